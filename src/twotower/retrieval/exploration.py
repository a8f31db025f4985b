"""Give a share of the positions of a list to uncertain and new items, with exact probabilities.

A list L of k items has a pool U of items that are not in it: those that follow it, and the best of those with few events. Each
position is given away with probability `share`, independently. The positions that are given away get different items of U, drawn at
random. With M = max(|U|, k):

    an item of L is shown with probability 1 − share · |U| / M
    an item of U is shown with probability share · k / M

These are the propensities that the answer has, and that off-policy estimates divide by (`evaluation.off_policy`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twotower.data.dataset import Dataset
from twotower.schema import FIRST_ROW
from twotower.utils.types import Float, Float64, Int, Mask

POOL = 25  # items that follow a list, and as many with few events
MIN_EVENTS = 5  # items with fewer are uncertain …
UNCERTAIN_FRAC = 0.1  # … and at least this share of the catalogue


@dataclass(frozen=True, slots=True)
class Explored:
    """A list with some positions given away.

    Attributes
    ----------
    rows, scores
        int64 [n], float32 [n]: the list as it is shown.
    propensity
        float64 [n]: probability with which the list has each item.
    """

    rows: Int
    scores: Float
    propensity: Float64


def uncertain_items(dataset: Dataset) -> Mask:
    """Return a mask of the items with few events, bool [n_item_rows]: at least a tenth of the catalogue."""
    counts = np.diff(dataset.item_events.offsets)
    if dataset.n_items == 0:
        return np.zeros(dataset.n_item_rows, np.bool_)
    most = max(float(np.quantile(counts[FIRST_ROW:], UNCERTAIN_FRAC)), MIN_EVENTS - 1)
    found: Mask = counts <= most
    found[:FIRST_ROW] = False
    return found


def pool_of(rows: Int, lists: Sequence[tuple[Int, Float]]) -> tuple[Int, Float]:
    """Return the items that may take a place of the list `rows`, and their scores: `POOL` of each of the other lists."""
    shown, found = set(rows.tolist()), dict[int, float]()
    for other, scores in lists:
        pairs = zip(other.tolist(), scores.tolist(), strict=True)
        found |= dict([(row, score) for row, score in pairs if row not in shown and row not in found][:POOL])
    return np.array(list(found), np.int64), np.array(list(found.values()), np.float32)


def probabilities(k: int, pool: int, share: float) -> tuple[float, float]:
    """Return the probabilities with which an item of the list and an item of its pool are shown.

    Examples
    --------
    >>> probabilities(10, 50, 0.05)
    (0.95, 0.01)
    """
    most = max(pool, k, 1)
    return 1 - share * pool / most, share * k / most


def explored(rows: Int, scores: Float, pool: Int, pool_scores: Float, share: float, rng: np.random.Generator) -> Explored:
    """Give away positions of a list.

    Parameters
    ----------
    rows, scores
        int64 [k], float32 [k]: the list.
    pool, pool_scores
        int64 [m], float32 [m]: items that are not in it.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> explored(np.arange(2), np.zeros(2, np.float32), np.arange(2, 6), np.zeros(4, np.float32), 1.0, rng).propensity
    array([0.5, 0.5])
    """
    k, size = len(rows), len(pool)
    kept, drawn = probabilities(k, size, share)
    given = np.flatnonzero(rng.random(k) < share)
    order = rng.permutation(max(size, k))[: len(given)]
    place, order = given[order < size], order[order < size]
    shown, values, propensity = rows.copy(), scores.copy(), np.full(k, kept)
    shown[place], values[place], propensity[place] = pool[order], pool_scores[order], drawn
    return Explored(shown, values, propensity)
