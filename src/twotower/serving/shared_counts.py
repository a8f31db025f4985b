"""Numbers that the processes of one server share, in memory that all of them map.

Each number has one writer, so none is locked: a worker writes the row of its seat, the supervisor writes the rest.
"""

from __future__ import annotations

import mmap
import time

import numpy as np

from twotower.utils.types import Int

ANNOUNCED, READY, PUBLISHED = range(3)  # columns of a row
STATES = {"stopping": 0, "workers": 1}


class SharedCounts:
    """Counts of one server; created before its workers, which inherit it.

    Parameters
    ----------
    seats
        Number of workers that can exist at once.

    Examples
    --------
    >>> counts = SharedCounts(2)
    >>> news = counts.news(0)
    >>> news.tell()
    >>> counts.news(1).latest()
    1
    """

    def __init__(self, seats: int) -> None:
        self._memory = mmap.mmap(-1, 8 * (seats * 3 + len(STATES)))
        numbers = np.frombuffer(self._memory, np.int64)
        self._rows: Int = numbers[: seats * 3].reshape(seats, 3)
        self._states: Int = numbers[seats * 3 :]

    def news(self, seat: int) -> SharedNews:
        """Return the news of new events, as a seat tells and hears them."""
        return SharedNews(self._rows, seat)

    def get(self, state: str) -> int:
        """Return a number of the whole server."""
        return int(self._states[STATES[state]])

    def set(self, state: str, value: int) -> None:
        """Set a number of the whole server."""
        self._states[STATES[state]] = value

    def set_ready(self, seat: int, *, ready: bool) -> None:
        """Note whether the worker of a seat answers requests."""
        self._rows[seat, READY] = ready

    @property
    def ready(self) -> int:
        """Return the number of workers that answer requests."""
        return int(self._rows[:, READY].sum())

    def published(self, seat: int) -> int:
        """Return when a seat has last published its metrics, in nanoseconds of the monotonic clock; 0: never."""
        return int(self._rows[seat, PUBLISHED])

    def publish(self, seat: int) -> None:
        """Note that a seat has published its metrics."""
        self._rows[seat, PUBLISHED] = time.monotonic_ns()

    def seats(self) -> list[int]:
        """Return the seats whose worker answers requests."""
        return np.flatnonzero(self._rows[:, READY]).tolist()


class SharedNews:
    """See `event_journal.News`."""

    def __init__(self, rows: Int, seat: int) -> None:
        self._column, self._seat = rows[:, ANNOUNCED], seat

    def tell(self) -> None:
        """Count new entries."""
        self._column[self._seat] += 1

    def latest(self) -> int:
        """Return a number that is another one after every `tell`."""
        return int(self._column.sum())
