"""Evaluate retrievers on held-out queries and return a report.

`judge` evaluates a model, its baselines and, on a simulated town, an oracle; `report.py` writes the result. Every system ranks the
whole catalogue for the same queries, with the same rule for seen items and in bounded memory. Intervals come from a paired
bootstrap over users (`bootstrap.py`). The oracle is listed but not compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np

from twotower.baselines.base import Baseline
from twotower.baselines.baselines import BASELINES, GRIDS, unavailable
from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.errors import DataError
from twotower.evaluation.comparison import Evaluation, compare, users_of
from twotower.evaluation.slices import categories
from twotower.retriever import Retriever
from twotower.schema import FIRST_ROW, SPLITS, WITHHELD
from twotower.utils import metrics as m
from twotower.utils.config import EvaluationConfig
from twotower.utils.documents import Protocol, Report, ReportData
from twotower.utils.registry import check_names
from twotower.utils.types import Int

ProgressCallback = Callable[[int, int], None]
"""Called with (steps done, all steps)."""

QUERIES_AT_ONCE = 1024
_TUNING_QUERIES = 5000  # at most, for the tuning of a baseline


def metric_names(settings: EvaluationConfig, *more: str) -> tuple[str, ...]:
    """Return the names of all metrics at all `settings.ks`, and `more`. An unknown name raises a `ConfigError`.

    Examples
    --------
    >>> metric_names(EvaluationConfig(ks=[10]), "NDCG@5")[-2:]
    ('Precision@10', 'NDCG@5')
    """
    names = [f"{name}@{k}" for name in m.METRICS for k in sorted(set(settings.ks))]
    for name in more:
        m.parse_metric(name)
    return tuple(dict.fromkeys([*names, *more]))


def evaluate(
    retriever: Retriever,
    held_out: HeldOut,
    dataset: Dataset,
    settings: EvaluationConfig,
    *,
    metrics: Sequence[str] | None = None,
    beyond_k: int | None = 10,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Evaluate `retriever` on all queries of `held_out`, in batches.

    Parameters
    ----------
    metrics
        Names such as "NDCG@10"; None: all metrics at all `settings.ks`.
    beyond_k
        List length of the metrics beyond accuracy; None skips them.
    progress
        Called after each batch with (queries done, all queries).
    """
    names = tuple(metrics) if metrics is not None else metric_names(settings)
    depth = max([*(m.parse_metric(name)[1] for name in names), beyond_k or 1])
    n_targets, size = np.diff(held_out.target_offsets), len(held_out.queries)
    values, seconds = np.zeros((size, len(names))), 0.0
    beyond = _Beyond(dataset, beyond_k) if beyond_k else None
    for start in range(0, size, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, size)
        queries, offsets = held_out.queries.slice(start, stop), held_out.target_offsets[start : stop + 1]
        began = time.perf_counter()
        items = retriever.retrieve(queries, depth, exclude_seen=settings.exclude_seen).items
        seconds += time.perf_counter() - began
        hits = m.hit_matrix(items, offsets - offsets[0], held_out.target_row[offsets[0] : offsets[-1]])
        for column, name in enumerate(names):
            values[start:stop, column] = m.compute(name, hits, n_targets[start:stop])
        if beyond:
            beyond.add(items, queries.item_row)
        if progress:
            progress(stop, size)
    return Evaluation(retriever.name, names, values, beyond.figures() if beyond else {}, seconds)


class _Beyond:
    """Accumulates item counts and list diversity for the metrics beyond accuracy."""

    def __init__(self, dataset: Dataset, k: int) -> None:
        self.k, self.popularity = k, dataset.item_train_count
        self.exposure, self.history = np.zeros_like(self.popularity), np.zeros_like(self.popularity)
        self.categories = categories(dataset)
        self.spread, self.lists = 0.0, 0

    def add(self, items: Int, history: Int) -> None:
        top, size = items[:, : self.k], len(self.exposure)
        self.exposure += np.bincount(top[top >= 0], minlength=size)
        self.history += np.bincount(history, minlength=size)
        if self.categories is not None:
            spread = m.diversity(top, *self.categories)
            self.spread, self.lists = self.spread + float(np.nansum(spread)), self.lists + int((~np.isnan(spread)).sum())

    def figures(self) -> dict[str, float]:
        exposure, history, popularity = (a[FIRST_ROW:] for a in (self.exposure, self.history, self.popularity))
        figures = {
            f"coverage@{self.k}": m.coverage(exposure),
            f"gini@{self.k}": m.gini(exposure),
            f"novelty_bits@{self.k}": m.novelty(exposure, popularity),
            f"popularity_lift@{self.k}": m.popularity_lift(exposure, history, popularity),
        }
        return figures | ({f"diversity@{self.k}": self.spread / self.lists} if self.lists else {})


def fit_baseline(
    name: str,
    dataset: Dataset,
    settings: EvaluationConfig,
    *,
    metric: str = "NDCG@10",
    seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
    progress: ProgressCallback | None = None,
) -> Baseline:
    """Fit a baseline, tuned on the validation part if `settings.tune_baselines` is set.

    Tuning selects the entry of `GRIDS` with the best `metric` on validation queries. Without validation queries, or if the
    settings `fixed` are given, the baseline is not tuned.

    Raises
    ------
    ConfigError
        The baseline is unknown; the message suggests the nearest name.
    """
    kind = BASELINES[name]
    grid: list[Mapping[str, Any]] = [fixed or {}]
    valid = None
    if settings.tune_baselines and name in GRIDS and fixed is None:
        valid = dataset.held_out("valid", max_queries=_TUNING_QUERIES, seed=seed)
        grid = [*GRIDS[name]] if len(valid.queries) else grid
    seeded = {"seed": seed} if "seed" in signature(kind).parameters else {}
    best, best_value = None, -1.0
    for tried, choice in enumerate(grid, 1):
        candidate = kind(dataset, **{**seeded, **choice})
        value = evaluate(candidate, valid, dataset, settings, metrics=[metric], beyond_k=None).mean(metric) if valid else 0.0
        if value > best_value:  # a tie keeps the earlier entry: grids list cheaper settings first
            best, best_value = candidate, value
        if progress:
            progress(tried, len(grid))
    assert best is not None
    return best


def judge(
    systems: Iterable[Retriever],
    dataset: Dataset,
    settings: EvaluationConfig,
    *,
    held_out: HeldOut | None = None,
    part: str = "test",
    main: str = "two-tower",
    metric: str = "NDCG@10",
    seed: int = 0,
    baseline_settings: Mapping[str, Mapping[str, Any]] | None = None,
    progress: ProgressCallback | None = None,
) -> Report:
    """Evaluate `systems` and the baselines of the settings on the same queries, and return the report that compares them.

    Parameters
    ----------
    systems
        Retrievers with distinct names. The one named `main` is compared with all others. Without it, nothing is compared.
    held_out
        Queries of the split `part`; None: all of them, or a seeded sample of `settings.max_queries`.
    metric
        The metric of the verdict and of the slices.
    baseline_settings
        Settings by name of the baseline. Baselines with settings are not tuned.
    progress
        Called with (queries done, all queries). Tuning a baseline counts as much as evaluating it.

    Raises
    ------
    DataError
        The split has no query.
    ConfigError
        The metric or a baseline is unknown; the message suggests the nearest name.
    """
    check_names(settings)
    held_out = held_out or dataset.held_out(part, max_queries=settings.max_queries, seed=seed)
    if not len(held_out.queries):
        raise DataError(
            f"The split {part!r} has no query. An evaluation needs at least one. Prepare the data with a larger {part} part."
        )
    retrievers = list(systems)
    names, left_out = _competitors(dataset, settings, {system.name for system in retrievers})
    meter = _Meter(progress, len(held_out.queries), len(retrievers) + 2 * len(names))
    results: list[Evaluation] = []
    chosen: dict[str, dict[str, Any]] = {}
    every, k = metric_names(settings, metric), m.parse_metric(metric)[1]
    entries: list[Retriever | str] = [*retrievers, *names]
    for entry in entries:
        system = entry
        if isinstance(system, str):  # fitted one at a time, so that memory holds only one baseline
            fixed = (baseline_settings or {}).get(system)
            system = fit_baseline(system, dataset, settings, metric=metric, seed=seed, fixed=fixed, progress=meter.part())
        chosen[system.name] = dict(getattr(system, "settings", {}))
        results.append(evaluate(system, held_out, dataset, settings, metrics=every, beyond_k=k, progress=meter.part()))
    return Report(
        **compare(results, held_out, dataset, settings, main, metric, seed),
        dataset=_counts(dataset),
        settings=chosen,
        left_out=left_out,
        protocol=_protocol(dataset, held_out, settings, part, metric),
        beyond={e.name: {key: round(value, 6) for key, value in e.beyond.items()} for e in results},
        seconds={e.name: round(e.seconds, 3) for e in results},
    )


class _Meter:
    """Combines the progress of several parts. Each part counts as `size` queries, independent of its own total."""

    def __init__(self, progress: ProgressCallback | None, size: int, parts: int) -> None:
        self.progress, self.size, self.parts, self.started = progress, size, parts, 0

    def part(self) -> ProgressCallback:
        before, self.started = self.started * self.size, self.started + 1
        report = self.progress or (lambda _done, _total: None)
        return lambda done, total: report(before + self.size * done // total, self.size * self.parts)


def _competitors(dataset: Dataset, settings: EvaluationConfig, given: set[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names of the baselines that can run, and by name the reason why others cannot. A town's oracle always runs."""
    requested = [name for name in dict.fromkeys(settings.baselines) if name not in given]
    reasons = {
        name: unavailable(name, dataset, max_ease_items=settings.max_ease_items) for name in dict.fromkeys([*requested, "oracle"])
    }
    left_out = {name: reason for name, reason in reasons.items() if reason and name in requested}
    return [name for name, reason in reasons.items() if not reason and name not in given], left_out


def _counts(dataset: Dataset) -> ReportData:
    parts = np.bincount(dataset.events.split, minlength=WITHHELD + 1)
    return ReportData(
        users=dataset.n_users,
        items=dataset.n_items,
        noun=dataset.noun,
        new_users=dataset.n_users - dataset.n_train_users,
        new_items=dataset.n_items - dataset.n_train_items,
        events=len(dataset.events),
        event_types=dataset.event_types,
        features=[f"{spec.side}: {spec.name}" for spec in dataset.specs],
        **{f"{part}_events": int(parts[code]) for part, code in (SPLITS | {"withheld": WITHHELD}).items()},
    )


def _protocol(dataset: Dataset, held_out: HeldOut, settings: EvaluationConfig, part: str, metric: str) -> Protocol:
    return Protocol(
        split=dataset.manifest.config.prepare.split.kind,
        part=part,
        seen="masked" if settings.exclude_seen else "unmasked",
        queries=len(held_out.queries),
        users=len(np.unique(users_of(held_out))),
        targets=len(held_out.target_row),
        seen_targets=held_out.seen_targets,
        catalogue=dataset.n_items,
        metric=metric,
        ks=sorted(set(settings.ks)),
        ties="lower item row first",
        interval=f"95 %, {settings.bootstrap_resamples} paired bootstrap resamples of users",
    )
