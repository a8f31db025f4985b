"""Confidence intervals by the paired bootstrap: a table of figures in, means and 95 % intervals out.

Enters: float64 [B, C], a row a query, a column for each (system, metric), and whose query it is. Promised: users are drawn with
replacement, with all their queries, as the queries of one person are alike; all columns see the same draws, so that the
interval of a difference is that of the differences of the draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.utils.types import Float64, Int

Interval = dict[str, float]
"""{"value", "low", "high"}"""

_WEIGHTS_AT_ONCE = 2**24  # 128 MB


def resample(table: Float64, user: Int, resamples: int, seed: int) -> Float64:
    """Means [resamples, C] of the columns of `table` [B, C] over draws of the users [B]; B at least 1."""
    _, cluster, count = np.unique(user, return_inverse=True, return_counts=True)
    order = np.argsort(cluster, kind="stable")
    sums = np.add.reduceat(table[order], np.cumsum(count) - count, axis=0)
    rng, users = np.random.default_rng(seed), len(count)
    step, means = max(1, _WEIGHTS_AT_ONCE // users), []
    for begin in range(0, resamples, step):
        draws = min(step, resamples - begin)
        drawn = rng.integers(users, size=(draws, users)) + np.arange(draws)[:, None] * users
        weights = np.bincount(drawn.ravel(), minlength=draws * users).reshape(draws, users).astype(np.float64)
        means.append(weights @ sums / (weights @ count)[:, None])
    return np.concatenate(means)


def intervals(names: Sequence[str], value: Float64, draws: Float64) -> dict[str, Interval]:
    """Name → value [C] and the 2.5 and 97.5 percentiles of its draws [R, C], rounded to six decimals."""
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    rows = zip(names, value, low, high, strict=True)
    return {name: {"value": round(float(v), 6), "low": round(float(a), 6), "high": round(float(b), 6)} for name, v, a, b in rows}
