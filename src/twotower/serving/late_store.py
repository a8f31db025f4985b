"""Let a worker serve while its event store cannot be opened, such as a file that has become read-only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from twotower.bundle.changed_items import ItemChange
from twotower.errors import BusyError, DataError
from twotower.serving.event_types import Entry, Event, EventStore, LoggedAnswer
from twotower.utils.console import log

AGAIN_S = 1.0  # between two attempts to open the store
_CLOSED = "The event store cannot be opened; the log of the server has the reason. Try again later."


def opened_or_late(opener: Callable[[], EventStore], follow_s: float | None) -> EventStore:
    """Return the store of `opener`; if it cannot be opened, one that raises a `BusyError` until it can.

    Parameters
    ----------
    follow_s
        See `EventStore.follow_s`.
    """
    try:
        return opener()
    except DataError as error:
        log.error("events are refused: %s", error)
        return LateStore(opener, follow_s, str(error))


class LateStore:
    """An event store that is opened when it is possible; see `EventStore` for its methods."""

    def __init__(self, opener: Callable[[], EventStore], follow_s: float | None, reason: str) -> None:
        self._opener, self._follow_s, self._reason = opener, follow_s, reason
        self._store: EventStore | None = None
        self._next_s = time.monotonic() + AGAIN_S

    @property
    def follow_s(self) -> float | None:
        """See `EventStore`."""
        return self._follow_s

    def _opened(self) -> EventStore:
        if self._store is not None:
            return self._store
        if time.monotonic() < self._next_s:
            raise BusyError(_CLOSED)
        self._next_s = time.monotonic() + AGAIN_S
        try:
            self._store = self._opener()
        except DataError as error:
            if str(error) != self._reason:
                log.error("events are refused: %s", error)
            self._reason = str(error)
            raise BusyError(_CLOSED) from None
        log.info("the event store is open again")
        return self._store

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See `EventStore`."""
        return self._opened().append(events)

    def since(self, position: str) -> list[Entry]:
        """See `EventStore`."""
        return self._opened().since(position)

    def log_answers(self, answers: Sequence[LoggedAnswer]) -> list[bool]:
        """See `EventStore`."""
        return self._opened().log_answers(answers)

    def answers_of(self, request_ids: Sequence[str]) -> list[LoggedAnswer]:
        """See `EventStore`."""
        return self._opened().answers_of(request_ids)

    def answers(self, position: str) -> tuple[str, list[LoggedAnswer]]:
        """See `EventStore`."""
        return self._opened().answers(position)

    def forget(self, user: str) -> int:
        """See `EventStore`."""
        return self._opened().forget(user)

    def change_items(self, changes: Mapping[str, ItemChange], reset: Sequence[str]) -> int:
        """See `EventStore`."""
        return self._opened().change_items(changes, reset)

    def item_changes(self, known: int) -> tuple[int, dict[str, ItemChange]] | None:
        """See `EventStore`."""
        return self._opened().item_changes(known)

    def expire(self, events_before_s: int | None, answers_before_s: int | None) -> int:
        """See `EventStore`."""
        return self._opened().expire(events_before_s, answers_before_s)

    def tidy(self) -> bool:
        """See `EventStore`."""
        return self._store is None or self._store.tidy()

    def backup(self, path: Path) -> None:
        """See `EventStore`."""
        self._opened().backup(path)

    def close(self) -> None:
        """See `EventStore`."""
        if self._store is not None:
            self._store.close()
