"""Compute ranking metrics of each query, and metrics beyond accuracy of a whole system.

Ranking metrics take `hits` bool [B, K], True if position j of query b's list is one of its targets (best first, position 1 is
column 0), and `n_targets` int64 [B], the number of distinct targets of each query, at least 1. They return float64 [B]; the metric
of a system is the mean over the queries. A list shorter than `k` counts as if it were filled up with misses.

Ties: lists arrive in their final order; equal scores are ordered by item row (`search.topk`).

Beyond accuracy: catalogue coverage, evenness (Gini), novelty, popularity lift, and diversity within a list.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

from twotower.errors import ConfigError
from twotower.utils.registry import Registry, parse_at_k
from twotower.utils.types import Float64, Int, Mask

Metric = Callable[[Mask, Int, int], Float64]


def hit_matrix(items: Int, target_offsets: Int, target_row: Int) -> Mask:
    """Return bool [B, K]: True where a recommended item is a target of its query.

    Parameters
    ----------
    items
        int64 [B, K], item rows best first, -1 after the end of a list.
    target_offsets, target_row
        int64 [B + 1] and [T]: the targets of query b are target_row[target_offsets[b]:target_offsets[b + 1]].

    Examples
    --------
    >>> hit_matrix(np.array([[5, 7, -1]]), np.array([0, 1]), np.array([7])).tolist()
    [[False, True, False]]
    """
    size = len(items)
    width = int(max(items.max(initial=0), target_row.max(initial=0))) + 2  # -1 and the next query's rows never meet
    owner = np.repeat(np.arange(size), np.diff(target_offsets))
    keys = np.arange(size)[:, None] * width + items + 1
    hits: Mask = np.isin(keys, owner * width + target_row + 1)
    return hits & (items >= 0)


def recall(hits: Mask, n_targets: Int, k: int) -> Float64:
    """Return Recall@k, targets among the first k divided by all targets. With more than k targets it is below 1.

    Examples
    --------
    >>> recall(np.array([[True, False, True]]), np.array([4]), 3)
    array([0.5])
    """
    return np.asarray(hits[:, :k].sum(1) / n_targets, np.float64)


def hit_rate(hits: Mask, n_targets: Int, k: int) -> Float64:  # noqa: ARG001
    """Return 1 if any target is among the first k, else 0. Equals recall if every query has one target."""
    return np.asarray(hits[:, :k].any(1), np.float64)


def precision(hits: Mask, n_targets: Int, k: int) -> Float64:  # noqa: ARG001
    """Return targets among the first k divided by k, also if the list is shorter."""
    return np.asarray(hits[:, :k].sum(1) / k, np.float64)


def ndcg(hits: Mask, n_targets: Int, k: int) -> Float64:
    """Return NDCG@k: the sum of 1 / log2(1 + position) over the targets among the first k, divided by its largest possible value.

    The largest value has hits at the first min(k, targets) positions. Järvelin and Kekäläinen (2002), with gains 0 and 1.

    Examples
    --------
    >>> ndcg(np.array([[False, True]]), np.array([1]), 2).round(3)
    array([0.631])
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discounts)[np.minimum(n_targets, k) - 1]
    found = hits[:, :k]
    return np.asarray(found @ discounts[: found.shape[1]] / ideal, np.float64)


def mrr(hits: Mask, n_targets: Int, k: int) -> Float64:  # noqa: ARG001
    """Return the reciprocal rank: 1 / position of the first target if it is among the first k, else 0."""
    found = hits[:, :k]
    return np.where(found.any(1), 1 / (found.argmax(1) + 1), 0.0) if found.shape[1] else np.zeros(len(hits))


def average_precision(hits: Mask, n_targets: Int, k: int) -> Float64:
    """Return the sum of the precisions at the positions of targets among the first k, divided by all targets (as in TREC)."""
    found = hits[:, :k]
    at = np.cumsum(found, 1) / np.arange(1, found.shape[1] + 1)
    return np.asarray((at * found).sum(1) / n_targets, np.float64)


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "Recall": recall,
        "HitRate": hit_rate,
        "NDCG": ndcg,
        "MRR": mrr,
        "MAP": average_precision,
        "Precision": precision,
    },
)
"""Metrics by name; larger is better. To add one, write a function of (hits, n_targets, k) and register it."""


def parse_metric(text: str) -> tuple[str, int]:
    """Split "NDCG@10" into ("NDCG", 10).

    Raises
    ------
    ConfigError
        The name is unknown (the nearest known one is named), or k is missing or below 1.

    Examples
    --------
    >>> parse_metric("NDCG@10")
    ('NDCG', 10)
    """
    return parse_at_k(text, "metric", METRICS)


def compute(metric: str, hits: Mask, n_targets: Int) -> Float64:
    """Return float64 [B]: the metric, named as in "NDCG@10", of every query.

    Raises
    ------
    ConfigError
        A metric that was registered returns something else.
    """
    name, k = parse_metric(metric)
    found = METRICS[name](hits, n_targets, k)
    if np.shape(found) != n_targets.shape:
        raise ConfigError(
            f"The metric {name!r} gives the shape {np.shape(found)} for {len(n_targets)} queries. "
            "Expected one number per query. Correct the function."
        )
    return found


def coverage(exposure: Int) -> float:
    """Return the share of items that are shown at least once. `exposure` int64 [N]: how often each item was shown.

    Examples
    --------
    >>> coverage(np.array([3, 0, 1, 0]))
    0.5
    """
    return float((exposure > 0).mean()) if len(exposure) else 0.0


def gini(exposure: Int) -> float:
    """Return the Gini index of the exposure of all items: 0 if all are shown equally often, near 1 if a single item is shown.

    It is half the mean absolute difference of two items' exposure, divided by the mean exposure.
    """
    total, size = exposure.sum(), len(exposure)
    if total == 0:
        return 0.0
    rank = np.arange(1, size + 1)
    return float((2 * rank - size - 1) @ np.sort(exposure).astype(np.float64) / (size * total))


def novelty(exposure: Int, popularity: Int) -> float:
    """Return the mean of -log2 p(item) over all shown items, in bits.

    p = (training events of the item + 1) / (all training events + items), so an item without events has a finite value.
    """
    if exposure.sum() == 0:
        return 0.0
    bits = np.log2(popularity.sum() + len(popularity)) - np.log2(popularity + 1)
    return float(exposure @ bits / exposure.sum())


def popularity_lift(exposure: Int, history: Int, popularity: Int) -> float:
    """Return the mean training popularity of shown items, divided by that of the items in the users' histories, minus 1.

    0: as popular as the histories; 1: twice as popular. `exposure`, `history`, `popularity`: int64 [N] counts by item.
    """
    before = history @ popularity / max(int(history.sum()), 1)
    mean_popularity = exposure @ popularity / max(int(exposure.sum()), 1)
    return float(mean_popularity / before - 1) if before > 0 else 0.0


def diversity(items: Int, category_offsets: Int, category: Int) -> Float64:
    """Return the mean Jaccard distance (1 - shared / all categories of both items) of the pairs in each list, float64 [B].

    Parameters
    ----------
    items
        int64 [B, K], -1 after the end of a list.
    category_offsets, category
        int64 [N + 1] and [C]: the distinct categories of item row r are category[category_offsets[r]:category_offsets[r + 1]].

    Notes
    -----
    Pairs with an item that has no category are left out; a list without pairs gives NaN.
    """
    safe = np.maximum(items, 0)
    lengths = np.where(items >= 0, np.diff(category_offsets)[safe], 0)
    shared = _shared(lengths, category_offsets[safe], category)
    union = lengths[:, :, None] + lengths[:, None, :] - shared
    pair = np.triu((lengths[:, :, None] > 0) & (lengths[:, None, :] > 0), 1)
    distance = np.where(pair, 1 - shared / np.maximum(union, 1), 0.0).sum((1, 2))
    count = pair.sum((1, 2))
    return np.where(count > 0, distance / np.maximum(count, 1), np.nan)


def _shared(lengths: Int, starts: Int, category: Int) -> Int:
    """Return int64 [B, K, K]: number of categories that two positions of a list share; lengths and starts are int64 [B, K]."""
    size, k = lengths.shape
    flat = lengths.ravel()
    indptr = np.append(0, np.cumsum(flat))
    slot = np.repeat(np.arange(size * k), flat)
    label = category[starts.ravel()[slot] + np.arange(len(slot)) - indptr[slot]]
    _, column = np.unique(slot // k * (int(label.max(initial=0)) + 1) + label, return_inverse=True)  # lists share no column
    table = sparse.csr_matrix((np.ones(len(slot), np.int64), column, indptr), (size * k, int(column.max(initial=-1)) + 1))
    pairs = (table @ table.T).tocoo()
    shared = np.zeros((size, k, k), np.int64)
    shared[pairs.row // k, pairs.row % k, pairs.col % k] = pairs.data
    return shared
