"""A two-tower as a `Retriever`: item vectors made once for a moment, user vectors on demand.

Both have one more number than the towers give them: an item its log popularity, a user what a nat of it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy

import numpy as np
import torch
from torch import Tensor

from twotower.features.batches import ItemBatch
from twotower.features.feature_store import FeatureStore
from twotower.models.two_tower import TwoTower
from twotower.retriever import Queries, Recommendations
from twotower.schema import DAY_S
from twotower.search.index import ExactIndex, joined
from twotower.search.reranking import POPULARITY_SCALE, boost_recent_items
from twotower.utils.types import Float, Int, Mask

BLOCK = 8192  # items encoded at once
PORTION = 1024  # queries encoded at once; the vectors of more would only leave the cache


class NeuralRetriever:
    """Answer queries with a trained model.

    Parameters
    ----------
    store
        Features as known at the moment of the index.
    n_items
        Item rows, the two reserved ones included.
    time_s
        Seconds: the moment the item vectors stand for.
    """

    dial = 0.0
    """Of popularity, from -1 to 1, as in requests."""

    def __init__(self, model: TwoTower, store: FeatureStore, *, n_items: int, time_s: int, name: str = "two-tower") -> None:
        self.name, self.model, self.store = name, model.eval(), store
        self.device = model.log_temperature.device
        filled, vectors = 0, torch.zeros(0)
        with torch.no_grad():
            for batch in item_blocks(model, store, np.arange(n_items), time_s):
                block = self.model.encode_items(batch)
                if not filled:
                    vectors = block.new_empty(n_items, block.shape[1] + 1)
                    logs, new = (torch.from_numpy(values).to(self.device) for values in (store.log_popularity, store.is_new))
                    vectors[:, -1] = model.popularity(logs, new)
                vectors[filled : filled + len(block), :-1] = block
                filled += len(block)
        self.index = ExactIndex(vectors)

    def with_popularity_bias(self, dial: float) -> NeuralRetriever:
        """The same with the popularity dial at `dial`."""
        other = copy(self)
        other.name, other.dial = f"{self.name} at {dial}", dial
        return other

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """See `Retriever`; scores are inner products."""
        found = []
        for start in range(0, len(queries), PORTION):
            part = queries.slice(start, min(start + PORTION, len(queries)))
            seen = (part.offsets, part.item_row) if exclude_seen else None
            allowed = allow[start : start + PORTION] if allow is not None and allow.ndim == 2 else allow
            found.append(self.index.search(self.encode(part, again=not exclude_seen), k, exclude=seen, allow=allowed))
        return joined(found, k)

    def encode(self, queries: Queries, *, again: bool = False) -> Tensor:
        """User vectors float32 [B, D + 1] on the model's device; `again`: to rank visited items too."""
        with torch.inference_mode():
            vectors = self.model.encode_users(self.store.users(queries).to(self.device))
            asked = np.full(len(queries), again)
            vectors = boost_recent_items(vectors, queries, self.index.vectors[:, :-1], self.model.recent_item_weight(), asked)
            popularity = self.model.popularity_weight() + self.dial * POPULARITY_SCALE
            return torch.cat([vectors, vectors.new_full((len(vectors), 1), popularity)], dim=1)


class RefreshedRetriever:
    """A model whose index is made anew at fixed intervals from the events so far, as a server does; the weights stay.

    Parameters
    ----------
    store
        Features with the state of the items at any moment; see `open_store` with the split "future".
    popularity
        Moment in seconds → log popularity float32 [n_item_rows] known just before it.
    start_s, every_days
        The first index is of the moment `start_s`; a question is answered by the last index made at its moment or before. Questions
        in the order of time are answered fastest: one index is held at a time.
    """

    def __init__(
        self,
        model: TwoTower,
        store: FeatureStore,
        popularity: Callable[[int], Float],
        *,
        n_items: int,
        start_s: int,
        every_days: float,
        name: str,
    ) -> None:
        self.name, self.model, self.store, self.popularity = name, model, store, popularity
        self.n_items, self.start_s, self.every_s = n_items, start_s, max(round(every_days * DAY_S), 1)
        self._held: tuple[int, NeuralRetriever] | None = None

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """See `Retriever`; scores are inner products."""
        items = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for moment in np.unique(self.moments(queries.time_s)):
            rows = np.flatnonzero(self.moments(queries.time_s) == moment)
            allowed = allow[rows] if allow is not None and allow.ndim == 2 else allow
            found = self.at(int(moment)).retrieve(queries.take(rows), k, exclude_seen=exclude_seen, allow=allowed)
            items[rows], scores[rows] = found.items, found.scores
        return Recommendations(items, scores)

    def moments(self, time_s: Int) -> Int:
        """Return the moment in seconds of the index that answers at each of `time_s`."""
        return np.asarray(self.start_s + np.maximum(time_s - self.start_s, 0) // self.every_s * self.every_s)

    def at(self, moment: int) -> NeuralRetriever:
        """Return the model with the index of a moment."""
        if self._held is None or self._held[0] != moment:
            store = self.store.with_popularity(self.popularity(moment))
            self._held = moment, NeuralRetriever(self.model, store, n_items=self.n_items, time_s=moment, name=self.name)
        return self._held[1]


def item_blocks(model: TwoTower, store: FeatureStore, row: Int, moment_s: int) -> Iterator[ItemBatch]:
    """Item rows as known at a moment, in blocks, on the model's device."""
    for start in range(0, len(row), BLOCK):
        part = row[start : start + BLOCK]
        yield store.items(part, np.full(len(part), moment_s, np.int64)).to(model.log_temperature.device)
