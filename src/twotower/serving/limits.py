"""Define the limits of a server (sizes, rates, timeouts), the rate limiter and the key check."""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass

MAX_HISTORY_EVENTS = 1000  # history events in a request
MAX_K = 500
MAX_EXPLAINED_ITEMS = 100  # items in a request
MAX_BATCH_REQUESTS = 256  # requests in a batch
MAX_BATCH_ITEMS = 25_600  # items in all lists of a batch: 6 MB
MAX_EVENTS_PER_REQUEST = 1000  # events in a request
MAX_ID_CHARS = 256  # characters
MAX_FILTER_CHARS = 4000  # characters
MAX_FILTER_JSON_BYTES = 1 << 16  # bytes
LAST_S = 4_102_444_800  # the year 2100: later times are probably milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a running server.

    Attributes
    ----------
    body_bytes
        Maximum size of a request body.
    queue_timeout_s
        Maximum time in the queue. After that the request is rejected with 503.
    header_timeout_s
        Maximum time for the request headers, from the opening of the connection or the first header byte.
    request_s
        Maximum time for a whole request, including the arrival of its body.
    write_timeout_s
        Time in which a client must read at least 16 KiB of a pending response.
    keep_alive_s
        Maximum idle time between requests. Longer than that of common load balancers, so that the balancer closes first.
    lookups
        Maximum number of lookups (such as searches by name) that run or wait.
    waiting
        Maximum number of requests that wait for the worker thread.
    max_batch
        Maximum number of requests computed at once.
    rate, burst
        Requests per second for each client, and the size of its token bucket. Each request of a batch counts. A rate of 0 disables
        the limit.
    connections
        Maximum number of open connections.
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
    """Token bucket of `burst` requests for each client, refilled at `rate` per second. Each request of a batch counts.

    Memory is bounded: beyond `most_clients`, the client not seen for the longest time is dropped and starts with a full bucket.
    """

    def __init__(self, rate: float, burst: float, *, most_clients: int = 10_000) -> None:
        self.rate, self.burst, self.most_clients = rate, burst, most_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str, now: float | None = None) -> float:
        """Take one request from the client's bucket. Return 0, or the seconds to wait if the bucket is empty."""
        left, now = self._left(client, now)
        wait = 0.0 if left >= 1 or self.rate <= 0 else (1 - left) / self.rate
        self._keep(client, left if wait else left - 1, now)
        return wait

    def charge(self, client: str, requests: int, now: float | None = None) -> None:
        """Take the further requests of an accepted batch. The bucket may become negative; later requests then wait."""
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
    """Return True if `given` is the key. The comparison takes constant time."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), key.encode())
