"""Every mistake of a client, from the wire to a value, is answered as JSON with a request id and a status of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twotower.serving.access import KEY_VARIABLE, Access
from twotower.serving.app import create_app
from twotower.serving.service import Service
from twotower.utils.config_serving import Limits, ServingConfig

from .test_http_connection import Running, everything, running

KEY = "a-key-of-this-test"
HOST = b"host: localhost\r\n"
POST = b"POST /v1/recommend HTTP/1.1\r\n" + HOST
MISTAKES: dict[str, tuple[int, bytes]] = {
    "no HTTP": (400, b"hello\r\n\r\n"),
    "no host": (400, b"GET /v1/items HTTP/1.1\r\n\r\n"),
    "space in a name": (400, b"GET / HTTP/1.1\r\nho st: x\r\n\r\n"),
    "no length that is a number": (400, POST + b"content-length: ten\r\n\r\n"),
    "chunk of no size": (400, POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n"),
    "no such route": (404, b"GET /v2/items HTTP/1.1\r\n" + HOST + b"\r\n"),
    "no such item": (404, b"GET /v1/items/nothing%2Flike%20it HTTP/1.1\r\n" + HOST + b"\r\n"),
    "no such user": (404, b"GET /v1/history?user=unknown HTTP/1.1\r\n" + HOST + b"\r\n"),
    "no such method": (405, b"DELETE /v1/recommend HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method of another route": (405, b"GET /v1/recommend HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a post to a list": (405, b"POST /v1/columns HTTP/1.1\r\n" + HOST + b"content-length: 0\r\n\r\n"),
    "a body that does not come": (408, POST + b"content-length: 9\r\n\r\n{"),
    "a large body": (413, POST + b"content-length: 9999\r\n\r\n{"),
    "large chunks": (413, POST + b"transfer-encoding: chunked\r\n\r\n" + 3 * (b"fff\r\n" + b" " * 4095 + b"\r\n") + b"0\r\n\r\n"),
    "many values": (413, POST + b"content-length: 4002\r\n\r\n[" + b"," * 4000 + b"]"),
    "a long target": (414, b"GET /v1/items?q=" + b"x" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a compressed body": (415, POST + b"content-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc"),
    "two encodings": (415, POST + b"content-encoding: gzip, br\r\ncontent-length: 3\r\n\r\nabc"),
    "no JSON": (422, POST + b"content-length: 3\r\n\r\nabc"),
    "a wrong parameter": (422, b"GET /v1/items?limit=many HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a large header": (431, b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n"),
    "many headers": (431, b"GET / HTTP/1.1\r\n" + HOST + b"x: y\r\n" * 120 + b"\r\n"),
    "another version": (505, b"GET / HTTP/2.0\r\n" + HOST + b"\r\n"),
    "a version of its own": (505, b"GET / HTTP/1.9\r\n" + HOST + b"\r\n"),
    "no key": (401, b"POST /v1/events HTTP/1.1\r\n" + HOST + b"content-length: 2\r\n\r\n{}"),
    "an unknown host": (400, b"GET /v1/items HTTP/1.1\r\nhost: other.org\r\nconnection: close\r\n\r\n"),
    "another site": (403, POST + b"origin: https://other.org\r\ncontent-length: 2\r\n\r\n{}"),
}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server under the path /shop, with small limits."""
    limits = Limits(rate=0, request_s=0.5, body_bytes=8192, drain_delay_s=0, linger_s=0.3)
    service = Service(bundle, f"sqlite:{tmp_path_factory.mktemp('mistakes') / 'e'}", limits, refresh_s=0)
    access = Access(variables={KEY_VARIABLE: KEY}, public=True, hosts=("localhost",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twotower.serving.bodies.MAX_JSON_MARKS", 4000)
        with running(limits, create_app(service, access, config=ServingConfig()), root_path="/shop") as server:
            yield server
    service.close()


def asked(server: Running, raw: bytes) -> tuple[int, dict[str, Any], bytes]:
    with server.connect() as client:
        client.sendall(raw.replace(HOST, HOST + b"connection: close\r\n", 1))
        head, _, body = everything(client).partition(b"\r\n\r\n")
    return int(head[9:12]), json.loads(body), head


@pytest.mark.parametrize(("status", "raw"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_has_its_status_and_a_request_id(server: Running, status: int, raw: bytes) -> None:
    found, answer, head = asked(server, raw)
    assert found == status, answer
    assert answer["error"]["code"] and answer["error"]["message"].endswith(".")
    assert f"x-request-id: {answer['request_id']}".encode() in head


@pytest.mark.parametrize("root", [b"", b"/shop"])
def test_a_server_below_a_path_answers_with_the_path_and_without(server: Running, root: bytes) -> None:
    for path in (b"/health/ready", b"/v1/items?limit=1", b"/openapi.json"):
        assert asked(server, b"GET " + root + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 200, path
    said = asked(server, b"POST " + root + b"/v1/recommend HTTP/1.1\r\n" + HOST + b"content-length: 7\r\n\r\n" + b'{"k":1}')
    assert said[0] == 200 and len(said[1]["items"]) == 1
    item = said[1]["items"][0]["item_id"].encode()
    assert asked(server, b"GET " + root + b"/v1/items/" + item + b"/similar HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 200


def test_a_path_that_only_begins_alike_is_another(server: Running) -> None:
    assert asked(server, b"GET /shopping/v1/items HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 404
