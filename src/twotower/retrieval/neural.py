"""A two-tower as a `Retriever`: item vectors made once for a moment, user vectors on demand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from twotower.batches import ItemBatch
from twotower.features import FeatureStore
from twotower.models.two_tower import TwoTower
from twotower.retrieval.index import ExactIndex, joined
from twotower.retriever import Int, Mask, Queries, Recommendations

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

    def __init__(self, model: TwoTower, store: FeatureStore, *, n_items: int, time_s: int, name: str = "two-tower") -> None:
        self.name, self.model, self.store = name, model.eval(), store
        self.device = model.log_temperature.device
        with torch.inference_mode():
            blocks = [self.model.encode_items(batch) for batch in item_blocks(model, store, np.arange(n_items), time_s)]
        self.index = ExactIndex(torch.cat(blocks))

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


def item_blocks(model: TwoTower, store: FeatureStore, row: Int, moment_s: int) -> Iterator[ItemBatch]:
    """Item rows as known at a moment, in blocks, on the model's device."""
    for start in range(0, len(row), BLOCK):
        part = row[start : start + BLOCK]
        yield store.items(part, np.full(len(part), moment_s, np.int64)).to(model.log_temperature.device)
