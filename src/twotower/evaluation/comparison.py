"""Compare the systems of an evaluation with paired intervals: on all queries, on each slice, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.evaluation.bootstrap import intervals, resample
from twotower.evaluation.slices import slices
from twotower.evaluation.verdict import is_refreshed, verdict
from twotower.schema import UNKNOWN
from twotower.utils.config import EvaluationConfig
from twotower.utils.documents import Interval, SliceGroup
from twotower.utils.types import Float64, Int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of one system.

    Attributes
    ----------
    metrics
        Names of the columns of `values`.
    values
        float64 [B, len(metrics)], one row per query.
    beyond
        Metrics beyond accuracy by name, such as "coverage@10".
    seconds
        Time spent in `retrieve`, in seconds.
    """

    name: str
    metrics: tuple[str, ...]
    values: Float64
    beyond: dict[str, float]
    seconds: float

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the queries; 0 without queries."""
        return float(self.values[:, self.metrics.index(metric)].mean()) if len(self.values) else 0.0


def compare(
    judged: Sequence[Evaluation], held_out: HeldOut, dataset: Dataset, settings: EvaluationConfig, main: str, metric: str, seed: int
) -> dict[str, Any]:
    """Return fields of the report: intervals of all systems, of the differences to the main one and of slices, and the verdict."""
    order, names, user = [e.name for e in judged], judged[0].metrics, users_of(held_out)
    table = np.stack([e.values for e in judged], 1)  # [B, S, M]
    draws = resample(table.reshape(len(user), -1), user, settings.bootstrap_resamples, seed).reshape(-1, len(order), len(names))
    mean = table.mean(0)
    refreshed = next((name for name in order if is_refreshed(name, main)), "")

    def minus_others(name: str) -> dict[str, dict[str, Interval]]:
        if name not in order:
            return {}
        own = order.index(name)
        others = [s for s in range(len(order)) if s != own]
        return {order[s]: intervals(names, mean[own] - mean[s], draws[:, own] - draws[:, s]) for s in others}

    differences, refreshed_differences = minus_others(main), minus_others(refreshed)
    groups: dict[str, dict[str, SliceGroup]] = {}
    for title, masks in slices(held_out, dataset).items():
        for group, mask in masks.items():
            inside = table[mask, :, names.index(metric)]
            value, drawn = inside.mean(0), resample(inside, user[mask], settings.bootstrap_resamples, seed)
            ahead = {}
            if main in order:
                own = order.index(main)
                ahead = intervals(order, value[own] - value, drawn[:, [own]] - drawn)
            groups.setdefault(title, {})[group] = SliceGroup(
                queries=int(mask.sum()),
                users=len(np.unique(user[mask])),
                systems=intervals(order, value, drawn),
                differences={name: gap for name, gap in ahead.items() if name != main},
            )
    return {
        "systems": {name: intervals(names, mean[s], draws[:, s]) for s, name in enumerate(order)},
        "differences": differences,
        "refreshed_differences": refreshed_differences,
        "slices": groups,
        "verdict": verdict({e.name: e.mean(metric) for e in judged}, differences, main, metric, refreshed_differences),
    }


def users_of(held_out: HeldOut) -> Int:
    """Return the user row of each query, int64 [B]. Each query of an unknown user gets a negative number of its own."""
    user = held_out.queries.user_row
    return np.where(user == UNKNOWN, -1 - np.arange(len(user)), user)
