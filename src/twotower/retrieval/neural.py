"""A two-tower as a `Retriever`: item vectors made once for a moment, user vectors on demand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twotower.features import FeatureStore
from twotower.models.two_tower import TwoTower
from twotower.retrieval.index import ExactIndex, joined
from twotower.retriever import Mask, Queries, Recommendations

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
        Seconds: the moment the item vectors stand for. Ignored when `vectors` are given.
    vectors
        Item vectors float32 [n_items, D] made earlier.
    """

    def __init__(
        self,
        model: TwoTower,
        store: FeatureStore,
        *,
        n_items: int,
        time_s: int,
        vectors: Tensor | None = None,
        name: str = "two-tower",
    ) -> None:
        self.name, self.model, self.store = name, model.eval(), store
        self.device = model.log_temperature.device
        self.index = ExactIndex(self._item_vectors(n_items, time_s) if vectors is None else vectors.to(self.device))

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """See `Retriever`; scores are cosines."""
        found = []
        for start in range(0, len(queries), PORTION):
            part = queries.slice(start, min(start + PORTION, len(queries)))
            seen = (part.offsets, part.item_row) if exclude_seen else None
            allowed = allow[start : start + PORTION] if allow is not None and allow.ndim == 2 else allow
            found.append(self.index.search(self.encode(part), k, exclude=seen, allow=allowed))
        return joined(found, k)

    def encode(self, queries: Queries) -> Tensor:
        """User vectors float32 [B, D] on the model's device."""
        with torch.inference_mode():
            return self.model.encode_users(self.store.users(queries).to(self.device))

    def _item_vectors(self, n_items: int, time_s: int) -> Tensor:
        blocks = []
        with torch.inference_mode():
            for start in range(0, n_items, BLOCK):
                row = np.arange(start, min(start + BLOCK, n_items))
                batch = self.store.items(row, np.full(len(row), time_s, np.int64))
                blocks.append(self.model.encode_items(batch.to(self.device)))
        return torch.cat(blocks)
