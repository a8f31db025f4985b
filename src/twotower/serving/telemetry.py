"""Send traces and metrics by OpenTelemetry, if the environment names a collector. Otherwise nothing of it is imported.

The standard variables configure it: `OTEL_EXPORTER_OTLP_ENDPOINT` turns it on, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and so
on are read by the SDK. Spans and metrics contain no user, history, filter or key.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from twotower.errors import ConfigError, require
from twotower.retrieval.request import Answer
from twotower.serving.json_logs import FIELDS
from twotower.serving.prometheus import Meters
from twotower.utils.console import log

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SIGNALS = ("TRACES", "METRICS")
PROTOCOL, PROTOCOLS = "http/protobuf", ("", "http/protobuf")
CLOSE_S = 1.5  # for the last spans; a dead collector must not hold up the end of the server
FAILED = 500  # statuses from here on are errors of the server
PACKAGE = "twotower"


class RequestTrace:
    """The span of one request, which is current until it ends."""

    def __init__(self, telemetry: Telemetry, method: str, headers: Mapping[bytes, bytes]) -> None:
        from opentelemetry import context, trace

        carrier = {
            name: headers[name.encode()].decode("latin-1") for name in ("traceparent", "tracestate") if name.encode() in headers
        }
        parent = telemetry.propagator.extract(carrier)
        attributes = {"http.request.method": method, "url.scheme": "http"}
        self._telemetry, self._method = telemetry, method
        self.span: Span = telemetry.tracer.start_span(method, parent, trace.SpanKind.SERVER, attributes)
        self._token = context.attach(trace.set_span_in_context(self.span))

    @property
    def header(self) -> tuple[bytes, bytes]:
        """Return the response header that names the span: `traceresponse` of W3C Trace Context, level 2."""
        context = self.span.get_span_context()
        return b"traceresponse", f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}".encode()

    def end(self, *, route: str, status: int, seconds: float, request_id: str, code: str | None, crash: Exception | None) -> None:
        """End the span and record the duration of the request."""
        from opentelemetry import context, trace

        failure = code or (str(status) if status >= FAILED else None)
        known: dict[str, str | int] = {"http.route": route, "http.response.status_code": status}
        if failure is not None:
            known["error.type"] = failure
        self.span.update_name(f"{self._method} {route}")
        self.span.set_attributes({**known, "twotower.request_id": request_id})
        if crash is not None:
            self.span.record_exception(crash)
        if status >= FAILED:
            self.span.set_status(trace.StatusCode.ERROR, code)
        self._telemetry.request_seconds.record(seconds, {"http.request.method": self._method, **known})
        self.span.end()
        context.detach(self._token)


class Telemetry:
    """Makes the spans and the metrics of one server.

    Parameters
    ----------
    traces, metrics
        Providers, which hold the exporters.
    """

    def __init__(self, traces: TracerProvider, metrics: MeterProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._traces, self._metrics = traces, metrics
        self.propagator = TraceContextTextMapPropagator()
        self.tracer, self._meter = traces.get_tracer(PACKAGE), metrics.get_meter(PACKAGE)
        text = "Duration of HTTP server requests."
        self.request_seconds = self._meter.create_histogram("http.server.request.duration", "s", text)
        self._stage_seconds = self._meter.create_histogram("twotower.stage.duration", "s", "Duration of the stages of an answer.")
        self._ids = _TraceIds()
        log.addFilter(self._ids)

    @classmethod
    def wanted(cls, variables: Mapping[str, str]) -> list[str]:
        """Return what is sent, of `SIGNALS`; nothing if the environment names no collector.

        Raises
        ------
        ConfigError
            The protocol is not http/protobuf.
        MissingExtraError
            The extra `otel` is not installed.
        """
        wanted = [one for one in SIGNALS if _endpoint(variables, one)]
        if not wanted or variables.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return []
        protocol = variables.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
        if protocol not in PROTOCOLS:
            raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}. Allowed: {PROTOCOL!r}, usually on port 4318.")
        require("otel", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
        return wanted

    @classmethod
    def from_environment(cls, variables: Mapping[str, str], worker: int | None = None) -> Telemetry | None:
        """Return what sends to the collector that the environment names; None if it names none. It starts threads.

        Parameters
        ----------
        worker
            Number of this process among several, which becomes part of its `service.instance.id`.

        Raises
        ------
        TwoTowerError
            See `wanted`.
        """
        wanted = cls.wanted(variables)
        if not wanted:
            return None
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = {SERVICE_NAME: variables.get("OTEL_SERVICE_NAME") or PACKAGE}
        resource = Resource.create(named)
        if worker is not None:  # a number is used again by the next worker, so that restarts make no new series
            given = OTELResourceDetector().detect().attributes.get(SERVICE_INSTANCE_ID) or f"{socket.gethostname()}-{os.getppid()}"
            resource = resource.merge(Resource({SERVICE_INSTANCE_ID: f"{given}-{worker}"}))
        traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        if "TRACES" in wanted:
            traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        readers = [PeriodicExportingMetricReader(OTLPMetricExporter())] if "METRICS" in wanted else []
        return cls(traces, MeterProvider(readers, resource, shutdown_on_exit=False))

    def watch(self, meters: Meters, without: Collection[str] = ()) -> None:
        """Send the counters and gauges of `/metrics` too, under their names there; `without`: not these."""
        from opentelemetry.metrics import CallbackOptions, Observation

        def reader(name: str) -> Any:
            def read(_: CallbackOptions) -> Iterable[Observation]:
                for family in meters.registry.restricted_registry([name]).collect():
                    yield from (Observation(sample.value, sample.labels) for sample in family.samples if sample.name == name)

            return read

        for family in meters.registry.collect():
            if family.name in without:
                continue
            if family.type == "counter":
                total = f"{family.name}_total"
                self._meter.create_observable_counter(family.name, [reader(total)], description=family.documentation)
            elif family.type == "gauge":
                self._meter.create_observable_gauge(family.name, [reader(family.name)], description=family.documentation)

    def request(self, method: str, headers: Mapping[bytes, bytes]) -> RequestTrace:
        """Begin the span of a request, below that of its `traceparent`."""
        return RequestTrace(self, method, headers)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Make a span of the block, below the current one."""
        with self.tracer.start_as_current_span(name):
            yield

    def answers(self, answers: Iterable[Answer]) -> None:
        """Make a span of each stage of answers, below the current span. Answers computed together share their stages."""
        offset_s = time.time() - time.perf_counter()
        for answer in {id(one.stages_ms): one for one in answers}.values():
            for stage, spent_ms in answer.stages_ms.items():
                self._stage_seconds.record(spent_ms / 1000, {"twotower.stage": stage})
                begun = answer.stages_began.get(stage)
                if begun is not None:
                    start_ns = int((offset_s + begun) * 1e9)
                    self.tracer.start_span(stage, start_time=start_ns).end(start_ns + int(spent_ms * 1e6))

    def close(self) -> None:
        """Send what is left, for at most 1.5 seconds."""
        log.removeFilter(self._ids)

        def flush() -> None:
            self._traces.shutdown()
            self._metrics.shutdown(timeout_millis=1000 * CLOSE_S)

        thread = threading.Thread(target=flush, name="telemetry", daemon=True)
        thread.start()
        thread.join(CLOSE_S)


class _TraceIds(logging.Filter):
    """Adds the ids of the current span to log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True, after adding them."""
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            ids = {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
            setattr(record, FIELDS, {**getattr(record, FIELDS, {}), **ids})
        return True


def _endpoint(variables: Mapping[str, str], signal: str) -> str | None:
    return variables.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or variables.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None
