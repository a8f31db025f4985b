"""Figures of a run's health: how vectors lie, what a batch contrasts, what the answers cost, which rows were never trained.

Enters: tensors of a model, a batch. Leaves: numbers. Promise: nothing is changed, and nothing is drawn at random.
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
"""Vectors of each side to look at: enough for means whose error is far below the thresholds, and little beside a validation."""
BLOCK = 1 << 24  # scores held at once
ID_TABLES = {"item.id": "item_tower", "user.id": "user_tower"}
"""Tables whose row UNKNOWN answers for whoever was not there in training, and the tower whose `id_dropout` trains that row."""
MOVED = 0.02
"""Of the length a row is drawn with: what chance updates of a stray id do not reach."""


@dataclass(frozen=True, slots=True)
class VectorSpread:
    """How the directions of a sample of vectors lie: `effective_rank` and `mean_cosine`."""

    rank: float
    cosine: float


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What a batch contrasts.

    Attributes
    ----------
    masked
        Share of the (example, candidate) pairs left out of the loss, because the example's user visited the candidate too.
    same_user
        Share of the pairs of two examples that belong to one user.
    negatives
        Mean number of candidates that an example is left with.
    """

    masked: float
    same_user: float
    negatives: float


def spread(vectors: Tensor) -> VectorSpread:
    """How at most `SAMPLE` of the vectors [n, D], taken at equal distances, lie."""
    some = vectors[:: -(-len(vectors) // SAMPLE)] if len(vectors) else vectors
    some = torch.nn.functional.normalize(some.double(), dim=-1)
    return VectorSpread(effective_rank(some), mean_cosine(some))


def effective_rank(vectors: Tensor) -> float:
    """In how many directions vectors [n, D] differ: exp of the entropy of the shares of their variance, 1 … min(n − 1, D).

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), with squared singular values, which
    are variances, of the vectors less their mean; `mean_cosine` looks at the mean. 0 when all vectors are equal or there is none.
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
    """Mean cosine of two different ones of the unit vectors [n, D]; 0 when there are no two."""
    size, wide = len(vectors), vectors.double()
    if size < 2:
        return 0.0
    return float((wide.sum(dim=0).square().sum() - wide.square().sum()) / (size * (size - 1)))


def batch_stats(batch: TrainBatch) -> BatchStats:
    """What a batch (this process's share of it) contrasts."""
    counted, stands = batch.weight > 0, batch.log_weight > float("-inf")  # as a negative, and not as somebody's positive alone
    examples, candidates = int(counted.sum()), int(stands.sum())
    if not examples:  # a process may have no share of a small batch
        return BatchStats(0.0, 0.0, float(candidates))
    masked = int((counted[batch.masked.example] & stands[batch.masked.column]).sum())
    _, of_user = torch.unique(torch.cat([part.user_row for part in batch.users])[counted], return_counts=True)
    same = float((of_user * (of_user - 1)).sum()) / max(examples * (examples - 1), 1)
    negatives = candidates - float(stands[batch.target[counted]].double().mean()) - masked / examples
    return BatchStats(masked / max(examples * candidates, 1), same, negatives)


def question_loss(users: Tensor, items: Tensor, target_offsets: Int, target_row: Int, temperature: float) -> float:
    """Mean nats of the answers to questions under a softmax over all items.

    Parameters
    ----------
    users, items
        [B, D + 1] of the questions' users, and [N, D + 1] of all item rows: vectors, and the weight and log popularity.
    target_offsets, target_row
        int64 [B + 1], [T]: each question's answers.
    """
    total, rows = 0.0, max(BLOCK // len(items), 1)
    for start in range(0, len(users), rows):
        stop = min(start + rows, len(users))
        scores = (users[start:stop] @ items.T).float() / temperature
        scores[:, :FIRST_ROW] = float("-inf")
        answers = torch.from_numpy(target_row[target_offsets[start] : target_offsets[stop]]).to(items.device)
        asked = torch.from_numpy(np.repeat(np.arange(stop - start), np.diff(target_offsets[start : stop + 1]))).to(items.device)
        total += float((torch.logsumexp(scores, dim=1)[asked] - scores[asked, answers]).sum())
    return total / max(int(target_offsets[len(users)]), 1)


@torch.no_grad()
def untrained(model: TwoTower) -> tuple[str, ...]:
    """Id tables whose row UNKNOWN, which begins at zero, still lies there. All processes of a run must ask together."""
    device = model.log_temperature.device
    with torch.no_grad():
        rows = {name: model.tables.lookup(name)(torch.tensor([UNKNOWN], device=device))[0] for name in ID_TABLES}
    return tuple(name for name, row in rows.items() if float(row.float().norm()) < MOVED * INIT_STD * math.sqrt(len(row)))
