"""Let a history count beside the user tower: its last items, and its items where they may be recommended again.

    score(u, i) + T · r · Σ_b ½ᵇ ⟨v_b, v_i⟩                for every item
    score(u, i) + T · w · x(u, i)                          for an item of the history, where seen items may be recommended

v_b is the vector of the item b events before the last. x(u, i) is 1, log n, log(1 + b), log(1 + R), the log popularity of i, and
score(u, i) / T: n is the number of events of i in the history, b the number of events since the last of them, and R the number of
events of the history whose item occurred before. The first term is part of the user vector. For the second, the search leaves out
the history; its items are scored exactly and merged into the list. The weights are chosen on the validation part
(`trainers.history_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.retriever import Queries, Recommendations
from twotower.schema import FIRST_ROW
from twotower.utils.ragged import changes
from twotower.utils.types import Float, Float64, Int, Mask

LAST = 16
"""Number of last events whose items count."""
WIDTH = 6
"""Number of weights of a repeat."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """The distinct items of histories, by query, then by row.

    Attributes
    ----------
    query, item_row
        int64 [P].
    counted
        float64 [P, 4]: 1, log n, log(1 + b), log(1 + R).
    """

    query: Int
    item_row: Int
    counted: Float64

    def take(self, chosen: Mask | Int) -> Repeats:
        """Return some of the items: bool [P], or positions."""
        return Repeats(self.query[chosen], self.item_row[chosen], self.counted[chosen])

    def features(self, popularity: Float64, score: Float64) -> Float64:
        """Return the features float64 [P, 6] of the items, with their log popularities and scores [P] in nats."""
        return np.column_stack([self.counted, popularity, score])


def repeats_of(queries: Queries, chosen: Mask) -> Repeats:
    """Return the distinct items of the histories of the `chosen` (bool [B]) queries, without the reserved rows.

    Examples
    --------
    >>> found = repeats_of(Queries.of([[7, 9, 7, 8]], time_s=1_700_000_000), np.array([True]))
    >>> found.item_row.tolist(), np.exp(found.counted[:, 1:]).round(6).tolist()
    ([7, 8, 9], [[2.0, 2.0, 2.0], [1.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    """
    query = np.repeat(np.arange(len(queries)), queries.lengths)
    since = queries.offsets[query + 1] - 1 - np.arange(len(query))
    kept = np.flatnonzero(chosen[query] & (queries.item_row >= FIRST_ROW))
    kept = kept[np.lexsort((since[kept], queries.item_row[kept], query[kept]))]
    first = np.flatnonzero(changes(query[kept], queries.item_row[kept]))
    count = np.diff(np.append(first, len(kept)))
    at = kept[first]
    again = np.bincount(query[at], count - 1, len(queries))
    counted = np.column_stack([np.ones(len(at)), np.log(count), np.log1p(since[at]), np.log1p(again[query[at]])])
    return Repeats(query[at], queries.item_row[at], counted)


def recent_sum(queries: Queries, items: Tensor) -> Tensor:
    """Return Σ_b ½ᵇ v_b [B, D] over the last `LAST` events of each history; `items` [n_item_rows, D]."""
    summed = items.new_zeros(len(queries), items.shape[1])
    start, last = queries.offsets[:-1], queries.offsets[1:] - 1
    for back in range(LAST):
        query = np.flatnonzero(last - back >= start)
        row = queries.item_row[last[query] - back]
        query, row = query[row >= FIRST_ROW], row[row >= FIRST_ROW]
        summed[torch.from_numpy(query).to(items.device)] += 0.5**back * items[torch.from_numpy(row).to(items.device)]
    return summed


def merge_repeats(
    best: Recommendations,
    queries: Queries,
    vectors: Tensor,
    items: Tensor,
    weights: Tensor,
    temperature: float,
    *,
    popularity: int,
    again: Mask,
    allow: Mask | None = None,
) -> Recommendations:
    """Return the lists with the items of the histories merged in, for queries that may get them again.

    Parameters
    ----------
    best
        Lists [B, k] without the items of the histories.
    vectors, items
        float32 [B, D + P] and [n_item_rows, D + P]: vectors of the queries and of the index.
    weights
        float [6].
    popularity
        Column of `items` with the log popularity.
    again
        bool [B].
    allow
        As in `Retriever.retrieve`.
    """
    found = repeats_of(queries, again)
    if allow is not None:
        found = found.take(allow[found.item_row] if allow.ndim == 1 else allow[found.query, found.item_row])
    mine = items[torch.from_numpy(found.item_row).to(vectors.device)]
    products = (vectors[torch.from_numpy(found.query).to(vectors.device)] * mine).sum(dim=1).double().cpu().numpy()
    features = found.features(mine[:, popularity].double().cpu().numpy(), products / temperature)
    scores = products + temperature * (features @ weights.double().cpu().numpy())
    return merged(best, found.query, found.item_row, scores.astype(np.float32))


def merged(best: Recommendations, query: Int, row: Int, score: Float) -> Recommendations:
    """Return lists [B, k] with more items merged in: rows and scores [P] by query, which are in no list yet."""
    k = best.items.shape[1]
    if not len(row) or not k:
        return best
    order = np.lexsort((row, -score, query))
    query, row, score = query[order], row[order], score[order]
    begins = changes(query)
    rank = np.arange(len(row)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]
    first = rank < k
    query, row, score, rank = query[first], row[first], score[first], rank[first]
    more = (len(best.items), int(rank.max()) + 1)
    more_items, more_scores = np.full(more, -1, np.int64), np.full(more, -np.inf, np.float32)
    more_items[query, rank], more_scores[query, rank] = row, score
    rows, scores = np.concatenate([best.items, more_items], axis=1), np.concatenate([best.scores, more_scores], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return Recommendations(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))
