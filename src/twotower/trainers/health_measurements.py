"""Measure a run's health: spread of the vectors, composition of a batch, validation loss, untrained rows.

The functions change nothing and draw no random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.data.data_loader import TrainBatch
from twotower.models.layers.tables import INIT_STD
from twotower.models.two_tower import TwoTower
from twotower.schema import FIRST_ROW, UNKNOWN
from twotower.utils.types import Int

SAMPLE = 1024
"""Vectors sampled per tower: the error of their means is far below the thresholds, and the cost is small beside a validation."""
BLOCK = 1 << 24  # scores in memory at once
ID_TABLES = {"item.id": "item_tower", "user.id": "user_tower"}
"""Tables whose row UNKNOWN represents new users or items, and the tower whose `id_dropout` trains that row."""
MOVED = 0.02
"""Share of the initial norm of a row; accidental updates of single ids stay below it."""


@dataclass(frozen=True, slots=True)
class VectorSpread:
    """Spread of a sample of unit vectors: `effective_rank` and `mean_cosine`."""

    rank: float
    cosine: float


@dataclass(frozen=True, slots=True)
class BatchStats:
    """Composition of a batch.

    Attributes
    ----------
    masked
        Share of the (example, candidate) pairs left out of the loss because the candidate is another positive of the user.
    same_user
        Share of the pairs of two examples that belong to one user.
    negatives
        Mean number of negatives of an example.
    """

    masked: float
    same_user: float
    negatives: float


def spread(vectors: Tensor) -> VectorSpread:
    """Return the spread of at most `SAMPLE` evenly spaced vectors of [n, D]."""
    some = vectors[:: -(-len(vectors) // SAMPLE)] if len(vectors) else vectors
    some = torch.nn.functional.normalize(some.double(), dim=-1)
    return VectorSpread(effective_rank(some), mean_cosine(some))


def effective_rank(vectors: Tensor) -> float:
    """Return the effective rank of vectors [n, D]: exp of the entropy of their variance shares, from 1 to min(n − 1, D).

    This is Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), with squared singular values
    (variances) of the centred vectors; `mean_cosine` measures their mean. It is 0 if all vectors are equal or there are none.

    Examples
    --------
    >>> axes = torch.eye(2)
    >>> round(effective_rank(torch.cat([axes, -axes])), 6)
    2.0
    """
    if not len(vectors):
        return 0.0
    wide = vectors.double()
    energy = torch.linalg.svdvals(wide - wide.mean(dim=0)).square()
    if float(energy.sum()) <= 1e-12 * float(wide.square().sum()):  # rounding alone
        return 0.0
    share = energy / energy.sum()
    return float(torch.special.entr(share).sum().exp())


def mean_cosine(vectors: Tensor) -> float:
    """Return the mean cosine over all pairs of the unit vectors [n, D]; 0 for fewer than two vectors.

    Examples
    --------
    >>> mean_cosine(torch.eye(2))
    0.0
    """
    size, wide = len(vectors), vectors.double()
    if size < 2:
        return 0.0
    return float((wide.sum(dim=0).square().sum() - wide.square().sum()) / (size * (size - 1)))


def batch_stats(batch: TrainBatch) -> BatchStats:
    """Return the composition of a batch, for this process's part of it."""
    counted, stands = batch.weight > 0, batch.log_weight > float("-inf")  # a negative, not only the positive of an example
    examples, candidates = int(counted.sum()), int(stands.sum())
    if not examples:  # a process may have no share of a small batch
        return BatchStats(0.0, 0.0, float(candidates))
    masked = int((counted[batch.masked.example] & stands[batch.masked.column]).sum())
    _, of_user = torch.unique(torch.cat([part.user_row for part in batch.users])[counted], return_counts=True)
    same = float((of_user * (of_user - 1)).sum()) / max(examples * (examples - 1), 1)
    negatives = candidates - float(stands[batch.target[counted]].double().mean()) - masked / examples
    return BatchStats(masked / max(examples * candidates, 1), same, negatives)


def question_loss(users: Tensor, items: Tensor, target_offsets: Int, target_row: Int, temperature: float) -> float:
    """Return the mean cross-entropy, in nats, of the queries' targets under a softmax over all items.

    Parameters
    ----------
    users, items
        User vectors [B, D + 1] of the queries, and vectors [N, D + 1] of all item rows. The last number is the popularity weight
        and the log popularity.
    target_offsets, target_row
        int64 [B + 1] and [T]: the targets of each query.
    """
    total, rows = 0.0, SAMPLE // 4
    offered = torch.split(items[FIRST_ROW:], max(BLOCK // rows, 1))  # a block of items is read once for many queries
    for start in range(0, len(users), rows):
        some = users[start : start + rows]
        stop = start + len(some)
        sums = [torch.logsumexp((some @ part.T).float() / temperature, dim=1) for part in offered]
        answers = torch.from_numpy(target_row[target_offsets[start] : target_offsets[stop]]).to(items.device)
        query = torch.from_numpy(np.repeat(np.arange(len(some)), np.diff(target_offsets[start : stop + 1]))).to(items.device)
        scores = (some[query] * items[answers]).sum(dim=1).float() / temperature
        total += float((torch.logsumexp(torch.stack(sums), dim=0)[query] - scores).sum())
    return total / max(int(target_offsets[len(users)]), 1)


@torch.no_grad()
def untrained(model: TwoTower) -> tuple[str, ...]:
    """Return the id tables whose row UNKNOWN, initialised to zero, is still there. All processes of a run must call it together."""
    device = model.log_temperature.device
    with torch.no_grad():
        rows = {name: model.tables.lookup(name)(torch.tensor([UNKNOWN], device=device))[0] for name in ID_TABLES}
    return tuple(name for name, row in rows.items() if float(row.float().norm()) < MOVED * INIT_STD * math.sqrt(len(row)))
