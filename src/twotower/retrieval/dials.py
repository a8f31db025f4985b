"""What orders a list beside the model: popularity, diversity, and what is offered where nothing is known of who asks."""

from __future__ import annotations

import numpy as np

from twotower.retrieval.filters import distances_km
from twotower.retriever import Float, Int

POPULARITY_SCALE = 0.1
"""Cosine that a nat of log popularity is worth more, or less, with the dial at an end."""
NEARBY_KM = 3.0
"""So much farther away counts as e times fewer visits; an item without a place, as ten times so far."""
UNPLACED = 10.0


def with_popularity(vectors: Float, prior: float, dial: Float) -> Float:
    """User vectors [B, D] and their dials [B] → [B, D + 1], whose last number meets the log popularity of the items.

    Parameters
    ----------
    prior
        What a nat of it is worth with the dial at rest; see `TwoTower.popularity_weight`.
    """
    return np.concatenate([vectors, (prior + dial * POPULARITY_SCALE)[:, None]], axis=1).astype(np.float32)


def diversify(scores: Float, vectors: Float, k: int, diversity: float) -> Int:
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
    likeness = vectors @ vectors.T
    left = np.ones(len(scores), np.bool_)
    nearest = np.zeros(len(scores), np.float32)
    chosen: list[int] = []
    while len(chosen) < min(k, len(scores)):
        value = np.where(left, (1 - diversity) * scores - diversity * nearest, -np.inf)
        best = int(np.argmax(value)) if chosen else 0
        nearest = np.maximum(nearest, likeness[best]) if chosen else likeness[best]
        left[best] = False
        chosen.append(best)
    return np.array(chosen, np.int64)


def back_off(recent: Int, places: Float, near: tuple[float, float] | None) -> Float:
    """Scores float32 [n] of items for somebody nothing is known of: recent visits, told down by the distance from `near`.

    Parameters
    ----------
    recent
        int64 [n]: visits in the last months.
    places
        float [n, 2]: degrees, NaN where unknown.
    """
    scores = np.log1p(recent.astype(np.float64))
    if near is not None:
        away = distances_km(places, near) / NEARBY_KM
        scores = scores - np.where(np.isnan(away), UNPLACED, away)
    return scores.astype(np.float32)
