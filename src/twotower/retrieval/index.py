"""Exact search: inner products of query vectors with every item's vector, in blocks of bounded memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.retrieval.topk import top_k
from twotower.retriever import Int, Mask, Recommendations

BLOCK = 256  # queries scored at once: 256 × 150,000 items are 150 MB


class ExactIndex:
    """Vectors of all item rows float32 [n_items, D]; rows PAD and UNKNOWN are never found."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def search(
        self, queries: Tensor, k: int, *, exclude: tuple[Int, Int] | None = None, allow: Mask | None = None
    ) -> Recommendations:
        """The `k` items of greatest inner product with each query [B, D].

        Parameters
        ----------
        exclude
            Ragged item rows (offsets [B + 1], rows [T]) left out per query.
        allow
            bool [n_items] or [B, n_items]: False leaves an item out.
        """
        items: list[NDArray[np.int64]] = []
        scores: list[NDArray[np.float32]] = []
        for start in range(0, len(queries), BLOCK):
            stop = min(start + BLOCK, len(queries))
            with torch.inference_mode():
                block = (queries[start:stop] @ self.vectors.T).float().cpu().numpy()
            found = top_k(
                block,
                k,
                exclude=_slice(exclude, start, stop),
                allow=allow[start:stop] if allow is not None and allow.ndim == 2 else allow,
            )
            items.append(found.items)
            scores.append(found.scores)
        if not items:
            return Recommendations(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
        return Recommendations(np.concatenate(items), np.concatenate(scores))


def _slice(ragged: tuple[Int, Int] | None, start: int, stop: int) -> tuple[Int, Int] | None:
    if ragged is None:
        return None
    offsets, rows = ragged[0][start : stop + 1], ragged[1]
    return offsets - offsets[0], rows[offsets[0] : offsets[-1]]
