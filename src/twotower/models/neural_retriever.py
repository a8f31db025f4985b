"""A two-tower as a `Retriever`: item vectors made once for a moment, user vectors on demand.

Both have one more number than the towers give them: an item its log popularity, a user what a nat of it is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import numpy as np
import torch
from torch import Tensor

from twotower.features.batches import ItemBatch
from twotower.features.feature_store import FeatureStore
from twotower.models.two_tower import TwoTower
from twotower.retriever import Queries, Recommendations
from twotower.search.index import ExactIndex, joined
from twotower.search.reranking import POPULARITY_SCALE, boost_recent_items
from twotower.utils.types import Int, Mask

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
                    vectors[:, -1] = model.popularity(torch.from_numpy(store.log_popularity).to(self.device))
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


def item_blocks(model: TwoTower, store: FeatureStore, row: Int, moment_s: int) -> Iterator[ItemBatch]:
    """Item rows as known at a moment, in blocks, on the model's device."""
    for start in range(0, len(row), BLOCK):
        part = row[start : start + BLOCK]
        yield store.items(part, np.full(len(part), moment_s, np.int64)).to(model.log_temperature.device)
