"""Connections that keep a slow client from holding them: the head of a request must arrive in time, the first one's included, an
answer must be taken in time, and who only rests must go when many have come.

uvicorn waits without a bound for the first byte, for the rest of a head that has begun, and for a client to read; so many who send
or read nothing would take every connection, and the memory of their answers.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from twotower.serving.limits import Limits

CROWD_REST_S = 1  # a connection may rest when more than half of them are taken
MIN_READ_BYTES = 2**14  # bytes of an answer in `write_timeout_s`


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
    """uvicorn's protocol with these bounds in time; a connection that breaks one is closed."""
    return type("Punctual", (_Punctual,), {"limits": limits})
