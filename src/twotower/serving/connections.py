"""Connections that keep a slow client from holding them: the head of a request must arrive in time, the first one's included.

uvicorn waits without a bound for the first byte, and for the rest of a head that has begun; so many who send nothing would take
every connection that others could have.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def punctual(head_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which closes a connection whose next head is not there `head_s` seconds after it was opened or begun."""

    class Punctual(HttpToolsProtocol):
        head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            if self.head_timer is None:
                self._await_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_is_there()
            super().on_headers_complete()

        def _await_head(self) -> None:
            self.head_timer = self.loop.call_later(head_s, self._too_slow)

        def _head_is_there(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def _too_slow(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return Punctual
