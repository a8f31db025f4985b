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


def co_visited(user_row: Int, item_row: Int, *, n_users: int, n_items: int, most: int) -> NDArray[np.int32]:
    """The `most` nearest items of each, best first.

    The likeness of two items is Σ 1/|u| over the users u of both, |u| being how many items u visited, divided by the root of both
    items' numbers of users.

    Parameters
    ----------
    user_row, item_row
        int64 [E]: training events by user, oldest first.

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

    def find(start: int) -> None:
        alike = by_item[start : start + BLOCK] @ by_user
        for row in range(start, min(start + BLOCK, n_items)):
            found = slice(*alike.indptr[row - start : row - start + 2])
            best = _best(alike.indices[found], alike.data[found], row, most)
            near[row, : len(best)] = best

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(find, range(FIRST_ROW, n_items, BLOCK)))
    return near


def _visits(user_row: Int, item_row: Int, n_users: int, n_items: int) -> sparse.csr_matrix:
    """float64 [n_users, n_items]: 1 where a user was, by their latest events."""
    end = lengths_to_offsets(np.bincount(user_row, minlength=n_users))[user_row + 1]
    late = end - np.arange(len(user_row)) <= MAX_USER_EVENTS
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
