"""Sample the candidates of a batch: the items that its examples are compared with, and their log weights.

A log weight is log(c / q): how often an item was drawn, divided by how often it was expected. `losses.softmax_loss` uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from twotower.utils.ragged import ragged_arange
from twotower.utils.registry import Registry
from twotower.utils.types import Array, Float, Int


@dataclass(frozen=True, slots=True)
class Candidates:
    """Distinct candidate items of a batch.

    Attributes
    ----------
    row
        int64 [C]: item rows, ascending.
    target
        int64 [Q]: column of the positive of each example.
    log_weight
        float32 [C]: log(c / q), times drawn over times expected; -inf for items that are candidates only as a positive.
    """

    row: Int
    target: Int
    log_weight: Float

    def with_items(self, item_row: Int) -> Candidates:
        """Return the candidates with further items, which only pairs of their own give a weight; they change no other weight."""
        row = np.union1d(self.row, item_row)
        log_weight = np.full(len(row), -np.inf, np.float32)
        log_weight[np.searchsorted(row, self.row)] = self.log_weight
        return Candidates(row, np.searchsorted(row, self.row[self.target]), log_weight)


@dataclass(frozen=True, slots=True)
class Pool:
    """Items that negatives are drawn from.

    Attributes
    ----------
    count
        [n_item_rows]: number of times each item is a target in an epoch; in an update the expected number.
    trained
        int64 [N]: rows of items with at least one target, ascending; other items are never drawn.
    total
        Number of targets in an epoch.
    """

    count: Array
    trained: Int
    total: float

    @classmethod
    def of(cls, count: Array) -> Pool:
        """Return the pool of target counts [n_item_rows], computed once for all batches."""
        return cls(count, np.flatnonzero(count), float(count.sum()))


def infonce(target_row: Int, pool: Pool, draws: int, rng: np.random.Generator) -> Candidates:
    """Return in-batch positives and `draws` shared uniform negatives, with q = (Q - 1) · popularity + draws / N.

    Parameters
    ----------
    target_row
        int64 [Q]: positives of the batch.
    draws
        Number of uniform negatives.
    """
    uniform = rng.choice(pool.trained, draws)
    row, proposed = np.unique(np.concatenate([target_row, uniform]), return_counts=True)
    expected = (len(target_row) - 1) * pool.count[row] / pool.total + draws / len(pool.trained)
    # The loss replaces the example's own positive by its uncorrected score, so `proposed` may count it.
    return Candidates(row, np.searchsorted(row, target_row), _log_ratio(proposed, expected))


def sampled_softmax(target_row: Int, pool: Pool, draws: int, rng: np.random.Generator) -> Candidates:
    """Return `draws` uniform negatives and the positives, with q = draws / N."""
    uniform = rng.choice(pool.trained, draws)
    row = np.unique(np.concatenate([target_row, uniform]))
    proposed = np.bincount(np.searchsorted(row, uniform), minlength=len(row))
    return Candidates(row, np.searchsorted(row, target_row), _log_ratio(proposed, np.full(len(row), draws / len(pool.trained))))


def full_softmax(target_row: Int, pool: Pool, draws: int, rng: np.random.Generator) -> Candidates:  # noqa: ARG001 - one signature
    """Return every trained item once, with log weight 0."""
    row = pool.trained
    return Candidates(row, np.searchsorted(row, target_row), np.zeros(len(row), np.float32))


def _log_ratio(proposed: Array, expected: Array) -> Float:
    with np.errstate(divide="ignore"):
        ratio: Float = (np.log(proposed) - np.log(expected)).astype(np.float32)
        return ratio


def other_positives(user_row: Int, target_row: Int, candidates: Int, offsets: Int, positives: Int) -> tuple[Int, Int]:
    """Return pairs (example, column) of candidates that are other positive items of the example's user.

    Parameters
    ----------
    user_row, target_row
        int64 [Q]: user and target of each example.
    candidates
        int64 [C]: item rows of the columns, distinct, ascending.
    offsets, positives
        int64 [n_user_rows + 1] and [P]: distinct positive items of each user in training.
    """
    start, length = offsets[user_row], offsets[user_row + 1] - offsets[user_row]
    example, at = ragged_arange(start, length)
    item = positives[at]
    column = np.minimum(np.searchsorted(candidates, item), len(candidates) - 1)
    kept = (candidates[column] == item) & (item != target_row[example])
    return example[kept], column[kept]


LOSSES: Registry[Callable[[Int, Pool, int, np.random.Generator], Candidates]] = Registry(
    "loss", {"infonce": infonce, "sampled_softmax": sampled_softmax, "full_softmax": full_softmax}
)
