"""Speak HTTP/1.1 on one connection: `httptools` parses, this module bounds what arrives and calls the ASGI application.

Every byte is counted before it is parsed, and every state has its own time limit:

    idle        nothing of a request has arrived; ends after `keep_alive_s` (`header_timeout_s` before the first request)
    head        request line and headers arrive; `header_timeout_s`, `head_bytes`, `max_headers`
    request     the application runs and the body arrives; the middleware limits time and size, this module bounds the framing
    writing     the client reads the response; at least `MIN_READ_BYTES_PER_S` of `http_cycle`
    lingering   after a refusal; input is thrown away for `linger_s`, so that the client can read the refusal

Requests on one connection are answered one after the other. Reading stops while one is in progress.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Coroutine
from typing import Any, Protocol

import httptools

from twotower.serving.http_cycle import Cycle, Host, Request, as_bytes
from twotower.serving.http_head import Refusal, address_of, malformed, read_target
from twotower.serving.refusals import error_body

HEAD_SLICE = 4096  # bytes parsed at once while a head arrives: what one parser call may cost
BODY_SLICE = 65_536
UNREAD_BYTES = 65_536  # body bytes that wait for the application before reading stops
RESERVED_HEADER_S = 1.0
LINGER_BYTES = 1 << 20  # thrown away after a refusal
RESERVED_PATHS = ("/health/", "/metrics")
"""Paths that connections above the limit may request, so that monitoring works while the server is full."""


class ConnectionHost(Host, Protocol):
    """Interface of the server that a connection uses."""

    loop: asyncio.AbstractEventLoop
    root_path: str

    def leave(self, connection: Connection) -> None: ...

    def begin(self, connection: Connection) -> None: ...

    def start(self, work: Coroutine[Any, Any, None]) -> None: ...

    def refused(self, code: str) -> None: ...

    def idle_s(self, *, new: bool = False) -> float: ...

    def waits(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """The protocol of one connection.

    Parameters
    ----------
    address
        IP address of the peer.
    overload
        For a connection above the limits: the refusal of all requests but those for `RESERVED_PATHS`.
    """

    def __init__(self, server: ConnectionHost, address: str, *, overload: Refusal | None = None) -> None:
        self.server, self.limits, self.loop = server, server.limits, server.loop
        self.address, self.overload = address, overload
        self.client = server.clients.group(address)
        self.parser: Any = httptools.HttpRequestParser(self)
        self.transport: Any = None
        self.lost = self.lingering = self.muted = self.doomed = self.half_closed = False
        self.requests: deque[Request] = deque()  # the first one is being answered
        self.arriving: Request | None = None
        self.rest = b""  # received, not parsed yet
        self.url, self.headers = b"", list[tuple[bytes, bytes]]()
        self.head_bytes, self.thrown, self.answered = 0, 0, 0
        self.timer: asyncio.TimerHandle | None = None
        self.drained = asyncio.Event()
        self.drained.set()
        self.refusal: Refusal | None = None

    @property
    def idle(self) -> bool:
        """Return True if nothing of a request has arrived."""
        return not self.requests and not self.head_bytes

    # The transport calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        self.transport = transport
        self.secure = transport.get_extra_info("sslcontext") is not None
        self.peer, self.here = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self.wait(RESERVED_HEADER_S if self.overload else self.server.idle_s(new=not self.answered), self.close)
        if self.doomed:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Notify the application, and release the slot."""
        self.lost = True
        self.stop_waiting()
        self.drained.set()
        for request in self.requests:
            request.arrived.set()
            if request.cycle is None:
                self.server.clients.release(self.client, request.held_bytes)
        self.server.leave(self)
        self.parser, self.rest = None, b""

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, or keep it while a request is in progress."""
        if self.lingering:
            self.thrown += len(data)
            if self.thrown > LINGER_BYTES:
                self.transport.abort()
            return
        self.rest = self.rest + data if self.rest else data
        self.feed()

    def eof_received(self) -> bool:
        """Keep the connection open for the responses of requests in progress."""
        self.half_closed = True
        return bool(self.requests) and not self.lingering

    def pause_writing(self) -> None:
        """Wait until the client reads."""
        self.drained.clear()

    def resume_writing(self) -> None:
        """Go on writing."""
        self.drained.set()

    # The parser calls these.

    def on_message_begin(self) -> None:
        """Begin a head."""
        if self.muted:
            return
        self.url, self.headers, self.head_bytes = b"", [], 1
        if self.answered and not self.requests:
            self.wait(self.limits.header_timeout_s, self.close)

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or drop a trailer."""
        if self.arriving is not None or self.muted:  # a trailer
            return
        self.headers.append((name.lower(), value))
        if len(self.headers) > self.limits.max_headers:
            text = f"The request has more than {self.limits.max_headers} headers. Send fewer."
            self.refusal = Refusal(431, "too_large", text)

    def on_headers_complete(self) -> None:
        """Check the head and start the application."""
        if self.refusal is not None or self.muted:
            return
        self.version = self.parser.get_http_version()
        target = read_target(self.version, self.url, self.headers)
        if isinstance(target, Refusal):
            self.refusal = target
            return
        target = target.below(self.server.root_path)
        if self.overload is not None and not target.path.startswith(RESERVED_PATHS):
            self.refusal = self.overload
            return
        scope = target.scope(self.version, self.parser.get_method(), self.headers, self.server.root_path, secure=self.secure)
        scope |= {"client": address_of(self.peer), "server": address_of(self.here)}
        expects = any(name == b"expect" and value.lower() == b"100-continue" for name, value in self.headers)
        keep_alive = self.version == "1.1" and self.parser.should_keep_alive()
        request = self.arriving = Request(scope, keep_alive=keep_alive, expects=expects)
        self.requests.append(request)
        if len(self.requests) == 1:
            self._begin()

    def on_body(self, data: bytes) -> None:
        """Take a part of the body."""
        request = self.arriving
        if request is None or self.refusal is not None:
            return
        request.length += len(data)
        if request.cycle is not None and request.cycle.complete:
            return  # answered without its body
        request.body += data
        request.held_bytes += len(data)
        if not self.server.clients.hold(self.client, len(data)):
            self.refusal = Refusal(429, "rate", "This client holds too much memory of the server. Send less at once.")
        request.arrived.set()

    def on_message_complete(self) -> None:
        """The body has arrived."""
        if self.parser.should_upgrade():
            return  # see `_ignore_upgrade`
        self.head_bytes = 0
        if self.arriving is not None:
            self.arriving.whole = True
            self.arriving.arrived.set()
            self.arriving = None

    # Reading

    def feed(self) -> None:
        """Parse what has been received, slice by slice, until a whole request waits for its response."""
        data, self.rest = self.rest, b""
        at, size = 0, len(data)
        while at < size and not (self.requests and self.requests[0].whole):
            part = data[at : at + (HEAD_SLICE if self.arriving is None else BODY_SLICE)]
            at += len(part)
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade as pause:
                at += pause.args[0] - len(part)
                self._ignore_upgrade()
            except httptools.HttpParserError as error:
                self.refusal = self.refusal or malformed(error)
            self._bound(len(part))
            if self.refusal is not None:
                self.refuse(*self.refusal)
                return
        self.rest = data[at:]
        self.pace()

    def _ignore_upgrade(self) -> None:
        """Go on after a head that asks for another protocol: a new parser reads its body, which the old one would skip."""
        self.parser, self.muted = httptools.HttpRequestParser(self), True
        framing = b"".join(b"%b: %b\r\n" % one for one in self.headers if one[0] in (b"content-length", b"transfer-encoding"))
        self.parser.feed_data(b"POST / HTTP/1.1\r\nhost: x\r\n" + framing + b"\r\n")
        self.muted = False

    def _bound(self, size: int) -> None:
        """Count the bytes of the head or of the framing of a body."""
        if self.arriving is None:
            self.head_bytes += size if self.head_bytes else 0
            limit = self.limits.head_bytes
            if self.head_bytes > limit:
                long = len(self.url) > limit // 2
                text = f"The request {'target' if long else 'head'} is too large: at most {limit:,} bytes are allowed. Send less."
                self.refusal = self.refusal or Refusal(414 if long else 431, "too_large", text)
            return
        self.arriving.wire += size
        framing = self.arriving.wire - self.arriving.length
        if framing > self.limits.head_bytes + 8 * HEAD_SLICE + self.arriving.length // 2:
            text = "The body has too much chunk framing or too many trailers. Send larger chunks."
            self.refusal = self.refusal or Refusal(413, "too_large", text)

    def pace(self) -> None:
        """Read on, or stop reading while the application is busy."""
        if self.lost or self.transport.is_closing():
            return
        unread = len(self.arriving.body) if self.arriving is not None else 0
        stop = bool(self.rest) or unread > UNREAD_BYTES
        if stop and self.transport.is_reading():
            self.transport.pause_reading()
        elif not stop and not self.transport.is_reading():
            self.transport.resume_reading()

    # Answering

    def _begin(self) -> None:
        """Have the first request answered, perhaps after others of its client."""
        self.stop_waiting()
        self.server.begin(self)

    def run(self) -> None:
        """Start the application for the first request."""
        request = self.requests[0]
        request.cycle = Cycle(self, request, self.server)
        self.server.start(request.cycle.run())

    def done(self, request: Request) -> None:
        """Go on after a response: with the next request, idle, or by closing."""
        self.server.clients.release(self.client, request.held_bytes)
        request.held_bytes = 0
        if self.lost:
            return
        self.requests.popleft()
        self.answered += 1
        if request is self.arriving:  # answered before its body has arrived
            self.linger()
        elif not request.keep_alive or self.server.closing:
            self.close()
        elif self.requests:
            self._begin()
        elif self.half_closed and not self.rest:
            self.close()
        else:
            self.wait(self.limits.header_timeout_s if self.head_bytes else self.server.idle_s(), self.close)
            self.feed()
            self.server.waits(self)

    def refuse(self, status: int, code: str, text: str) -> None:
        """Answer a request that the application does not get, then close. Nothing is answered inside another response."""
        self.server.refused(code)
        busy = any(request.cycle is not None and request.cycle.started for request in self.requests)
        for request in self.requests:
            self.server.clients.release(self.client, request.held_bytes)
            request.held_bytes = 0
            if request.cycle is not None:
                request.cycle.abandon()
        self.requests.clear()
        if not busy and not self.transport.is_closing():
            request_id = uuid.uuid4().hex
            body = error_body(code, text, request_id)
            head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            head += [(b"x-request-id", request_id.encode()), (b"cache-control", b"no-store")]
            head += [(b"retry-after", b"1")] if status in (429, 503) else []
            self.transport.write(as_bytes(status, head, close=True) + body)
        self.linger()

    def linger(self) -> None:
        """Throw away what still arrives for a moment, then close: an immediate close could destroy the response under way."""
        if self.lingering or self.lost:
            return
        self.lingering, self.rest = True, b""
        self.arriving = None
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if not self.transport.is_reading():
            self.transport.resume_reading()
        self.wait(self.limits.linger_s, self.abort)

    def close(self) -> None:
        """Close after what is written has been sent, at most `write_timeout_s` later."""
        if self.transport is None:
            self.doomed = True
        elif not self.lost and not self.transport.is_closing():
            self.wait(self.limits.write_timeout_s, self.abort)
            self.transport.close()

    def abort(self) -> None:
        """Close at once, or as soon as there is a transport."""
        if self.transport is None:
            self.doomed = True
        elif not self.lost:
            self.transport.abort()

    def wait(self, seconds: float, then: Any) -> None:
        """Call `then` in so many seconds, instead of what was waited for before."""
        self.stop_waiting()
        self.timer = self.loop.call_later(seconds, then)

    def stop_waiting(self) -> None:
        """Cancel the time limit of the current state."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
