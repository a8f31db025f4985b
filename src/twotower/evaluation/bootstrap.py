"""Compute confidence intervals by the paired bootstrap over users.

The input is a table float64 [B, C] with one row per query and one column per (system, metric), and the user of each query. Users
are drawn with replacement, each with all their queries, because queries of one user are correlated. All columns share the draws, so
the interval of a difference is computed from the differences of the draws. Of a single user, the queries are drawn: the interval is
that of this user.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.utils.documents import Interval
from twotower.utils.types import Float64, Int

_WEIGHTS_AT_ONCE = 2**24  # 128 MB


def resample(table: Float64, user: Int, resamples: int, seed: int) -> Float64:
    """Return the column means of every bootstrap resample.

    Parameters
    ----------
    table
        float64 [B, C], one row per query; B is at least 1.
    user
        int64 [B]: the user of each query.

    Returns
    -------
    Float64
        [resamples, C].

    Examples
    --------
    >>> resample(np.ones((3, 2)), np.array([7, 7, 9]), resamples=4, seed=0).shape
    (4, 2)
    """
    _, cluster, count = np.unique(user, return_inverse=True, return_counts=True)
    if len(count) == 1:
        cluster, count = np.arange(len(user)), np.ones(len(user), np.int64)
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
    """Return the 95 % interval of each column: name → value, and the 2.5 and 97.5 percentiles of its draws.

    Parameters
    ----------
    value
        float64 [C].
    draws
        float64 [R, C], as returned by `resample`. All numbers are rounded to six decimals.

    Examples
    --------
    >>> intervals(["NDCG@10"], np.array([0.5]), np.array([[0.4], [0.6]]))
    {'NDCG@10': Interval(value=0.5, low=0.405, high=0.595)}
    """
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    rows = zip(names, value, low, high, strict=True)
    return {name: Interval(value=round(float(v), 6), low=round(float(a), 6), high=round(float(b), 6)) for name, v, a, b in rows}
