"""Retrieve items with a two-tower model: item vectors are computed once for a time, user vectors on demand.

Both vectors have a few more numbers than the towers' output: what is known of an item without them, and its weights for a user
(`priors`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy

import numpy as np
import torch
from torch import Tensor

from twotower.features.batches import ItemBatch
from twotower.features.feature_store import FeatureStore
from twotower.features.geo import EARTH_KM, median_location, on_sphere
from twotower.models.history_terms import Bonuses, bonuses_of, merge_bonuses, recent_sum
from twotower.models.two_tower import TwoTower
from twotower.retriever import Queries, Recommendations
from twotower.schema import DAY_S
from twotower.search.index import ExactIndex, Index, joined
from twotower.utils.types import Array, Float, Float64, Int, Mask

BLOCK = 8192  # items per batch
PORTION = 1024  # queries per batch; larger batches exceed the CPU cache


class NeuralRetriever:
    """Answer queries with a trained model.

    Parameters
    ----------
    store
        Features as known at the time of the index.
    n_item_rows
        Number of item rows, with the two reserved ones.
    time_s
        Time of the item vectors, in seconds.
    """

    popularity_bias = 0.0
    """Popularity bias, from -1 to 1, as in requests."""

    def __init__(self, model: TwoTower, store: FeatureStore, *, n_item_rows: int, time_s: int, name: str = "two-tower") -> None:
        self.name, self.model, self.store = name, model.eval(), store
        self.device = model.log_temperature.device
        with torch.no_grad():
            self.index = ExactIndex(*encoded_items(model, store, np.arange(n_item_rows), time_s))

    def with_popularity_bias(self, popularity_bias: float) -> NeuralRetriever:
        """Return a copy with this popularity bias, −1 to 1."""
        other = copy(self)
        other.name, other.popularity_bias = f"{self.name} at {popularity_bias}", popularity_bias
        return other

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """Return the k best items of each query; see `Retriever`. Scores are inner products and bonuses."""
        found = []
        for start in range(0, len(queries), PORTION):
            part = queries.slice(start, min(start + PORTION, len(queries)))
            allowed = allow[start : start + PORTION] if allow is not None and allow.ndim == 2 else allow
            again = np.full(len(part), not exclude_seen)
            vectors = self.encode(part)
            found.append(
                search(self.model, self.store, self.index, self.index.vectors, vectors, part, k, again=again, allow=allowed)
            )
        return joined(found, k)

    def encode(self, queries: Queries) -> Tensor:
        """Return user vectors float32 [B, D + P] on the model's device."""
        with torch.inference_mode():
            towers = self.model.encode_users(self.store.users(queries).to(self.device))
            popularity_bias = np.full(len(queries), self.popularity_bias, np.float32)
            return query_vectors(self.model, self.store, towers, queries, self.index.vectors, popularity_bias=popularity_bias)


class RefreshedRetriever:
    """Retriever whose index is rebuilt at fixed intervals from the events so far, as a server does; the weights stay unchanged.

    Parameters
    ----------
    store
        Features with the state of the items at any time; see `open_store` with the split "future".
    popularity
        Function from a time in seconds to the popularity columns float32 [n_item_rows, H'] just before it.
    start_s, every_days
        Time of the first index, and the interval. A query uses the last index built at or before its time. Only one index is in
        memory, so queries sorted by time are fastest.
    """

    def __init__(
        self,
        model: TwoTower,
        store: FeatureStore,
        popularity: Callable[[int], Float],
        *,
        n_item_rows: int,
        start_s: int,
        every_days: float,
        name: str,
    ) -> None:
        self.name, self.model, self.store, self.popularity = name, model, store, popularity
        self.n_item_rows, self.start_s, self.every_s = n_item_rows, start_s, max(round(every_days * DAY_S), 1)
        self._held: tuple[int, NeuralRetriever] | None = None

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """Return the k best items of each query; see `Retriever`. Scores are inner products and bonuses."""
        items = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for moment in np.unique(self.moments(queries.time_s)):
            rows = np.flatnonzero(self.moments(queries.time_s) == moment)
            allowed = allow[rows] if allow is not None and allow.ndim == 2 else allow
            found = self.at(int(moment)).retrieve(queries.take(rows), k, exclude_seen=exclude_seen, allow=allowed)
            items[rows], scores[rows] = found.items, found.scores
        return Recommendations(items, scores)

    def drop(self) -> None:
        """Free the index; the next use builds it from the weights of then."""
        self._held = None

    def moments(self, time_s: Int) -> Int:
        """Return the time, in seconds, of the index that is used at each of `time_s`."""
        return np.asarray(self.start_s + np.maximum(time_s - self.start_s, 0) // self.every_s * self.every_s)

    def at(self, moment: int) -> NeuralRetriever:
        """Return the retriever with the index of a time, in seconds."""
        if self._held is None or self._held[0] != moment:
            self._held = None  # frees the old index before the new one is built
            store = self.store.with_popularity(self.popularity(moment))
            self._held = moment, NeuralRetriever(self.model, store, n_item_rows=self.n_item_rows, time_s=moment, name=self.name)
        return self._held[1]


def encoded_items(model: TwoTower, store: FeatureStore, row: Int, moment_s: int, *, tokens: bool = False) -> list[Tensor]:
    """Return the vectors [n, D + P] of item rows at a time, with `tokens` also their history tokens [n, d], on the model's device.

    The results are filled block by block, so they are never in memory twice.
    """
    columns, wholes, filled = item_columns(model, store, row), list[Tensor](), 0
    for batch in item_blocks(model, store, row, moment_s):
        blocks = [model.encode_items(batch), *([model.history_items(batch)] if tokens else [])]
        if not wholes:
            widths = [blocks[0].shape[1] + columns.shape[1], *(block.shape[1] for block in blocks[1:])]
            wholes = [block.new_empty(len(row), width) for block, width in zip(blocks, widths, strict=True)]
            wholes[0][:, blocks[0].shape[1] :] = columns
        for whole, block in zip(wholes, blocks, strict=True):
            whole[filled : filled + len(block), : block.shape[1]] = block
        filled += len(blocks[0])
    return wholes


def item_blocks(model: TwoTower, store: FeatureStore, row: Int, moment_s: int) -> Iterator[ItemBatch]:
    """Yield batches of item rows, with features as known at a time, on the model's device."""
    for start in range(0, len(row), BLOCK):
        part = row[start : start + BLOCK]
        yield store.items(part, np.full(len(part), moment_s, np.int64)).to(model.log_temperature.device)


def item_columns(model: TwoTower, store: FeatureStore, row: Int | slice = slice(None)) -> Tensor:
    """Return the columns float32 [n, P] that follow the tower's vectors of item rows, on the model's device."""
    logs, new = torch.from_numpy(store.log_popularity[row]), torch.from_numpy(store.is_new[row])
    device = model.log_temperature.device
    return model.priors.item_columns(logs.to(device), new.to(device), torch.from_numpy(item_points(store, row)).to(device))


def item_points(store: FeatureStore, row: Int | slice = slice(None)) -> Float64:
    """Return the location float64 [n, 3] of item rows on the globe in km, NaN if unknown."""
    unknown = np.full((len(store.is_new[row]), 2), np.nan)
    return on_sphere(store.location[row] if len(store.location) else unknown) * EARTH_KM


def search(
    model: TwoTower,
    store: FeatureStore,
    index: Index,
    items: Tensor,
    vectors: Tensor,
    queries: Queries,
    k: int,
    *,
    again: Mask,
    allow: Mask | None = None,
) -> Recommendations:
    """Return the k best items of each query: the search leaves out the history and the items with a bonus, which are merged in.

    Parameters
    ----------
    items, vectors
        float32 [n_item_rows, D + P] and [B, D + P]: vectors of the index and of the queries.
    again
        bool [B]: queries whose seen items may be recommended.
    allow
        As in `Retriever.retrieve`.
    """
    priors = model.priors
    bonuses = model_bonuses(model, store, queries, again)
    left_out = queries.left_out(again)
    if not len(bonuses.query):
        return index.search(vectors, k, exclude=left_out, allow=allow)
    best = index.search(vectors, k, exclude=bonuses.beside(left_out), allow=allow)
    if allow is not None:
        bonuses = bonuses.take(allow[bonuses.item_row] if allow.ndim == 1 else allow[bonuses.query, bonuses.item_row])
    weights, temperature = torch.cat([priors.repeats, priors.transitions]), float(model.temperature().detach())
    return merge_bonuses(best, bonuses, vectors, items, weights, temperature, popularity=items.shape[1] - priors.width)


def model_bonuses(model: TwoTower, store: FeatureStore, queries: Queries, again: Mask) -> Bonuses:
    """Return the items with a bonus that the model gives them; see `bonuses_of`."""
    return bonuses_of(queries, again, store.transitions if model.priors.transitions.any() else None)


def query_vectors(
    model: TwoTower, store: FeatureStore, towers: Tensor, queries: Queries, items: Tensor, *, popularity_bias: Float
) -> Tensor:
    """Return the vectors float32 [B, D + P] that an index is searched with.

    Parameters
    ----------
    towers
        float32 [B, D]: output of the user tower.
    items
        float32 [n_item_rows, D + P]: vectors of the index.
    popularity_bias
        float32 [B]: popularity bias, from -1 to 1.
    """
    device = towers.device
    points = torch.from_numpy(user_points(queries, store.location)).to(device)
    lengths = torch.from_numpy(queries.lengths).to(device)
    temperature = float(model.temperature().detach())
    scale, columns = model.priors.user_columns(lengths, points, temperature, torch.from_numpy(popularity_bias).to(device))
    vectors, recency = towers * scale, float(model.priors.recency)
    if recency:
        vectors = vectors + recency * temperature * recent_sum(queries, items[:, : towers.shape[1]])
    return torch.cat([vectors, columns.to(vectors)], dim=1)


def user_points(queries: Queries, locations: Array) -> Float64:
    """Return the location float64 [B, 3] of each user on the globe in km: that of the request, else the median of the history."""
    home = median_location(queries.offsets, queries.item_row, locations)
    return on_sphere(np.where(np.isnan(queries.location), home, queries.location)) * EARTH_KM
