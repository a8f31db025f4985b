"""Define the limits of a server: sizes, counts, rates and timeouts."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HISTORY_EVENTS = 1000  # history events in a request
MAX_K = 500
MAX_EXPLAINED_ITEMS = 100  # items in a request
MAX_BATCH_REQUESTS = 256  # requests in a batch
MAX_BATCH_ITEMS = 25_600  # items in all lists of a batch: 6 MB
MAX_BATCH_HISTORY_EVENTS = 10_000  # events in all histories of a batch
HEAVY_WEIGHT = 8  # requests from this weight on are computed on a thread of their own, so that light ones do not wait for them
MAX_JSON_MARKS = 100_000  # brackets, commas and colons of a body: its values cost time and memory, not its bytes
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
    head_bytes, max_headers
        Maximum size of the request line with all headers, and their number.
    body_bytes
        Maximum size of a request body.
    held_bytes_per_client, held_bytes
        Maximum size of the bodies that have arrived, and of the responses that have not been read, of one client and of all.
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
    running_per_client
        Maximum number of requests of a client in progress; further ones wait unread. None waits without a rate.
    lookups
        Maximum number of lookups (such as searches by name) that run or wait.
    waiting
        Maximum number of requests that wait for the worker thread.
    max_batch
        Maximum number of requests computed at once; heavy ones count more.
    rate, burst
        Requests per second for each client, and the size of its token bucket. Each request of a batch counts, heavy ones more. A
        rate of 0 disables the limit.
    connections, connections_per_client
        Maximum number of open connections of all clients and of one. Trusted proxies have as many as they like.
    reserved_connections
        Connections above the maximum that may ask for health and metrics.
    linger_s
        Time for a client to read a refusal before its connection closes.
    drain_delay_s
        Time after SIGTERM in which readiness is down but everything is answered, so that load balancers notice.
    drain_s
        Maximum time from SIGTERM to the end of all requests; the process ends at most 2 s later.
    """

    head_bytes: int = 2**14
    max_headers: int = 100
    body_bytes: int = 2**20
    held_bytes_per_client: int = 16 * 2**20
    held_bytes: int = 64 * 2**20
    queue_timeout_s: float = 2.0
    header_timeout_s: float = 10.0
    request_s: float = 15.0
    write_timeout_s: float = 15.0
    keep_alive_s: int = 65
    running_per_client: int = 16
    lookups: int = 64
    waiting: int = 512
    max_batch: int = 32
    rate: float = 100.0
    burst: float = 200.0
    connections: int = 1024
    connections_per_client: int = 128
    reserved_connections: int = 32
    linger_s: float = 1.0
    drain_delay_s: float = 1.0
    drain_s: float = 8.0
