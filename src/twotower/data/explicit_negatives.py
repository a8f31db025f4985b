"""Find the explicit negatives of a training target: what its user disliked, or was shown and did not choose, before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twotower.data.dataset import Dataset
from twotower.data.train_events import TrainEvents
from twotower.schema import TRAIN
from twotower.utils.ragged import lower_bound, ragged_arange
from twotower.utils.types import Float64, Int, Mask

MAX_NEGATIVES = 20  # latest explicit negatives of an example


@dataclass(frozen=True, slots=True)
class NegativePairs:
    """Distinct pairs of an example and an item that is a negative of its user; sorted by example, then item.

    Attributes
    ----------
    example, item_row
        int64 [P].
    weight
        float64 [P]: sum of the weights of the negatives of the pair.
    """

    example: Int
    item_row: Int
    weight: Float64

    def take(self, kept: Mask) -> NegativePairs:
        """Return the pairs of a mask."""
        return NegativePairs(self.example[kept], self.item_row[kept], self.weight[kept])


class ExplicitNegatives:
    """Explicit negatives of the training part, by user; create it with `of`.

    Items without a training event are left out, since the towers do not know them. So are items that the user has a training event
    with: they were chosen after all.
    """

    def __init__(self, dataset: Dataset, events: TrainEvents, weight: float) -> None:
        rows = dataset.negatives
        assert rows is not None
        trained = np.flatnonzero((rows.split == TRAIN) & (rows.item_row < dataset.n_train_item_rows) & (rows.weight > 0))
        every = np.arange(events.offsets[-1])
        chosen = np.repeat(np.arange(len(events.offsets) - 1), np.diff(events.offsets)) * dataset.n_item_rows
        pair = rows.user_row[trained] * dataset.n_item_rows + rows.item_row[trained]
        kept = trained[~np.isin(pair, chosen + events.targets(every)[0])]
        self.offsets = np.searchsorted(kept, rows.offsets)
        self.item_row, self.time_s, self.request = rows.item_row[kept], rows.time_s[kept], rows.request[kept]
        self.weight = weight * rows.weight[kept].astype(np.float64)
        self._n_item_rows = dataset.n_item_rows

    @classmethod
    def of(cls, dataset: Dataset, events: TrainEvents, weight: float) -> ExplicitNegatives | None:
        """Return the negatives, whose weights are multiplied by `weight`; None if there is nothing to learn from."""
        if not weight or dataset.negatives is None:
            return None
        found = cls(dataset, events, weight)
        return found if len(found.item_row) else None

    def before(self, event: Int, events: TrainEvents) -> NegativePairs:
        """Return the negatives of targets, given the positions of training events among those of all users.

        They are the latest `MAX_NEGATIVES` strictly before the target, and those of its own list if they have its time: a list is
        shown before something is chosen from it.
        """
        user = np.searchsorted(events.offsets, event, side="right") - 1
        item_row, time_s, _ = events.targets(event)
        request = events.lists(event)
        begin, end = self.offsets[user], self.offsets[user + 1]
        past = lower_bound(self.time_s, begin, end, time_s)
        stop = lower_bound(self.time_s, past, end, time_s + 1) if request.any() else past
        start = np.maximum(begin, past - MAX_NEGATIVES)
        example, at = ragged_arange(start, stop - start)
        kept = (at < past[example]) | ((self.request[at] == request[example]) & (request[example] > 0))
        kept &= self.item_row[at] != item_row[example]
        pairs, which = np.unique(example[kept] * self._n_item_rows + self.item_row[at[kept]], return_inverse=True)
        weight = np.bincount(which, self.weight[at[kept]], len(pairs)).astype(np.float64)
        return NegativePairs(pairs // self._n_item_rows, pairs % self._n_item_rows, weight)
