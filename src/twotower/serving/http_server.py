"""Accept connections within their limits, and stop in order: readiness first, then idle connections, then the rest.

accept      a client has at most `connections_per_client`; all together have `connections`. Above that, the longest idle
            connection ends, or the new one is reserved for health checks and metrics
stop        for `drain_delay_s` everything is answered as before, but readiness is down and every response closes its
            connection; then nothing is accepted, and what is in progress has until `drain_s`
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from email.utils import formatdate
from typing import Any

from starlette.types import ASGIApp

from twotower.errors import ConfigError
from twotower.serving.clients import Clients, take
from twotower.serving.http_connection import RESERVED_PATHS, Connection
from twotower.serving.http_cycle import as_bytes
from twotower.serving.http_head import Refusal
from twotower.serving.limits import Limits
from twotower.serving.refusals import error_body
from twotower.utils.console import log

CROWD_IDLE_S = 1.0  # keep-alive time when more than half of the connections are in use
OTHER_FILES = 96  # descriptors for everything but connections
BACKLOG = 2048
ACCEPTED_AT_ONCE = 1.0
ADMITTED, TURNED_AWAY = 0.25, 0.03  # cost of a connection, as a share of the work between two turns of the event loop


class HttpServer:
    """Serves an ASGI application on listening sockets.

    Parameters
    ----------
    on_refusal
        Called with the code of each refusal that the application does not see.
    on_stop
        Called once when the server begins to stop.
    """

    def __init__(
        self,
        application: ASGIApp,
        limits: Limits,
        clients: Clients,
        *,
        tls: ssl.SSLContext | None = None,
        root_path: str = "",
        on_refusal: Callable[[str], None] = lambda _: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.application, self.limits, self.clients = application, limits, clients
        self.tls, self.root_path = tls, root_path
        self.loop = asyncio.get_running_loop()
        self.stopping = False
        self._on_refusal, self._on_stop = on_refusal, on_stop
        self._connections: dict[Connection, None] = {}
        self._reserved: dict[Connection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._date = (0, b"")
        self._complained = 0.0
        self._places = places(limits)
        body = error_body("busy", "The server has too many connections. Try again later.", "")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"retry-after", b"1")]
        self._no_place = as_bytes(503, headers, close=True) + body
        self._running: Counter[str] = Counter()
        self._lines: dict[str, deque[Connection]] = {}  # connections whose request waits for others of its client

    @property
    def open(self) -> int:
        """Return the number of open connections."""
        return len(self._connections) + len(self._reserved)

    async def serve(self, sockets: Sequence[socket.socket], stop: asyncio.Event, *, delay: Callable[[], bool]) -> None:
        """Accept connections until `stop` is set, then finish what is in progress.

        Parameters
        ----------
        delay
            Returns True if load balancers get the time to notice that readiness is down.
        """
        for listening in sockets:
            listening.setblocking(False)
            listening.listen(BACKLOG)
        accepting = [self.loop.create_task(self._accept(listening)) for listening in sockets]
        await stop.wait()
        end = self.loop.time() + self.limits.drain_s
        self.stopping = True
        self._on_stop()
        if delay():
            await asyncio.sleep(self.limits.drain_delay_s)
        for task in accepting:
            task.cancel()
        await asyncio.gather(*accepting, return_exceptions=True)
        for listening in sockets:
            listening.close()
        await self._drain(end)

    async def _drain(self, end: float) -> None:
        for connection in [*self._connections, *self._reserved]:
            if connection.idle or connection.lingering:
                connection.close()
        while self.open and self.loop.time() < end:
            await asyncio.sleep(0.02)
        if self._tasks:
            log.warning("%d requests were still in progress after %g s and have been ended", len(self._tasks), self.limits.drain_s)
        for connection in [*self._connections, *self._reserved]:
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, listening: socket.socket) -> None:
        left = ACCEPTED_AT_ONCE
        while True:
            if left <= 0:
                await asyncio.sleep(0)  # open connections get their turn
                left = ACCEPTED_AT_ONCE
            try:
                accepted, address = await self.loop.sock_accept(listening)
            except OSError as error:  # such as no descriptors left
                if error.errno != errno.ECONNABORTED:
                    self._complain("cannot accept connections: %s", error)
                    await asyncio.sleep(0.1)
                continue
            try:
                connection = self._admit(address[0] if isinstance(address, tuple) else "")
                left -= TURNED_AWAY if connection is None else ADMITTED
                if connection is None:
                    self._turn_away(accepted)
                else:
                    self.start(self._connect(accepted, connection))
            except Exception:  # a defect must not end the loop
                log.exception("a connection failed")
                accepted.close()

    def _admit(self, host: str) -> Connection | None:
        """Return an admitted connection, if necessary after closing an idle one; None if none can be admitted."""
        if not self.clients.arrives(host):
            return None
        crowd: Refusal | None = None
        if not self.clients.enter(host):
            most = self.limits.connections_per_client
            text = f"Too many connections from this client: at most {most} are allowed. Close some first."
            crowd = Refusal(429, "rate", text)
        elif len(self._connections) >= self._places:
            self._complain("all %d connections are in use", self._places)
            if not self._evict(self._connections, lambda one: one.lingering or (one.idle and one.answered > 0)):
                self.clients.leave(host)
                crowd = Refusal(503, "busy", "The server has too many connections. Try again later.")
        full = crowd is not None and len(self._reserved) >= self.limits.reserved_connections
        if full and not self._evict(self._reserved, lambda one: one.lingering or one.idle):
            return None
        connection = Connection(self, host, crowd=crowd)
        (self._connections if crowd is None else self._reserved)[connection] = None
        return connection

    def _evict(self, connections: dict[Connection, None], useless: Callable[[Connection], bool]) -> bool:
        """Close the longest idle connection. Return False if there is none."""
        oldest = next(filter(useless, connections), None)
        if oldest is None:
            return False
        oldest.abort()
        self.leave(oldest)
        return True

    async def _connect(self, accepted: socket.socket, connection: Connection) -> None:
        if accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            timeout = {} if self.tls is None else {"ssl_handshake_timeout": self.limits.header_timeout_s}
            await self.loop.connect_accepted_socket(lambda: connection, accepted, ssl=self.tls, **timeout)
        except OSError:  # the client has gone, or the TLS handshake failed
            accepted.close()
            self.leave(connection)

    def _turn_away(self, accepted: socket.socket) -> None:
        """Close a connection that was not admitted."""
        self.refused("busy")
        with accepted:
            if self.tls is None:
                with suppress(OSError):
                    accepted.setblocking(False)
                    accepted.send(self._no_place)

    def leave(self, connection: Connection) -> None:
        """Release the slot of a connection; a second call does nothing."""
        if connection.crowd is not None:
            self._reserved.pop(connection, None)
        elif self._connections.pop(connection, connection) is None:
            self.clients.leave(connection.address)

    def begin(self, connection: Connection) -> None:
        """Run the request of a connection now, or once fewer requests of its client are in progress."""
        client, request = connection.client, connection.requests[0]
        free = not self.limits.rate or request.scope["path"].startswith(RESERVED_PATHS) or self.clients.trusts(connection.address)
        if free:
            connection.run()
        elif self._running[client] < self.limits.running_per_client:
            self._running[client] += 1
            request.counted = True
            connection.run()
        else:
            self._lines.setdefault(client, deque()).append(connection)

    def ended(self, client: str) -> None:
        """Count a request of a client as finished, and run the next waiting one."""
        line = self._lines.get(client, deque())
        while line:
            connection = line.popleft()
            if connection.requests and not connection.lost and not connection.lingering:
                connection.requests[0].counted = True
                connection.run()
                return
        self._lines.pop(client, None)
        take(self._running, client, 1)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task; the shutdown waits for it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def refused(self, code: str) -> None:
        """Count a refusal that the application does not see."""
        self._on_refusal(code)

    def idle_s(self) -> float:
        """Return how long an idle connection may stay."""
        if self.stopping:
            return 0.0
        return CROWD_IDLE_S if len(self._connections) > self._places // 2 else self.limits.keep_alive_s

    def date(self) -> bytes:
        """Return the value of the header `Date`."""
        now = int(time.time())
        if now != self._date[0]:
            self._date = now, formatdate(now, usegmt=True).encode()
        return self._date[1]

    def _complain(self, text: str, *values: Any) -> None:
        """Write a warning, at most every ten seconds."""
        if self.loop.time() > self._complained:
            self._complained = self.loop.time() + 10
            log.warning(text, *values)


def places(limits: Limits) -> int:
    """Return how many connections fit into the descriptors of this process, at most `limits.connections`."""
    wanted = limits.connections + limits.reserved_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = min(limits.connections, soft - limits.reserved_connections - OTHER_FILES)
    if found < limits.connections:
        log.warning("this process may open %d files: at most %d connections fit; raise `ulimit -n`", soft, found)
    return max(found, 1)


def bound_sockets(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of `host`. They do not listen yet: a taken port is found before the bundle is loaded.

    Raises
    ------
    ConfigError
        An address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"Cannot listen on {host!r}: {error}. Use an address of this machine with --host.") from None
    bound: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found if port else found[:1]):
        listening = socket.socket(family, kind, protocol)
        bound.append(listening)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and len(found) > 1:  # such as ::1 of localhost on a machine without IPv6
                bound.pop().close()
                continue
            for one in bound:
                one.close()
            text = f"Cannot listen on {host} port {port}: {error.strerror}. Stop the other server, or use --host and --port."
            raise ConfigError(text) from None
    if not bound:
        raise ConfigError(f"Cannot listen on {host}: it has no address on this machine. Use another --host.")
    return bound
