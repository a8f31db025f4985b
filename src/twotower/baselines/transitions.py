"""Recommend what followed the last items of a history in the histories of training: a Markov chain with back-off."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from sklearn.preprocessing import normalize

from twotower.baselines.base import Baseline
from twotower.data.dataset import Dataset
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW, TRAIN
from twotower.utils.types import Float


class Transitions(Baseline):
    """Rank by the share of the events after an item that were events of the candidate, summed over the last items.

    An event d positions after an item counts 1 / d, and the item d positions from the end of the history weighs 1 / d. With both
    settings 1 this is a first-order Markov chain; otherwise sequential rules (Ludewig and Jannach, 2018). Items that never followed
    come after the others, by popularity (back-off).

    Parameters
    ----------
    steps
        Number of events after an item that count.
    last
        Number of last items of a history that are used.
    """

    name = "transitions"

    def __init__(self, dataset: Dataset, *, steps: int = 1, last: int = 1) -> None:
        super().__init__(dataset, steps=steps, last=last)
        self.last = last
        events = dataset.events
        kept = np.flatnonzero(events.positive & (events.split == TRAIN) & (events.weight > 0))
        user, item = events.user_row[kept], events.item_row[kept]
        counts: Any = sparse.csr_matrix((len(self.popularity), len(self.popularity)), dtype=np.float32)
        for distance in range(1, steps + 1):
            same = user[:-distance] == user[distance:]
            before, after = item[:-distance][same], item[distance:][same]
            ones = np.full(len(before), 1 / distance, np.float32)
            counts = counts + sparse.csr_matrix((ones, (before, after)), counts.shape)
        self.shares = normalize(counts, norm="l1", axis=1)

    def scores(self, queries: Queries) -> Float:
        lengths, stop = queries.lengths, queries.offsets[1:]
        found = sparse.csr_matrix((len(queries), len(self.popularity)), dtype=np.float32)
        for distance in range(1, self.last + 1):
            query = np.flatnonzero(lengths >= distance)
            row = queries.item_row[stop[query] - distance]
            query, row = query[row >= FIRST_ROW], row[row >= FIRST_ROW]
            weights = np.full(len(query), 1 / distance, np.float32)
            found = found + sparse.csr_matrix((weights, (query, row)), found.shape) @ self.shares
        dense: Float = found.toarray()
        return np.where(dense == 0, self.popularity / (self.popularity.max(initial=0) + 1) - 1, dense)
