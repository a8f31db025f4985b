"""Add up the metrics of all processes of a server.

Each process writes what it has counted to a file of its own, `NUMBER.json`, when another one asks for it. When a process has ended,
its counts are added to `past.json`, so that counters never fall.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from twotower.utils.console import log

PAST = "past.json"
GAUGES = {  # the others are added up
    **dict.fromkeys(("twotower_bundle", "twotower_as_of_seconds", "twotower_items_changed"), max),
    **dict.fromkeys(("twotower_refreshed_seconds", "twotower_item_events"), max),
    **dict.fromkeys(("twotower_event_store_up", "process_start_time_seconds"), min),
}
Family = dict[str, Any]
"""Name, type and text of a metric, and its samples: lists of name, labels and value."""


class MetricsFolder:
    """The files of all processes of one server."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._complained = folder, False

    def write(self, number: int, registry: CollectorRegistry) -> None:
        """Write what the process of this number has counted. A full disk is logged once: the server goes on without."""
        with self._disk_errors_logged():
            self._replace(f"{number}.json", [_family(metric) for metric in registry.collect()])

    def text(self, workers: int) -> bytes:
        """Return the sums in the Prometheus text format."""
        with self._locked(fcntl.LOCK_SH):
            families = [family for path in sorted(self._folder.glob("*.json")) for family in _read(path)]
        samples = [["twotower_workers", {}, workers]]
        up: Family = {"name": "twotower_workers", "kind": "gauge", "text": "Processes that answer requests.", "samples": samples}
        registry = CollectorRegistry()
        registry.register(_Sums(added([*families, up])))
        return generate_latest(registry)

    def forget(self, number: int) -> None:
        """Add the counts of a process that has ended to those of the past."""
        with self._disk_errors_logged(), self._locked(fcntl.LOCK_EX):
            own = [one for one in _read(self._folder / f"{number}.json") if one["kind"] in ("counter", "histogram")]
            self._replace(PAST, added([*_read(self._folder / PAST), *own]))
            with suppress(FileNotFoundError):
                (self._folder / f"{number}.json").unlink()

    def _replace(self, name: str, families: list[Family]) -> None:
        made = self._folder / f"{name}.{os.getpid()}.new"
        made.write_text(json.dumps(families))
        made.replace(self._folder / name)

    @contextmanager
    def _disk_errors_logged(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._complained:
                log.error("metrics cannot be written to %s: %s", self._folder, error.strerror)
            self._complained = True

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, kind)
            yield
        finally:
            os.close(lock)


def added(families: list[Family]) -> list[Family]:
    """Return one family for each name, with added samples; of some gauges the largest or the smallest.

    Examples
    --------
    >>> two = [{"name": "n", "kind": "counter", "text": "", "samples": [["n_total", {"a": "b"}, value]]} for value in (1, 2)]
    >>> added(two)[0]["samples"]
    [['n_total', {'a': 'b'}, 3]]
    """
    found: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, str], float]] = {}
    for family in families:
        name = family["name"]
        found.setdefault(name, family)
        own = values.setdefault(name, {})
        for sample, labels, value in family["samples"]:
            key = sample, json.dumps(labels)
            how = min if sample.endswith("_created") else GAUGES.get(name)
            own[key] = value if key not in own else how(own[key], value) if how else own[key] + value
    return [
        {**found[name], "samples": [[sample, json.loads(labels), value] for (sample, labels), value in own.items()]}
        for name, own in values.items()
    ]


class _Sums(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family["name"], family["text"], family["kind"])
            for sample, labels, value in family["samples"]:
                metric.add_sample(sample, labels, value)
            yield metric


def _family(metric: Metric) -> Family:
    samples = [[sample.name, sample.labels, sample.value] for sample in metric.samples]
    return {"name": metric.name, "kind": metric.type, "text": metric.documentation, "samples": samples}


def _read(path: Path) -> list[Family]:
    try:
        found: list[Family] = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    return found
