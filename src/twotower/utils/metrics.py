"""Figures of merit: a hit matrix in, one number a query out. Pure functions, nothing kept.

Enters: `hits` bool [B, K], True where the list of query b holds one of its targets at position j (best first, position 1 is column
0), and `n_targets` int64 [B], the number of distinct targets, at least 1, whether or not the list can reach them. Leaves: float64
[B]; the figure of a system is the mean over the queries. Promised: a list shorter than `k` counts as if filled up with misses.

Ties: a list comes in one order only, equal scores by the lower item row (`search.topk`), and is judged as it stands.

Beyond accuracy, at the end, are figures of a whole system rather than of a query: what share of the catalogue it shows, how evenly,
how surprising, how much more popular than what people chose, how varied within a list.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

from twotower.errors import ConfigError, nearest
from twotower.utils.registry import Registry
from twotower.utils.types import Float64, Int, Mask

Metric = Callable[[Mask, Int, int], Float64]


def hit_matrix(items: Int, target_offsets: Int, target_row: Int) -> Mask:
    """Mark the targets in the lists.

    Parameters
    ----------
    items
        int64 [B, K], item rows best first, -1 where the list has ended.
    target_offsets, target_row
        int64 [B + 1] and [T]: the targets of query b are target_row[target_offsets[b]:target_offsets[b + 1]].
    """
    size = len(items)
    width = int(max(items.max(initial=0), target_row.max(initial=0))) + 2  # -1 and the next query's rows never meet
    owner = np.repeat(np.arange(size), np.diff(target_offsets))
    keys = np.arange(size)[:, None] * width + items + 1
    hits: Mask = np.isin(keys, owner * width + target_row + 1)
    return hits & (items >= 0)


def recall(hits: Mask, n_targets: Int, k: int) -> Float64:
    """Targets among the first k / targets. (With more than k targets it cannot reach 1.)"""
    return np.asarray(hits[:, :k].sum(1) / n_targets, np.float64)


def hit_rate(hits: Mask, n_targets: Int, k: int) -> Float64:  # noqa: ARG001
    """1 if any target is among the first k, else 0. Equals recall when every query has one target."""
    return np.asarray(hits[:, :k].any(1), np.float64)


def precision(hits: Mask, n_targets: Int, k: int) -> Float64:  # noqa: ARG001
    """Targets among the first k / k, also where the list is shorter."""
    return np.asarray(hits[:, :k].sum(1) / k, np.float64)


def ndcg(hits: Mask, n_targets: Int, k: int) -> Float64:
    """Sum of 1 / log2(1 + position) over the targets among the first k / the same sum with the first min(k, targets) all hits.

    Järvelin and Kekäläinen (2002), gains 0 and 1.
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discounts)[np.minimum(n_targets, k) - 1]
    found = hits[:, :k]
    return np.asarray(found @ discounts[: found.shape[1]] / ideal, np.float64)


def mrr(hits: Mask, n_targets: Int, k: int) -> Float64:  # noqa: ARG001
    """1 / position of the first target if it is among the first k, else 0."""
    found = hits[:, :k]
    return np.where(found.any(1), 1 / (found.argmax(1) + 1), 0.0) if found.shape[1] else np.zeros(len(hits))


def average_precision(hits: Mask, n_targets: Int, k: int) -> Float64:
    """Sum, over the targets among the first k, of the precision at the target's position / targets (all of them, as in TREC)."""
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
"""Add a metric: one function of (hits, n_targets, k) and one line here. Larger is better."""


def parse_metric(text: str) -> tuple[str, int]:
    """Split "NDCG@10" into ("NDCG", 10).

    Raises
    ------
    ConfigError
        The name is unknown (the nearest known one is named), or k is missing or below 1.
    """
    name, _, k = text.partition("@")
    if name not in METRICS:
        folded = {known.lower(): known for known in METRICS}
        hint = f" Did you mean {folded[name.lower()]!r}?" if name.lower() in folded else nearest(name, METRICS)
        raise ConfigError(f"A metric must be a known name, as in 'NDCG@10'. Got {text!r}.{hint}")
    if not (k.isascii() and k.isdigit() and int(k) > 0):
        raise ConfigError(f"A metric needs the length of the list, at least 1, as in '{name}@10'. Got {text!r}.")
    return name, int(k)


def compute(metric: str, hits: Mask, n_targets: Int) -> Float64:
    """float64 [B]: the metric named as in "NDCG@10", of every query."""
    name, k = parse_metric(metric)
    return METRICS[name](hits, n_targets, k)


def coverage(exposure: Int) -> float:
    """Items shown at least once / items that could be shown. `exposure` int64 [N]: how often each of those items was shown."""
    return float((exposure > 0).mean()) if len(exposure) else 0.0


def gini(exposure: Int) -> float:
    """Gini index of the exposure over all items that could be shown: 0 shown equally often, towards 1 a single item shown.

    Half the mean absolute difference between two items' exposure / the mean exposure.
    """
    total, size = exposure.sum(), len(exposure)
    if total == 0:
        return 0.0
    rank = np.arange(1, size + 1)
    return float((2 * rank - size - 1) @ np.sort(exposure).astype(np.float64) / (size * total))


def novelty(exposure: Int, popularity: Int) -> float:
    """Mean over everything shown of -log2 p(item), in bits.

    p = (training events of the item + 1) / (all training events + items): an item without any event has a finite surprise.
    """
    if exposure.sum() == 0:
        return 0.0
    bits = np.log2(popularity.sum() + len(popularity)) - np.log2(popularity + 1)
    return float(exposure @ bits / exposure.sum())


def popularity_lift(exposure: Int, history: Int, popularity: Int) -> float:
    """Mean training popularity of what is shown / that of what the same users had chosen before, minus 1.

    0: as popular as their own choices; 1: twice as popular. `exposure`, `history`, `popularity`: int64 [N] counts by item.
    """
    before = history @ popularity / max(int(history.sum()), 1)
    shown = exposure @ popularity / max(int(exposure.sum()), 1)
    return float(shown / before - 1) if before > 0 else 0.0


def diversity(items: Int, category_offsets: Int, category: Int) -> Float64:
    """Mean Jaccard distance (1 - shared categories / all categories of both) over the pairs of each list: float64 [B].

    Parameters
    ----------
    items
        int64 [B, K], -1 where the list has ended.
    category_offsets, category
        int64 [N + 1] and [C]: the distinct categories of item row r are category[category_offsets[r]:category_offsets[r + 1]].

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
    """int64 [B, K, K]: how many categories two positions of a list have in common; lengths, starts int64 [B, K]."""
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
