"""Test the contract of all event stores, and the specifics of each."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from twotower.errors import BusyError, ConfigError, DataError
from twotower.serving import event_store as module
from twotower.serving.event_journal import MAX_EVENTS_PER_USER, Journal
from twotower.serving.event_store import Event, EventStore, open_store

Opener = Callable[[], EventStore]


@pytest.fixture(params=["sqlite", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Return a function that opens the same store; all are closed at the end."""
    url = f"sqlite:{tmp_path / 'events.sqlite'}" if request.param == "sqlite" else request.getfixturevalue("redis_url")
    name = f"{{{uuid.uuid4().hex}}}"  # of one Redis every test has its own keys
    monkeypatch.setattr(module.RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
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
    found, position = [], ""
    while True:
        events, position = store.since(position)
        if not events:
            return found
        found += events


def test_events_come_back_whole_and_in_order(opener: Opener) -> None:
    store = opener()
    sent = [event("é\x00\n", stars=4.5, event_type="tip"), event("a"), event("b", user="ü 🍜", time_s=2**32)]
    assert store.append(sent[:1]) == [True] and store.append(sent[1:]) == [True, True] and store.append([]) == []
    assert all_of(store) == sent


def test_an_id_counts_once_in_one_request_and_over_many(opener: Opener) -> None:
    store = opener()
    assert store.append([event("a"), event("a", user="other"), event("b")]) == [True, False, True]
    assert store.append([event("b"), event("c")]) == [False, True]
    assert [one.event_id for one in all_of(store)] == ["a", "b", "c"]
    assert all_of(store)[0].user == "u", "the first of an id is the event"


def test_reading_goes_on_where_it_stopped(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    store = opener()
    store.append([event(str(i)) for i in range(5)])
    first, position = store.since("")
    assert [one.event_id for one in first] == ["0", "1"] and len(all_of(store)) == 5
    store.append([event("late")])
    assert [one.event_id for one in store.since(position)[0]] == ["2", "3"]
    assert store.since(store.since(store.since(position)[1])[1]) == ([], store.since(store.since(position)[1])[1])


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


def test_two_servers_of_one_redis_see_each_other_s_events(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.RedisStore, "_KEYS", ("{both}:events", "{both}:ids"))
    one, other = Journal(open_store(redis_url)), Journal(open_store(redis_url))
    try:
        assert one.append([[event("a")]]) == [1] and other.append([[event("a"), event("b", time_s=200)]]) == [1]
        other_sees = len(other.of("u"))
        one.catch_up()
        assert other_sees == len(one.of("u")) == 2
    finally:
        one.close()
        other.close()


def test_a_second_server_is_refused_the_file_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_WAIT_S", 0.05)
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


@pytest.mark.parametrize("url", ["", "sqlite:", "file.sqlite", "http://x"])
def test_an_address_of_nothing_known_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:PATH"):
        open_store(url)


def test_a_redis_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(DataError, match=r"redis://127\.0\.0\.1:1:") as refused:
        open_store("redis://:secret@127.0.0.1:1")
    assert "secret" not in str(refused.value)


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
        "import sys\nfrom twotower.serving.event_store import Event, open_store\nstore = open_store(sys.argv[1])\n"
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
