"""Find items that have events of the same users in training: those co-visited with an item, and those after and before it.

The results depend only on the training events. Used as an item feature, co-visited items are one precomputed layer of graph
convolution (He et al., "LightGCN", SIGIR 2020): an item learns from its neighbours in one training step, where its id alone would
need many events. The items after and before an item tell what the towers learn slowly, the direction; see `features.transitions`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from twotower.features.transitions import Transitions
from twotower.schema import FIRST_ROW
from twotower.utils.hardware import cores
from twotower.utils.ragged import changes, lengths_to_offsets
from twotower.utils.types import Float, Float64, Int, Mask

MAX_USER_EVENTS = 100  # most recent events of a user: very active users tell little, and pairs grow quadratically
BLOCK = 1024  # items compared at once by each thread
LAGS = 20  # largest distance, in events, of a pair


def co_visited(
    user_row: Int, item_row: Int, *, n_user_rows: int, n_item_rows: int, most: int, ordered: bool = False
) -> NDArray[np.int32]:
    """Return the `most` nearest items of each item, best first.

    The similarity of two items is Σ 1/|u| over their common users u, divided by the square root of the product of the items'
    numbers of users. |u| is the number of items of u.

    Parameters
    ----------
    user_row, item_row
        int64 [E]: training events by user, oldest first.
    ordered
        True if the order of a user's events is known. Then each pair of events counts 1/|u|/lag, where lag is their distance in
        events, up to `LAGS`.
    most
        Number of co-visited items per item.

    Returns
    -------
    int32 [n_item_rows, most]
        Item rows, padded with 0; among equally near items the lower row first.
    """
    interactions = _interactions(user_row, item_row, n_user_rows, n_item_rows)
    users_of, items_of = np.maximum(interactions.getnnz(0), 1), np.maximum(interactions.getnnz(1), 1)
    by_user = (sparse.diags(items_of**-0.5) @ interactions @ sparse.diags(users_of**-0.5)).tocsr()
    by_item = by_user.T.tocsr()
    pairs = _Pairs(user_row, item_row, items_of**-1.0, users_of**-0.5) if ordered else None

    def alike(start: int, stop: int) -> sparse.csr_matrix:
        return by_item[start:stop] @ by_user if pairs is None else pairs.alike(start, stop)

    return _nearest(alike, n_item_rows, most)[0]


def transitions(user_row: Int, item_row: Int, time_s: Int, *, n_user_rows: int, n_item_rows: int, most: int) -> Transitions:
    """Return the `most` items with the largest weights after each item, and before it.

    The weight of two items is the sum of 1/lag over their pairs of events of the same user in this order, divided by the square
    root of the product of the items' numbers of users. The lag is their distance in distinct times of the user's events: 1 for the
    next time. Events at the same time have no order and make no pair; nor do events that are more than `LAGS` events apart.

    Parameters
    ----------
    time_s
        int64 [E]: times of the events in seconds; ascending for each user. The others are as in `co_visited`.
    """
    users_of = np.maximum(_interactions(user_row, item_row, n_user_rows, n_item_rows).getnnz(0), 1)
    factors, moment = (np.ones(n_user_rows), users_of**-0.5), np.cumsum(changes(user_row, time_s), dtype=np.int64)
    after, before = (_Pairs(user_row, item_row, *factors, moment, side).alike for side in (1, -1))
    return Transitions(*_nearest(after, n_item_rows, most), *_nearest(before, n_item_rows, most))


def _nearest(alike: Callable[[int, int], sparse.csr_matrix], n_item_rows: int, most: int) -> tuple[NDArray[np.int32], Float]:
    """Return the other items that are most similar to each item, and the similarities float32; [n_item_rows, most], 0 without.

    `alike(start, stop)` returns the similarities of the items start … stop - 1 to all items.
    """
    near, values = np.zeros((n_item_rows, most), np.int32), np.zeros((n_item_rows, most), np.float32)

    def find(start: int) -> None:
        found = alike(start, min(start + BLOCK, n_item_rows))
        for row in range(start, min(start + BLOCK, n_item_rows)):
            mine = slice(*found.indptr[row - start : row - start + 2])
            best, value = _best(found.indices[mine], found.data[mine], row, most)
            near[row, : len(best)], values[row, : len(best)] = best, value

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(find, range(FIRST_ROW, n_item_rows, BLOCK)))
    return near, values


class _Pairs:
    """Pairs of events of the same user that are near each other in order.

    Parameters
    ----------
    of_user, of_item
        float64 [n_user_rows], [n_item_rows]: factor of a pair for its user, and for each of its items.
    moment
        int64 [E]: ascending numbers, equal for events of a user at the same time. The lag of a pair is their difference; with equal
        numbers it is no pair. None: the lag is the distance in events.
    side
        1: the other event comes after that of the item; -1: before it; 0: both.
    """

    def __init__(
        self,
        user_row: Int,
        item_row: Int,
        of_user: Float64,
        of_item: Float64,
        moment: Int | None = None,
        side: int = 0,
    ) -> None:
        late = _late(user_row, len(of_user))
        self.user, self.item, self.sides = user_row[late], item_row[late], (side,) if side else (-1, 1)
        self.moment = np.arange(len(self.user)) if moment is None else moment[late]
        self.of_user, self.of_item = of_user, of_item
        self.by_item = np.argsort(self.item, kind="stable")
        self.offsets = lengths_to_offsets(np.bincount(self.item, minlength=len(of_item)))

    def alike(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return the similarity of items start … stop - 1 to all items, float64 [stop - start, n_item_rows]."""
        event = self.by_item[self.offsets[start] : self.offsets[stop]]
        rows, columns, weights = [], [], []
        for lag in range(1, LAGS + 1):
            for other in (event + side * lag for side in self.sides):
                inside = (other >= 0) & (other < len(self.user))
                one, two = event[inside], other[inside]
                apart = np.abs(self.moment[one] - self.moment[two])
                kept = (self.user[one] == self.user[two]) & (apart > 0)
                one, two, apart = one[kept], two[kept], apart[kept]
                rows.append(self.item[one] - start)
                columns.append(self.item[two])
                weights.append(self.of_user[self.user[one]] * self.of_item[self.item[one]] * self.of_item[self.item[two]] / apart)
        pairs = (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_matrix((np.concatenate(weights), pairs), (stop - start, len(self.of_item)))


def _late(user_row: Int, n_user_rows: int) -> Mask:
    """Return a mask of the events that are among the latest of their user."""
    end = lengths_to_offsets(np.bincount(user_row, minlength=n_user_rows))[user_row + 1]
    return np.asarray(end - np.arange(len(user_row)) <= MAX_USER_EVENTS)


def _interactions(user_row: Int, item_row: Int, n_user_rows: int, n_item_rows: int) -> sparse.csr_matrix:
    """Return float64 [n_user_rows, n_item_rows]: 1 if an item is in the latest events of the user."""
    late = _late(user_row, n_user_rows)
    interactions = sparse.csr_matrix((np.ones(int(late.sum())), (user_row[late], item_row[late])), (n_user_rows, n_item_rows))
    interactions.sum_duplicates()
    interactions.data[:] = 1
    return interactions


def _best(item: NDArray[np.int32], value: Float64, itself: int, most: int) -> tuple[NDArray[np.int32], Float64]:
    """Return the items with the largest values, best first, and the values; among equal values the lower row first."""
    value = value.round(12)  # makes sums in different order equal
    value[item == itself] = 0
    floor = np.partition(value, -most)[-most] if len(value) > most else 0
    kept = (value >= floor) & (value > 0)
    item, value = item[kept], value[kept]
    best = np.lexsort((item, -value))[:most]
    return item[best], value[best]
