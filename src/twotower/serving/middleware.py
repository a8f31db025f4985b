"""Wrap every request: request id, limits of size, rate and time, security headers, one log line and metrics.

Plain ASGI, so that it costs microseconds. If the application fails, the client gets the standard error body, never a traceback;
the traceback goes to the log.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.serving.json_logs import FIELDS
from twotower.serving.limits import Limits, RateLimiter
from twotower.serving.prometheus import Meters
from twotower.utils.console import log

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
UNLIMITED = ("/health/", "/metrics", "/page/")  # health checks, metrics and static files have no rate limit
COMPUTED = "/v1/recommend"
REFUSAL_DELAY_S = 0.05  # delay of a rejection, so that immediate retries do not take time from accepted requests
UNTIMED_PREFIX = "/admin/"  # loading a bundle has no time limit once the body has arrived
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(self)"),
]
TRANSPORT = (b"strict-transport-security", b"max-age=31536000")
UNCACHED = (b"cache-control", b"no-store")


class RequestMiddleware:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    overloaded
        Returns True if the queue is so long that requests should be rejected before they are read.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, meters: Meters, overloaded: Callable[[], bool]) -> None:
        self.app, self.limits, self.meters, self.overloaded = app, limits, meters, overloaded
        self.rates = RateLimiter(limits.rate, limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        passage, client = _Passage(scope, receive, send, self.limits.body_bytes), (scope.get("client") or ("",))[0]
        scope["state"]["asks_for"] = lambda requests: self.rates.charge(client, requests - 1)
        try:
            wait = 0.0 if scope["path"].startswith(UNLIMITED) else self.rates.wait_s(client)
            if wait:
                await passage.refuse(
                    429, "rate", f"Too many requests: at most {self.limits.rate:g} per second. Try again later.", wait
                )
            elif passage.length > self.limits.body_bytes:
                await passage.refuse(413, "too_large", too_large(self.limits.body_bytes))
            elif scope["path"].startswith(COMPUTED) and self.overloaded():
                await asyncio.sleep(REFUSAL_DELAY_S)
                await passage.refuse(503, "busy", "The server is overloaded. Try again later.", 1.0)
            else:
                await self._within(passage, self.limits.request_s, patient=scope["path"].startswith(UNTIMED_PREFIX))
        except Exception as error:
            passage.crash = error
            await passage.refuse(500, "internal", "Internal server error. The server log has the details under this request id.")
        finally:
            self._note(passage)

    async def _within(self, passage: _Passage, seconds: float, *, patient: bool) -> None:
        """Run the application and cancel it after `seconds`. If `patient`, the limit covers only the arrival of the body."""
        task, late = asyncio.current_task(), threading.Event()
        assert task is not None

        def stop() -> None:
            late.set()
            task.cancel()

        timer = asyncio.get_running_loop().call_later(seconds, stop)
        passage.on_arrival = timer.cancel if patient else None
        try:
            await self.app(passage.scope, passage.receive, passage.send)
        except asyncio.CancelledError:
            if not late.is_set():
                raise
            if hasattr(task, "uncancel"):
                task.uncancel()
            await passage.refuse(
                408, "timeout", f"The request took longer than {seconds:g} seconds. Send less at once or try again later."
            )
        finally:
            timer.cancel()

    def _note(self, passage: _Passage) -> None:
        took, route = time.perf_counter() - passage.began, getattr(passage.scope.get("route"), "path", "other")
        self.meters.request(route, passage.status, took)
        code = passage.scope["state"].get("code")
        if code:
            self.meters.error(code)
        # Log the route, not the path: paths contain user ids.
        fields = {
            "request_id": passage.request_id,
            "method": passage.scope["method"],
            "route": route,
            "status": passage.status,
            "took_ms": round(1000 * took, 3),
            **({"code": code} if code else {}),
        }
        if passage.crash is not None:
            log.error("failed", exc_info=passage.crash, extra={FIELDS: fields})
        else:
            log.info("answered", extra={FIELDS: fields})


class _Passage:
    """One request in progress: counts the bytes of the body and adds headers to the response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most_bytes: int) -> None:
        self.began = time.perf_counter()
        self.scope, self._receive, self._send, self._most_bytes = scope, receive, send, most_bytes
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        length = headers.get(b"content-length", b"")
        self.length = int(length) if length.isdigit() else 0
        self.status, self._read = 0, 0
        self.crash: Exception | None = None
        self.on_arrival: Callable[[], None] | None = None
        """Called when the whole body has arrived."""
        scope["state"] = {**scope.get("state", {}), "request_id": self.request_id, "began": self.began}

    async def receive(self) -> Message:
        """Return the next part of the body. Raise 413 if the body exceeds its limit."""
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._most_bytes:
            raise HTTPException(413, too_large(self._most_bytes))
        if self.on_arrival is not None and not message.get("more_body", False):
            self.on_arrival()
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *self._headers(message["headers"])]
        await self._send(message)

    async def refuse(self, status: int, code: str, text: str, wait_s: float = 0.0) -> None:
        """Send an error response, unless a response has begun."""
        self.scope["state"]["code"] = code
        if self.status:
            return
        body = error_body(code, text, self.request_id)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"retry-after", b"%d" % max(1, math.ceil(wait_s)))] if wait_s else []
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def _headers(self, present: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        added = [*HEADERS, (b"x-request-id", self.request_id.encode())]
        if self.scope["scheme"] == "https":
            added.append(TRANSPORT)
        return added if any(name == b"cache-control" for name, _ in present) else [*added, UNCACHED]


def error_body(code: str, message: str, request_id: str, location: Any = None) -> bytes:
    """Return the standard error body as JSON."""
    error = {"code": code, "message": message} | ({} if location is None else {"location": location})
    return to_json({"error": error, "request_id": request_id})


def too_large(most_bytes: int) -> str:
    """Return the message for a body that is too large."""
    return f"The request body is too large: at most {most_bytes:,} bytes are allowed. Send less at once."
