"""Accepted events, by user, in memory: built from a store at the start, and kept up with it.

Promise: when `append` returns, the events are durable and part of what `of` gives. All ways into memory are one (`catch_up`),
so that what a restart, or another server, would see is what this one sees.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

from twotower.errors import BusyError
from twotower.retrieval.request import HistoryEvent
from twotower.serving.event_store import Event, EventStore
from twotower.utils.console import log

MAX_EVENTS_PER_USER = 1000  # of a user's events in memory, the latest; the store keeps all


class Journal:
    """Events in a store and, by user, in memory.

    Parameters
    ----------
    store
        Is read from the beginning.
    """

    def __init__(self, store: EventStore) -> None:
        self._store, self._position, self._lock = store, "", threading.Lock()
        self._events: dict[str, tuple[HistoryEvent, ...]] = {}
        self._stop = threading.Event()
        self.catch_up()
        self._thread: threading.Thread | None = None
        if store.follow_s is not None:
            self._thread = threading.Thread(target=self._follow, args=(store.follow_s,), name="follow", daemon=True)
            self._thread.start()

    def of(self, user: str) -> tuple[HistoryEvent, ...]:
        """The user's accepted events, oldest first."""
        return self._events.get(user, ())

    def users(self) -> list[str]:
        """Everybody with accepted events, who came last at the end."""
        return list(self._events)

    def append(self, groups: Sequence[Sequence[Event]]) -> list[int]:
        """Keep the events of several requests by one write; of each request, how many were new."""
        with self._lock:
            new = iter(self._store.append([event for group in groups for event in group]))
        self.catch_up()
        return [sum(next(new) for _ in group) for group in groups]

    def catch_up(self) -> None:
        """Take in what the store has and memory has not."""
        with self._lock:
            while True:
                events, self._position = self._store.since(self._position)
                for event in events:
                    self._take(event)
                if not events:
                    return

    def close(self) -> None:
        """Stop following, and let go of the store."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._store.close()

    def _take(self, event: Event) -> None:
        visits = self._events.get(event.user, ())
        at = bisect_right(visits, event.time_s, key=lambda history_event: history_event.time_s or 0)
        history_event = HistoryEvent(event.item_id, event.time_s, event.stars, event.event_type)
        # A new tuple, never a changed one: whoever reads meanwhile has the old one whole.
        self._events[event.user] = (*visits[:at], history_event, *visits[at:])[-MAX_EVENTS_PER_USER:]

    def _follow(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                self.catch_up()
            except BusyError as error:
                log.warning("events of other servers wait: %s", error)
                self._stop.wait(1.0)
            except Exception:  # a defect of ours is told whole, and does not end the following
                log.exception("events of other servers wait")
                self._stop.wait(1.0)
