"""Let a history count beside the user tower: its last items, what came after and before them, and its items themselves.

    score(u, i) + T · r · Σ_b ½ᵇ ⟨v_b, v_i⟩                for every item
    score(u, i) + T · t · y(u, i)                          for an item after or before the last items, see `features.transitions`
    score(u, i) + T · w · x(u, i)                          for an item of the history, where seen items may be recommended

v_b is the vector of the item b events before the last. y(u, i) is 1 and log a where i came after them, and 1 and log b where it
came before them. x(u, i) is 1, log n, log(1 + b), log(1 + R), the log popularity of i, and score(u, i) / T: n is the number of
events of i in the history, b the number of events since the last of them, and R the number of events of the history whose item
occurred before.

The first term is part of the user vector. The others are the bonuses of a few items. The search leaves these out; they are scored
exactly and merged into the list, so the list is exact with every index. The weights are chosen on the validation part
(`trainers.history_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.features.transitions import LAST, TRANSITIONS, Transitions
from twotower.retriever import Queries, Recommendations
from twotower.schema import FIRST_ROW
from twotower.utils.ragged import changes, concatenated, lengths_to_offsets
from twotower.utils.types import Float, Float64, Int, Mask

REPEATS = 6
"""Number of weights of a repeat. Those of the transitions follow them."""
COUNTED = 4
"""Number of features of a repeat that the history alone tells."""
BLOCK = 2048
"""Pairs of a query and an item whose vectors are gathered at once: they stay in the CPU cache."""


@dataclass(frozen=True, slots=True)
class Bonuses:
    """Items of a few queries whose scores have a bonus, by query, then by row.

    Attributes
    ----------
    query, item_row
        int64 [P].
    counted
        float64 [P, 4]: 1, log n, log(1 + b), log(1 + R) for an item of the history that may be recommended, else zeros.
    transitions
        float64 [P, 4]: see `Transitions.near`; zeros for an item that is in no list.
    """

    query: Int
    item_row: Int
    counted: Float64
    transitions: Float64

    def take(self, chosen: Mask | Int) -> Bonuses:
        """Return some of the items: bool [P], or positions."""
        return Bonuses(self.query[chosen], self.item_row[chosen], self.counted[chosen], self.transitions[chosen])

    def features(self, popularity: Float64, score: Float64) -> Float64:
        """Return the features float64 [P, 10] of the items, with their log popularities and scores [P] in nats."""
        repeated = self.counted[:, 0]
        return np.column_stack([self.counted, repeated * popularity, repeated * score, self.transitions])

    def beside(self, left_out: tuple[Int, Int]) -> tuple[Int, Int]:
        """Return ragged item rows (offsets [B + 1], rows) with the items of each query added."""
        n_queries = len(left_out[0]) - 1
        return concatenated(left_out, (lengths_to_offsets(np.bincount(self.query, minlength=n_queries)), self.item_row))


def bonuses_of(queries: Queries, again: Mask, transitions: Transitions | None = None) -> Bonuses:
    """Return the items with a bonus: those of the histories of the queries `again` (bool [B]), and those of the transitions.

    Items that are left out of the list of a query have none: see `Queries.left_out`.

    Examples
    --------
    >>> found = bonuses_of(Queries.of([[7, 9, 7, 8]], time_s=1_700_000_000), np.array([True]))
    >>> found.item_row.tolist(), np.exp(found.counted[:, 1:]).round(6).tolist()
    ([7, 8, 9], [[2.0, 2.0, 2.0], [1.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    """
    repeats = _repeats_of(queries, again)
    if transitions is None:
        return repeats
    query, item_row, features = transitions.near(queries)
    offsets, rows = queries.left_out(again)
    size = max(len(transitions.after), int(rows.max(initial=0)) + 1)
    key, known = query * size + item_row, repeats.query * size + repeats.item_row
    left_out = np.repeat(np.arange(len(queries)), np.diff(offsets)) * size + rows
    kept = np.ones(len(key), np.bool_)
    kept[_positions(key, left_out)] = False
    kept[_positions(key, known)] = True
    key, features = key[kept], features[kept]
    every = np.union1d(known, key) if len(known) else key
    found = Bonuses(every // size, every % size, np.zeros((len(every), COUNTED)), np.zeros((len(every), TRANSITIONS)))
    found.counted[_positions(every, known)] = repeats.counted
    found.transitions[_positions(every, key)] = features
    return found


def _positions(ascending: Int, values: Int) -> Int:
    """Return the positions, in distinct ascending numbers, of those values that are among them."""
    if not len(ascending):
        return np.zeros(0, np.int64)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(at[ascending[at] == values], np.int64)


def _repeats_of(queries: Queries, chosen: Mask) -> Bonuses:
    """Return the distinct items of the histories of the `chosen` (bool [B]) queries, without the reserved rows."""
    query = np.repeat(np.arange(len(queries)), queries.lengths)
    since = queries.offsets[query + 1] - 1 - np.arange(len(query))
    kept = np.flatnonzero(chosen[query] & (queries.item_row >= FIRST_ROW))
    kept = kept[np.lexsort((since[kept], queries.item_row[kept], query[kept]))]
    first = np.flatnonzero(changes(query[kept], queries.item_row[kept]))
    count = np.diff(np.append(first, len(kept)))
    at = kept[first]
    again = np.bincount(query[at], count - 1, len(queries))
    counted = np.column_stack([np.ones(len(at)), np.log(count), np.log1p(since[at]), np.log1p(again[query[at]])])
    return Bonuses(query[at], queries.item_row[at], counted, np.zeros((len(at), TRANSITIONS)))


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


def merge_bonuses(
    best: Recommendations, bonuses: Bonuses, vectors: Tensor, items: Tensor, weights: Tensor, temperature: float, *, popularity: int
) -> Recommendations:
    """Return the lists with the items that have a bonus merged in.

    Parameters
    ----------
    best
        Lists [B, k] without these items.
    vectors, items
        float32 [B, D + P] and [n_item_rows, D + P]: vectors of the queries and of the index.
    weights
        float [10].
    popularity
        Column of `items` with the log popularity.
    """
    row, query = (torch.from_numpy(each).to(vectors.device) for each in (bonuses.item_row, bonuses.query))
    blocks = [slice(start, start + BLOCK) for start in range(0, len(row), BLOCK)]
    parts = [torch.linalg.vecdot(vectors.index_select(0, query[at]), items.index_select(0, row[at])) for at in blocks]
    products = torch.cat([vectors.new_zeros(0), *parts]).double().cpu().numpy()
    features = bonuses.features(items[row, popularity].double().cpu().numpy(), products / temperature)
    scores = (products + temperature * (features @ weights.double().cpu().numpy())).astype(np.float32)
    least = best.scores[:, -1] if best.scores.shape[1] else np.full(len(vectors), np.inf, np.float32)
    kept = scores >= least[bonuses.query]
    return merged(best, bonuses.query[kept], bonuses.item_row[kept], scores[kept])


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
