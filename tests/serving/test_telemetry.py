"""Test traces and metrics: in this process with the SDK's exporters in memory, and from a server to a collector on this machine."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from twotower.client import Client
from twotower.errors import ConfigError, MissingExtraError, require
from twotower.serving.json_logs import JsonFormatter
from twotower.serving.telemetry import Telemetry
from twotower.utils.console import log

from .conftest import some_items

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
STAGES = {"features", "filter", "tower", "search", "explain", "describe"}


class Kept:
    """Telemetry that keeps spans and metrics in memory."""

    def __init__(self) -> None:
        self._spans, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        traces = TracerProvider(shutdown_on_exit=False)
        traces.add_span_processor(SimpleSpanProcessor(self._spans))
        self.telemetry = Telemetry(traces, MeterProvider([self._reader], shutdown_on_exit=False))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._spans.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [one for one in self.spans if one.name == name]

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        assert data is not None
        return {one.name: one for resource in data.resource_metrics for scope in resource.scope_metrics for one in scope.metrics}


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    yield kept
    kept.telemetry.close()


@pytest.fixture
def traced(connect: Callable[..., AbstractContextManager[TestClient]], kept: Kept) -> Iterator[TestClient]:
    with connect(telemetry=kept.telemetry) as client:
        kept.telemetry.watch(cast(Any, client.app).state.service.meters)
        yield client


def test_a_request_has_a_span_with_one_for_each_stage(traced: TestClient, kept: Kept) -> None:
    item = some_items(traced, 1)[0]
    answer = traced.post(
        "/v1/recommend", json={"history": [{"item_id": item}], "filter": "within(5)", "explain": True}, headers=TRACEPARENT
    )
    assert answer.status_code == 200
    (span,) = kept.named("POST /v1/recommend")
    assert span.context is not None and span.parent is not None and span.attributes is not None
    assert f"{span.context.trace_id:032x}" == TRACE and f"{span.parent.span_id:016x}" == PARENT
    assert span.attributes["http.route"] == "/v1/recommend" and span.attributes["http.response.status_code"] == 200
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    below = {one.name: one for one in kept.spans if one.parent is not None and one.parent.span_id == span.context.span_id}
    assert below.keys() == STAGES
    took = answer.json()["stages_ms"]
    for name, one in below.items():
        assert one.start_time is not None and one.end_time is not None and span.start_time is not None and span.end_time is not None
        assert span.start_time - 5e6 <= one.start_time <= one.end_time <= span.end_time + 5e6  # two clocks
        assert (one.end_time - one.start_time) / 1e6 == pytest.approx(took[name], abs=0.01)
    assert below["features"].start_time <= below["filter"].start_time <= below["tower"].start_time <= below["search"].start_time


def test_a_batch_has_each_computation_once(traced: TestClient, kept: Kept) -> None:
    assert traced.post("/v1/recommend:batch", json={"requests": [{"k": 2}] * 20}).status_code == 200
    (span,) = kept.named("POST /v1/recommend:batch")
    assert 1 <= len(kept.named("search")) < 20
    assert all(one.parent == span.context for one in kept.named("search"))


def test_events_and_similar_items_have_spans_of_their_work(traced: TestClient, kept: Kept, keyed: dict[str, str]) -> None:
    item = some_items(traced, 1)[0]
    event = {"event_id": "1", "user": "u", "item_id": item}
    assert traced.post("/v1/events", json={"events": [event]}, headers=keyed).status_code == 200
    assert traced.get("/v1/similar", params={"id": item}).status_code == 200
    (store,), (events,) = kept.named("store"), kept.named("POST /v1/events")
    (search,), (similar,) = kept.named("search"), kept.named("GET /v1/similar")
    assert store.parent == events.context and search.parent == similar.context


def test_refusals_and_failures_are_sent(traced: TestClient, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    assert traced.post("/v1/recommend", json={"k": 0}).status_code == 422
    service = cast(Any, traced.app).state.service
    monkeypatch.setattr(service, "recommend", None)
    assert traced.post("/v1/recommend", json={}).status_code == 500
    refused, failed = kept.named("POST /v1/recommend")
    assert refused.attributes is not None and refused.attributes["error.type"] == "malformed"
    assert refused.status.status_code.name == "UNSET"  # a mistake of the client
    assert failed.status.status_code.name == "ERROR" and failed.events[0].name == "exception"


@pytest.mark.parametrize("wrong", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "é" * 300])
def test_a_wrong_traceparent_begins_a_new_trace(traced: TestClient, kept: Kept, wrong: str) -> None:
    assert traced.get("/v1/about", headers={"traceparent": wrong.encode("latin-1")}).status_code == 200
    (span,) = kept.named("GET /v1/about")
    assert span.parent is None and span.context is not None and span.context.is_valid


def test_a_trace_that_is_not_sampled_stays_so(traced: TestClient, kept: Kept) -> None:
    answer = traced.get("/v1/about", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert not kept.named("GET /v1/about") and answer.headers["traceresponse"].endswith("-00")


def test_probes_have_no_span_and_nothing_tells_of_people(traced: TestClient, kept: Kept, keyed: dict[str, str]) -> None:
    for path in ("/health/live", "/health/ready", "/metrics", "/page/icon.svg"):
        assert traced.get(path).status_code == 200
    assert not kept.spans
    traced.get("/v1/users/secret-user/history", headers=keyed)
    traced.get("/v1/items", params={"q": "secret-user"})
    traced.post("/v1/recommend", json={"user": "secret-user", "filter": 'city == "secret-user"'})
    traced.post("/v1/recommend", json={"filter": "secret-user"})
    sent = " ".join(one.to_json() for one in kept.spans) + str(kept.metrics())
    assert len(kept.spans) > 3 and "secret-user" not in sent and keyed["Authorization"].split()[1] not in sent


def test_log_lines_have_the_ids_of_the_trace(traced: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, log.name):
        traced.get("/v1/about", headers=TRACEPARENT)
        traced.get("/v1/about")
    first, second = (json.loads(JsonFormatter().format(one)) for one in caplog.records if one.getMessage() == "answered")
    assert first["trace_id"] == TRACE and len(first["span_id"]) == 16 and first["route"] == "/v1/about"
    assert second["trace_id"] not in ("", TRACE)  # a span ends with its request


def test_metrics_are_those_of_the_server(traced: TestClient, kept: Kept) -> None:
    for _ in range(3):
        traced.post("/v1/recommend", json={})
    found = kept.metrics()
    (point,) = found["http.server.request.duration"].data.data_points
    assert point.count == 3 and dict(point.attributes)["http.route"] == "/v1/recommend"
    stages = {dict(one.attributes)["twotower.stage"] for one in found["twotower.stage.duration"].data.data_points}
    assert {"search", "describe"} <= stages
    requests = {dict(one.attributes)["route"]: one.value for one in found["twotower_requests"].data.data_points}
    assert requests["/v1/recommend"] == 3
    assert found["twotower_event_store_up"].data.data_points[0].value == 1


def test_without_a_collector_nothing_is_loaded() -> None:
    assert Telemetry.from_environment({}) is None
    assert Telemetry.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}) is None
    program = "import sys, twotower.serving.server; print([name for name in sys.modules if 'opentelemetry.sdk' in name])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_cannot_be_sent_is_sent_at_once() -> None:
    with pytest.raises(ConfigError, match=r"'grpc'\. Allowed: 'http/protobuf'"):
        Telemetry.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    with pytest.raises(MissingExtraError, match="extra 'otel'"):
        require("otel", "nothing_of_this_name.sdk")


class Collector(ThreadingHTTPServer):
    """A collector of OTLP over HTTP."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Any] = []
        self.metrics: set[str] = set()
        self.names: set[str] = set()
        self.instances: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def log_message(self, *_: Any) -> None:
        """Write nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.server.names |= {one.value.string_value for one in resource.resource.attributes if one.key == "service.name"}
                self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        else:
            assert self.path == "/v1/metrics"
            for metrics in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                found = {one.key: one.value.string_value for one in metrics.resource.attributes}
                self.server.instances.add(found.get("service.instance.id", ""))
                self.server.metrics |= {one.name for scope in metrics.scope_metrics for one in scope.metrics}
        self.send_response_only(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield collector
        collector.shutdown()


@pytest.mark.slow
def test_a_collector_gets_what_a_server_did_before_it_ended(
    bundle: Path, load: Any, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("caller")
    with load.Server(bundle, f"sqlite:{tmp_path / 'events.sqlite'}", tmp_path / "log") as server:
        with tracer.start_as_current_span("caller") as caller, Client(f"http://127.0.0.1:{server.port}") as client:
            assert client.recommend(filter="within(5)", near=(0.0, 0.0)) is not None
        assert server.end() == 0
    named = {span.name: span for span in collector.spans}
    assert {"POST /v1/recommend", "features", "filter", "search"} <= named.keys()
    assert {span.trace_id for span in collector.spans} == {caller.get_span_context().trace_id.to_bytes(16)}
    assert named["POST /v1/recommend"].parent_span_id == caller.get_span_context().span_id.to_bytes(8)
    assert collector.names == {"shop"}
    assert {"http.server.request.duration", "twotower_requests", "twotower_connections"} <= collector.metrics
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (answered,) = [line for line in lines if line["message"] == "answered"]
    assert answered["trace_id"] == f"{caller.get_span_context().trace_id:032x}"


@pytest.mark.slow
def test_every_worker_sends_its_own(
    bundle: Path, load: Any, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=here")
    with load.Server(bundle, f"sqlite:{tmp_path / 'events.sqlite'}", tmp_path / "log", "--workers", "2") as server:
        end = time.monotonic() + 60
        while "workers have started" not in (tmp_path / "log").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        for _ in range(20):
            server.get("/v1/about")
        assert server.end() == 0
    assert len([span for span in collector.spans if span.name == "GET /v1/about"]) == 20
    assert collector.instances == {"here-0", "here-1"}
    assert "twotower_requests" in collector.metrics and "twotower_reloads" not in collector.metrics


@pytest.mark.slow
def test_a_dead_collector_holds_nothing_up(bundle: Path, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{load.free_port()}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    with load.Server(bundle, f"sqlite:{tmp_path / 'events.sqlite'}", tmp_path / "log") as server:
        with Client(f"http://127.0.0.1:{server.port}") as client:
            for _ in range(20):
                client.recommend()
        began = time.monotonic()
        assert server.end() == 0 and time.monotonic() - began < 10
    for line in (tmp_path / "log").read_text().splitlines():
        assert json.loads(line)["level"] != "critical"
