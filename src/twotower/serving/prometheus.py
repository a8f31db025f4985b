"""What to watch of a running server, for Prometheus: a registry of its own, so that two servers of one process do not mix."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from twotower.retrieval.request import Answer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SHARES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SIZES = (1, 2, 4, 8, 16, 32)
RELOADS, EVENTS, ERRORS = ("loaded", "refused"), ("accepted", "repeated"), ("internal", "busy", "rate", "timeout")


class Meters:
    """Counters and histograms; names begin with "twotower_".

    Parameters
    ----------
    waiting
        Says how many requests wait to be computed.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self._requests = Counter("twotower_requests", "Requests by route and status.", ["route", "status"], registry=r)
        self._seconds = Histogram("twotower_request_seconds", "Whole requests.", ["route"], buckets=SECONDS, registry=r)
        self._stages = Histogram("twotower_stage_seconds", "Answers by stage.", ["stage"], buckets=SECONDS, registry=r)
        self._answers = Counter("twotower_answers", "Answers by source; all but model are cold.", ["source"], registry=r)
        self._share = Histogram("twotower_filter_share", "Share of items that pass a filter.", buckets=SHARES, registry=r)
        self._errors = Counter("twotower_errors", "Refused and failed requests by code.", ["code"], registry=r)
        self._batches = Histogram("twotower_batch_size", "Requests computed together.", buckets=SIZES, registry=r)
        self._events = Counter("twotower_events", "Events by what became of them.", ["outcome"], registry=r)
        self._reloads = Counter("twotower_reloads", "Bundles loaded while serving.", ["outcome"], registry=r)
        self._bundle = Gauge("twotower_bundle", "1 for the version that answers.", ["version"], registry=r)
        for counter, outcomes in ((self._reloads, RELOADS), (self._events, EVENTS), (self._errors, ERRORS)):
            for outcome in outcomes:  # a series that appears with its first count has not risen: nobody would be woken
                counter.labels(outcome)
        Gauge("twotower_waiting", "Requests that wait to be computed.", registry=r).set_function(waiting)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def answer(self, answer: Answer) -> None:
        """A list has been made."""
        self._answers.labels(answer.source).inc()
        for stage, spent in answer.stages_ms.items():
            self._stages.labels(stage).observe(spent / 1000)
        if answer.selectivity is not None:
            self._share.observe(answer.selectivity)

    def error(self, code: str) -> None:
        """A request was refused, or failed."""
        self._errors.labels(code).inc()

    def batch(self, size: int, waited_s: float) -> None:
        """Requests were computed together; the first of them had waited so long."""
        self._batches.observe(size)
        self._stages.labels("wait").observe(waited_s)

    def events(self, accepted: int, repeated: int) -> None:
        """Events came in."""
        self._events.labels("accepted").inc(accepted)
        self._events.labels("repeated").inc(repeated)

    def bundle(self, version: str) -> None:
        """From now on this version answers."""
        self._bundle.clear()
        self._bundle.labels(version).set(1)

    def reload(self, outcome: str) -> None:
        """A bundle was "loaded" or "refused"."""
        self._reloads.labels(outcome).inc()

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)
