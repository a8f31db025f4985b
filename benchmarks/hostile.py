"""Define the attacks of `serving_attacks.py`: each is one hostile client on 127.0.0.1, without a key, for a limited time."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

HOSTILE = "127.0.0.1"
HEAD = b"host: localhost\r\ncontent-type: application/json\r\n"
Attack = Callable[[int, float], None]
ATTACKS: dict[str, Attack] = {}


KINDS = {
    "input without end": (
        *("endless_header", "endless_headers", "endless_target", "endless_trailers", "slow_trailers"),
        *("tiny_chunks", "chunk_extensions"),
    ),
    "held connections": ("held_bodies", "held_after_refusals", "slow_heads", "slow_bodies", "silent_connections", "upgrades"),
    "unread responses": ("slow_readers", "pipelines"),
    "invalid bodies": (
        *("bad_batches", "bad_batches_of_2_mb", "many_mistakes_in_a_few_kb", "deep_json", "gzip_bombs", "garbage"),
        "events_without_a_key",
    ),
    "expensive lists": ("large_batches", "heavy_filters"),
    "searches": ("searches", "long_queries"),
    "cheap requests": ("cheap_requests", "many_users", "connections_that_come_and_go"),
    "forged addresses": ("forged_addresses",),
}
"""All attacks by kind."""


def attack(function: Attack) -> Attack:
    """Register an attack under its name."""
    ATTACKS[function.__name__] = function
    return function


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 5, (HOSTILE, 0))


def ask(
    port: int, method: str, path: str, body: bytes | None = None, source: str | None = None, timeout: float = 5
) -> tuple[int, bytes]:
    """Send one request on a new connection; return status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout, source_address=(source or HOSTILE, 0))
    try:
        connection.request(method, path, body, {"content-type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def post(path: str, body: bytes, *more: bytes) -> bytes:
    """Return the bytes of a POST request."""
    head = b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (path.encode(), HEAD, b"".join(more), len(body))
    return head + body


def endless(port: int, end: float, begin: bytes, more: Callable[[], bytes], pause_s: float = 0.0) -> None:
    """Send requests that never end, on one connection after the other."""
    while time.monotonic() < end:
        try:
            with connect(port) as client:
                client.sendall(begin)
                while time.monotonic() < end:
                    client.sendall(more())
                    time.sleep(pause_s)
        except OSError:
            time.sleep(0.01)


def flood(port: int, end: float, requests: Sequence[bytes], connections: int = 8) -> None:
    """Send requests as fast as they are answered, on several connections."""

    def one(number: int) -> None:
        turn = itertools.cycle(requests[number % len(requests) :] + list(requests[: number % len(requests)]))
        while time.monotonic() < end:
            try:
                with connect(port) as client:
                    while time.monotonic() < end:
                        client.sendall(next(turn))
                        if not client.recv(1 << 20):
                            break
            except OSError:
                time.sleep(0.01)

    together([lambda number=number: one(number) for number in range(connections)])  # type: ignore[misc]


def held(port: int, end: float, number: int, begin: bytes, drip: bytes = b"", every_s: float = 1.0) -> None:
    """Keep many connections open, each with an incomplete request and optionally a byte from time to time."""
    with ExitStack() as stack:
        clients: list[socket.socket] = []
        while time.monotonic() < end:
            while len(clients) < number:
                try:
                    clients.append(stack.enter_context(connect(port)))
                    clients[-1].sendall(begin)
                except OSError:
                    break
            time.sleep(every_s)
            for client in list(clients):
                try:
                    client.sendall(drip)
                    client.setblocking(False)
                    gone = not client.recv(1 << 16)
                except BlockingIOError:
                    gone = False
                except OSError:
                    gone = True
                client.settimeout(5)
                if gone:
                    client.close()
                    clients.remove(client)


def together(acts: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=act, daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


CHUNKED = b"POST /v1/recommend HTTP/1.1\r\n" + HEAD + b"transfer-encoding: chunked\r\n\r\n"


@attack
def endless_header(port: int, end: float) -> None:
    endless(port, end, b"GET / HTTP/1.1\r\nhost: localhost\r\na: ", lambda: b"a" * 262_144)


@attack
def endless_headers(port: int, end: float) -> None:
    lines = b"".join(b"h%05d: x\r\n" % number for number in range(20_000))
    endless(port, end, b"GET / HTTP/1.1\r\nhost: localhost\r\n", lambda: lines)


@attack
def endless_target(port: int, end: float) -> None:
    endless(port, end, b"GET /v1/items?q=", lambda: b"a" * 262_144)


@attack
def long_queries(port: int, end: float) -> None:
    flood(port, end, [b"GET /v1/items?q=%b HTTP/1.1\r\nhost: localhost\r\n\r\n" % (b"&".join([b"id=x"] * 1500))])


@attack
def endless_trailers(port: int, end: float) -> None:
    lines = b"".join(b"h%05d: x\r\n" % number for number in range(20_000))
    endless(port, end, CHUNKED + b'7\r\n{"k":1}\r\n0\r\n', lambda: lines)


@attack
def slow_trailers(port: int, end: float) -> None:
    endless(port, end, CHUNKED + b'7\r\n{"k":1}\r\n0\r\n', lambda: b"h: x\r\n" * 5000, 0.5)


@attack
def tiny_chunks(port: int, end: float) -> None:
    endless(port, end, CHUNKED, lambda: b"1\r\n \r\n" * 20_000)


@attack
def chunk_extensions(port: int, end: float) -> None:
    endless(port, end, CHUNKED + b"1;", lambda: b"a=b;" * 50_000)


@attack
def held_bodies(port: int, end: float) -> None:
    begin = b"POST /v1/recommend HTTP/1.1\r\n" + HEAD + b"content-length: 1000\r\n\r\n{"
    held(port, end, 1030, begin)


@attack
def held_after_refusals(port: int, end: float) -> None:
    held(port, end, 1030, b"GET /\r\n\r\n", b" ")


@attack
def slow_heads(port: int, end: float) -> None:
    held(port, end, 1030, b"GET / HTTP/1.1\r\nhost: ", b"a")


@attack
def slow_bodies(port: int, end: float) -> None:
    begin = b"POST /v1/recommend:batch HTTP/1.1\r\n" + HEAD + b"content-length: 1000000\r\n\r\n" + b" " * 900_000
    held(port, end, 400, begin, b" ")


@attack
def silent_connections(port: int, end: float) -> None:
    held(port, end, 1030, b"")


@attack
def slow_readers(port: int, end: float) -> None:
    body = json.dumps({"requests": [{"k": 500}] * 51}).encode()
    held(port, end, 128, post("/v1/recommend:batch", body) * 4)


@attack
def pipelines(port: int, end: float) -> None:
    endless(port, end, b"", lambda: b"GET /v1/about HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2000)


@attack
def bad_batches(port: int, end: float) -> None:
    """Send bodies with the maximum number of errors: wrong types, unknown fields, missing ones, wrong values."""
    half = 500_000
    bodies = [
        b'{"requests":[{"history":[' + b"1," * (half // 2) + b"1]}]}",
        b'{"requests":[' + b"{}," * 255 + b"{" + b",".join(b'"%d":1' % number for number in range(30_000)) + b"}]}",
        json.dumps({"requests": [{"history": [{"item_id": 5, "stars": "x", "time_s": -1}] * 500}] * 20}).encode(),
        json.dumps({"requests": [{"filter": {"and": [{"price": {"mx": 1}}] * 1000}}] * 20}).encode(),
        b'{"requests":' + b"[" * half,
        b'{"requests":"' + b"\\u0000" * (half // 6) + b'"}',
    ]
    flood(port, end, [post("/v1/recommend:batch", body) for body in bodies], 2)


@attack
def bad_batches_of_2_mb(port: int, end: float) -> None:
    body = b'{"requests":[{"history":[' + b"1," * 1_000_000 + b"1]}]}"
    flood(port, end, [post("/v1/recommend:batch", body)], 2)


@attack
def many_mistakes_in_a_few_kb(port: int, end: float) -> None:
    """Send many small bodies with many errors: reporting an error must be cheap."""
    body = b'{"requests":[{' + b",".join(b'"%d":1' % number for number in range(1500)) + b"}]}"
    flood(port, end, [post("/v1/recommend:batch", body)])


@attack
def deep_json(port: int, end: float) -> None:
    bodies = [b'{"filter":' + b'{"and":[' * 5000 + b"]}" * 5000 + b"}", b'{"near":' + b"[" * 16_000, b'{"a":' * 4000]
    flood(port, end, [post("/v1/recommend", body) for body in bodies])


@attack
def large_batches(port: int, end: float) -> None:
    """Send valid, expensive requests: long histories, long lists, explanations."""
    status, listed = 0, b""
    while status != 200 and time.monotonic() < end:
        with suppress(OSError):  # other attacks have used up the rate or the slots of this address
            status, listed = ask(port, "GET", "/v1/items?limit=100")
        time.sleep(0.5)
    items = json.loads(listed)["items"] if status == 200 else []
    history = [{"item_id": item["item_id"]} for item in items] * 3
    bodies: list[tuple[str, Any]] = [
        ("/v1/recommend:batch", {"requests": [{"history": history[:39], "k": 100}] * 256}),
        ("/v1/recommend", {"history": history, "k": 100, "explain": True, "diversity": 0.5}),
        ("/v1/recommend", {"history": history, "k": 500, "diversity": 1.0}),
    ]
    flood(port, end, [post(path, json.dumps(body).encode()) for path, body in bodies], 16)


@attack
def heavy_filters(port: int, end: float) -> None:
    texts = [" or ".join(["(price == 1 and not price == 2)"] * 120), "not " * 900 + "price == 1", "(" * 1900 + "price == 1"]
    flood(port, end, [post("/v1/recommend", json.dumps({"filter": text[:3990], "k": 100}).encode()) for text in texts])


@attack
def searches(port: int, end: float) -> None:
    names = [b"a", b"e%20", b"%C3%A9" * 16, b"x" * 100]
    flood(
        port,
        end,
        [
            b"GET /v1/%b?limit=100&q=%b HTTP/1.1\r\nhost: localhost\r\n\r\n" % one
            for one in itertools.product((b"items", b"users"), names)
        ],
        64,
    )


@attack
def cheap_requests(port: int, end: float) -> None:
    paths = (b"/health/live", b"/metrics", b"/page/app.js", b"/docs", b"/v1/about", b"/nowhere", b"/v1/users/random")
    flood(port, end, [b"GET %b HTTP/1.1\r\nhost: localhost\r\n\r\n" % path for path in paths], 128)


@attack
def many_users(port: int, end: float) -> None:
    flood(port, end, [post("/v1/recommend", json.dumps({"user": f"unknown-{n}", "k": 10}).encode()) for n in range(5000)])


@attack
def forged_addresses(port: int, end: float) -> None:
    chance = random.Random(1)
    forged = [b"x-forwarded-for: %d.%d.%d.%d\r\n" % tuple(chance.choices(range(1, 255), k=4)) for _ in range(2000)]
    flood(port, end, [post("/v1/recommend", b'{"k": 100}', line) for line in forged], 16)


@attack
def upgrades(port: int, end: float) -> None:
    ask = b"GET /v1/about HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    ask += b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    held(port, end, 500, ask, b"\x81\x85\x00\x00\x00\x00hello", 0.05)


@attack
def gzip_bombs(port: int, end: float) -> None:
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(500)) + packer.flush()
    flood(port, end, [post("/v1/recommend", bomb[:900_000], b"content-encoding: gzip\r\n")], 4)


@attack
def events_without_a_key(port: int, end: float) -> None:
    body = json.dumps({"events": [{"event_id": str(n), "user": "u", "item_id": "x"} for n in range(15_000)]}).encode()[:1_000_000]
    flood(port, end, [post("/v1/events", body), post("/admin/reload", body)], 8)


@attack
def garbage(port: int, end: float) -> None:
    chance = random.Random(2)
    lines = [chance.randbytes(chance.randrange(1, 5000)) for _ in range(200)]
    lines += [b"\x16\x03\x01" + chance.randbytes(500), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 5000]
    flood(port, end, lines, 16)


@attack
def connections_that_come_and_go(port: int, end: float) -> None:
    def one() -> None:
        while time.monotonic() < end:
            try:
                connect(port).close()
            except OSError:
                time.sleep(0.01)

    together([one] * 4)


def run_attack(name: str, port: int, seconds: float) -> None:
    """Attack for some seconds from an address of its own, whose rate no other attack has used up."""
    global HOSTILE
    HOSTILE = f"127.0.1.{list(ATTACKS).index(name) + 1}"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard) if soft < 4096 else (soft, hard))
    ATTACKS[name](port, time.monotonic() + seconds)
