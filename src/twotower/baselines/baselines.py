"""What a model must beat: nine simple recommenders behind the interface of the model, judged by the same evaluator.

Enters: a dataset. Leaves: `Retriever`s. Promised: each is fitted on the positive events of the training period alone (`recent`
and `oracle` say what else they know), and answers from the query's history, so that it knows exactly what the model is told, and
serves people it has never seen; with an empty history it answers by popularity.

Add a baseline: one class with `scores`, one line in `BASELINES`, and, where it has settings worth choosing, one in `GRIDS`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from implicit.nearest_neighbours import ItemItemRecommender
from numpy.typing import NDArray
from scipy import linalg, sparse
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from twotower.baselines.als import ALPHA, ITERATIONS, L2, factorise, interactions
from twotower.baselines.content_vectors import content_vectors
from twotower.data.dataset import Dataset
from twotower.data.simulator.town import NEVER, Truth
from twotower.errors import DataError
from twotower.features.geo import EARTH_KM, on_sphere
from twotower.features.item_columns import location_columns, locations
from twotower.retriever import Queries, Recommendations
from twotower.schema import DAY_S, FIRST_ROW, TRUTH_FILE
from twotower.search.topk import top_k
from twotower.utils.registry import Registry
from twotower.utils.types import Float, Mask

_SCORES_AT_ONCE = 2**25  # 128 MB


class Baseline:
    """A retriever made of a matrix of scores.

    Attributes
    ----------
    name
        Its key in `BASELINES`.
    settings
        What it was fitted with; a report shows them.
    popularity
        float32 [n_items]: positive training events of each item.
    """

    name: str
    needs_history: ClassVar[bool] = True

    def __init__(self, dataset: Dataset, **settings: Any) -> None:
        self.settings = settings
        self.popularity: Float = dataset.item_train_count.astype(np.float32)

    def scores(self, queries: Queries) -> Float:
        """float32 [B, n_items], larger is better; a new array that the caller may write to."""
        raise NotImplementedError

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """As `Retriever.retrieve` says; memory is bounded by going through the queries in parts."""
        step = max(1, _SCORES_AT_ONCE // len(self.popularity))
        parts = []
        for start in range(0, len(queries), step):
            part = queries.slice(start, start + step)
            scores = self.scores(part)
            if self.needs_history:  # the history says nothing: it is empty, or of items that training did not know
                scores[~scores.any(axis=1)] = self.popularity
            allowed = allow[start : start + step] if allow is not None and allow.ndim == 2 else allow
            parts.append(top_k(scores, k, exclude=(part.offsets, part.item_row) if exclude_seen else None, allow=allowed))
        items = np.concatenate([part.items for part in parts]) if parts else np.empty((0, k), np.int64)
        return Recommendations(items, np.concatenate([part.scores for part in parts]) if parts else np.empty((0, k), np.float32))


class Popular(Baseline):
    """The items with the most positive training events, the same for everybody."""

    name = "popular"
    needs_history = False

    def scores(self, queries: Queries) -> Float:
        return np.tile(self.popularity, (len(queries), 1))


class RecentPopularity(Baseline):
    """The items with the most positive events in the `days` days up to midnight before the query; ties by popularity.

    It reads every event before that midnight, held-out ones of others included: what was known at the moment, as the features of
    the model are. Without a clock in the data it is `popular`.
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
    """(1 + popularity) · exp(-distance / `scale_km`), from where the request comes from, else from the user's home.

    Home is the median latitude and longitude of the history. Without a place, or for items without one, popularity alone counts
    (an item without coordinates as if 10 scales away). Without coordinates in the data it is `popular`.
    """

    name = "nearby"
    needs_history = False

    def __init__(self, dataset: Dataset, *, scale_km: float = 3.0) -> None:
        super().__init__(dataset, scale_km=scale_km)
        self.scale_km = scale_km
        self.location = coordinates(dataset)
        self.point = on_sphere(self.location)

    def scores(self, queries: Queries) -> Float:
        home = np.where(np.isnan(queries.location), self.home(queries), queries.location)
        # Chord instead of arc: the same below 1,000 km to one part in 1,000. In float64, or 1 km would drown in rounding.
        squared = np.maximum(2 - 2 * on_sphere(home) @ self.point.T, 0)
        scales = np.sqrt(squared) * (EARTH_KM / self.scale_km)
        scales = np.where(np.isnan(home[:, :1]), 0.0, np.where(np.isnan(scales), 10.0, scales))
        return np.asarray(np.log1p(self.popularity) - scales, np.float32)

    def home(self, queries: Queries) -> NDArray[np.float64]:
        """float64 [B, 2]: median latitude and longitude of each history, NaN without any."""
        query = np.repeat(np.arange(len(queries)), queries.lengths)
        known = ~np.isnan(self.location[queries.item_row]).any(1)
        query, location = query[known], self.location[queries.item_row[known]]
        count = np.bincount(query, minlength=len(queries))
        middle = np.cumsum(count) - count + count // 2
        home = np.full((len(queries), 2), np.nan)
        for axis in (0, 1):
            home[count > 0, axis] = location[np.lexsort((location[:, axis], query)), axis][middle[count > 0]]
        return home


class Repeat(Baseline):
    """The distinct items of the user's history, newest first, then the popular ones."""

    name = "repeat"

    def scores(self, queries: Queries) -> Float:
        scores = np.tile(self.popularity / (self.popularity.max(initial=0) + 1), (len(queries), 1))
        query = np.repeat(np.arange(len(queries)), queries.lengths)
        position = np.arange(len(query)) - queries.offsets[query]
        scores[query, queries.item_row] = 1 + position  # of a repeated item the last position stays
        return scores


class ItemKNN(Baseline):
    """Sum, over the distinct items of the history, of the cosine between the items' sets of training users.

    `neighbours` is how many each item of the history speaks for (0: all; their matrix is never built). An item is its own nearest
    one, so that repeats come first where they are allowed. What nothing speaks for follows by popularity. Sarwar et al. (2001).
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
    """Cosine between an item's features and the mean of the history's: what can be said of items that nobody has visited."""

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
    """Linear autoencoder in closed form: B = I - P diag(P)^-1 with P = (X'X + `l2` I)^-1; scores = history · B.

    Steck (2019). Items² · 4 bytes of memory and items³ operations: `EvaluationConfig.max_ease_items` is the limit.
    """

    name = "ease"

    def __init__(self, dataset: Dataset, *, l2: float = 300.0) -> None:
        super().__init__(dataset, l2=l2)
        self.last = FIRST_ROW + dataset.n_train_items
        users = interactions(dataset)[:, FIRST_ROW : self.last]
        gram = (users.T @ users).toarray(order="F")
        gram[np.diag_indices_from(gram)] += l2
        factor, singular = linalg.lapack.spotrf(gram, lower=1, overwrite_a=1)
        inverse, failed = linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
        if singular or failed:
            raise DataError(f"EASE needs a regularised matrix it can invert. Got l2 = {l2}. Choose a larger l2.")
        inverse = inverse.T  # rows in memory one after another; the upper triangle is filled
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
    """Implicit-feedback matrix factorisation by alternating least squares; a query's vector is solved from its history.

    See `als`. The weight of an item is `alpha` · its events, that of the others 1.
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
    """The true probability of every place in a simulated town: the best ranking there can be. No competitor, a ceiling."""

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


BASELINES: Registry[type[Baseline]] = Registry(
    "baseline", {c.name: c for c in (Popular, RecentPopularity, Nearby, Repeat, ItemKNN, ContentKNN, EASE, IALS, Oracle)}
)

GRIDS: dict[str, list[dict[str, Any]]] = {
    "recent": [{"days": days} for days in (7, 30, 90, 365)],
    "nearby": [{"scale_km": km} for km in (0.5, 1.0, 3.0, 10.0, 30.0)],
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
"""Settings tried on the validation part; a baseline not named here is fitted as it is."""


def coordinates(dataset: Dataset) -> NDArray[np.float64]:
    """float64 [n_items, 2]: latitude and longitude of each item in degrees, NaN where unknown."""
    known = locations(dataset.items, location_columns(dataset.items, dataset.specs, learned=True))
    return np.concatenate([np.full((FIRST_ROW, 2), np.nan), known])


def unavailable(name: str, dataset: Dataset, *, max_ease_items: int) -> str | None:
    """Why a baseline has nothing to say on this dataset, as a clause; None when it has."""
    if name == "recent" and not dataset.has_time:
        return "the data has no clock"
    if name == "nearby" and np.isnan(coordinates(dataset)).all():
        return "the items have no coordinates"
    if name == "content_knn" and not any(spec.side == "item" for spec in dataset.specs):
        return "the items have no features"
    if name == "oracle" and not (dataset.path / TRUTH_FILE).is_file():
        return "the data is no simulated town"
    if name == "ease" and dataset.n_train_items > max_ease_items:
        return f"{dataset.n_train_items:,} items are more than evaluation.max_ease_items = {max_ease_items:,}"
    return None


def _history(queries: Queries, n_items: int) -> sparse.csr_matrix:
    """float32 [B, n_items]: events of each history, repeats counted, reserved rows left out."""
    query = np.repeat(np.arange(len(queries)), queries.lengths)
    known = queries.item_row >= FIRST_ROW
    ones = np.ones(int(known.sum()), np.float32)
    return sparse.csr_matrix((ones, (query[known], queries.item_row[known])), (len(queries), n_items))


def _binary(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
