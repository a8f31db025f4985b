"""Test what event stores hold beside events, for SQLite and Redis: logged answers, events of lists, forgotten users, retention."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twotower.errors import ConfigError, DataError
from twotower.serving import redis_deletion, redis_store, sqlite_store
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import open_store
from twotower.serving.event_types import (
    Event,
    EventStore,
    Forgotten,
    LoggedAnswer,
    PositionLost,
    digest_of,
)
from twotower.serving.stored_rows import every_answer, every_event
from twotower.utils.atomic_files import atomic_file

Opener = Callable[..., EventStore]
ANSWER = LoggedAnswer("r1", 1_000, "v1", "u", ["a", "b"], [0.9, 0.1], '{"k":2}')


@pytest.fixture(params=["sqlite", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Return a function that opens the same store; all are closed at the end."""
    url = f"sqlite:{tmp_path / 'events.sqlite'}" if request.param == "sqlite" else request.getfixturevalue("redis_url")
    name = f"{{{uuid.uuid4().hex}}}"  # of one Redis every test has its own keys
    monkeypatch.setattr(redis_store.RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
    monkeypatch.setattr(redis_deletion, "COPY_PAGE", 3)
    for module in (redis_store, sqlite_store):
        monkeypatch.setattr(module, "ANSWERS_PAGE", 2)
    opened: list[EventStore] = []

    def open_it(**options: Any) -> EventStore:
        opened.append(open_store(url, **options))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


def event(event_id: str, user: str = "u", **more: Any) -> Event:
    return Event(event_id, user, "b_1", 100, **more)


def events_of(store: EventStore) -> list[Event]:
    return [one for page in every_event(store) for one in page]


def test_an_item_has_each_type_once_in_a_list(opener: Opener) -> None:
    store = opener()
    shown = event("1", event_type="impression", request_id="r", position=1, version="v")
    sent = [shown, replace(shown, event_id="2"), replace(shown, event_id="3", event_type="buy")]
    sent += [replace(shown, event_id="4", item_id="b_2"), replace(shown, event_id="5", request_id="s"), event("6"), event("7")]
    assert store.append(sent) == [True, False, True, True, True, True, True]
    assert store.append(sent[1:2]) == [False] and events_of(store) == [*sent[:1], *sent[2:]]


def test_answers_are_found_by_their_id_and_the_first_is_kept(opener: Opener) -> None:
    store = opener()
    others = [replace(ANSWER, request_id=f"r{n}", user=None, time_s=1_000 + n) for n in range(2, 6)]
    assert store.log_answers([ANSWER, *others]) == [True] * 5
    assert store.log_answers([replace(ANSWER, items=["c"]), replace(ANSWER, request_id="r9", time_s=9_000)]) == [False, True]
    others.append(replace(ANSWER, request_id="r9", time_s=9_000))
    assert store.answers_of(["r1"]) == [ANSWER] and store.answers_of(["none", "r3"]) == [others[1]] and store.answers_of([]) == []
    assert list(every_answer(opener(reading=True))) == [ANSWER, *others]
    position, first = store.answers("")
    assert first == [ANSWER, others[0]] and store.answers(position)[1] == others[1:3]


def test_everything_about_a_user_goes_and_the_rest_stays_in_order(opener: Opener) -> None:
    store = opener()
    users = ["u", "other", "u", "third", "other", "ü 🍜", "u", "third"]
    store.append([event(f"e{n}", user) for n, user in enumerate(users)])
    store.log_answers([ANSWER, replace(ANSWER, request_id="r2", user="other"), replace(ANSWER, request_id="r3", user=None)])
    last = store.since("")[-1][0]
    assert store.forget("u") == 3
    assert [one.user for one in events_of(store)] == [user for user in users if user != "u"]
    assert [one.request_id for one in every_answer(store)] == ["r2", "r3"]
    try:
        assert [entry for _, entry in store.since(last)] == [Forgotten(digest_of("u"))]
    except PositionLost:
        raise AssertionError("the last entry was another user's") from None
    assert store.append([event("e0"), event("e1", "other")]) == [True, False], "the ids of a forgotten user are free again"
    assert store.forget("ü 🍜") == 1 and store.forget("nobody") == 0
    assert [one.user for one in events_of(store)] == ["other", "third", "other", "third", "u"]


def test_a_store_of_one_user_alone_is_emptied(opener: Opener) -> None:
    store = opener()
    store.append([event(str(n)) for n in range(7)])
    assert store.forget("u") == 7 and events_of(store) == []
    assert store.append([event("1")]) == [True] and len(events_of(store)) == 1


def test_journals_of_other_servers_forget_too(opener: Opener) -> None:
    one = Journal(opener(), follow=False)
    other = Journal(opener(shared=True) if one._store.follow_s is None else opener(), follow=False)
    try:
        one.append([[event("1"), event("2", "v"), event("3", request_id="r", version="w", event_type="buy")]])
        other.catch_up()
        log = other.log()
        assert len(other.of("u")) == 2 and not other.is_forgotten("u") and other.outcomes().summary(bool)
        assert one.forget("u") == 2
        other.catch_up()
        for journal in (one, other):
            assert (
                journal.of("u") == () and journal.users() == ["v"] and journal.is_forgotten("u") and not journal.is_forgotten("v")
            )
            assert journal.outcomes().summary(bool).get("w") is None or journal.outcomes().summary(bool)["w"].lists == 0
        assert other.log() is not log and [user for user, _ in other.log()] == ["v"]
        one.append([[event("4")]])
        other.catch_up()
        assert len(other.of("u")) == 1, "who comes back has a new history"
    finally:
        one.close()
        other.close()


def test_what_is_old_is_deleted(opener: Opener) -> None:
    store = opener()
    store.append([event("1")])
    store.log_answers([ANSWER, replace(ANSWER, request_id="r2", time_s=2_000)])
    assert store.expire(None, 1_500) == 0
    assert [one.request_id for one in every_answer(store)] == ["r2"] and len(events_of(store)) == 1
    assert store.expire(5_000_000_000, None) == 1 and events_of(store) == []
    assert len(list(every_answer(store))) == 1
    store.log_answers([replace(ANSWER, request_id="r2", time_s=9_000)])
    store.expire(None, 2_001)
    assert list(every_answer(store)) == [], "the first time of an answer counts"


def test_the_ids_of_deleted_events_are_free_again(opener: Opener) -> None:
    store = opener()
    sent = [event("1"), event("2", event_type="buy", request_id="r"), event("3", "other"), event("4"), event("5")]
    assert store.append(sent) == [True] * 5
    assert store.expire(5_000_000_000, None) == 5 and events_of(store) == []
    assert store.append(sent) == [True] * 5 and store.append(sent) == [False] * 5
    store.expire(5_000_000_000, None)
    assert store.forget("u") == 0 and store.append(sent) == [True] * 5, "events that retention has deleted before"
    assert store.forget("u") == 4 and store.append(sent) == [True, True, False, True, True]


def test_a_store_can_be_read_while_a_server_uses_it(opener: Opener, tmp_path: Path) -> None:
    store = opener()
    store.append([event("1")])
    reading = opener(reading=True)
    store.append([event("2")])
    assert len(events_of(reading)) == 2
    if store.follow_s is None:
        reading.backup(tmp_path / "copy")
        copy = open_store(f"sqlite:{tmp_path / 'copy'}", reading=True)
        assert events_of(copy) == events_of(store)
        copy.close()
    else:
        with pytest.raises(ConfigError, match="BGSAVE"):
            reading.backup(tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("options", [{"reading": True}, {"create": False}])
def test_reading_and_forgetting_make_no_store(tmp_path: Path, options: dict[str, bool]) -> None:
    with pytest.raises(DataError, match="No event store at"):
        open_store(f"sqlite:{tmp_path / 'none'}", **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="Cannot use"):
        open_store(f"sqlite:{tmp_path / 'empty'}", **options)
    assert (tmp_path / "empty").stat().st_size == 0


def test_a_backup_replaces_what_a_killed_one_left(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path / 'events.sqlite'}")
    store.append([event("1")])
    out = tmp_path / "out" / "copy"
    out.parent.mkdir()
    with atomic_file(out) as beside:
        beside.touch()
    left = [beside.with_name(beside.name + end) for end in ("", "-journal", "-wal", "-shm")]
    for file in left:
        file.write_bytes(b"half of a backup")
    store.backup(out)
    copy = open_store(f"sqlite:{out}", reading=True)
    assert events_of(copy) == events_of(store) and out.stat().st_mode & 0o777 == 0o600
    copy.close()
    assert [file.name for file in out.parent.iterdir()] == ["copy"]
    with pytest.raises(DataError, match=r"Cannot write the backup .*copy: .*Choose a writable path with enough space"):
        store.backup(out / "copy")
    store.close()
