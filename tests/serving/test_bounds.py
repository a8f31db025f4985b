"""Each row of the table of limits in docs/serving.md has a test; the bounds of values are tried from both sides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.serving import clients
from twotower.serving.bodies import BodyError, parse
from twotower.serving.event_schemas import EventsIn
from twotower.serving.http_server import WATCHING_PER_CLIENT
from twotower.serving.limits import MAX_JSON_MARKS
from twotower.serving.schemas import BatchIn, RecommendIn
from twotower.utils.config_serving import Limits

ROOT = Path(__file__).parents[2]
TESTS = {  # the row of the table, and the test of it
    "request line and headers": "test_http_connection.test_what_arrives_is_bounded",
    "chunk framing and trailers": "test_http_connection.test_what_arrives_is_bounded",
    "request body": "test_refusals.test_a_large_body_is_refused_whether_or_not_it_says_so",
    "values in a body": "test_bounds.test_values_in_a_body",
    "memory for bodies and unread responses, per client and in total": "test_limits.test_counts_of_clients_end_at_nothing",
    "`k`": "test_bounds.test_a_value_at_its_bound_is_taken_and_one_more_is_refused",
    "history per request, per batch": "test_bounds.test_a_value_at_its_bound_is_taken_and_one_more_is_refused",
    "batch": "test_bounds.test_a_value_at_its_bound_is_taken_and_one_more_is_refused",
    "events per request": "test_bounds.test_a_value_at_its_bound_is_taken_and_one_more_is_refused",
    "filter": "test_bounds.test_a_value_at_its_bound_is_taken_and_one_more_is_refused",
    "explained items per request": "test_bounds.test_a_value_at_its_bound_is_taken_and_one_more_is_refused",
    "an id": "test_bounds.test_a_value_at_its_bound_is_taken_and_one_more_is_refused",
    "rate per client": "test_refusals.test_a_client_above_its_rate_must_wait",
    "health, metrics and files of the page": "test_bounds.test_health_metrics_and_files_of_the_page_have_a_rate_of_their_own",
    "concurrent requests per client": (
        "test_http_connection.test_requests_of_a_client_in_progress_are_bounded_and_others_wait_unread"
    ),
    "concurrent health checks and metrics per client": (
        "test_http_connection.test_health_checks_of_a_client_are_bounded_apart_from_its_other_requests"
    ),
    "queued lists, per client and in total": "test_refusals.test_while_too_much_waits_a_request_is_refused_unread",
    "connections, per client and in total": (
        "test_http_connection.test_connections_are_bounded_by_client_and_health_is_answered_when_all_are_taken"
    ),
    "new connections per client": "test_bounds.test_new_connections_per_client",
    "time for request line and headers": "test_http_connection.test_a_head_that_comes_byte_by_byte_ends_the_connection",
    "time until a response begins": "test_batching.test_what_comes_too_late_is_not_begun",
    "time for a whole request": "test_refusals.test_a_request_must_be_over_in_time",
    "minimum rate of reading a response": (
        "test_http_connection.test_a_client_that_does_not_read_loses_its_connection_and_one_that_reads_does_not"
    ),
    "idle connection": "test_http_connection.test_an_idle_connection_ends",
    "connection after a refusal": "test_http_connection.test_after_a_refusal_the_connection_ends_whatever_comes",
}


def rows() -> dict[str, str]:
    """Return the limits of the page with their values."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = page.partition("| limit | value |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|", table.partition("\n")[2], re.M))


def test_each_row_of_the_table_has_its_test() -> None:
    assert rows().keys() == TESTS.keys()
    for row, test in TESTS.items():
        file, _, name = test.partition(".")
        assert f"def {name}(" in (Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8"), row


def test_the_values_of_the_table_are_the_defaults() -> None:
    limits, found = Limits(), rows()
    assert found["request line and headers"] == f"{limits.head_bytes >> 10} KiB, {limits.max_headers} headers"
    assert found["request body"] == f"{limits.body_bytes >> 20} MiB"
    held = f"{limits.held_bytes_per_client >> 20} MiB, {limits.held_bytes >> 20} MiB"
    assert found["memory for bodies and unread responses, per client and in total"] == held
    assert found["connections, per client and in total"] == f"{limits.connections_per_client}, {limits.connections:,}"
    assert found["queued lists, per client and in total"] == f"{limits.waiting // 2}, {limits.waiting}"
    assert found["concurrent requests per client"] == str(limits.running_per_client)
    assert found["concurrent health checks and metrics per client"] == str(WATCHING_PER_CLIENT)
    assert found["rate per client"].startswith(f"{limits.rate:g} lists") and found["rate per client"].endswith(f"{limits.bucket:g}")
    assert found["time for request line and headers"] == f"{limits.header_timeout_s:g} s"
    assert found["time until a response begins"] == f"{limits.queue_timeout_s:g} s"
    assert found["time for a whole request"] == f"{limits.request_s:g} s"
    assert found["connection after a refusal"] == f"{limits.linger_s:g} s"
    assert found["idle connection"].startswith(f"{limits.keep_alive_s:g} s")
    assert found["values in a body"].startswith(f"{MAX_JSON_MARKS:,}")
    assert found["new connections per client"] == f"{clients.ARRIVALS_PER_S:g} per second, burst {clients.ARRIVALS_BURST:g}"
    assert found["health, metrics and files of the page"].startswith(f"{clients.WATCH_RATE:g} per second")


VISIT, ITEM = {"item_id": "x"}, "x" * 256
EVENT = {"event_id": "e", "user": "u", "item_id": "i"}
BOUNDS: dict[str, tuple[Any, Callable[[int], Any], int]] = {
    "k": (RecommendIn, lambda n: {"k": n}, 500),
    "history": (RecommendIn, lambda n: {"history": [VISIT] * n}, 1000),
    "histories of a batch": (
        BatchIn,
        lambda n: {"requests": [{"history": [VISIT] * 1000}] * (n // 1000) + [{"history": [VISIT] * (n % 1000)}]},
        10_000,
    ),
    "requests of a batch": (BatchIn, lambda n: {"requests": [{"k": 1}] * n}, 256),
    "items of a batch": (BatchIn, lambda n: {"requests": [{"k": 500}] * (n // 500) + [{"k": n % 500}]}, 25_600),
    "events": (EventsIn, lambda n: {"events": [EVENT] * n}, 1000),
    "filter as text": (RecommendIn, lambda n: {"filter": "x" * n}, 4000),
    "filter as JSON": (RecommendIn, lambda n: {"filter": {"a": "x" * (n - len('{"a":""}'))}}, 65_536),
    "explained items": (RecommendIn, lambda n: {"k": n, "explain": True}, 100),
    "explained items of a batch": (
        BatchIn,
        lambda n: {"requests": [{"k": n - 50, "explain": True}, {"k": 50, "explain": True}]},
        100,
    ),
    "an id": (RecommendIn, lambda n: {"user": "x" * n}, 256),
    "an id of a history": (RecommendIn, lambda n: {"history": [{"item_id": "é" * n}]}, 256),
    "an id of an event": (EventsIn, lambda n: {"events": [{**EVENT, "event_id": "x" * n}]}, 256),
}


@pytest.mark.parametrize(("model", "made", "most"), BOUNDS.values(), ids=BOUNDS)
def test_a_value_at_its_bound_is_taken_and_one_more_is_refused(model: Any, made: Callable[[int], Any], most: int) -> None:
    assert parse(model, json.dumps(made(most)).encode())
    with pytest.raises(BodyError) as refused:
        parse(model, json.dumps(made(most + 1)).encode())
    assert refused.value.status == 422


def test_values_in_a_body() -> None:
    marks = MAX_JSON_MARKS - 2  # besides the brackets
    with pytest.raises(BodyError, match="not valid JSON"):
        parse(RecommendIn, b"[" + b"," * marks + b"}")
    with pytest.raises(BodyError, match="too many values") as refused:
        parse(RecommendIn, b"[" + b":" * (marks + 1) + b"{")
    assert refused.value.status == 413


def test_new_connections_per_client() -> None:
    one = clients.Clients(Limits())
    assert [one.arrives("10.0.0.1") for _ in range(513)].count(True) in (512, 513), "one more if a hundredth of a second has passed"
    assert not all(one.arrives("10.0.0.1") for _ in range(200)) and one.arrives("10.0.0.2")


def test_health_metrics_and_files_of_the_page_have_a_rate_of_their_own(
    connect: Callable[..., AbstractContextManager[TestClient]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.serving.clients.WATCH_RATE", 0.001)
    monkeypatch.setattr("twotower.serving.clients.WATCH_BURST", 4)
    monkeypatch.setattr("twotower.serving.middleware.RATE_DELAY_S", 0.01)
    with connect(limits=Limits(rate=100)) as client:
        paths = ("/health/live", "/metrics", "/page/app.js", "/health/ready", "/health/live")
        assert [client.get(path).status_code for path in paths] == [200, 200, 200, 200, 429]
        assert client.post("/v1/recommend", json={"k": 1}).status_code == 200
