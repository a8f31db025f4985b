"""Collect the Prometheus metrics of a server. Each server has its own registry, so two servers in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from twotower.retrieval.request import Answer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REFRESH_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SHARES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
OVERLAPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZES = (1, 2, 4, 8, 16, 32)
LOGGED, SHADOWS = ("logged", "dropped"), ("answered", "failed", "dropped")
REFRESHES = ("refreshed", "unchanged", "failed")
RELOADS, EVENTS, ERRORS = ("loaded", "refused"), ("accepted", "repeated", "skipped"), ("internal", "busy", "rate", "timeout")

UPDATES = frozenset(
    f"twotower_{name}" for name in ("reloads", "refreshes", "as_of_seconds", "items_changed", "refreshed_seconds", "item_events")
)  # counted by the process that makes the updates, which is no worker


class Meters:
    """Counters and histograms; names begin with "twotower_".

    Parameters
    ----------
    waiting
        Returns the number of requests in the queue.
    store_up
        Returns True if the event store works.
    """

    def __init__(self, waiting: Callable[[], float], store_up: Callable[[], bool]) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self._requests = Counter("twotower_requests", "Requests by route and status.", ["route", "status"], registry=r)
        self._seconds = Histogram("twotower_request_seconds", "Request duration by route.", ["route"], buckets=SECONDS, registry=r)
        self._stages = Histogram("twotower_stage_seconds", "Answer duration by stage.", ["stage"], buckets=SECONDS, registry=r)
        self._versions = Counter("twotower_lists", "Answers by version.", ["version"], registry=r)
        self._logged = Counter("twotower_answers_logged", "Answers that events can name, by outcome.", ["outcome"], registry=r)
        self._feedback = Counter("twotower_list_events", "Events of lists by version and type.", ["version", "type"], registry=r)
        self._shadow = Counter("twotower_shadow_answers", "Answers of the shadow version.", ["outcome"], registry=r)
        self._shadow_seconds = Histogram("twotower_shadow_seconds", "Its duration.", buckets=SECONDS, registry=r)
        self._same = Histogram("twotower_shadow_overlap", "Share of a list that it has, too.", buckets=OVERLAPS, registry=r)
        self._answers = Counter("twotower_answers", "Answers by source; nearby and recent are cold start.", ["source"], registry=r)
        self._share = Histogram("twotower_filter_share", "Share of items that match a filter.", buckets=SHARES, registry=r)
        self._errors = Counter("twotower_errors", "Rejected and failed requests by code.", ["code"], registry=r)
        self._batches = Histogram("twotower_batch_size", "Requests computed together.", buckets=SIZES, registry=r)
        self._events = Counter("twotower_events", "Events by outcome.", ["outcome"], registry=r)
        self._reloads = Counter("twotower_reloads", "Bundles loaded while serving.", ["outcome"], registry=r)
        self._bundle = Gauge("twotower_bundle", "1 for the served version.", ["version"], registry=r)
        self._refreshes = Counter("twotower_refreshes", "Refreshes of the items by outcome.", ["outcome"], registry=r)
        self._refresh_seconds = Histogram("twotower_refresh_seconds", "Duration of a refresh.", buckets=REFRESH_SECONDS, registry=r)
        self._as_of = Gauge("twotower_as_of_seconds", "Time up to which events count for the items, since 1970.", registry=r)
        self._items_changed = Gauge("twotower_items_changed", "How often the served items were changed over HTTP.", registry=r)
        self._refreshed_at = Gauge("twotower_refreshed_seconds", "Time of the last refresh without error, since 1970.", registry=r)
        self._item_events = Gauge("twotower_item_events", "Accepted events at the last refresh by use.", ["use"], registry=r)
        for counter, outcomes in (
            (self._refreshes, REFRESHES),
            (self._reloads, RELOADS),
            (self._events, EVENTS),
            (self._errors, ERRORS),
            (self._logged, LOGGED),
            (self._shadow, SHADOWS),
        ):
            for outcome in outcomes:  # a series must exist before its first count, or an alert on its rise does not fire
                counter.labels(outcome)
        Gauge("twotower_waiting", "Requests in the queue.", registry=r).set_function(waiting)
        Gauge("twotower_event_store_up", "1 while the event store works.", registry=r).set_function(store_up)
        self._connections = Gauge("twotower_connections", "Open connections.", registry=r)
        self._stage = cache(self._stages.labels)  # finding the labels costs more than counting

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def answer(self, answer: Answer, version: str) -> None:
        """Count an answer of a version."""
        self._versions.labels(version).inc()
        self._answers.labels(answer.source).inc()
        for stage, spent in answer.stages_ms.items():
            self._stage(stage).observe(spent / 1000)
        if answer.selectivity is not None:
            self._share.observe(answer.selectivity)

    def error(self, code: str) -> None:
        """Count a rejected or failed request."""
        self._errors.labels(code).inc()

    def batch(self, size: int, waited_s: float) -> None:
        """Count a batch and the seconds that its first request waited."""
        self._batches.observe(size)
        self._stage("wait").observe(waited_s)

    def events(self, accepted: int, repeated: int) -> None:
        """Count received events."""
        self._events.labels("accepted").inc(accepted)
        self._events.labels("repeated").inc(repeated)

    def answers_logged(self, outcome: str, count: int) -> None:
        """Count answers; `outcome` is "logged" or "dropped"."""
        self._logged.labels(outcome).inc(count)

    def list_events(self, version: str, event_type: str, count: int) -> None:
        """Count new events of lists."""
        self._feedback.labels(version, event_type).inc(count)

    def shadow(self, outcome: str, seconds: float = 0.0, overlap: float | None = None) -> None:
        """Count an answer of the shadow version; `outcome` is "answered", "failed" or "dropped"."""
        self._shadow.labels(outcome).inc()
        if overlap is not None:
            self._shadow_seconds.observe(seconds)
            self._same.observe(overlap)

    def skipped(self, entries: int) -> None:
        """Count entries of the event store that cannot be read."""
        self._events.labels("skipped").inc(entries)

    def connections(self, count: Callable[[], float]) -> None:
        """Tell how to count the open connections."""
        self._connections.set_function(count)

    def bundle(self, *versions: str) -> None:
        """Set the served versions."""
        self._bundle.clear()
        for version in versions:
            self._bundle.labels(version).set(1)

    def reload(self, outcome: str) -> None:
        """Count a reload; `outcome` is "loaded" or "refused"."""
        self._reloads.labels(outcome).inc()

    def refresh(self, outcome: str, seconds: float) -> None:
        """Count a refresh; `outcome` is "refreshed", "unchanged" or "failed"."""
        self._refreshes.labels(outcome).inc()
        if outcome == "refreshed":
            self._refresh_seconds.observe(seconds)
        if outcome != "failed":
            self._refreshed_at.set_to_current_time()

    def items(self, as_of: int | None, changed: int, counts: Mapping[str, int]) -> None:
        """Set the time up to which events count for the items, how often items were changed, and what became of the events."""
        self._as_of.set(as_of or 0)
        self._items_changed.set(changed)
        for use, count in counts.items():
            self._item_events.labels(use).set(count)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
