"""Test the contract of all event stores, and the specifics of each."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from twotower.errors import BusyError, ConfigError, DataError
from twotower.serving import redis_store, sqlite_store
from twotower.serving.event_journal import MAX_EVENTS_PER_USER, Journal
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event, EventStore

Opener = Callable[[], EventStore]


@pytest.fixture(params=["sqlite", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Return a function that opens the same store; all are closed at the end."""
    url = f"sqlite:{tmp_path / 'events.sqlite'}" if request.param == "sqlite" else request.getfixturevalue("redis_url")
    name = f"{{{uuid.uuid4().hex}}}"  # of one Redis every test has its own keys
    monkeypatch.setattr(redis_store.RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
    opened: list[EventStore] = []

    def open_it() -> EventStore:
        opened.append(open_store(url))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


def event(event_id: str, user: str = "u", time_s: int = 100, **more: Any) -> Event:
    return Event(event_id, user, "b_1", time_s, **more)


def all_of(store: EventStore) -> list[Event]:
    found: list[Event] = []
    position = ""
    while entries := store.since(position):
        found += [one for _, one in entries if one is not None]
        position = entries[-1][0]
    return found


def test_events_are_read_back_complete_and_in_order(opener: Opener) -> None:
    store = opener()
    sent = [event("é\x00\n", stars=4.5, event_type="tip"), event("a"), event("b", user="ü 🍜", time_s=2**32)]
    assert store.append(sent[:1]) == [True] and store.append(sent[1:]) == [True, True] and store.append([]) == []
    assert all_of(store) == sent


def test_an_id_of_a_user_counts_once_in_one_request_and_over_many(opener: Opener) -> None:
    store = opener()
    other = event("a", user="other")
    assert store.append([event("a"), other, event("a", time_s=7), event("b")]) == [True, True, False, True]
    assert store.append([event("b"), event("c"), other]) == [False, True, False]
    assert [(one.user, one.event_id) for one in all_of(store)] == [("u", "a"), ("other", "a"), ("u", "b"), ("u", "c")]
    assert all_of(store)[0].time_s == 100, "the first of an id is the event"
    alike = [
        event("bc", user="a"),
        event("c", user="ab"),
        event("", user="abc"),
        event("1:a", user="1:a"),
        event("a1:a", user="1:"),
    ]
    assert store.append(alike) == [True] * 5, "no two pairs are the same"


def test_reading_goes_on_where_it_stopped(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "PAGE", 2)
    monkeypatch.setattr(redis_store, "PAGE", 2)
    store = opener()
    store.append([event(str(i)) for i in range(5)])
    first = store.since("")
    assert [one.event_id for _, one in first if one] == ["0", "1"] and len(all_of(store)) == 5
    store.append([event("late")])
    assert [one.event_id for _, one in store.since(first[1][0]) if one] == ["2", "3"]
    last = store.since(store.since(first[1][0])[1][0])[1][0]
    assert store.since(last) == store.since(last) == []


def test_what_was_kept_is_there_when_opened_again(opener: Opener) -> None:
    store = opener()
    store.append([event("a"), event("b")])
    store.close()
    again = opener()
    assert [one.event_id for one in all_of(again)] == ["a", "b"] and again.append([event("a")]) == [False]


def test_a_journal_has_each_user_s_events_by_time_and_the_latest_of_many(opener: Opener) -> None:
    store = opener()
    store.append([event("before", time_s=50)])
    journal = Journal(store)
    assert journal.append([[event("c", time_s=30)], [event("a", time_s=10), event("a"), event("x", user="v")], []]) == [1, 2, 0]
    assert [visit.time_s for visit in journal.of("u")] == [10, 30, 50] and len(journal.of("v")) == 1 and journal.of("w") == ()
    journal.append([[event(f"n{i}", user="often", time_s=i) for i in range(MAX_EVENTS_PER_USER + 5)]])
    assert [visit.time_s for visit in journal.of("often")] == list(range(5, MAX_EVENTS_PER_USER + 5))
    journal.close()


@pytest.fixture
def redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a client of Redis; stores have keys of this test only."""
    import redis as library

    name = f"{{{uuid.uuid4().hex}}}"
    monkeypatch.setattr(redis_store.RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
    client = library.Redis.from_url(redis_url, decode_responses=True)
    yield client
    client.close()


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.usefixtures("redis")
def test_two_servers_of_one_redis_see_each_other_s_events(redis_url: str) -> None:
    one, other = Journal(open_store(redis_url)), Journal(open_store(redis_url))
    try:
        assert one.append([[event("a")]]) == [1] and other.append([[event("a"), event("b", time_s=200)]]) == [1]
        other_sees = len(other.of("u"))
        one.catch_up()
        assert other_sees == len(one.of("u")) == 2
    finally:
        one.close()
        other.close()


STRANGE_ENTRIES: list[dict[str, str]] = [
    {"v": "2", "event": json.dumps({"event_id": "x", "user": "u", "item_id": "b", "time_s": 1, "kind": "of a later server"})},
    {"v": "one", "event": "{}"},
    {"event": "{}"},
    {"v": "1"},
    {"v": "1", "event": "not JSON"},
    {"v": "1", "event": "[]"},
    {"v": "1", "event": "null"},
    {"v": "1", "event": "[" * 100_000},
    {"v": "1", "event": json.dumps({"event_id": "x", "user": "u", "item_id": "b"})},
    {"v": "1", "event": json.dumps({"event_id": 5, "user": "u", "item_id": "b", "time_s": 1})},
    {"v": "1", "event": json.dumps({"event_id": "x", "user": None, "item_id": "b", "time_s": 1})},
    {"v": "1", "event": json.dumps({"event_id": "x", "user": "u", "item_id": "b", "time_s": "1"})},
    {"v": "1", "event": json.dumps({"event_id": "x", "user": "u", "item_id": "b", "time_s": True})},
    {"v": "1", "event": json.dumps({"event_id": "x", "user": "u", "item_id": "b", "time_s": -1})},
    {"v": "1", "event": json.dumps({"event_id": "x", "user": "u", "item_id": "b", "time_s": 1, "stars": "five"})},
    {"v": "1", "event": json.dumps({"event_id": "x", "user": "u", "item_id": "b", "time_s": 1, "event_type": {}})},
    {"v": "1", "event": json.dumps({"event_id": "x", "user": "u", "item_id": "b", "time_s": 4_102_444_800})},
    {"something": "else"},
]


def test_entries_that_cannot_be_read_are_skipped_and_counted(redis: Any, redis_url: str) -> None:
    skipped: list[int] = []
    following = Journal(open_store(redis_url), skipped.append)
    try:
        key, _ = redis_store.RedisStore._KEYS
        known = {"event_id": "y", "user": "u", "item_id": "b", "time_s": 5, "of_a_later_server": {"a": [1]}}
        for entry in STRANGE_ENTRIES:
            redis.xadd(key, entry)
        redis.xadd(key, {"v": "1", "event": json.dumps(known), "another": "field"})
        until(lambda: following.of("u"))
        assert [one.time_s for one in following.of("u")] == [5] and sum(skipped) == len(STRANGE_ENTRIES)
        assert following.append([[event("after")]]) == [1] and len(following.of("u")) == 2
        fresh = Journal(open_store(redis_url))
        assert fresh.of("u") == following.of("u")
        fresh.close()
    finally:
        following.close()


@pytest.mark.usefixtures("redis")
def test_rolling_upgrades_between_two_entry_formats_lose_nothing(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = 0
    for upgrade in range(100):
        for version in (1, 2):  # an old and a new server, each reading what both write
            monkeypatch.setattr(redis_store, "ENTRY_VERSION", version)
            store = open_store(redis_url)
            store.append([event(f"{upgrade}-{version}", time_s=sent)])
            sent += 1
            store.close()
    monkeypatch.setattr(redis_store, "ENTRY_VERSION", 1)
    old = Journal(open_store(redis_url))
    assert [one.time_s for one in old.of("u")] == list(range(0, sent, 2))
    old.close()
    monkeypatch.setattr(redis_store, "ENTRY_VERSION", 2)
    new = Journal(open_store(redis_url))
    assert [one.time_s for one in new.of("u")] == list(range(sent))
    new.close()


@pytest.mark.parametrize("how", ["emptied", "copy without the last entries", "trimmed"])
def test_a_store_that_lost_entries_is_read_again(redis: Any, redis_url: str, how: str) -> None:
    key, ids = redis_store.RedisStore._KEYS
    for number in range(4):
        redis.xadd(key, {"v": "1", "event": json.dumps(asdict(event(str(number), time_s=number)))}, id=f"999999999999{number}-0")
    journal = Journal(open_store(redis_url))
    try:
        assert [one.time_s for one in journal.of("u")] == [0, 1, 2, 3]
        if how == "emptied":
            redis.delete(key, ids)
            kept = []
        elif how == "trimmed":
            redis.xtrim(key, maxlen=0)
            kept = []
        else:  # as after a failover: the copy goes on with ids below the last one that was read
            held = redis.xrange(key, count=2)
            redis.delete(key)
            for at, fields in held:
                redis.xadd(key, fields, id=at)
            kept = [0, 1]
        lowest = "9999999999991-5" if how.startswith("copy") else "5-0" if how == "emptied" else "*"
        redis.xadd(key, {"v": "1", "event": json.dumps(asdict(event("new", time_s=50)))}, id=lowest)
        until(lambda: [one.time_s for one in journal.of("u")] == [*kept, 50])
    finally:
        journal.close()


def test_a_failing_store_is_reported_and_recovers(redis_url: str, redis: Any) -> None:
    journal = Journal(open_store(redis_url))
    try:
        assert journal.state == "ok"
        key, _ = redis_store.RedisStore._KEYS
        journal.append([[event("a")]])
        redis.rename(key, f"{key}-kept")
        redis.set(key, "of another type")
        until(lambda: "does not respond" in journal.state)
        with pytest.raises(BusyError):
            journal.append([[event("b")]])
        redis.rename(f"{key}-kept", key)
        until(lambda: journal.state == "ok")
        assert len(journal.of("u")) == 1 and journal.append([[event("c")]]) == [1]
    finally:
        journal.close()


def test_the_file_of_events_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.touch(0o644)
    for _ in range(2):
        store = open_store(f"sqlite:{path}")
        store.append([event(str(n)) for n in range(100)])
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
        assert len(list(tmp_path.iterdir())) >= 2, "the log beside it, too"
        store.close()
    with pytest.raises(DataError, match="Choose a writable path"):
        open_store(f"sqlite:{tmp_path / 'no' / 'such' / 'folder'}")


def test_a_second_server_is_refused_the_file_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "_LOCK_WAIT_S", 0.05)
    store = open_store(f"sqlite:{tmp_path / 'e'}")
    with pytest.raises(DataError, match="used by another server"):
        open_store(f"sqlite:{tmp_path / 'e'}")
    store.close()
    open_store(f"sqlite:{tmp_path / 'e'}").close()


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be looked at" * 100, None])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "e"
    if content is not None:
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE events (what TEXT)")
        other.close()
    before = path.read_bytes()
    with pytest.raises(DataError, match="as event store"):
        open_store(f"sqlite:{path}")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize(
    "url", ["", "sqlite:", "file.sqlite", "http://x", "redis:/:secret@host", ":secret@host", "redis//:secret@x"]
)
def test_an_address_of_nothing_known_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:PATH") as refused:
        open_store(url)
    assert "secret" not in str(refused.value)


def test_a_redis_that_is_not_there_is_named_without_its_password() -> None:
    for url in ("redis://:secret@127.0.0.1:1", "redis://127.0.0.1:1?password=secret", "redis://u:a@secret@127.0.0.1:1"):
        with pytest.raises(DataError, match=r"redis://127\.0\.0\.1:1:") as refused:
            open_store(url)
        assert "secret" not in str(refused.value)
    for url in ("redis://:secret/x@127.0.0.1:6379", "redis://127.0.0.1:secret", "redis://user:secret", "redis://:secret@[::1"):
        with pytest.raises(ConfigError, match="is not valid") as wrong:
            open_store(url)
        assert "secret" not in str(wrong.value)


def test_a_full_disk_refuses_the_events_and_takes_them_later(tmp_path: Path) -> None:
    store: Any = open_store(f"sqlite:{tmp_path / 'e'}")
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(BusyError, match="cannot write to the event file"):
        store.append([event(str(i), user="x" * 200) for i in range(200)])
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert store.append([event(str(i)) for i in range(200)]) == [True] * 200
    assert len(all_of(store)) == 200
    store.close()


def test_nothing_acknowledged_goes_with_a_killed_process(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom twotower.serving.event_types import Event\n"
        "from twotower.serving.event_store import open_store\nstore = open_store(sys.argv[1])\n"
        "for i in range(10**6):\n    store.append([Event(str(i), 'u', 'b', i)])\n    print(i, flush=True)\n"
    )
    url = f"sqlite:{tmp_path / 'e'}"
    with subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(50)]
        writer.kill()
        said += writer.stdout.readlines()
    store = open_store(url)
    acknowledged = {line.strip() for line in said if line.endswith("\n")}
    assert len(acknowledged) >= 50 and acknowledged <= {one.event_id for one in all_of(store)}
    store.close()
