"""Re-rank: popularity bias, diversity (MMR), and the fallback for unknown users."""

from __future__ import annotations

import numpy as np

from twotower.features.geo import distances_km
from twotower.utils.types import Float, Int

POPULARITY_SCALE = 0.1
"""Change of the weight of the log popularity of all events at a popularity bias of 1 (or, with opposite sign, −1)."""
NEARBY_KM = 3.0
"""Distance that reduces the score like e times fewer recent events."""
UNLOCATED = 10.0
"""Distance of items without coordinates, in units of `NEARBY_KM`."""


def mmr(scores: Float, vectors: Float, k: int, diversity: float) -> Int:
    """Choose `k` of the candidates [C] by maximal marginal relevance (Carbonell & Goldstein, 1998), in list order.

    Each position gets the candidate with the largest
    (1 - diversity) · score - diversity · (largest inner product with a vector chosen already).

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
    """Return scores float32 [n] of items for an unknown user: recent events, reduced by the distance from `near`.

    Parameters
    ----------
    recent_event_count
        int64 [n]: events in the last 90 days.
    locations
        float [n, 2]: degrees, NaN where unknown.
    """
    scores = np.log1p(recent_event_count.astype(np.float64))
    if near is not None:
        away = distances_km(locations, near) / NEARBY_KM
        scores = scores - np.where(np.isnan(away), UNLOCATED, away)
    return scores.astype(np.float32)
