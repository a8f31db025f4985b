"""Give the ASGI application one request of a connection, and write its response as HTTP/1.1."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import ASGIApp

from twotower.serving.clients import Clients
from twotower.utils.config_serving import Limits

MIN_READ_BYTES_PER_S = 16_384  # of a response
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Request:
    """One request on a connection, and its response."""

    __slots__ = (
        "arrived",
        "body",
        "cycle",
        "expects",
        "head_only",
        "held_bytes",
        "keep_alive",
        "length",
        "line",
        "scope",
        "whole",
        "wire",
    )

    def __init__(self, scope: dict[str, Any], *, keep_alive: bool, expects: bool) -> None:
        self.scope, self.keep_alive, self.expects = scope, keep_alive, expects
        self.head_only = scope["method"] == "HEAD"
        self.body, self.arrived = bytearray(), asyncio.Event()
        self.whole = False  # its body has arrived
        self.length = 0  # body bytes so far
        self.wire = 0  # bytes on the wire since the headers
        self.held_bytes = 0  # bytes in the account of the client
        self.line: str | None = None  # in which it counts as in progress
        self.cycle: Cycle | None = None


class Host(Protocol):
    """Interface of the server that a request uses."""

    limits: Limits
    clients: Clients
    application: ASGIApp

    @property
    def closing(self) -> bool: ...

    def date(self) -> bytes: ...

    def ended(self, client: str) -> None: ...


class Wire(Protocol):
    """Interface of the connection that a request uses."""

    transport: Any
    client: str
    version: str
    lost: bool
    arriving: Request | None
    drained: asyncio.Event

    def pace(self) -> None: ...

    def abort(self) -> None: ...

    def done(self, request: Request) -> None: ...


class Cycle:
    """One request and its response, as the ASGI application sees them."""

    def __init__(self, connection: Wire, request: Request, server: Host) -> None:
        self.connection, self.request, self.server = connection, request, server
        self.started = self.complete = self.abandoned = False
        self._head: MutableMapping[str, Any] | None = None
        self._chunked = False
        self._more = True  # of the request body

    async def run(self) -> None:
        """Run the application, and make sure that the connection goes on or ends."""
        try:
            await self.server.application(self.request.scope, self.receive, self.send)
        finally:
            self._computed()
            if not self.abandoned:
                if not self.complete:
                    self.connection.abort()
                self.connection.done(self.request)

    def _computed(self) -> None:
        """Let the next request of the client begin. How slowly it reads this response is its own affair."""
        line, self.request.line = self.request.line, None
        if line is not None:
            self.server.ended(line)

    def abandon(self) -> None:
        """The connection has ended the request itself: the application is told that the client has gone."""
        self.abandoned = True
        self.request.arrived.set()

    @property
    def over(self) -> bool:
        """Return True if the client has gone, or has its response."""
        return self.connection.lost or self.abandoned or self.complete

    async def receive(self) -> dict[str, Any]:
        """Return the next part of the body. After the body, wait for the end of the request."""
        connection, request = self.connection, self.request
        if request.expects and not self.started:
            request.expects = False
            if not request.body and not self.over:
                connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self.over and not (self._more and (request.body or request.whole)):
            request.arrived.clear()
            connection.pace()
            await request.arrived.wait()
        if self.over:
            return {"type": "http.disconnect"}
        body, request.body = bytes(request.body), bytearray()
        self._more = not request.whole
        return {"type": "http.request", "body": body, "more_body": self._more}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Write a part of the response, and wait until the client has read most of it."""
        connection = self.connection
        if connection.lost or self.abandoned:
            return
        if message["type"] == "http.response.start":
            self._head = message
            self.started = True
            self._computed()
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        parts = []
        if self._head is not None:
            parts.append(self._first(self._head, None if more else len(body)))
            self._head = None
        if not self.request.head_only:
            parts.append(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked and body else body)
            parts += [b"0\r\n\r\n"] if self._chunked and not more else []
        connection.transport.write(b"".join(parts))
        if not more:
            self.complete = True
            self.request.arrived.set()
        if not connection.drained.is_set():
            await self._drain()

    def _first(self, message: MutableMapping[str, Any], size: int | None) -> bytes:
        """Return the head of the response. Without a length, HTTP/1.1 gets chunks and HTTP/1.0 a connection that closes."""
        request, connection = self.request, self.connection
        headers, status = list(message["headers"]), message["status"]
        bare = status in (204, 304) or request.head_only
        if not any(name.lower() == b"content-length" for name, _ in headers) and not bare:
            if size is not None:
                headers.append((b"content-length", b"%d" % size))
            elif connection.version == "1.1":
                self._chunked = True
                headers.append((b"transfer-encoding", b"chunked"))
            else:
                request.keep_alive = False
        close = not request.keep_alive or self.server.closing or request is connection.arriving
        request.keep_alive = not close
        headers.append((b"date", self.server.date()))
        return as_bytes(status, headers, close=close)

    async def _drain(self) -> None:
        """Wait until the client reads. A client that is too slow loses its connection."""
        connection = self.connection
        waiting = connection.transport.get_write_buffer_size()
        clients, held_bytes = self.server.clients, waiting
        clients.hold(connection.client, held_bytes)
        try:
            while not connection.drained.is_set():
                try:
                    await asyncio.wait_for(connection.drained.wait(), self.server.limits.write_timeout_s)
                except TimeoutError:
                    left = connection.transport.get_write_buffer_size()
                    if waiting - left < MIN_READ_BYTES_PER_S * self.server.limits.write_timeout_s:
                        connection.abort()
                        return
                    waiting = left
        finally:
            clients.release(connection.client, held_bytes)


def as_bytes(status: int, headers: list[tuple[bytes, bytes]], *, close: bool) -> bytes:
    """Return the head of a response."""
    lines = [STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
    lines += [b"%b: %b\r\n" % header for header in headers]
    lines.append(b"connection: close\r\n\r\n" if close else b"\r\n")
    return b"".join(lines)
