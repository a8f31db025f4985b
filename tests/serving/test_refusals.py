"""Test rejected requests: the error of each, and that they have no side effects."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.serving import schemas
from twotower.serving.catalogue import Browser
from twotower.serving.limits import MAX_BATCH_REQUESTS
from twotower.utils.config_serving import Limits

from .conftest import send, some_items

Connect = Callable[..., AbstractContextManager[TestClient]]


def test_the_lists_of_a_batch_are_counted_and_bounded(connect: Connect, keyed: dict[str, str]) -> None:
    with connect(limits=Limits(rate=1, burst=5)) as client:
        assert client.post("/v1/recommend:batch", json={"requests": [{"k": 1}] * 40}).status_code == 200
        waits = client.post("/v1/recommend", json={"k": 1})
        assert waits.status_code == 429 and 30 < int(waits.headers["retry-after"]) < 40
    with connect() as client:
        answer = client.post("/v1/recommend:batch", json={"requests": [{"k": 500}] * 52})
        assert answer.status_code == 422 and "at most 25,600 items" in answer.json()["error"]["message"]
        events = [{"event_id": str(n), "user": "busy", "item_id": some_items(client, 1)[0]} for n in range(1000)]
        send(client, keyed, *events)
        wrong = [{"user": "busy"}] * 3 + [{"user": "busy", "history": [{"item_id": "no such"}], "strict": True}]
        refused = client.post("/v1/recommend:batch", json={"requests": wrong}).json()["answers"][3]["error"]
        assert refused["location"] == "requests.3.history.0.item_id", "however much was accepted before"


def test_an_event_of_something_unknown_is_refused_with_all_others(client: TestClient, keyed: dict[str, str]) -> None:
    (item,) = some_items(client, 1)
    good = {"event_id": "a", "user": "u", "item_id": item}
    for bad, where in (({"item_id": "nowhere"}, "item_id"), ({"event_type": "dream"}, "event_type")):
        answer = client.post("/v1/events", json={"events": [good, {**good, **bad}]}, headers=keyed)
        assert answer.status_code == 422 and answer.json()["error"]["location"] == f"events.1.{where}"
    assert send(client, keyed, good) == {"accepted": 1, "repeated": 0}


def test_the_number_of_explained_items_is_limited(client: TestClient) -> None:
    assert client.post("/v1/recommend", json={"user": "x", "k": 101, "explain": True}).status_code == 422
    body = {"requests": [{"user": "x", "k": 60, "explain": True}] * 2}
    said = client.post("/v1/recommend:batch", json=body).json()["error"]["message"]
    assert "explanations are requested for 120 items; at most 100 items are allowed" in said
    assert client.post(
        "/v1/recommend:batch", json={"requests": [{"user": "x", "k": 60, "explain": i < 1} for i in range(2)]}
    ).is_success


def test_so_many_lookups_may_be_under_way(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(limits=Limits(rate=0, lookups=1)) as client:
        browser, begun, go_on = client.app.state.service.current.browser, threading.Event(), threading.Event()  # type: ignore[attr-defined]
        monkeypatch.setattr(browser, "items", lambda *_: [begun.set(), go_on.wait(10)][:0])
        with ThreadPoolExecutor(1) as other:
            first = other.submit(client.get, "/v1/items?q=a")
            assert begun.wait(10)
            refused = client.get("/v1/items?q=b")
            go_on.set()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
            assert first.result().status_code == 200
        assert client.get("/v1/items?q=c").status_code == 200


MISTAKES: list[tuple[dict[str, Any], str | None]] = [
    ({"k": 0}, "k"),
    ({"k": 501}, "k"),
    ({"K": 5}, "K"),
    ({"near": [91, 0]}, "near.0"),
    ({"near": [1]}, "near.1"),
    ({"diversity": 2}, "diversity"),
    ({"history": [{"item_id": "nowhere"}], "strict": True}, "history.0.item_id"),
    ({"history": [{"item_id": "x"}] * 1001}, "history"),
    ({"history": [{"item_id": "x", "stars": 9}]}, "history.0.stars"),
    ({"time_s": 10**12}, "time_s"),
    ({"user": ""}, "user"),
    ({"filter": "x" * 4001}, None),
]


def test_a_json_filter_that_is_too_long_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"filter": {"id": {"any": ["x" * 100] * 700}}})
    assert answer.status_code == 422 and "at most 65,536 bytes of JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("body", "where"), MISTAKES, ids=[str(where or "filter") for _, where in MISTAKES])
def test_an_error_has_its_position(client: TestClient, body: dict[str, Any], where: str | None) -> None:
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 422
    error = schemas.ErrorOut.model_validate(answer.json()).error
    assert where is None or error.location == where
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


KINDS: list[tuple[dict[str, Any], str, str]] = [
    ({"k": True}, "k", "an integer, not a boolean"),
    ({"k": "3"}, "k", "an integer, not a text"),
    ({"k": 3.5}, "k", "a valid integer"),
    ({"time_s": True}, "time_s", "an integer, not a boolean"),
    ({"time_s": "5"}, "time_s", "an integer, not a text"),
    ({"history": [{"item_id": "x", "time_s": False}]}, "history.0.time_s", "an integer, not a boolean"),
    ({"history": [{"item_id": "x", "stars": True}]}, "history.0.stars", "a valid number"),
    ({"history": [{"item_id": "x", "stars": "4"}]}, "history.0.stars", "a valid number"),
    ({"history": [{"item_id": True}]}, "history.0.item_id", "a valid string"),
    ({"diversity": True}, "diversity", "a valid number"),
    ({"diversity": "0.5"}, "diversity", "a valid number"),
    ({"popularity_bias": "0.5"}, "popularity_bias", "a valid number"),
    ({"near": [True, 0]}, "near.0", "a valid number"),
    ({"near": [0, "5"]}, "near.1", "a valid number"),
    ({"exclude_seen": "no"}, "exclude_seen", "a valid boolean"),
    ({"explain": 1}, "explain", "a valid boolean"),
    ({"strict": "true"}, "strict", "a valid boolean"),
    ({"user": True}, "user", "a valid string"),
    ({"user": 1.5}, "user", "a valid string"),
    ({"filter": True}, "filter", "a valid string"),
]


@pytest.mark.parametrize(("body", "where", "said"), KINDS, ids=[json.dumps(body) for body, *_ in KINDS])
def test_a_value_of_another_kind_is_refused(client: TestClient, body: dict[str, Any], where: str, said: str) -> None:
    answer = client.post("/v1/recommend", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["location"]) == (422, where) and f"{where}: Input should be {said}" in error["message"]


@pytest.mark.parametrize("event", [{"time_s": True}, {"time_s": "5"}, {"stars": True}, {"position": True}, {"position": "1"}])
def test_an_event_of_another_kind_is_refused(client: TestClient, keyed: dict[str, str], event: dict[str, Any]) -> None:
    body = {"events": [{"event_id": "a", "user": "u", "item_id": "x", **event}]}
    answer = client.post("/v1/events", json=body, headers=keyed)
    assert answer.status_code == 422 and answer.json()["error"]["location"] == f"events.0.{next(iter(event))}"


def test_numbers_of_equal_value_are_the_same(client: TestClient) -> None:
    body = {"user": 5, "k": 3.0, "time_s": 1.7e9, "near": [42, -71], "diversity": 0, "popularity_bias": 1}
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200 and len(answer.json()["items"]) == 3
    assert schemas.RecommendIn.model_validate(body).user == "5", "an integer is the same as its text"


def test_the_error_of_a_malformed_filter_has_its_position(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"filter": "pric <= 2"})
    assert answer.status_code == 422 and "'price'" in answer.json()["error"]["message"]
    assert answer.json()["error"]["location"] == "filter:1", "the character"
    answer = client.post("/v1/recommend", json={"filter": {"and": [{"price": {"mx": 2}}]}})
    assert answer.status_code == 422 and answer.json()["error"]["location"] == "filter.and[0].price.mx"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"user": "\\ud800"}', b"\xff", b"[" * 100_000, b'{"k": 1e400}', b"null"])
def test_a_body_of_no_sense_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["error"]["message"]


def test_what_writes_needs_the_key(connect: Connect, keyed: dict[str, str]) -> None:
    body = {"events": [{"event_id": "a", "user": "u", "item_id": "x"}]}
    with connect() as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}, {"Authorization": "Bearer \u00e9"}):
            for path in ("/v1/events", "/admin/reload"):
                answer = client.post(path, json=body, headers={name: value.encode("latin-1") for name, value in headers.items()})
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    with connect(key=None) as client:
        answer = client.post("/v1/events", json=body, headers=keyed)
        assert answer.status_code == 403 and "TWOTOWER_API_KEY" in answer.json()["error"]["message"]


def test_what_is_not_there_is_not_found(client: TestClient) -> None:
    for path in ("/nowhere", "/v1/items/nowhere", "/v1/items/a/b/similar", "/v1/users/nobody/history", "/page/../app.py"):
        answer = client.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found", path
    assert client.get("/v1/recommend").status_code == 405


def test_a_request_must_be_over_in_time(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(*_: Any) -> Any:
        await asyncio.sleep(30)

    with connect(limits=Limits(rate=0, request_s=0.2)) as client:
        monkeypatch.setattr(client.app.state.service, "recommend", slow)  # type: ignore[attr-defined]
        began = time.perf_counter()
        answer = client.post("/v1/recommend", json={"k": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout") and time.perf_counter() - began < 10
        monkeypatch.undo()
        assert client.post("/v1/recommend", json={"k": 1}).status_code == 200


def test_a_client_that_leaves_before_its_body_is_there_is_no_internal_error(client: TestClient) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    head = [(b"host", b"testserver"), (b"content-type", b"application/json"), (b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "raw_path": b"/v1/recommend", "query_string": b""}
    scope |= {"headers": head, "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 5), "server": ("testserver", 80)}
    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 400 and b"closed before the end of the body" in sent[1]["body"]


def test_loading_may_take_longer_than_a_request_once_all_of_it_is_there(
    connect: Connect, keyed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_: Any) -> dict[str, str]:
        await asyncio.sleep(0.6)
        return {"version": "new", "previous_version": "old"}

    with connect(limits=Limits(rate=0, request_s=0.2)) as client:
        monkeypatch.setattr(client.app.state.service.updates, "reload", slow)  # type: ignore[attr-defined]
        assert client.post("/admin/reload", json={}, headers=keyed).json() == {"version": "new", "previous_version": "old"}


def test_a_large_body_is_refused_whether_or_not_it_says_so(connect: Connect) -> None:
    with connect(limits=Limits(rate=0, body_bytes=1000)) as client:
        large = json.dumps({"user": "x" * 2000}).encode()
        headers = {"content-type": "application/json"}
        said = client.post("/v1/recommend", content=large, headers=headers)
        silent = client.post("/v1/recommend", content=iter([large[:900], large[900:]]), headers=headers)
        assert "content-length" not in silent.request.headers
        for answer in (said, silent):
            assert answer.status_code == 413 and "1,000 bytes" in answer.json()["error"]["message"]


def test_a_client_above_its_rate_must_wait(connect: Connect) -> None:
    with connect(limits=Limits(rate=0.5, burst=2)) as client:
        assert [client.get("/v1/about").status_code for _ in range(3)] == [200, 200, 429]
        answer = client.get("/v1/about")
        assert answer.json()["error"]["code"] == "rate" and 1 <= int(answer.headers["retry-after"]) <= 2
        assert client.get("/health/live").status_code == 200, "watchers are not counted"


def test_a_defect_shows_the_client_nothing_and_the_log_everything(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(Browser, "about", broken)
    monkeypatch.setattr(logging.getLogger("twotower"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("twotower"), "handlers", [])  # those that tests before have left
    answer = client.get("/v1/about", headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500 and answer.json()["request_id"] == "mine-1" and "secret" not in answer.text
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info and record.exc_info[0] is ZeroDivisionError and record.fields["request_id"] == "mine-1"  # type: ignore[attr-defined]


def test_while_too_much_waits_a_request_is_refused_unread(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect() as client:
        monkeypatch.setattr(type(client.app.state.service), "overloaded", lambda *_: True)  # type: ignore[attr-defined]
        answer = client.post("/v1/recommend", content=b"this is not even JSON")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "busy" and answer.headers["retry-after"] == "1"
        assert client.post("/v1/recommend:batch", content=b"nor this").status_code == 503
        assert client.get("/health/live").status_code == 200 and client.get("/v1/items").status_code == 200


def test_a_batch_of_any_size_fits_where_a_request_is_let_in() -> None:
    assert Limits().waiting // 2 + MAX_BATCH_REQUESTS <= Limits().waiting
