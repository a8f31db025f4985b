"""Which items the same people visit: for each item its nearest ones, as a feature whose values are items.

Enters: training events by user. Leaves: a list of item rows for each item. Promise: it is a function of the training events alone,
the same for the same events.

What an item's neighbours mean reaches the item in one step of training, where its own id would need many visits to learn as much:
one layer of graph convolution (He et al., "LightGCN", SIGIR 2020), computed beforehand.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from twotower.schema import FIRST_ROW
from twotower.utils.hardware import cores
from twotower.utils.ragged import lengths_to_offsets
from twotower.utils.types import Int

MAX_USER_EVENTS = 100  # of a user, the latest: who visits everything says little, and pairs grow with the square
BLOCK = 1024  # items compared at once, by each processor
LAGS = 20  # events between which order counts


def co_visited(user_row: Int, item_row: Int, *, n_users: int, n_items: int, most: int, ordered: bool = False) -> NDArray[np.int32]:
    """Return the `most` nearest items of each item, best first.

    The likeness of two items is Σ 1/|u| over the users u of both, |u| being how many items u visited, divided by the root of both
    items' numbers of users.

    Parameters
    ----------
    user_row, item_row
        int64 [E]: training events by user, oldest first.
    ordered
        The order of a user's events means something: each pair of events counts 1/|u|/lag, lag being how many events apart they
        are, up to `LAGS`.

    Returns
    -------
    int32 [n_items, most]
        Item rows, 0 where there are no more; of equally near ones the lower row first.
    """
    interactions = _visits(user_row, item_row, n_users, n_items)
    users_of, items_of = np.maximum(interactions.getnnz(0), 1), np.maximum(interactions.getnnz(1), 1)
    by_user = (sparse.diags(items_of**-0.5) @ interactions @ sparse.diags(users_of**-0.5)).tocsr()
    by_item = by_user.T.tocsr()
    near = np.zeros((n_items, most), np.int32)
    pairs = _Pairs(user_row, item_row, items_of**-1.0, users_of**-0.5) if ordered else None

    def find(start: int) -> None:
        alike = by_item[start : start + BLOCK] @ by_user if pairs is None else pairs.alike(start, min(start + BLOCK, n_items))
        for row in range(start, min(start + BLOCK, n_items)):
            found = slice(*alike.indptr[row - start : row - start + 2])
            best = _best(alike.indices[found], alike.data[found], row, most)
            near[row, : len(best)] = best

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(find, range(FIRST_ROW, n_items, BLOCK)))
    return near


class _Pairs:
    """Pairs of events of the same user, near each other in order.

    Parameters
    ----------
    of_user, of_item
        float64 [n_users], [n_items]: what a pair counts by its user, and by each of its items.
    """

    def __init__(self, user_row: Int, item_row: Int, of_user: NDArray[np.float64], of_item: NDArray[np.float64]) -> None:
        late = _late(user_row, len(of_user))
        self.user, self.item = user_row[late], item_row[late]
        self.of_user, self.of_item = of_user, of_item
        self.by_item = np.argsort(self.item, kind="stable")
        self.offsets = lengths_to_offsets(np.bincount(self.item, minlength=len(of_item)))

    def alike(self, start: int, stop: int) -> sparse.csr_matrix:
        """Likeness of the items start … stop - 1 and all others, float64 [stop - start, n_items]."""
        event = self.by_item[self.offsets[start] : self.offsets[stop]]
        rows, columns, weights = [], [], []
        for lag in range(1, LAGS + 1):
            for other in (event - lag, event + lag):
                inside = (other >= 0) & (other < len(self.user))
                one, two = event[inside], other[inside]
                same = self.user[one] == self.user[two]
                one, two = one[same], two[same]
                rows.append(self.item[one] - start)
                columns.append(self.item[two])
                weights.append(self.of_user[self.user[one]] * self.of_item[self.item[one]] * self.of_item[self.item[two]] / lag)
        pairs = (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_matrix((np.concatenate(weights), pairs), (stop - start, len(self.of_item)))


def _late(user_row: Int, n_users: int) -> NDArray[np.bool_]:
    """Which events are among their user's latest."""
    end = lengths_to_offsets(np.bincount(user_row, minlength=n_users))[user_row + 1]
    return np.asarray(end - np.arange(len(user_row)) <= MAX_USER_EVENTS)


def _visits(user_row: Int, item_row: Int, n_users: int, n_items: int) -> sparse.csr_matrix:
    """float64 [n_users, n_items]: 1 where a user was, by their latest events."""
    late = _late(user_row, n_users)
    interactions = sparse.csr_matrix((np.ones(int(late.sum())), (user_row[late], item_row[late])), (n_users, n_items))
    interactions.sum_duplicates()
    interactions.data[:] = 1
    return interactions


def _best(item: NDArray[np.int32], value: NDArray[np.float64], itself: int, most: int) -> NDArray[np.int32]:
    """The items of the greatest values, best first; of equal ones the lower row first."""
    value = value.round(12)  # sums of the same numbers in another order are the same
    value[item == itself] = 0
    floor = np.partition(value, -most)[-most] if len(value) > most else 0
    kept = (value >= floor) & (value > 0)
    item, value = item[kept], value[kept]
    return item[np.lexsort((item, -value))[:most]]
