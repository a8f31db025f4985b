"""Candidates of a batch: the items that its examples are contrasted with, and the log weight of each.

A weight is log(c / q): how often an item was drawn, over how often it was expected. `losses.softmax_loss` explains its use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.utils.ragged import ragged_arange
from twotower.utils.registry import Registry
from twotower.utils.types import Int


@dataclass(frozen=True, slots=True)
class Candidates:
    """Distinct items that a batch contrasts with.

    Attributes
    ----------
    row
        int64 [C], ascending.
    target
        int64 [Q]: the column of each example's positive.
    log_weight
        float32 [C]: log(c / q), times proposed over times expected; -inf where the item stands there as a positive only.
    """

    row: Int
    target: Int
    log_weight: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Pool:
    """What negatives are drawn from.

    Attributes
    ----------
    count
        int64 [n_items]: how often each item, by row, is a target in an epoch.
    trained
        int64 [N]: rows of the items that ever are, ascending; others are never proposed.
    total
        Targets in an epoch.
    """

    count: Int
    trained: Int
    total: int

    @classmethod
    def of(cls, count: Int) -> Pool:
        """Count once, so that a batch costs nothing by item."""
        return cls(count, np.flatnonzero(count), int(count.sum()))


def infonce(target_row: Int, pool: Pool, draws: int, rng: np.random.Generator) -> Candidates:
    """In-batch positives and `draws` shared uniform negatives; q is the mixture's: (Q - 1) · popularity + draws / N.

    Parameters
    ----------
    target_row
        int64 [Q]: positives of the batch.
    """
    uniform = rng.choice(pool.trained, draws)
    row, proposed = np.unique(np.concatenate([target_row, uniform]), return_counts=True)
    expected = (len(target_row) - 1) * pool.count[row] / pool.total + draws / len(pool.trained)
    # The example's own positive is replaced by its uncorrected score, so `proposed` may count it without harm.
    return Candidates(row, np.searchsorted(row, target_row), _log_ratio(proposed, expected))


def sampled_softmax(target_row: Int, pool: Pool, draws: int, rng: np.random.Generator) -> Candidates:
    """Uniform negatives only; q = draws / N."""
    uniform = rng.choice(pool.trained, draws)
    row = np.unique(np.concatenate([target_row, uniform]))
    proposed = np.bincount(np.searchsorted(row, uniform), minlength=len(row))
    return Candidates(row, np.searchsorted(row, target_row), _log_ratio(proposed, np.full(len(row), draws / len(pool.trained))))


def full_softmax(target_row: Int, pool: Pool, draws: int, rng: np.random.Generator) -> Candidates:  # noqa: ARG001 - one signature
    """Every trained item, once."""
    row = pool.trained
    return Candidates(row, np.searchsorted(row, target_row), np.zeros(len(row), np.float32))


def _log_ratio(proposed: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        ratio: NDArray[np.float32] = (np.log(proposed) - np.log(expected)).astype(np.float32)
        return ratio


def other_positives(user_row: Int, target_row: Int, candidates: Int, offsets: Int, positives: Int) -> tuple[Int, Int]:
    """Pairs (example, column) of the candidates that the example's user also visited, its own target excepted.

    Parameters
    ----------
    user_row, target_row
        int64 [Q].
    candidates
        int64 [C]: item rows of the columns, distinct, ascending.
    offsets, positives
        int64 [n_users + 1] and [P]: items each user visited in training, by user row.
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
