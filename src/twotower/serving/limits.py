"""What a server lets itself be asked: sizes, rates, times, and who may write."""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass

MAX_HISTORY_EVENTS = 1000  # visits in a request
MAX_K = 500
MAX_EXPLAINED_ITEMS = 100  # places in a request
MAX_BATCH_REQUESTS = 256  # requests in one
MAX_BATCH_ITEMS = 25_600  # of all its lists: 6 MB
MAX_EVENTS_PER_REQUEST = 1000  # events in a request
MAX_ID_CHARS = 256  # characters
MAX_FILTER_CHARS = 4000  # characters
MAX_FILTER_JSON_BYTES = 1 << 16  # bytes
LAST_S = 4_102_444_800  # the year 2100: what lies beyond is a mistake of units


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of a running server.

    Attributes
    ----------
    body_bytes
        Largest body of a request.
    queue_timeout_s
        An answer that has not begun by then is not given: whoever asked has gone.
    header_timeout_s
        The head of a request, from when the connection was opened or the head begun.
    request_s
        A whole request, the arrival of its body included.
    write_timeout_s
        Of an answer that waits to be read, 16 KiB must be in so many seconds.
    keep_alive_s
        A connection may rest between requests: longer than a balancer lets one rest, so that the balancer closes first.
    lookups
        Searches by name and the like that may be under way or wait.
    waiting
        Requests that may wait for the thread that computes.
    max_batch
        Requests computed at once.
    rate, burst
        Requests a second for each client, each of a batch being one, and how many it may save up; a rate of 0 asks nobody to wait.
    connections
        Open at once.
    """

    body_bytes: int = 2 * 2**20
    queue_timeout_s: float = 2.0
    header_timeout_s: float = 10.0
    request_s: float = 15.0
    write_timeout_s: float = 15.0
    keep_alive_s: int = 65
    lookups: int = 64
    waiting: int = 512
    max_batch: int = 32
    rate: float = 100.0
    burst: float = 200.0
    connections: int = 1024


class RateLimiter:
    """A bucket of `burst` requests for each client, filled at `rate` a second; each list of a batch is one.

    Memory is bounded: of more than `most_clients` the one longest unseen is forgotten, which costs it nothing.
    """

    def __init__(self, rate: float, burst: float, *, most_clients: int = 10_000) -> None:
        self.rate, self.burst, self.most_clients = rate, burst, most_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str, now: float | None = None) -> float:
        """Take one request from the client's bucket: 0, or the seconds after which there is one again."""
        left, now = self._left(client, now)
        wait = 0.0 if left >= 1 or self.rate <= 0 else (1 - left) / self.rate
        self._keep(client, left if wait else left - 1, now)
        return wait

    def charge(self, client: str, requests: int, now: float | None = None) -> None:
        """Take what a request that was let in asks for besides, whatever is left: who comes next waits for it."""
        left, now = self._left(client, now)
        self._keep(client, left - requests, now)

    def _left(self, client: str, now: float | None) -> tuple[float, float]:
        now = time.monotonic() if now is None else now
        left, then = self._buckets.pop(client, (self.burst, now))
        return min(self.burst, left + (now - then) * self.rate), now

    def _keep(self, client: str, left: float, now: float) -> None:
        if self.rate > 0:
            self._buckets[client] = (left, now)
        if len(self._buckets) > self.most_clients:
            self._buckets.popitem(last=False)


def is_key(given: str, key: str) -> bool:
    """Whether `given` is the key; how long it takes tells nothing of where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), key.encode())
