"""Compute content vectors of items from their features, to compare items without events.

The result is a sparse and a dense matrix with one row per item. Both rows together have unit length (0 without features).
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.preprocessing import normalize

from twotower.data.dataset import Dataset
from twotower.schema import FIRST_ROW
from twotower.utils.types import Array, Float


def content_vectors(dataset: Dataset) -> tuple[sparse.csr_matrix, Float]:
    """Return a sparse float32 [n_item_rows, values] and a dense float32 [n_item_rows, numbers].

    Every item feature is a block of unit length before the final scaling: one-hot values weighted by inverse document frequency
    (over training items), or encoded numbers.
    """
    fitted_on = dataset.n_train_item_rows
    blocks = [sparse.csr_matrix((dataset.n_item_rows, 1), dtype=np.float32)]
    numbers = [np.zeros((dataset.n_item_rows, 1), np.float32)]
    for spec in (spec for spec in dataset.specs if spec.side == "item"):
        array = dataset.item_features[spec.name]
        if spec.kind == "geo":  # one cell per scale
            blocks += [normalize(_one_hot(cell[:, None], fitted_on)) for cell in array.T]
        elif array.dtype.kind == "i":
            blocks.append(normalize(_one_hot(array.reshape(len(array), -1), fitted_on)))
        else:
            numbers.append(normalize(array))
    values, dense = sparse.hstack(blocks, "csr"), np.hstack(numbers)
    length = np.sqrt(values.multiply(values).sum(1).A1 + (dense**2).sum(1))
    scale = (1 / np.where(length > 0, length, 1)).astype(np.float32)
    return (sparse.diags(scale) @ values).tocsr(), dense * scale[:, None]


def _one_hot(rows: Array, fitted_on: int) -> sparse.csr_matrix:
    """Return float32 [n_item_rows, values] from vocabulary rows [n_item_rows, width], weighted by inverse document frequency.

    The frequency is that in the first `fitted_on` item rows.
    """
    item, column = np.nonzero(rows >= FIRST_ROW)
    value = rows[item, column]
    found = sparse.csr_matrix((np.ones(len(item), np.float32), (item, value)), (len(rows), int(value.max(initial=0)) + 1))
    frequency = np.asarray((found[:fitted_on] > 0).sum(0)).ravel()
    return found @ sparse.diags(np.log((1 + fitted_on) / (1 + frequency)).astype(np.float32))
