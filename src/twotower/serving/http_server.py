"""Admit connections within their limits, and stop in order: readiness first, then idle connections, then the rest.

accept      a client has at most `connections_per_client`; all together have `connections`. Above that, the longest idle
            connection ends, or the new one is reserved for health checks and metrics
stop        for `drain_delay_s` everything is answered as before, but readiness is down and every response closes its
            connection; then nothing is accepted, and what is in progress has until `drain_s`
retire      another process takes over: nothing is accepted, requests in progress are answered, and connections are passed on
            as soon as they are idle
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from email.utils import formatdate
from typing import Any, Protocol

from starlette.types import ASGIApp

from twotower.serving.acceptor import Acceptor
from twotower.serving.clients import Clients, take
from twotower.serving.http_connection import RESERVED_PATHS, Connection
from twotower.serving.http_cycle import as_bytes
from twotower.serving.http_head import Refusal
from twotower.serving.listening import listen
from twotower.serving.refusals import error_body
from twotower.utils.config_serving import Limits
from twotower.utils.console import log

LEAST_RUNNING = 2  # of a client, however many others send requests: one that waits for its body does not hold up the rest
WATCHING, WATCHING_PER_CLIENT = " watching", 1  # health checks and metrics of a client do not wait for its other requests
CROWD_IDLE_S = 1.0  # keep-alive time when more than half of the connections are in use
OTHER_FILES = 96  # descriptors for everything but connections
PASS_ON_AGAIN_S = 0.005


class Successors(Protocol):
    """The processes that take over when this one retires."""

    def give(self, descriptor: int) -> bool:
        """Pass a copy of a connected socket on. Return False if it must be tried again."""
        ...

    def receive(self, loop: asyncio.AbstractEventLoop, adopt: Callable[[socket.socket], None]) -> None:
        """Call `adopt` with every connection that another process passes on."""
        ...

    def receive_no_more(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave further connections to other processes."""
        ...


class HttpServer:
    """Serves an ASGI application on listening sockets.

    Parameters
    ----------
    successors
        The processes that take over when this one retires.
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
        successors: Successors | None = None,
        on_refusal: Callable[[str], None] = lambda _: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.application, self.limits, self.clients = application, limits, clients
        self.tls, self.root_path = tls, root_path
        self.loop = asyncio.get_running_loop()
        self.stopping = self.retired = False
        self._successors = successors
        self._acceptor = Acceptor(self.loop, self._take, self._complain)
        self._on_refusal, self._on_stop = on_refusal, on_stop
        self._connections: dict[Connection, None] = {}
        self._reserved: dict[Connection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._date = (0, b"")
        self._complained = 0.0
        self._max_connections = max_connections(limits)
        body = error_body("busy", "The server has too many connections. Try again later.", "")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"retry-after", b"1")]
        self._full_response = as_bytes(503, headers, close=True) + body
        self._running: Counter[str] = Counter()
        self._lines: dict[str, deque[Connection]] = {}  # connections whose request waits for others of its client

    @property
    def open(self) -> int:
        """Return the number of open connections."""
        return len(self._connections) + len(self._reserved)

    @property
    def closing(self) -> bool:
        """Return True if a connection ends with its next response: one with TLS cannot be passed on."""
        return self.stopping or (self.retired and self.tls is not None)

    async def serve(self, sockets: Sequence[socket.socket], stop: asyncio.Event, *, delay: Callable[[], bool]) -> None:
        """Accept connections until `stop` is set, then finish what is in progress.

        Parameters
        ----------
        delay
            Returns True if load balancers get the time to notice that readiness is down.
        """
        listen(sockets)
        self._acceptor.start(sockets)
        if self._successors is not None:
            self._successors.receive(self.loop, self.adopt)
        await stop.wait()
        end = self.loop.time() + self.limits.drain_s
        self.stopping = True
        self._on_stop()
        if delay():
            await asyncio.sleep(self.limits.drain_delay_s)
        self._refuse_more()
        for listening in sockets:
            listening.close()
        await self._drain(end)

    def _refuse_more(self) -> None:
        self._acceptor.stop()
        if self._successors is not None:
            self._successors.receive_no_more(self.loop)

    async def retire(self) -> None:
        """Accept nothing more, and pass every idle connection on to the successors, now and after each response."""
        self.retired = True
        self._refuse_more()
        for connection in [*self._connections, *self._reserved]:
            self.waits(connection)
        while any(one.idle and not one.lingering and not one.lost for one in [*self._connections, *self._reserved]):
            await asyncio.sleep(PASS_ON_AGAIN_S)

    async def emptied(self, seconds: float) -> None:
        """Wait until all connections have gone, at most so long, and end the rest."""
        await self._drain(self.loop.time() + seconds, idle=False)

    def waits(self, connection: Connection) -> None:
        """Pass a connection on if it is idle and this process has retired. One with TLS cannot be given: it is closed."""
        ready = connection.transport is not None and not connection.transport.is_closing() and not connection.lingering
        if not self.retired or not ready or not connection.idle or connection.rest:
            return
        if self.tls is not None or self._successors is None:
            connection.close()
        elif self._successors.give(connection.transport.get_extra_info("socket").fileno()):
            connection.abort()
        else:  # the successors are busy with earlier ones
            self.loop.call_later(PASS_ON_AGAIN_S, self.waits, connection)

    def adopt(self, given: socket.socket) -> None:
        """Serve a connection that another process has passed on."""
        try:
            address = given.getpeername()
        except OSError:  # the client has gone
            given.close()
            return
        connection = self._admit(address[0] if isinstance(address, tuple) else "", new=False)
        if connection is None:
            self._turn_away(given)
        else:
            connection.answered = 1
            self.start(self._connect(given, connection))

    async def _drain(self, end: float, *, idle: bool = True) -> None:
        for connection in [*self._connections, *self._reserved]:
            if idle and (connection.idle or connection.lingering):
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

    def _take(self, accepted: socket.socket, host: str, tell: bool) -> bool:
        """Admit a connection, or turn it away."""
        connection = self._admit(host)
        if connection is None:
            self._turn_away(accepted, tell=tell)
        else:
            self.start(self._connect(accepted, connection))
        return connection is not None

    def _admit(self, host: str, *, new: bool = True) -> Connection | None:
        """Return an admitted connection, if necessary after closing an idle one; None if none can be admitted."""
        if new and not self.clients.arrives(host):
            return None
        overload: Refusal | None = None
        if not self.clients.enter(host):
            most = self.limits.connections_per_client
            text = f"Too many connections from this client: at most {most} are allowed. Close some first."
            overload = Refusal(429, "rate", text)
        elif len(self._connections) >= self._max_connections:
            self._complain("all %d connections are in use", self._max_connections)
            if not self._evict(self._connections, lambda one: one.lingering or (one.idle and one.answered > 0)):
                self.clients.leave(host)
                overload = Refusal(503, "busy", "The server has too many connections. Try again later.")
        full = overload is not None and len(self._reserved) >= self.limits.reserved_connections
        if full and not self._evict(self._reserved, lambda one: one.lingering or one.idle):
            return None
        connection = Connection(self, host, overload=overload)
        (self._connections if overload is None else self._reserved)[connection] = None
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
            self.waits(connection)
        except OSError:  # the client has gone, or the TLS handshake failed
            accepted.close()
            self.leave(connection)

    def _turn_away(self, accepted: socket.socket, *, tell: bool = True) -> None:
        """Close a connection that was not admitted."""
        self.refused("busy")
        with accepted:
            if tell and self.tls is None:
                with suppress(OSError):
                    accepted.send(self._full_response)

    def leave(self, connection: Connection) -> None:
        """Release the slot of a connection; a second call does nothing."""
        if connection.overload is not None:
            self._reserved.pop(connection, None)
        elif self._connections.pop(connection, connection) is None:
            self.clients.leave(connection.address)

    def begin(self, connection: Connection) -> None:
        """Run the request of a connection now, or once fewer requests of its client are in progress."""
        request = connection.requests[0]
        if not self.limits.rate or self.clients.trusts(connection.address):
            connection.run()
            return
        watching = request.scope["path"].startswith(RESERVED_PATHS)
        line = connection.client + WATCHING if watching else connection.client
        if self._running[line] < self._share(line):
            self._run(connection, line)
        else:
            self._lines.setdefault(line, deque()).append(connection)

    def ended(self, line: str) -> None:
        """Count a request of a line as finished, and run the next waiting ones."""
        take(self._running, line, 1)
        waiting = self._lines.get(line, deque())
        while waiting and self._running[line] < self._share(line):
            connection = waiting.popleft()
            if connection.requests and not connection.lost and not connection.lingering:
                self._run(connection, line)
        if not waiting:
            self._lines.pop(line, None)

    def _run(self, connection: Connection, line: str) -> None:
        self._running[line] += 1
        connection.requests[0].line = line
        connection.run()

    def _share(self, line: str) -> int:
        """Return how many requests of a line may be in progress: in each turn of the event loop, others wait for all of them."""
        if line.endswith(WATCHING):
            return WATCHING_PER_CLIENT
        most = self.limits.running_per_client
        return min(most, max(LEAST_RUNNING, most // max(1, len(self._running))))

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task; the shutdown waits for it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def refused(self, code: str) -> None:
        """Count a refusal that the application does not see."""
        self._on_refusal(code)

    def idle_s(self, *, new: bool = False) -> float:
        """Return how long an idle connection may stay; `new`: it has sent no request yet."""
        if new:
            return self.limits.header_timeout_s
        if self.stopping:
            return 0.0
        return CROWD_IDLE_S if len(self._connections) > self._max_connections // 2 else self.limits.keep_alive_s

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


def max_connections(limits: Limits) -> int:
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
