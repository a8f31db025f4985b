"""Wrap every request: request id, access, limits of size, rate and time, headers, one log line and metrics.

Everything that a request costs is checked before its body is read, in this order: host and origin, rate, key, size, queue.
Plain ASGI, so that it costs microseconds. If the application fails, the client gets the standard error body, never a traceback;
the traceback goes to the log.
"""

from __future__ import annotations

import asyncio
import gzip
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.serving.access import Access
from twotower.serving.bodies import BodyError
from twotower.serving.clients import BYTES_PER_TOKEN, Clients, cost, retry_after, shortened
from twotower.serving.json_logs import FIELDS
from twotower.serving.prometheus import Meters
from twotower.serving.rate_limits import RateLimiter
from twotower.serving.refusals import error_body, too_large
from twotower.serving.response_headers import PREFLIGHT, Headers, accepts_gzip, added_headers
from twotower.serving.telemetry import RequestTrace, Telemetry
from twotower.utils.config_serving import Limits
from twotower.utils.console import log

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
WATCHING = ("/health/", "/metrics", "/page/")  # these have a rate of their own
REFUSALS = frozenset(
    ["rate", "unauthorized", "forbidden", "host", "origin", "too_large", "busy", "malformed", "timeout", "encoding"]
)
FAILED = 400  # statuses from here on
UNLOGGED = ("/health/", "/metrics")
ID_PREFIXES = ("/v1/items/", "/v1/users/")
COMPUTED = "/v1/recommend"
REFUSAL_DELAY_S = 0.05  # delay of a rejection, so that immediate retries do not take time from accepted requests
RATE_DELAY_S = 1.0  # the same for a client above its rate, which has to wait anyway
QUERY_BYTES_PER_TOKEN = 1024
REFUSAL_LINES_PER_S = 10.0  # log lines of refused requests; the rest is counted
UNTIMED_PREFIXES = ("/admin/", "/v1/events/export")  # loading a bundle has no time limit once the body has arrived
GZIP_FROM_BYTES = 2**10
GZIP_IN_THREAD_FROM_BYTES = 2**16  # compressing more would delay other requests


@dataclass(frozen=True, slots=True)
class Gate:
    """Interface of the server that the middleware uses.

    Attributes
    ----------
    overloaded
        Returns True if a client has so many requests in the queue that its next ones are rejected before they are read.
    log_clients, log_probes
        See `utils.config_serving.ServingConfig`.
    images
        Origin of images that the page may show beside its own; empty: none.
    """

    limits: Limits
    meters: Meters
    access: Access
    clients: Clients
    overloaded: Callable[[str], bool]
    log_clients: str = "full"
    log_probes: bool = False
    telemetry: Telemetry | None = None
    images: str = ""

    def shown(self, client: str) -> dict[str, str]:
        """Return what a log line says of a client."""
        if self.log_clients == "none" or not client:
            return {}
        return {"client": shortened(client) if self.log_clients == "shortened" else client}


class RequestMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app, self.gate, self.limits = app, gate, gate.limits
        self._lines = RateLimiter(REFUSAL_LINES_PER_S, REFUSAL_LINES_PER_S, most_clients=1)
        self._left_out = 0  # refusals without a log line since the last one

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        passage = _Passage(scope, receive, send, self.gate)
        if self.gate.telemetry is not None and not passage.path.startswith(WATCHING):
            passage.trace = self.gate.telemetry.request(passage.method, passage.head)
        try:
            if not await self._refused(passage):
                await self._within(
                    passage, self.limits.request_s, patient=passage.path.startswith(UNTIMED_PREFIXES) or passage.method == "DELETE"
                )
        except ClientDisconnect:  # the response is only for the log
            await passage.refuse(400, "malformed", "The connection was closed before the end of the body.")
        except Exception as error:
            passage.crash = error
            await passage.refuse(500, "internal", "Internal server error. The server log has the details under this request id.")
        finally:
            self._note(passage)

    async def _refused(self, passage: _Passage) -> bool:
        """Refuse a request for what its head says. Return True if it has been answered."""
        gate, path, head, client = self.gate, passage.path, passage.head, passage.client
        host, origin = _text(head, b"host"), _text(head, b"origin")
        if await passage.preflight(gate.access.origins):
            return True
        denial = gate.access.host_denial(path, host) or gate.access.origin_denial(passage.method, origin, host)
        if denial is not None:
            await passage.refuse(denial.status, denial.code, denial.text)
            return True
        rates = gate.clients.watching if path.startswith(WATCHING) else gate.clients.rates
        wait = rates.wait_s(client, cost(passage.length) + len(passage.scope["query_string"]) // QUERY_BYTES_PER_TOKEN)
        if wait:
            await asyncio.sleep(RATE_DELAY_S)
            text = f"Too many requests: at most {rates.rate:g} per second. Try again later."
            await passage.refuse(429, "rate", text, wait)
            return True
        denial = gate.access.denial(path, _text(head, b"authorization"), passage.method)
        if denial is not None:
            await passage.refuse(denial.status, denial.code, denial.text)
        elif passage.length > self.limits.body_bytes:
            await passage.refuse(413, "too_large", too_large(self.limits.body_bytes))
        elif gate.clients.crowded(client):
            await passage.refuse(429, "rate", "This client reads its responses too slowly. Read them first.", 1.0)
        elif path.startswith(COMPUTED) and gate.overloaded(client):
            await asyncio.sleep(REFUSAL_DELAY_S)
            await passage.refuse(503, "busy", "The server is overloaded. Try again later.", 1.0)
        else:
            return False
        return True

    async def _within(self, passage: _Passage, seconds: float, *, patient: bool) -> None:
        """Run the application and cancel it after `seconds`. If `patient`, the limit covers only the arrival of the body."""
        task, late = asyncio.current_task(), False
        assert task is not None

        def stop() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = asyncio.get_running_loop().call_later(seconds, stop)
        if patient and passage.bodiless:
            timer.cancel()
        passage.on_arrival = timer.cancel if patient else None
        passage.on_answer = timer.cancel
        try:
            await self.app(passage.scope, passage.receive, passage.send)
        except asyncio.CancelledError:
            if not late:
                raise
            if hasattr(task, "uncancel"):
                task.uncancel()
            await passage.refuse(
                408, "timeout", f"The request took longer than {seconds:g} seconds. Send less at once or try again later."
            )
        finally:
            timer.cancel()

    def _note(self, passage: _Passage) -> None:
        """Count, log and trace a finished request."""
        took, route = time.perf_counter() - passage.began, getattr(passage.scope.get("route"), "path", "other")
        self.gate.meters.request(route, passage.status, took)
        code = passage.scope["state"].get("code")
        if code:
            self.gate.meters.error(code)
        # Log the route, not the path: paths contain user ids.
        fields = {
            "request_id": passage.request_id,
            "method": passage.method,
            "route": route,
            "status": passage.status,
            "took_ms": round(1000 * took, 3),
            **self.gate.shown(passage.client),
            **({"code": code} if code else {}),
        }
        if passage.crash is not None:
            log.error("failed", exc_info=passage.crash, extra={FIELDS: fields})
        elif code in REFUSALS and self._lines.wait_s(""):
            self._left_out += 1
        elif self.gate.log_probes or not passage.path.startswith(UNLOGGED) or passage.status >= FAILED:
            more, self._left_out = {"left_out": self._left_out} if self._left_out else {}, 0
            log.info("answered", extra={FIELDS: fields | more})
        if passage.trace is not None:
            given = {"request_id": passage.request_id, "code": code, "crash": passage.crash}
            passage.trace.end(route=route, status=passage.status, seconds=took, **given)


class _Passage:
    """One request in progress: counts the bytes of the body and adds headers to the response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, gate: Gate) -> None:
        self.began = time.perf_counter()
        self.scope, self._receive, self._send, self._gate = scope, receive, send, gate
        self.method, self.path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
        self.head = head = dict(scope["headers"])
        forwarded = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        peer = (scope.get("client") or ("",))[0]
        self.client = gate.clients.behind(peer, forwarded)
        if head.get(b"x-forwarded-proto") == b"https" and gate.clients.trusts(peer):
            scope["scheme"] = "https"
        given = head.get(b"x-request-id", b"")
        self.request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        length = head.get(b"content-length", b"")
        self.length = int(length) if length.isdigit() else 0
        self.bodiless = not self.length and b"transfer-encoding" not in head
        self.status, self._read = 0, 0
        self.crash: Exception | None = None
        self.trace: RequestTrace | None = None
        self.on_arrival: Callable[[], None] | None = None
        """Called when the whole body has arrived."""
        self.on_answer: Callable[[], None] | None = None
        """Called when the response begins."""
        self._start: Message | None = None
        scope["state"] = {
            **scope.get("state", {}),
            "request_id": self.request_id,
            "began": self.began,
            "client": self.client,
            "asks_for": lambda requests: gate.clients.rates.charge(self.client, requests - 1),
        }
        if self.path.startswith(ID_PREFIXES) and scope.get("raw_path"):  # ids keep their encoded slashes until a route has them
            scope["path"] = scope.get("root_path", "") + scope["raw_path"].decode("ascii", "replace")
        if self.method == "HEAD":  # every GET route answers HEAD, without a body
            scope["method"] = "GET"

    async def receive(self) -> Message:
        """Return the next part of the body. Raise 413 if the body exceeds its limit."""
        message = await self._receive()
        size = len(message.get("body", b""))
        self._read += size
        if self._read > self._gate.limits.body_bytes:
            raise BodyError(too_large(self._gate.limits.body_bytes), status=413, code="too_large")
        if not self.length:  # chunks are charged as they arrive
            self._gate.clients.rates.charge(self.client, size / BYTES_PER_TOKEN)
        if self.on_arrival is not None and not message.get("more_body", False):
            self.on_arrival()
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response. The head waits for the first part of the body, which may be compressed."""
        if message["type"] == "http.response.start":
            self.status, self._start = message["status"], message
            message["headers"] = [*message["headers"], *self._headers(message["headers"])]
            return
        if self._start is not None:
            if self.on_answer is not None:
                self.on_answer()
            start, self._start = self._start, None
            if not message.get("more_body", False):
                message = await self._compressed(start, message)
            await self._send(start)
        if self.method == "HEAD":
            message = {**message, "body": b""}
        await self._send(message)

    async def _compressed(self, start: Message, message: Message) -> Message:
        """Return the body compressed if the client accepts that and it pays, with the headers of `start` changed to match."""
        body, headers = message.get("body", b""), dict(start["headers"])
        kind = headers.get(b"content-type", b"")
        if len(body) < GZIP_FROM_BYTES or b"content-encoding" in headers or not kind.startswith((b"application/json", b"text/")):
            return message
        start["headers"].append((b"vary", b"accept-encoding"))
        if not accepts_gzip(self.head.get(b"accept-encoding", b"")):
            return message
        if len(body) < GZIP_IN_THREAD_FROM_BYTES:
            small = gzip.compress(body, 1, mtime=0)
        else:
            small = await asyncio.to_thread(gzip.compress, body, 1, mtime=0)
        kept = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        start["headers"] = [*kept, (b"content-encoding", b"gzip"), (b"content-length", b"%d" % len(small))]
        return {**message, "body": small}

    async def refuse(self, status: int, code: str, text: str, wait_s: float = 0.0) -> None:
        """Send an error response, unless a response has begun."""
        self.scope["state"]["code"] = code
        if self.status and self._start is None:
            return
        body = error_body(code, text, self.request_id)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"retry-after", retry_after(wait_s))] if wait_s else []
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def preflight(self, origins: frozenset[str]) -> bool:
        """Answer the question of a browser whether a page of another origin may call. Return True if it was one."""
        if self.method != "OPTIONS" or b"access-control-request-method" not in self.head:
            return False
        if _text(self.head, b"origin").lower() not in origins:
            return False
        await self.send({"type": "http.response.start", "status": 204, "headers": PREFLIGHT})
        await self.send({"type": "http.response.body", "body": b""})
        return True

    def _headers(self, present: Headers) -> Headers:
        own = [(b"x-request-id", self.request_id.encode()), *([self.trace.header] if self.trace else [])]
        return own + added_headers(
            present,
            images=self._gate.images,
            origins=self._gate.access.origins,
            origin=self.head.get(b"origin", b""),
            secure=self.scope["scheme"] == "https",
        )


def _text(head: dict[bytes, bytes], name: bytes) -> str:
    return head.get(name, b"").decode("latin-1").strip()
