"""Test that connections are accepted at a bounded cost, and that a failure does not end it."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

import pytest

from twotower.serving.acceptor import ADMITTED, TURNED_AWAY, Acceptor


def _waiting(listening: socket.socket, count: int) -> list[socket.socket]:
    """Return clients whose connections wait in the queue of a listening socket."""
    listening.bind(("127.0.0.1", 0))
    listening.listen(count)
    listening.setblocking(False)
    return [socket.create_connection(listening.getsockname()) for _ in range(count)]


@pytest.mark.parametrize("admitted, cost", [(True, ADMITTED), (False, TURNED_AWAY)])
def test_open_connections_get_their_turn_and_of_a_flood_one_client_is_told_in_each(admitted: bool, cost: float) -> None:
    turns: list[list[bool]] = []

    def take(accepted: socket.socket, host: str, tell: bool) -> bool:
        assert host == "127.0.0.1" and not accepted.getblocking()
        accepted.close()
        turns[-1].append(tell)
        return admitted

    async def run() -> None:
        acceptor = Acceptor(asyncio.get_running_loop(), take, lambda text, error: pytest.fail(text % error))
        with socket.socket() as listening:
            clients = _waiting(listening, 500)
            acceptor.start([listening])
            while sum(map(len, turns)) < len(clients):
                turns.append([])
                await asyncio.sleep(0)
            acceptor.stop()
        for client in clients:
            client.close()

    asyncio.run(run())
    busy = [turn for turn in turns if turn]
    assert max(map(len, busy)) <= 1 / cost + 1
    assert all(all(turn) if admitted else turn == [True] + [False] * (len(turn) - 1) for turn in busy)


class _Failing(socket.socket):
    """A listening socket on which the first calls fail."""

    errors: tuple[int, ...] = ()

    def accept(self) -> tuple[socket.socket, object]:
        if self.errors:
            first, *self.errors = self.errors  # type: ignore[assignment]
            raise OSError(first, "made up")
        return super().accept()


def test_without_descriptors_accepting_goes_on_later_and_a_defect_closes_one_connection() -> None:
    told: list[str] = []
    served: list[Callable[[], None]] = []

    def take(accepted: socket.socket, *_: object) -> bool:
        if not served:
            served.append(accepted.close)
            raise ValueError("a defect")
        served.append(accepted.close)
        return True

    async def run() -> None:
        acceptor = Acceptor(asyncio.get_running_loop(), take, lambda text, error: told.append(text % error))
        with _Failing() as listening:
            clients = _waiting(listening, 2)
            listening.errors = (errno.ECONNABORTED, errno.EMFILE)
            acceptor.start([listening])
            while len(served) < 2:
                await asyncio.sleep(0.01)
            assert clients[0].recv(1) == b"", "the one with the defect is closed"
            acceptor.stop()
        for client in clients:
            client.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert len(told) == 1 and "cannot accept connections" in told[0]
    for close in served:
        close()
