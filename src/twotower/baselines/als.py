"""Matrix factorisation of who visited what: a baseline, and what the ids of items begin as.

Enters: visits of the training period. Leaves: a vector for each item, and a way to solve one for any history. Promise: the same
visits and the same seed give the same numbers, on however many cores.

Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (ICDM 2008), by the package `implicit`.
"""

from __future__ import annotations

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from scipy import sparse
from threadpoolctl import threadpool_limits

from twotower.data.dataset import Dataset
from twotower.schema import FIRST_ROW, TRAIN
from twotower.utils.types import Float

L2, ALPHA, ITERATIONS = 10.0, 20.0, 15  # what tuning chooses on S3-Rec's split and on yelp2018
MAX_ALS_USERS = 200_000  # who say what items are alike: a bound of time and memory


def interactions(dataset: Dataset) -> sparse.csr_matrix:
    """float32 [n_users, n_items]: positive training events by their weight, repeats added up."""
    events = dataset.events
    kept = events.positive & (events.split == TRAIN) & (events.weight > 0)
    weight = events.weight[kept].astype(np.float32)
    return sparse.csr_matrix((weight, (events.user_row[kept], events.item_row[kept])), (dataset.n_users, dataset.n_items))


def factorise(
    interactions: sparse.csr_matrix,
    factors: int,
    *,
    l2: float = L2,
    alpha: float = ALPHA,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> AlternatingLeastSquares:
    """Factors of users and items whose products are near 1 where somebody went and near 0 elsewhere.

    Parameters
    ----------
    interactions
        float32 [n_users, n_items]: events of each.
    alpha
        An item somebody visited weighs `alpha` · its events, another 1.
    """
    with threadpool_limits(1, "blas"):  # its own threads and BLAS's would wait for each other
        model = AlternatingLeastSquares(factors=factors, regularization=l2, alpha=alpha, iterations=iterations, random_state=seed)
        model.fit(interactions, show_progress=False)
    return model


def item_vectors(dataset: Dataset, width: int, *, length: float, seed: int) -> Float:
    """Item factors float32 [n_items, width] of `length` on average, by at most `MAX_ALS_USERS` users drawn by lot; zeros for items
    that none of them visited."""
    matrix = interactions(dataset)
    visitors = np.flatnonzero(np.diff(matrix.indptr))
    if len(visitors) > MAX_ALS_USERS:
        visitors = np.sort(np.random.default_rng(seed).choice(visitors, MAX_ALS_USERS, replace=False))
    vectors: Float = np.array(factorise(matrix[visitors], width, seed=seed).item_factors, np.float32)
    vectors[:FIRST_ROW] = 0
    norms = np.linalg.norm(vectors, axis=1)
    if norms.any():
        vectors *= np.float32(length / norms[norms > 0].mean())
    return vectors
