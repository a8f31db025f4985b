"""Define the base class of baselines."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from twotower.data.dataset import Dataset
from twotower.retriever import Queries, Recommendations
from twotower.search.topk import top_k
from twotower.utils.types import Float, Mask

_SCORES_AT_ONCE = 2**25  # 128 MB


class Baseline:
    """Base class of baselines: a retriever that scores all items.

    Attributes
    ----------
    name
        Its key in `BASELINES`.
    settings
        Settings it was fitted with, as shown in reports.
    popularity
        float32 [n_item_rows]: number of positive training events of each item.
    """

    name: str
    needs_history: ClassVar[bool] = True

    def __init__(self, dataset: Dataset, **settings: Any) -> None:
        self.settings = settings
        self.popularity: Float = dataset.item_train_count.astype(np.float32)

    def scores(self, queries: Queries) -> Float:
        """Return scores float32 [B, n_item_rows], larger is better; a new array that the caller may change."""
        raise NotImplementedError

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """Return the `k` best items of each query (see `Retriever.retrieve`), in parts of bounded memory."""
        step = max(1, _SCORES_AT_ONCE // len(self.popularity))
        parts = []
        for start in range(0, len(queries), step):
            part = queries.slice(start, start + step)
            scores = self.scores(part)
            if self.needs_history:  # empty history, or only items without training events
                scores[~scores.any(axis=1)] = self.popularity
            allowed = allow[start : start + step] if allow is not None and allow.ndim == 2 else allow
            parts.append(top_k(scores, k, exclude=part.seen if exclude_seen else None, allow=allowed))
        items = np.concatenate([part.items for part in parts]) if parts else np.empty((0, k), np.int64)
        return Recommendations(items, np.concatenate([part.scores for part in parts]) if parts else np.empty((0, k), np.float32))
