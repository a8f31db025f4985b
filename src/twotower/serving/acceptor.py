"""Accept connections between two turns of the event loop, at a bounded cost."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence

from twotower.utils.console import log

ADMITTED, TURNED_AWAY = 0.03, 0.005  # a connection's share of what is accepted between two turns of the event loop, 2 ms or so
AGAIN_S = 0.1


class Acceptor:
    """Accepts the connections of listening sockets.

    In a flood, thousands of connections wait in the queue of the kernel, and those of other clients wait behind them. So the
    connections are accepted in a row without the event loop. It costs more to tell a client that it was turned away than all else,
    so one is told between two turns, and the others are closed at once.

    Parameters
    ----------
    take
        `take(connection, host, tell)` admits a connection, or closes it and returns False; `tell`: after a response.
    complain
        Writes a warning.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        take: Callable[[socket.socket, str, bool], bool],
        complain: Callable[[str, OSError], None],
    ) -> None:
        self._loop, self._take, self._complain = loop, take, complain
        self._sockets: list[socket.socket] = []
        self._waiting: dict[socket.socket, asyncio.TimerHandle] = {}

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accept the connections of sockets that listen."""
        self._sockets = list(sockets)
        for listening in sockets:
            self._go_on(listening)

    def stop(self) -> None:
        """Accept nothing more; the sockets stay open."""
        for listening in self._sockets:
            self._loop.remove_reader(listening)
            if listening in self._waiting:
                self._waiting.pop(listening).cancel()
        self._sockets = []

    def _go_on(self, listening: socket.socket) -> None:
        self._waiting.pop(listening, None)
        self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        left, tell = 1.0, True
        while left > 0:
            try:
                accepted, address = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                self._complain("cannot accept connections: %s", error)  # such as no descriptors left
                self._loop.remove_reader(listening)
                self._waiting[listening] = self._loop.call_later(AGAIN_S, self._go_on, listening)
                return
            accepted.setblocking(False)
            try:
                admitted = self._take(accepted, address[0] if isinstance(address, tuple) else "", tell)
            except Exception:  # a defect must not end the server
                log.exception("a connection failed")
                accepted.close()
                continue
            left -= ADMITTED if admitted else TURNED_AWAY
            tell = tell and admitted
