"""Limit how many requests a client may send, counted by all processes of a server together."""

from __future__ import annotations

import fcntl
import mmap
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

WAYS = 8  # places that a client can have in the table
BYTES = 16  # of a place: a key and a time


class RateLimiter:
    """Token bucket of `burst` requests for each client, refilled at `rate` per second; a rate of 0 limits nothing.

    The table of the buckets is in memory that forked processes share, so a client has one rate however many workers answer it. A
    bucket is one number: the time at which it is full again. Memory is bounded: a new client takes the place of a client with a
    fuller bucket. A process locks the places among which it looks; the lock of a process that dies is released. Threads of one
    process have to take turns.

    Parameters
    ----------
    most_clients
        Number of clients in the table, at least 8.

    Examples
    --------
    >>> limiter = RateLimiter(rate=2, burst=1)
    >>> limiter.wait_s("203.0.113.7", now=10.0), limiter.wait_s("203.0.113.7", now=10.1)
    (0.0, 0.4)
    """

    def __init__(self, rate: float, burst: float, *, most_clients: int = 2**14) -> None:
        self.rate, self.burst, self._sets = rate, burst, max(1, most_clients // WAYS)
        memory = memoryview(mmap.mmap(-1, BYTES * WAYS * self._sets))
        self._keys, self._full_s = memory[: len(memory) // 2].cast("q"), memory[len(memory) // 2 :].cast("d")
        locks = tempfile.TemporaryFile()  # noqa: SIM115 - empty: of each set of places, a byte beyond its end is locked
        self._locks = locks.fileno()
        weakref.finalize(self, locks.close)

    def wait_s(self, client: str, cost: float = 1.0, now: float | None = None) -> float:
        """Take a request from the client's bucket. Return 0, or the seconds to wait if the bucket is empty.

        A request that costs more than is left is taken as long as one request is left: later ones then wait.
        """
        if self.rate <= 0:
            return 0.0
        with self._place(client) as place:
            now = time.monotonic() if now is None else now
            left = self.burst - max(0.0, self._full_s[place] - now) * self.rate
            if left < 1:
                return round((1 - left) / self.rate, 9)
            self._take(place, cost, now)
        return 0.0

    def charge(self, client: str, requests: float, now: float | None = None) -> None:
        """Take the further requests of an accepted batch. The bucket may become negative; later requests then wait."""
        if self.rate > 0:
            with self._place(client) as place:
                self._take(place, requests, time.monotonic() if now is None else now)

    def _take(self, place: int, cost: float, now: float) -> None:
        self._full_s[place] = max(self._full_s[place], now) + cost / self.rate

    @contextmanager
    def _place(self, client: str) -> Iterator[int]:
        """Hold the bucket of a client, by its index; a new client gets a full one."""
        key = hash(client) | 1  # random for each server, the same in all of its processes; 0 is a free place
        number = (key >> 1) % self._sets
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, number)
        try:
            first = number * WAYS
            keys = self._keys[first : first + WAYS].tolist()
            if key in keys:
                place = first + keys.index(key)
            else:
                fuller = min(range(WAYS), key=self._full_s[first : first + WAYS].__getitem__)
                place = first + (keys.index(0) if 0 in keys else fuller)
                self._keys[place], self._full_s[place] = key, 0.0
            yield place
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, number)
