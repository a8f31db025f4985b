"""List the items that came after and before the last items of a history in the histories of training.

Item vectors are the same in a history and in a list, so the towers learn slowly in which direction two items follow each other.
Rules of what follows what are simple and strong (Ludewig and Jannach, "Evaluation of session-based recommendation algorithms",
2018); here they count beside the towers (`models.history_terms`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twotower.retriever import Queries
from twotower.schema import FIRST_ROW
from twotower.utils.ragged import changes
from twotower.utils.types import Float, Float64, Int

LAST = 16
"""Number of last events of a history whose items count."""
TRANSITIONS = 4
"""Number of features of an item of a list."""


@dataclass(frozen=True, slots=True)
class Transitions:
    """The items after each item and before it, with their weights, largest first; see `data.co_visitation.transitions`.

    Attributes
    ----------
    after, before
        int32 [n_item_rows, m]: item rows, padded with 0.
    after_weight, before_weight
        float32 [n_item_rows, m]: positive weights, padded with 0.
    """

    after: NDArray[np.int32]
    after_weight: Float
    before: NDArray[np.int32]
    before_weight: Float

    def near(self, queries: Queries) -> tuple[Int, Int, Float64]:
        """Return the items after or before the last `LAST` items of each history, and their features.

        Returns
        -------
        query, item_row
            int64 [P], by query, then by row.
        features
            float64 [P, 4]: 1 and log a for an item that comes after, then 1 and log b for one that comes before, else zeros. a is
            the sum of its weights, each divided by the distance of the item in the history from the end (1 for the last).

        Examples
        --------
        >>> import numpy as np
        >>> lists = Transitions(*(np.zeros((5, 1), kind) for kind in ("i4", "f4", "i4", "f4")))
        >>> lists.after[2], lists.after_weight[2] = 4, 0.5
        >>> query, item_row, features = lists.near(Queries.of([[2, 3]], time_s=1_700_000_000))
        >>> query.tolist(), item_row.tolist(), np.exp(features).round(2).tolist()
        ([0], [4], [[2.72, 0.25, 1.0, 1.0]])
        """
        query = np.repeat(np.arange(len(queries)), queries.lengths)
        distance = queries.offsets[query + 1] - np.arange(len(query))
        kept = (distance <= LAST) & (queries.item_row >= FIRST_ROW) & (queries.item_row < len(self.after))
        query, item, share = query[kept], queries.item_row[kept], (1 / distance[kept])[:, None]
        size = len(self.after)
        keys, weights = [], []
        for side, (rows, weight) in enumerate(((self.after, self.after_weight), (self.before, self.before_weight))):
            found = rows[item] > 0
            # The side is the lowest digit of a key, so both sums of an item are next to each other.
            keys.append((((query * size)[:, None] + rows[item]) * 2 + side)[found])
            weights.append((weight[item] * share)[found])
        key, value = np.concatenate(keys), np.concatenate(weights)
        order = np.argsort(key)
        key, first = key[order], changes(key[order])
        total = np.bincount(np.cumsum(first) - 1, value[order])
        key = key[first]
        pair, begins = key // 2, changes(key // 2)
        features = np.zeros((int(begins.sum()), TRANSITIONS))
        at, column = np.cumsum(begins) - 1, 2 * (key % 2)
        features[at, column], features[at, column + 1] = 1.0, np.log(total)
        return pair[begins] // size, pair[begins] % size, features
