"""Contrastive losses over shared candidates, with each candidate weighted by how likely it was to be there.

One formula serves all: the full softmax is −s₊ + log(e^{s₊} + Σ_{j≠+} e^{s_j}); when candidate j stands in the sum `c_j` times and
was expected `q_j` times, `Σ_j c_j / q_j · e^{s_j}` estimates the sum without bias. The positive is always there: its own term has
weight one and no correction: that is the corrected logQ (Khrylchenko et al., "Correcting the LogQ Correction", RecSys 2025), whose
gradient −(1 − P₊)(∇s₊ − Σ_j w_j ∇s_j) this form has by itself. Losses differ in the candidates they propose.

The classical logQ (Yi et al., RecSys 2019) also divides the positive's term by q; the tests show the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Int = NDArray[np.int64]


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


def softmax_loss(
    users: Tensor,
    items: Tensor,
    *,
    target: Tensor,
    log_weight: Tensor,
    masked: tuple[Tensor, Tensor] | None,
    temperature: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy over weighted candidates.

    Parameters
    ----------
    users, items
        Unit vectors [Q, D] and [C, D].
    target
        int64 [Q]: column of the positive.
    log_weight
        [C]: added to the logit of a candidate wherever it is not the positive.
    masked
        (example, column) pairs int64 [P] each, left out of the sum: the user's other positives. Never the example's own target.
    temperature
        Scalar that divides the inner products.
    weight
        [Q]: weight of each example; equal when None.

    Returns
    -------
    Tensor
        Scalar, mean in nats. Computed in float32 (or float64 when the vectors are).
    """
    with torch.autocast(users.device.type, enabled=False):
        wide = torch.promote_types(users.dtype, torch.float32)
        scores = users.to(wide) @ items.to(wide).T / temperature.to(wide)  # [Q, C]
        positive = scores.gather(1, target[:, None])  # [Q, 1]
        logits = scores + log_weight.to(wide)
        if masked is not None:
            logits = logits.index_put(masked, logits.new_tensor(float("-inf")))
        logits = logits.scatter(1, target[:, None], positive)
        loss = torch.logsumexp(logits, dim=1) - positive[:, 0]
        if weight is None:
            return loss.mean()
        return (loss * weight).sum() / weight.sum()


def infonce(target_row: Int, count: Int, draws: int, rng: np.random.Generator) -> Candidates:
    """In-batch positives and `draws` shared uniform negatives; q is the mixture's: (Q - 1) · popularity + draws / N.

    Parameters
    ----------
    target_row
        int64 [Q]: positives of the batch.
    count
        int64 [n_items]: training positives of every item, by row; items without any are never proposed.
    """
    trained = np.flatnonzero(count)
    uniform = rng.choice(trained, draws)
    row, proposed = np.unique(np.concatenate([target_row, uniform]), return_counts=True)
    expected = (len(target_row) - 1) * count[row] / count.sum() + draws / len(trained)
    # The example's own positive is replaced by its uncorrected score, so `proposed` may count it without harm.
    return Candidates(row, np.searchsorted(row, target_row), _log_ratio(proposed, expected))


def sampled_softmax(target_row: Int, count: Int, draws: int, rng: np.random.Generator) -> Candidates:
    """Uniform negatives only; q = draws / N."""
    trained = np.flatnonzero(count)
    uniform = rng.choice(trained, draws)
    row = np.unique(np.concatenate([target_row, uniform]))
    proposed = np.bincount(np.searchsorted(row, uniform), minlength=len(row))
    return Candidates(row, np.searchsorted(row, target_row), _log_ratio(proposed, np.full(len(row), draws / len(trained))))


def full_softmax(target_row: Int, count: Int, draws: int, rng: np.random.Generator) -> Candidates:  # noqa: ARG001 - one signature
    """Every trained item, once."""
    row = np.flatnonzero(count)
    return Candidates(row, np.searchsorted(row, target_row), np.zeros(len(row), np.float32))


def _log_ratio(proposed: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        ratio: NDArray[np.float32] = (np.log(proposed) - np.log(expected)).astype(np.float32)
        return ratio


def other_positives(user_row: Int, target_row: Int, candidates: Int, offsets: Int, positives: Int, n_items: int) -> tuple[Int, Int]:
    """Pairs (example, column) of the candidates that the example's user also visited, its own target excepted.

    Parameters
    ----------
    user_row, target_row
        int64 [Q].
    candidates
        int64 [C]: item rows of the columns, distinct.
    offsets, positives
        int64 [n_users + 1] and [P]: items each user visited in training, by user row.
    """
    column = np.full(n_items, -1, np.int64)
    column[candidates] = np.arange(len(candidates))
    start, length = offsets[user_row], offsets[user_row + 1] - offsets[user_row]
    example = np.repeat(np.arange(len(user_row)), length)
    within = np.arange(len(example)) - np.repeat(np.cumsum(length) - length, length)
    item = positives[np.repeat(start, length) + within]
    kept = (column[item] >= 0) & (item != target_row[example])
    return example[kept], column[item[kept]]


LOSSES: dict[str, Callable[[Int, Int, int, np.random.Generator], Candidates]] = {
    "infonce": infonce,
    "sampled_softmax": sampled_softmax,
    "full_softmax": full_softmax,
}
