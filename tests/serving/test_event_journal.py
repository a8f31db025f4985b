"""Test the events that a journal has in memory: complete, ordered by time, then by arrival, also while its store fails."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from twotower.errors import BusyError
from twotower.retrieval.request import HistoryEvent
from twotower.serving import event_journal as module
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Entry, Event, PositionLost
from twotower.serving.shared_counts import SharedCounts
from twotower.utils.console import log


class MemoryStore:
    """A store in memory, which fails with the errors of `faults`, one a call."""

    def __init__(self, follow_s: float | None = None, entries: list[Entry] | None = None) -> None:
        self.follow_s, self.entries = follow_s, [] if entries is None else entries
        self.faults: list[Exception] = []
        self.reads = self.tidied = 0

    def append(self, events: Sequence[Event]) -> list[bool]:
        self._fail()
        self.entries += [(f"{len(self.entries) + n}-{event.event_id}", event) for n, event in enumerate(events)]
        return [True] * len(events)

    def since(self, position: str) -> list[Entry]:
        self._fail()
        self.reads += 1
        if not position:
            return list(self.entries)
        positions = [number for number, (one, _) in enumerate(self.entries) if one == position]
        if not positions:
            raise PositionLost
        return self.entries[positions[0] + 1 :]

    def tidy(self) -> bool:
        self.tidied += 1
        return True

    def close(self) -> None:
        pass

    def _fail(self) -> None:
        if self.faults:
            raise self.faults.pop(0)


def event(event_id: str, user: str = "u") -> Event:
    return Event(event_id, user, event_id, 1)


def items_of(journal: Journal, user: str = "u") -> list[str]:
    return [one.item_id for one in journal.of(user)]


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    caplog.set_level(logging.WARNING, logger=log.name)
    return caplog


def test_events_are_complete_and_in_order(tmp_path: Path) -> None:
    journal = Journal(open_store(f"sqlite:{tmp_path / 'events.sqlite'}"))
    sent = [("first", 0, 4.5, "tip"), ("later", 9, None, None), ("second", 0, None, "review"), ("middle", 1, 1.0, None)]
    groups = [
        [Event(event_id=item, user="u", item_id=item, time_s=at, event_type=kind, stars=stars)] for item, at, stars, kind in sent
    ]
    assert journal.append(groups) == [1, 1, 1, 1]
    assert list(journal.of("u")) == [
        HistoryEvent("first", 0, 4.5, "tip"),
        HistoryEvent("second", 0, None, "review"),
        HistoryEvent("middle", 1, 1.0, None),
        HistoryEvent("later", 9, None, None),
    ]
    assert journal.users() == ["u"]
    journal.close()


def test_entries_that_cannot_be_used_are_counted(logged: pytest.LogCaptureFixture) -> None:
    skipped: list[int] = []
    store = MemoryStore(entries=[("1", event("a")), ("2", None), ("3", Event("b", "u", "b", 2**40)), ("4", event("c"))])
    journal = Journal(store, skipped.append)
    assert items_of(journal) == ["a", "c"] and skipped == [2] and journal.state == "ok"
    assert "skipped 2 entries of the event store" in logged.text


def test_a_thread_that_reads_other_servers_goes_on_after_errors(logged: pytest.LogCaptureFixture) -> None:
    store = MemoryStore(follow_s=0.01)
    journal = Journal(store)
    (follower,) = [one for one in threading.enumerate() if one.name == "follow" and one is journal._thread]
    assert follower.daemon, "it must not keep the process alive"
    cause = BusyError("gone for a moment")
    cause.__cause__ = OSError("connection refused by an address")
    store.faults += [cause, ValueError("a fault of ours")]
    until(lambda: not store.faults and store.tidied)
    store.entries.append(("1", event("a")))
    until(lambda: items_of(journal) == ["a"])
    assert journal.state == "ok"
    text = "cannot read the events of other servers, retrying"
    (first, second) = [record for record in logged.records if record.getMessage().startswith(text)]
    assert first.getMessage() == f"{text}: connection refused by an address" and first.exc_info is None
    assert second.exc_info is not None and "a fault of ours" in str(second.exc_info[1])
    journal.close()
    assert journal.closing and not follower.is_alive()


def test_a_store_that_fails_while_all_is_read_again_doubles_nothing() -> None:
    store = MemoryStore(entries=[("1", event("a")), ("2", event("b"))])
    journal = Journal(store)
    before = journal.log()
    store.entries = [("3", event("a")), ("4", event("c"))]
    store.since("")  # both calls of `catch_up` reach the store
    real = store.since
    calls = iter([real, lambda _: (_ for _ in ()).throw(BusyError("gone"))])
    store.since = lambda position: next(calls)(position)  # type: ignore[method-assign]
    with pytest.raises(BusyError, match="gone"):
        journal.catch_up()
    assert journal.state == "gone" and items_of(journal) == ["a", "b"] and journal.log() is before
    store.since = real  # type: ignore[method-assign]
    journal.catch_up()
    assert items_of(journal) == ["a", "c"] and [one.item_id for _, one in journal.log()] == ["a", "c"] and journal.state == "ok"


def test_a_process_hears_of_the_events_of_another(logged: pytest.LogCaptureFixture) -> None:
    counts, entries = SharedCounts(2), list[Entry]()
    stores = [MemoryStore(entries=entries), MemoryStore(entries=entries)]
    writer, reader = (Journal(store, news=counts.news(seat), follow=False) for seat, store in enumerate(stores))
    assert writer.append([[event("a")]]) == [1]
    assert items_of(reader) == ["a"] and reader.users() == ["u"]
    read = stores[1].reads
    assert items_of(reader) == ["a"] and stores[1].reads == read, "without news nothing is read"
    writer.append([[event("b")]])
    stores[1].faults.append(BusyError("gone for a moment"))
    assert items_of(reader) == ["a"] and "cannot read the events of other workers, retrying: gone for a moment" in logged.text
    assert items_of(reader) == ["a", "b"], "the next call reads again"


def test_a_copy_of_the_process_leaves_the_first_store_open() -> None:
    """Closing it would release the locks of the file, those of the new store included."""
    store = MemoryStore()
    alive = weakref.ref(store)
    journal = Journal(store, follow=False)
    journal.in_another_process(MemoryStore(entries=[("1", event("a"))]), SharedCounts(1).news(0))
    del store
    gc.collect()
    assert alive() is not None and items_of(journal) == ["a"]


def test_a_store_is_closed_after_the_calls_that_use_it() -> None:
    """A SQLite connection that is closed inside a call of another thread ends the process."""
    entered, leave, done = threading.Event(), threading.Event(), list[str]()

    class Slow(MemoryStore):
        def expire(self, *_: int | None) -> int:
            entered.set()
            assert leave.wait(10)
            done.append("expired")
            return 0

        def close(self) -> None:
            done.append("closed")

    journal = Journal(Slow(), follow=False)
    expiring, closing = (threading.Thread(target=one) for one in (lambda: journal.expire(1, 1), journal.close))
    expiring.start()
    assert entered.wait(10)
    closing.start()
    closing.join(0.2)
    assert not done
    leave.set()
    expiring.join(10)
    closing.join(10)
    assert done == ["expired", "closed"]
    with pytest.raises(BusyError, match="the server is stopping"):
        journal.expire(1, 1)
