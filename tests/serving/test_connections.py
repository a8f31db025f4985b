"""Real sockets: who sends nothing, or half of a head, is let go of; who rests between requests is not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from twotower.serving.connections import punctual

HEAD_S = 0.4
ASKED = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def application(scope: Any, _receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application, http=punctual(HEAD_S), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


@pytest.mark.parametrize("sent", [b"", ASKED[:20]], ids=["nothing", "half a head"])
def test_a_head_that_does_not_come_ends_the_connection(port: int, sent: bytes) -> None:
    began = time.perf_counter()
    with connected(port) as client:
        client.sendall(sent)
        assert client.recv(100) == b""
    assert HEAD_S * 0.9 <= time.perf_counter() - began < 5


def test_a_connection_may_rest_between_requests_and_not_within_a_head(port: int) -> None:
    with connected(port) as client:
        for rest in (0, 2 * HEAD_S):
            time.sleep(rest)
            client.sendall(ASKED)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(ASKED[:20])
        assert client.recv(100) == b""
