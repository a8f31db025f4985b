"""Close the connections of slow clients: request headers must arrive in time, responses must be read in time, idle ones end early.

uvicorn waits without a limit for the first byte, for the rest of the headers, and for the client to read. Clients that send or
read nothing could therefore occupy all connections, and the memory of their responses.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from twotower.serving.limits import Limits

CROWD_REST_S = 1  # keep-alive time when more than half of the connections are in use
MIN_READ_BYTES = 2**14  # bytes of a response that a client must read in `write_timeout_s`


class _Punctual(HttpToolsProtocol):
    limits: Limits
    head_timer: asyncio.TimerHandle | None = None
    taken_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        self._is_taken()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        if self.head_timer is None:
            self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_there()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        crowd = len(self.connections) > self.limits.connections // 2
        self.timeout_keep_alive = CROWD_REST_S if crowd else self.limits.keep_alive_s
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._is_taken()
        super().resume_writing()

    def _await_head(self) -> None:
        self.head_timer = self.loop.call_later(self.limits.header_timeout_s, self._too_slow)

    def _head_is_there(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _await_reading(self, waiting: int) -> None:
        self.taken_timer = self.loop.call_later(self.limits.write_timeout_s, self._unread, waiting)

    def _unread(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if before - waiting < MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._await_reading(waiting)

    def _is_taken(self) -> None:
        if self.taken_timer is not None:
            self.taken_timer.cancel()
            self.taken_timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def with_timeouts(limits: Limits) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol class with these timeouts. A connection that exceeds one is closed."""
    return type("Punctual", (_Punctual,), {"limits": limits})
