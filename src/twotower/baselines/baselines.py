"""Provide nine baselines and the oracle, with the same interface and evaluation as the model.

Each is fitted only on positive training events (exceptions: `recent` and `oracle`, see their docstrings). It recommends from the
history of the query, like the model, so it also serves new users. With an empty history it ranks by popularity.

To add a baseline, write a class with `scores`, register it in `BASELINES`, and add settings to tune to `GRIDS`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from implicit.nearest_neighbours import ItemItemRecommender
from scipy import linalg, sparse
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from twotower.baselines.als import ALPHA, ITERATIONS, L2, factorise, interactions
from twotower.baselines.base import Baseline
from twotower.baselines.content_vectors import content_vectors
from twotower.baselines.transitions import Transitions
from twotower.data.dataset import Dataset
from twotower.data.simulator.town import NEVER, Truth
from twotower.errors import DataError
from twotower.features.geo import EARTH_KM, median_location, on_sphere
from twotower.features.item_columns import location_columns, locations
from twotower.retriever import Queries
from twotower.schema import DAY_S, FIRST_ROW, TRUTH_FILE
from twotower.utils.registry import Registry
from twotower.utils.types import Float, Float64


class Popular(Baseline):
    """Recommend the items with the most positive training events, the same for all users."""

    name = "popular"
    needs_history = False

    def scores(self, queries: Queries) -> Float:
        return np.tile(self.popularity, (len(queries), 1))


class RecentPopularity(Baseline):
    """Recommend the items with the most positive events in the `days` days up to midnight before the query; ties by popularity.

    It reads all events before that midnight, including held-out ones of other users, like the point-in-time features of the model.
    Without times in the data it equals `popular`.
    """

    name = "recent"
    needs_history = False

    def __init__(self, dataset: Dataset, *, days: int = 30) -> None:
        super().__init__(dataset, days=days)
        self.days = days
        events = dataset.events
        rows, times = events.item_row[events.positive], events.time_s[events.positive]
        order = np.argsort(times, kind="stable") if dataset.has_time else np.empty(0, np.int64)
        self.item_row, self.time_s = rows[order], times[order]

    def scores(self, queries: Queries) -> Float:
        days, day = np.unique(queries.time_s // DAY_S, return_inverse=True)
        begin = np.searchsorted(self.time_s, (days - self.days) * DAY_S)
        end = np.searchsorted(self.time_s, days * DAY_S)
        tie = self.popularity / (self.popularity.max(initial=0) + 1)
        size = len(self.popularity)
        counts = [np.bincount(self.item_row[a:b], minlength=size) + tie for a, b in zip(begin, end, strict=True)]
        return np.array(counts, np.float32).reshape(-1, size)[day]


class Nearby(Baseline):
    """Rank by (1 + popularity) · exp(-distance / `scale_km`) from the location of the request, else from the user's home.

    Home is the median latitude and longitude of the history. Without a location of the user, only popularity counts. Items without
    coordinates count as 10 scales away. Without coordinates in the data it equals `popular`.
    """

    name = "nearby"
    needs_history = False

    def __init__(self, dataset: Dataset, *, scale_km: float = 3.0) -> None:
        super().__init__(dataset, scale_km=scale_km)
        self.scale_km = scale_km
        self.location = coordinates(dataset)
        self.point = on_sphere(self.location)

    def scores(self, queries: Queries) -> Float:
        home = np.where(
            np.isnan(queries.location), median_location(queries.offsets, queries.item_row, self.location), queries.location
        )
        # Chord instead of arc: equal to 0.1 % below 1,000 km. In float64, because float32 rounding is too coarse for 1 km.
        squared = np.maximum(2 - 2 * on_sphere(home) @ self.point.T, 0)
        scales = np.sqrt(squared) * (EARTH_KM / self.scale_km)
        scales = np.where(np.isnan(home[:, :1]), 0.0, np.where(np.isnan(scales), 10.0, scales))
        return np.asarray(np.log1p(self.popularity) - scales, np.float32)


class Repeat(Baseline):
    """Recommend the distinct items of the history, latest first, then popular items."""

    name = "repeat"

    def scores(self, queries: Queries) -> Float:
        scores = np.tile(self.popularity / (self.popularity.max(initial=0) + 1), (len(queries), 1))
        query = np.repeat(np.arange(len(queries)), queries.lengths)
        position = np.arange(len(query)) - queries.offsets[query]
        scores[query, queries.item_row] = 1 + position  # a repeated item keeps its last position
        return scores


class ItemKNN(Baseline):
    """Rank by the sum, over the distinct items of the history, of the cosine similarity of the items' training users.

    `neighbours` limits the number of items that each item of the history adds to (0: all, without building a matrix). An item is
    most similar to itself, so repeats come first if allowed. Items with score 0 follow by popularity. Sarwar et al. (2001).
    """

    name = "item_knn"

    def __init__(self, dataset: Dataset, *, neighbours: int = 0) -> None:
        super().__init__(dataset, neighbours=neighbours)
        unit = normalize(_binary(interactions(dataset)).astype(np.float64), axis=0).tocsr()  # inner products of columns: cosines
        self.factors = [unit.T.tocsr().astype(np.float32), unit.astype(np.float32)]
        if neighbours:
            model = ItemItemRecommender(K=neighbours + 1)
            model.fit(unit, show_progress=False)
            self.factors = [sparse.csr_matrix(model.similarity, dtype=np.float32)]

    def scores(self, queries: Queries) -> Float:
        near = _binary(_history(queries, len(self.popularity)))
        for factor in self.factors:
            near = near @ factor
        dense: Float = near.toarray()
        return np.where(dense == 0, self.popularity / (self.popularity.max(initial=0) + 1) - 1, dense)


class ContentKNN(Baseline):
    """Rank by the cosine of an item's features and the mean features of the history; works for new items."""

    name = "content_knn"

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.values, self.numbers = content_vectors(dataset)

    def scores(self, queries: Queries) -> Float:
        history = _binary(_history(queries, len(self.popularity)))
        alike: Float = ((history @ self.values) @ self.values.T).toarray() + (history @ self.numbers) @ self.numbers.T
        alike /= np.maximum(history.sum(1).A1, 1)[:, None]
        return alike


class EASE(Baseline):
    """Rank by a linear autoencoder in closed form: B = I - P diag(P)^-1 with P = (X'X + `l2` I)^-1; scores = history · B.

    Steck (2019). It needs items² · 4 bytes of memory and items³ operations; `EvaluationConfig.max_ease_items` is the limit.
    """

    name = "ease"

    def __init__(self, dataset: Dataset, *, l2: float = 300.0) -> None:
        super().__init__(dataset, l2=l2)
        self.last = dataset.n_train_item_rows
        users = interactions(dataset)[:, FIRST_ROW : self.last]
        gram = (users.T @ users).toarray(order="F")
        gram[np.diag_indices_from(gram)] += l2
        factor, singular = linalg.lapack.spotrf(gram, lower=1, overwrite_a=1)
        inverse, failed = linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
        if singular or failed:
            raise DataError(f"EASE cannot invert its matrix with l2 = {l2}. Choose a larger l2.")
        inverse = inverse.T  # row-major; only the upper triangle is filled
        for j in range(len(inverse)):
            inverse[j + 1 :, j] = inverse[j, j + 1 :]
        inverse /= -np.diag(inverse).copy()
        inverse[np.diag_indices_from(inverse)] = 0
        self.weights: Float = inverse

    def scores(self, queries: Queries) -> Float:
        scores = np.zeros((len(queries), len(self.popularity)), np.float32)
        scores[:, FIRST_ROW : self.last] = _history(queries, len(self.popularity))[:, FIRST_ROW : self.last] @ self.weights
        return scores


class IALS(Baseline):
    """Rank by implicit-feedback matrix factorisation (alternating least squares); user vectors are solved from the history.

    See `als`. Items of the history have weight `alpha` · number of events, other items 1.
    """

    name = "ials"

    def __init__(
        self,
        dataset: Dataset,
        *,
        factors: int = 128,
        l2: float = L2,
        alpha: float = ALPHA,
        iterations: int = ITERATIONS,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, factors=factors, l2=l2, alpha=alpha, iterations=iterations, seed=seed)
        self.model = factorise(interactions(dataset), factors, l2=l2, alpha=alpha, iterations=iterations, seed=seed)

    def scores(self, queries: Queries) -> Float:
        history = _history(queries, len(self.popularity))
        with threadpool_limits(1, "blas"):
            users = self.model.recalculate_user(np.arange(len(queries)), history)
        return np.asarray(users @ self.model.item_factors.T, np.float32)


class Oracle(Baseline):
    """Rank by the true probability of every item in a simulated town: an upper bound, not a baseline."""

    name = "oracle"
    needs_history = False

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.truth = Truth.load(dataset.path / TRUTH_FILE)
        self.item_ids, self.user_ids = list(dataset.item_ids), dataset.user_ids

    def scores(self, queries: Queries) -> Float:
        users, history = list(self.user_ids[queries.user_row]), (queries.offsets, queries.item_row)
        scores = self.truth.scores(users, queries.time_s, self.item_ids, history)
        scores[scores <= NEVER] = -np.inf
        return scores


_ALL = (Popular, RecentPopularity, Nearby, Repeat, Transitions, ItemKNN, ContentKNN, EASE, IALS, Oracle)
BASELINES: Registry[type[Baseline]] = Registry("baseline", {baseline.name: baseline for baseline in _ALL})

GRIDS: dict[str, list[dict[str, Any]]] = {
    "recent": [{"days": days} for days in (7, 30, 90, 365)],
    "nearby": [{"scale_km": km} for km in (0.5, 1.0, 3.0, 10.0, 30.0)],
    "transitions": [{"steps": steps, "last": last} for steps in (1, 5) for last in (1, 5)],
    "item_knn": [{"neighbours": n} for n in (0, 50, 500)],
    "ials": [
        {"factors": factors, "l2": l2, "alpha": alpha}
        for factors, l2, alpha in (
            (64, 1.0, 10.0),
            (64, 10.0, 20.0),
            (128, 10.0, 10.0),
            (128, 10.0, 20.0),
            (128, 30.0, 40.0),
            (256, 10.0, 10.0),
            (256, 10.0, 20.0),
        )
    ],
}
"""Settings that are tried on the validation part; baselines without an entry are not tuned."""


def coordinates(dataset: Dataset) -> Float64:
    """Return float64 [n_item_rows, 2]: latitude and longitude of each item in degrees, NaN if unknown."""
    known = locations(dataset.items, location_columns(dataset.items, dataset.specs, learned=True))
    return np.concatenate([np.full((FIRST_ROW, 2), np.nan), known])


def unavailable(name: str, dataset: Dataset, *, max_ease_items: int) -> str | None:
    """Return the reason why a baseline cannot run on this dataset, as a clause, or None if it can."""
    if name == "recent" and not dataset.has_time:
        return "the data has no times"
    if name == "transitions" and not dataset.ordered:
        return "the histories have no order"
    if name == "nearby" and np.isnan(coordinates(dataset)).all():
        return "the items have no coordinates"
    if name == "content_knn" and not any(spec.side == "item" for spec in dataset.specs):
        return "the items have no features"
    if name == "oracle" and not (dataset.path / TRUTH_FILE).is_file():
        return "the data is not a simulated town"
    if name == "ease" and dataset.n_train_items > max_ease_items:
        return f"{dataset.n_train_items:,} items are more than evaluation.max_ease_items = {max_ease_items:,}"
    return None


def _history(queries: Queries, n_item_rows: int) -> sparse.csr_matrix:
    """Return float32 [B, n_item_rows]: number of events of each item in each history, without reserved rows."""
    query = np.repeat(np.arange(len(queries)), queries.lengths)
    known = queries.item_row >= FIRST_ROW
    ones = np.ones(int(known.sum()), np.float32)
    return sparse.csr_matrix((ones, (query[known], queries.item_row[known])), (len(queries), n_item_rows))


def _binary(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
