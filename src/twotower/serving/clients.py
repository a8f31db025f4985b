"""Count what each client uses: requests, connections, and bytes that the server holds for it.

A client is an IPv4 address or an IPv6 network of 64 bits, which one client can usually fill with addresses of its own.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from twotower.errors import ConfigError
from twotower.serving.rate_limits import RateLimiter
from twotower.utils.config_serving import Limits

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
WATCH_RATE, WATCH_BURST = 50.0, 300.0  # of health checks, metrics and files of the page, apart from other requests
ARRIVALS_PER_S, ARRIVALS_BURST = 100.0, 512.0  # new connections of a client
MAX_FLOODING = 4096  # clients whose next connection is known to be too early
BYTES_PER_TOKEN = 4096
"""A request of this size takes one more request from the client's bucket, before it is read."""


class Clients:
    """Usage of all clients, with the limits of each.

    Parameters
    ----------
    trusted
        Addresses or networks of proxies. The last address in `X-Forwarded-For` that is none of theirs is then the client.
    unix
        Connections come over a Unix socket, so from a proxy on this machine.
    """

    def __init__(self, limits: Limits, trusted: Sequence[str] = (), *, unix: bool = False) -> None:
        self.limits = limits
        self.rates = RateLimiter(limits.rate, limits.bucket)
        self.watching = RateLimiter(WATCH_RATE if limits.rate else 0, WATCH_BURST)
        self._arrivals = RateLimiter(ARRIVALS_PER_S if limits.rate else 0, ARRIVALS_BURST)
        self._arrive_again_s: dict[str, float] = {}
        self._trusted, self._unix = [_network(text) for text in trusted], unix
        self._connections: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self.held_bytes = 0

    def group(self, address: str) -> str:
        """Return the client of an address: the address itself, or its IPv6 network."""
        return _group(address)

    def trusts(self, address: str) -> bool:
        """Return True if the address is that of a trusted proxy."""
        if not address:
            return self._unix
        if not self._trusted:
            return False
        try:
            given = _address(address)
        except ValueError:
            return False
        return any(given in network for network in self._trusted)

    def behind(self, address: str, forwarded: Iterable[str]) -> str:
        """Return the client of a request: the last forwarded address that is no proxy if `address` is a proxy, else `address`."""
        chain = [part.strip() for line in forwarded for part in line.split(",")] if self.trusts(address) else []
        for given in reversed(chain):
            bare = given.removeprefix("[").partition("]")[0] if given.startswith("[") else given
            try:
                _address(bare)
            except ValueError:
                break  # not written by a proxy
            address = bare
            if not self.trusts(bare):
                break
        return _group(address)

    def arrives(self, address: str) -> bool:
        """Count a new connection. Return False if the client opens them too fast."""
        if self.trusts(address):
            return True
        client, now = _group(address), time.monotonic()
        if self._arrive_again_s.get(client, 0.0) > now:  # a flood: the shared table with its locks would double its cost
            return False
        if not (wait := self._arrivals.wait_s(client, now=now)):
            return True
        if len(self._arrive_again_s) >= MAX_FLOODING:
            self._arrive_again_s.clear()
        self._arrive_again_s[client] = now + wait
        return False

    def enter(self, address: str) -> bool:
        """Count a connection. Return False, and count nothing, if the client has as many as it may."""
        client = _group(address)
        if self._connections[client] >= self.limits.connections_per_client and not self.trusts(address):
            return False
        self._connections[client] += 1
        return True

    def leave(self, address: str) -> None:
        """Count a connection no more."""
        take(self._connections, _group(address), 1)

    def hold(self, client: str, size: int) -> bool:
        """Count bytes that the server holds for a client. Return False if these are too many, for the client or in all.

        They count in any case, until `release`.
        """
        self._bytes[client] += size
        self.held_bytes += size
        return not self.overloaded(client)

    def release(self, client: str, size: int) -> None:
        """Count bytes no more."""
        if size:
            self.held_bytes -= size
            take(self._bytes, client, size)

    def overloaded(self, client: str) -> bool:
        """Return True if the server holds too much for this client, or in all."""
        return self._bytes[client] > self.limits.held_bytes_per_client or self.held_bytes > self.limits.held_bytes


def cost(body_bytes: int) -> float:
    """Return how many requests a body of this size counts for.

    Examples
    --------
    >>> cost(300), cost(1_000_000)
    (1, 245)
    """
    return 1 + body_bytes // BYTES_PER_TOKEN


def shortened(client: str) -> str:
    """Return a client without the bits that tell people apart: the first 24 of IPv4, 48 of IPv6.

    Examples
    --------
    >>> shortened("203.0.113.77"), shortened("2001:db8:1:2::/64")
    ('203.0.113.0/24', '2001:db8:1::/48')
    """
    try:
        given = ipaddress.ip_network(client)
    except ValueError:
        return ""
    bits = min(24 if given.version == 4 else 48, given.prefixlen)
    return str(given.supernet(new_prefix=bits))


def retry_after(wait_s: float) -> bytes:
    """Return the value of the header `Retry-After`: whole seconds, at least 1."""
    return b"%d" % max(1, math.ceil(wait_s))


def take(counts: Counter[str], key: str, size: int) -> None:
    """Subtract from a count, and forget it at zero."""
    counts[key] -= size
    if counts[key] <= 0:
        del counts[key]


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(
            f"{text!r} is not the address of a proxy. Expected an IP address or a network, such as 10.0.0.7 or 10.0.0.0/8."
        ) from None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    given = ipaddress.ip_address(text.partition("%")[0])
    return given.ipv4_mapped or given if isinstance(given, ipaddress.IPv6Address) else given


@lru_cache(4096)
def _group(address: str) -> str:
    try:
        given = _address(address)
    except ValueError:
        return address[:64]  # a Unix socket, or a test without sockets
    if isinstance(given, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(given) >> 64 << 64, 64)))
    return str(given)
