"""Test timeouts with real sockets: clients that send nothing, send half of the headers or read nothing are disconnected."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from twotower.serving.http_timeouts import with_timeouts
from twotower.serving.limits import Limits

HEAD_S = 0.4
LIMITS = Limits(header_timeout_s=HEAD_S, write_timeout_s=0.4, connections=6)
LARGE = 20_000_000
ASKED = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def application(scope: Any, _receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        body = b"ok" if scope["path"] == "/" else bytes(LARGE)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application, http=with_timeouts(LIMITS), log_config=None, lifespan="off")
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


def test_an_unread_response_is_dropped_and_a_slowly_read_one_arrives(port: int) -> None:
    with connected(port) as idle, connected(port) as slow:
        for client in (idle, slow):
            client.sendall(ASKED.replace(b" / ", b" /large "))
        got, began = 0, time.perf_counter()
        while got < LARGE:  # for longer than an answer may wait unread
            time.sleep(0.02)
            got += len(slow.recv(400_000))
        assert time.perf_counter() - began > 2 * LIMITS.write_timeout_s
        with pytest.raises(OSError):  # what is left of it was thrown away
            while idle.recv(1_000_000):
                pass
            raise ConnectionResetError("closed before all had come")


def test_an_idle_connection_is_closed_when_more_than_half_are_taken(port: int) -> None:
    with ExitStack() as opened:
        resting = []
        for _ in range(4):
            resting.append(opened.enter_context(connected(port)))
            resting[-1].sendall(ASKED)
            assert resting[-1].recv(1000).startswith(b"HTTP/1.1 200")
        assert resting[-1].recv(100) == b"", "more than half of the connections were taken"
        resting[0].sendall(ASKED)
        assert resting[0].recv(1000).startswith(b"HTTP/1.1 200"), "who came before the crowd may rest"
