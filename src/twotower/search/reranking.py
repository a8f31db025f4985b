"""What orders a list beside the towers: popularity, visits that may be repeated, diversity, and what is offered where nothing is
known of who asks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.features.geo import distances_km
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW
from twotower.utils.types import Float, Int

POPULARITY_SCALE = 0.1
"""What a nat of log popularity is worth more, or less, in an inner product with the dial at an end."""
NEARBY_KM = 3.0
"""So much farther away counts as e times fewer visits; an item without a place, as ten times so far."""
UNPLACED = 10.0
REVISITS = tuple(0.5**back for back in range(16))
"""What each of the last visits counts, newest first, where a user's vector is drawn to their items."""


def append_popularity_weight(vectors: Float, prior: float, dial: Float) -> Float:
    """User vectors [B, D] and their dials [B] → [B, D + 1], whose last number meets the log popularity of the items.

    Parameters
    ----------
    prior
        What a nat of it is worth with the dial at rest; see `TwoTower.popularity_weight`.
    """
    return np.concatenate([vectors, (prior + dial * POPULARITY_SCALE)[:, None]], axis=1).astype(np.float32)


def boost_recent_items(vectors: Tensor, history: Queries, items: Tensor, weight: float, again: NDArray[np.bool_]) -> Tensor:
    """User vectors [B, D] drawn to the items that were visited last, for those who may be recommended them again.

    The vector of the last visit's item is added with `weight`, that of the one before with half of it, and so on. So an item that
    was visited gains, and what is like it gains a part of that: in the same inner product, whatever the index.

    Parameters
    ----------
    items
        [n_items, D]: unit vectors.
    weight
        See `TwoTower.recent_item_weight`.
    again
        bool [B]: whose visited items may be recommended.
    """
    if not weight or not again.any():
        return vectors
    drawn = vectors.clone()
    start, last = history.offsets[:-1], history.offsets[1:] - 1
    for back, share in enumerate(REVISITS):
        asked = np.flatnonzero(again & (last - back >= start))
        rows = history.item_row[last[asked] - back]
        asked, rows = asked[rows >= FIRST_ROW], rows[rows >= FIRST_ROW]
        drawn[torch.from_numpy(asked)] += weight * share * items[torch.from_numpy(rows)]
    return drawn


def mmr(scores: Float, vectors: Float, k: int, diversity: float) -> Int:
    """The `k` of the candidates [C] that a list takes, in its order.

    Maximal marginal relevance (Carbonell & Goldstein, 1998): each place goes to the candidate of the greatest
    (1 - diversity) · score - diversity · (greatest inner product with a vector chosen already).

    Parameters
    ----------
    scores, vectors
        float32 [C], best first, and unit vectors float32 [C, D].

    Returns
    -------
    int64 [min(k, C)]
        Positions of the candidates.
    """
    left = np.ones(len(scores), np.bool_)
    nearest = np.zeros(len(scores), np.float32)
    chosen: list[int] = []
    while len(chosen) < min(k, len(scores)):
        value = np.where(left, (1 - diversity) * scores - diversity * nearest, -np.inf)
        best = int(np.argmax(value)) if chosen else 0
        likeness = vectors @ vectors[best]
        nearest = np.maximum(nearest, likeness) if chosen else likeness
        left[best] = False
        chosen.append(best)
    return np.array(chosen, np.int64)


def fallback_scores(recent_event_count: Int, locations: Float, near: tuple[float, float] | None) -> Float:
    """Scores float32 [n] of items for somebody nothing is known of: recent visits, told down by the distance from `near`.

    Parameters
    ----------
    recent_event_count
        int64 [n]: visits in the last months.
    locations
        float [n, 2]: degrees, NaN where unknown.
    """
    scores = np.log1p(recent_event_count.astype(np.float64))
    if near is not None:
        away = distances_km(locations, near) / NEARBY_KM
        scores = scores - np.where(np.isnan(away), UNPLACED, away)
    return scores.astype(np.float32)
