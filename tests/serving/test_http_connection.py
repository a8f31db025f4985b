"""Test the bounds of connections with real sockets and short limits: what arrives, how long it takes, and how many there are."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvloop

from twotower.serving.clients import Clients
from twotower.serving.http_server import WATCHING_PER_CLIENT, HttpServer
from twotower.serving.listening import bound_sockets
from twotower.utils.config_serving import Limits

pytestmark = pytest.mark.alone
LARGE = 20_000_000
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\n"
SHORT = Limits(
    header_timeout_s=0.4, write_timeout_s=1.5, keep_alive_s=1, linger_s=0.3, connections=12, connections_per_client=8,
    reserved_connections=2, body_bytes=100_000, held_bytes_per_client=150_000, drain_delay_s=0.2, drain_s=1.0,
)  # fmt: skip


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Respond by path: /large many bytes, /slow late, /unread without reading the body, else the body."""
    body, more = b"", scope["path"] != "/unread"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    if scope["path"].endswith("/slow"):
        await asyncio.sleep(0.6)
    body = bytes(LARGE) if scope["path"] == "/large" else body or b"ok"
    headers = [] if scope["path"] == "/stream" else [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"one,", "more_body": True})
        body = b"two"
    await send({"type": "http.response.body", "body": body})


class Running:
    """A server in a thread."""

    port: int
    server: HttpServer

    def __init__(self, limits: Limits, app: Any = application, **options: Any) -> None:
        self.app, self.options = app, options
        self.limits, self.ready, self.codes = limits, threading.Event(), list[str]()
        self.thread = threading.Thread(target=uvloop.run, args=(self._run(),), daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    async def _run(self) -> None:
        sockets = bound_sockets("127.0.0.1", 0)
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        self.server = HttpServer(self.app, self.limits, Clients(self.limits), on_refusal=self.codes.append, **self.options)
        self.port = sockets[0].getsockname()[1]
        self.loop.call_soon(self.ready.set)
        await self.server.serve(sockets, self.stop, delay=lambda: True)

    def end(self) -> None:
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10, (source, 0))

    def ask(self, raw: bytes, source: str = "127.0.0.1") -> tuple[int, bytes]:
        with self.connect(source) as client:
            client.sendall(raw)
            return answer_of(client)


@contextmanager
def running(limits: Limits = SHORT, app: Any = application, **options: Any) -> Iterator[Running]:
    server = Running(limits, app, **options)
    try:
        yield server
    finally:
        server.end()
        server.thread.join(10)
        assert not server.thread.is_alive()


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def everything(client: socket.socket) -> bytes:
    """Return all that comes until the server closes."""
    parts = []
    try:
        while part := client.recv(65_536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def answer_of(client: socket.socket) -> tuple[int, bytes]:
    """Return status and body of one response with a length."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        part = client.recv(65_536)
        assert part, f"closed after {raw!r}"
        raw += part
    head, _, body = raw.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(65_536)
    return int(head[9:12]), body


def seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


@pytest.mark.parametrize("sent", [b"", GET[:20], b"\r\n"], ids=["nothing", "half a head", "line break"])
def test_a_head_that_does_not_come_ends_the_connection(server: Running, sent: bytes) -> None:
    with server.connect() as client:
        client.sendall(sent)
        assert 0.3 <= seconds(lambda: everything(client)) < 5


def test_a_head_that_comes_byte_by_byte_ends_the_connection(server: Running) -> None:
    for before in (b"", GET):
        with server.connect() as client:
            client.sendall(before)
            if before:
                answer_of(client)
            began = time.perf_counter()
            with pytest.raises(OSError):
                while time.perf_counter() < began + 5:
                    client.sendall(b"a")
                    time.sleep(0.05)
            assert time.perf_counter() - began < 3


TOO_MUCH = {
    "one header": (431, b"GET / HTTP/1.1\r\nhost: x\r\na: ", b"a" * 65_536),
    "many headers": (431, b"GET / HTTP/1.1\r\nhost: x\r\n", b"".join(b"h%05d: x\r\n" % n for n in range(5000))),
    "target": (414, b"GET /", b"a" * 65_536),
    "query": (414, b"GET /?q=", b"a" * 65_536),
    "method": (400, b"", b"A" * 65_536),
    "trailers": (
        413,
        POST + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n",
        b"".join(b"h%05d: x\r\n" % n for n in range(5000)),
    ),
    "one trailer": (413, POST + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\na: ", b"a" * 65_536),
    "tiny chunks": (413, POST + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 10_000),
    "chunk extension": (413, POST + b"transfer-encoding: chunked\r\n\r\n1;", b"a" * 65_536),
    "chunk extensions": (413, POST + b"transfer-encoding: chunked\r\n\r\n", b"1;ext=" + b"a" * 500 + b"\r\nx\r\n"),
    "body": (429, POST + b"content-length: 1000000000\r\n\r\n", b"a" * 65_536),
    "chunks": (429, POST + b"transfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b"a" * 65_536 + b"\r\n"),
}


@pytest.mark.parametrize(("status", "begin", "more"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_arrives_is_bounded(server: Running, status: int, begin: bytes, more: bytes) -> None:
    with server.connect() as client:
        sent = 0
        try:
            client.sendall(begin)
            for _ in range(1000):
                client.sendall(more)
                sent += len(more)
        except OSError:
            pass
        assert sent < 20_000_000
        with ExitStack() as stack:
            stack.callback(lambda: None)
            raw = b""
            try:
                raw = client.recv(65_536)
            except ConnectionResetError:  # the client went on for so long that the refusal was lost
                assert sent > 1_000_000
        assert not raw or int(raw[9:12]) == status, raw
    assert server.ask(GET)[0] == 200
    assert server.codes


MALFORMED = {
    "two lengths": POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "length and chunks": POST + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "old version": b"GET /\r\n\r\n",
    "no version of HTTP": b"GET / HTTP/1.5\r\nhost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "not a path": b"GET http://other/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "a proxy's": b"CONNECT other:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    "path of no text": b"GET /%ff HTTP/1.1\r\nhost: x\r\n\r\n",
    "space in a header": b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
    "folded": b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n c: d\r\n\r\n",
    "zero in a header": b"GET / HTTP/1.1\r\nhost: x\r\na: \x00\r\n\r\n",
    "chunk of no size": POST + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
    "bare line feeds": b"GET / HTTP/1.1\nhost: x\n\n",
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_a_mistake_of_the_protocol_is_answered_as_json_with_a_request_id(server: Running, raw: bytes) -> None:
    with server.connect() as client:
        client.sendall(raw)
        said = everything(client)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 505 ")) and b"connection: close" in head, said
    answer = json.loads(body)
    assert answer["error"]["code"] == "malformed" and answer["request_id"].encode() in head


def test_after_a_refusal_the_connection_ends_whatever_comes(server: Running) -> None:
    for more in (b"", b" "):
        with server.connect() as client:
            client.sendall(POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n")
            answer_of(client)
            client.sendall(more)
            assert seconds(lambda: everything(client)) < 3
    with server.connect() as client:
        client.sendall(b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\na")
        assert answer_of(client)[0] == 200
        assert seconds(lambda: everything(client)) < 3, "a body that is not read"


def test_an_idle_connection_ends(server: Running) -> None:
    with server.connect() as client:
        client.sendall(GET)
        answer_of(client)
        assert 0.8 < seconds(lambda: everything(client)) < 5


def test_requests_of_one_connection_are_answered_in_turn(server: Running) -> None:
    bodies = [b"%03d" % number for number in range(300)]
    with server.connect() as client:
        threading.Thread(
            target=client.sendall, args=(b"".join(POST + b"content-length: 3\r\n\r\n" + one for one in bodies),)
        ).start()
        raw = b""
        while raw.count(b"HTTP/1.1 200") < len(bodies) or not raw.endswith(bodies[-1]):
            part = client.recv(65_536)
            assert part
            raw += part
    assert [part.partition(b"\r\n\r\n")[2] for part in raw.split(b"HTTP/1.1 200 OK")[1:]] == bodies


def test_pieces_of_any_size_make_the_same_request(server: Running) -> None:
    body = bytes(range(256)) * 40
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5000], body[5000:])) + b"0\r\na: b\r\n\r\n"
    for raw in (POST + b"content-length: %d\r\n\r\n" % len(body) + body, POST + b"transfer-encoding: chunked\r\n\r\n" + chunked):
        for size in (7, 64, len(raw)):
            with server.connect() as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for at in range(0, len(raw), size):
                    client.sendall(raw[at : at + size])
                assert answer_of(client) == (200, body), size


def test_a_client_that_closes_its_side_gets_its_answers(server: Running) -> None:
    with server.connect() as client:
        client.sendall(GET.replace(b"/ ", b"/slow ") + GET)
        client.shutdown(socket.SHUT_WR)
        began = time.perf_counter()
        assert everything(client).count(b"HTTP/1.1 200 OK") == 2 and time.perf_counter() - began < 0.9 + SHORT.header_timeout_s


def test_a_client_that_expects_100_gets_continue(server: Running) -> None:
    with server.connect() as client:
        client.sendall(POST + b"content-length: 2\r\nexpect: 100-continue\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"hi")
        assert answer_of(client) == (200, b"hi")


def test_an_upgrade_request_is_answered_without_the_upgrade(server: Running) -> None:
    for upgrade in (b"websocket", b"h2c"):
        raw = POST + b"connection: upgrade\r\nupgrade: %b\r\ncontent-length: 2\r\n\r\nhi" % upgrade
        with server.connect() as client:
            client.sendall(raw)
            assert answer_of(client) == (200, b"hi")
            chunks = raw.replace(b"content-length: 2", b"transfer-encoding: chunked").replace(b"hi", b"2\r\nho\r\n0\r\n\r\n")
            client.sendall(chunks)
            assert answer_of(client) == (200, b"ho")
            client.sendall(GET.replace(b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"))
            assert answer_of(client) == (200, b"ok")


def test_a_response_without_a_length_comes_in_chunks_or_ends_with_the_connection(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert everything(client).endswith(b"\r\n\r\n4\r\none,\r\n3\r\ntwo\r\n0\r\n\r\n")
    with server.connect() as client:
        client.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        said = everything(client)
        assert said.endswith(b"\r\n\r\none,two") and b"connection: close" in said


def test_a_client_that_does_not_read_loses_its_connection_and_one_that_reads_does_not(server: Running) -> None:
    with server.connect() as lazy:
        lazy.sendall(GET.replace(b"/ ", b"/large "))
        with server.connect() as client:
            client.sendall(GET.replace(b"/ ", b"/large "))
            assert len(answer_of(client)[1]) == LARGE
        end = time.monotonic() + 10
        while server.server.open and time.monotonic() < end:
            time.sleep(0.05)
        assert not server.server.open and server.server.clients.held_bytes == 0
        assert len(everything(lazy)) < LARGE


def test_connections_are_bounded_by_client_and_health_is_answered_when_all_are_taken(server: Running) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(server.connect()) for _ in range(8)]
        status, body = server.ask(GET)
        assert status == 429 and b"at most 8" in body
        assert server.ask(GET.replace(b"/ ", b"/health/live "))[0] == 200, "even for this client"
        assert server.ask(GET, "127.0.0.2")[0] == 200, "others are not affected"
        held += [stack.enter_context(server.connect("127.0.0.3")) for _ in range(4)]
        for _ in range(3):
            assert server.ask(GET.replace(b"/ ", b"/health/live "), "127.0.0.2")[0] == 200
            status, body = server.ask(GET, "127.0.0.2")
            assert status == 503 and b"too many connections" in body
        silent = [stack.enter_context(server.connect("127.0.0.4")) for _ in range(4)]
        assert server.ask(GET.replace(b"/ ", b"/metrics "), "127.0.0.2")[0] == 200, "though the reserve was full, too"
        assert silent
    end = time.monotonic() + 10
    while server.ask(GET, "127.0.0.2")[0] != 200:
        assert time.monotonic() < end
    assert not server.server.clients._connections or server.server.open


def test_requests_of_a_client_in_progress_are_bounded_and_others_wait_unread() -> None:
    with running(SHORT.model_copy(update={"running_per_client": 1})) as server, ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(6)]
        for client in slow:
            client.sendall(GET.replace(b"/ ", b"/slow "))
        slow.pop().close()  # one that waits and goes takes no turn
        began = time.perf_counter()
        assert server.ask(GET, "127.0.0.2")[0] == 200 and server.server._lines, "others do not wait"
        assert server.ask(GET.replace(b"/ ", b"/health/live "))[0] == 200 and server.server._lines, "nor do health checks"
        assert [answer_of(client)[0] for client in slow] == [200] * 5
        assert time.perf_counter() - began > 1.5, "one after the other"
        end = time.monotonic() + 5
        while server.server._running or server.server._lines:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_the_requests_in_progress_are_shared_between_clients() -> None:
    most = {"running_per_client": 6, "connections": 60, "connections_per_client": 20}
    with running(SHORT.model_copy(update=most)) as server, ExitStack() as stack:

        def send(address: str, count: int) -> None:
            for _ in range(count):
                stack.enter_context(server.connect(address)).sendall(GET.replace(b"/ ", b"/slow "))

        def becomes(expected: dict[str, int]) -> bool:
            end = time.monotonic() + 5
            while server.server._running != expected and time.monotonic() < end:
                time.sleep(0.005)
            return server.server._running == expected

        send("127.0.0.2", 16)
        assert becomes({"127.0.0.2": 6}), "alone"
        send("127.0.0.3", 12)
        assert becomes({"127.0.0.2": 3, "127.0.0.3": 3})
        send("127.0.0.4", 6), send("127.0.0.5", 6)
        assert becomes({f"127.0.0.{number}": 2 for number in (2, 3, 4, 5)}), "at least two"
        assert becomes({}) and not server.server._lines


def test_a_response_that_a_client_does_not_read_holds_up_none_of_its_other_requests() -> None:
    limits = SHORT.model_copy(update={"running_per_client": 1, "held_bytes_per_client": 2 * LARGE, "write_timeout_s": 5})
    with running(limits) as server, server.connect() as unread:
        unread.sendall(GET.replace(b"/ ", b"/large "))
        assert unread.recv(1)
        began = time.perf_counter()
        assert server.ask(GET)[0] == 200 and time.perf_counter() - began < 2
        assert not server.server._running


def test_health_checks_of_a_client_are_bounded_apart_from_its_other_requests() -> None:
    limits = SHORT.model_copy(update={"connections": 30, "connections_per_client": 20})
    with running(limits) as server, ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(2 * WATCHING_PER_CLIENT + 1)]
        for client in slow:
            client.sendall(GET.replace(b"/ ", b"/health/slow "))
        began = time.perf_counter()
        assert server.ask(GET)[0] == 200 and server.ask(GET.replace(b"/ ", b"/metrics "), "127.0.0.2")[0] == 200
        assert server.server._lines, "neither other requests of the client nor health checks of others wait"
        assert [answer_of(client)[0] for client in slow] == [200] * len(slow)
        assert time.perf_counter() - began > 1.5, "one after the other"


def test_the_longest_idle_connection_gives_way(server: Running) -> None:
    with ExitStack() as stack:
        for source in ("127.0.0.1", "127.0.0.2"):
            for _ in range(6):
                client = stack.enter_context(server.connect(source))
                client.sendall(GET)
                answer_of(client)
        assert server.ask(GET, "127.0.0.3")[0] == 200


def test_stopping_answers_what_is_in_progress_and_ends_in_time() -> None:
    with running() as server, server.connect() as idle, server.connect() as slow, server.connect() as hanging:
        idle.sendall(GET)
        answer_of(idle)
        hanging.sendall(POST + b"content-length: 5\r\n\r\na")
        began = time.perf_counter()
        server.end()
        while not server.server.stopping:
            time.sleep(0.01)
        slow.sendall(GET.replace(b"/ ", b"/slow "))
        assert server.ask(GET)[0] == 200, "for a moment it goes on"
        assert answer_of(slow)[0] == 200 and everything(idle) == b""
        server.thread.join(10)
        assert 0.5 < time.perf_counter() - began < 5
        with pytest.raises(ConnectionRefusedError):
            server.connect()
