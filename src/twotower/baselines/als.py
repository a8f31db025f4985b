"""Factorise the matrix of users and items (iALS): a baseline, and initial values of item embeddings.

Training events give a vector for each item and a model that solves a user vector for any history. The same events and seed give
the same numbers on any number of cores.

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

L2, ALPHA, ITERATIONS = 10.0, 20.0, 15  # chosen by tuning on S3-Rec's split and on yelp2018
MAX_ALS_USERS = 200_000  # limits time and memory of `item_vectors`
MAX_ALS_ITEMS = 1_000_000  # more are not factorised before a training


def interactions(dataset: Dataset) -> sparse.csr_matrix:
    """Return float32 [n_user_rows, n_item_rows]: sums of the weights of positive training events."""
    events = dataset.events
    kept = events.positive & (events.split == TRAIN) & (events.weight > 0)
    weight = events.weight[kept].astype(np.float32)
    return sparse.csr_matrix((weight, (events.user_row[kept], events.item_row[kept])), (dataset.n_user_rows, dataset.n_item_rows))


def factorise(
    interactions: sparse.csr_matrix,
    factors: int,
    *,
    l2: float = L2,
    alpha: float = ALPHA,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> AlternatingLeastSquares:
    """Return a fitted iALS model: products of user and item factors are near 1 for events and near 0 elsewhere.

    Parameters
    ----------
    interactions
        float32 [n_user_rows, n_item_rows]: weight of the events of each pair.
    factors
        Width of the vectors.
    l2
        Regularisation.
    alpha
        Confidence: a pair with events weighs `alpha` · its events, other pairs 1.
    iterations
        Number of alternating updates.
    """
    with threadpool_limits(1, "blas"):  # its threads and those of BLAS would block each other
        model = AlternatingLeastSquares(factors=factors, regularization=l2, alpha=alpha, iterations=iterations, random_state=seed)
        model.fit(interactions, show_progress=False)
    return model


def item_vectors(dataset: Dataset, width: int, *, length: float, seed: int) -> Float:
    """Return item factors float32 [n_item_rows, width] with mean length `length`.

    They are fitted on at most `MAX_ALS_USERS` random users; items without events of these users are zeros.
    """
    matrix = interactions(dataset)
    active_users = np.flatnonzero(np.diff(matrix.indptr))
    if len(active_users) > MAX_ALS_USERS:
        active_users = np.sort(np.random.default_rng(seed).choice(active_users, MAX_ALS_USERS, replace=False))
    vectors: Float = np.array(factorise(matrix[active_users], width, seed=seed).item_factors, np.float32)
    vectors[:FIRST_ROW] = 0
    norms = np.linalg.norm(vectors, axis=1)
    if norms.any():
        vectors *= np.float32(length / norms[norms > 0].mean())
    return vectors
