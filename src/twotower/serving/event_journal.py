"""Keep accepted events in memory by user, in sync with a persistent event store.

When `append` returns, the events are durable and `of` returns them. Events enter memory only through `catch_up`, so a restarted
server or another server sees the same events.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

from twotower.errors import BusyError
from twotower.retrieval.request import HistoryEvent
from twotower.serving.event_store import Event, EventStore
from twotower.utils.console import log

MAX_EVENTS_PER_USER = 1000  # latest events of a user kept in memory; the store keeps all


class Journal:
    """Accepted events in a store and, by user, in memory.

    Parameters
    ----------
    store
        Event store, read from the beginning.
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
        """Return the accepted events of a user, oldest first."""
        return self._events.get(user, ())

    def users(self) -> list[str]:
        """Return all users with accepted events, the newest user last."""
        return list(self._events)

    def append(self, groups: Sequence[Sequence[Event]]) -> list[int]:
        """Store the events of several requests with one write. Return the number of new events of each request."""
        with self._lock:
            new = iter(self._store.append([event for group in groups for event in group]))
        self.catch_up()
        return [sum(next(new) for _ in group) for group in groups]

    def catch_up(self) -> None:
        """Read the events that are in the store but not yet in memory."""
        with self._lock:
            while True:
                events, self._position = self._store.since(self._position)
                for event in events:
                    self._take(event)
                if not events:
                    return

    def close(self) -> None:
        """Stop the follower thread and close the store."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._store.close()

    def _take(self, event: Event) -> None:
        visits = self._events.get(event.user, ())
        at = bisect_right(visits, event.time_s, key=lambda history_event: history_event.time_s or 0)
        history_event = HistoryEvent(event.item_id, event.time_s, event.stars, event.event_type)
        # Replace the tuple instead of changing it: concurrent readers keep the complete old one.
        self._events[event.user] = (*visits[:at], history_event, *visits[at:])[-MAX_EVENTS_PER_USER:]

    def _follow(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                self.catch_up()
            except BusyError as error:
                log.warning("cannot read the events of other servers, retrying: %s", error)
                self._stop.wait(1.0)
            except Exception:  # log unexpected errors with a traceback and keep following
                log.exception("cannot read the events of other servers, retrying")
                self._stop.wait(1.0)
