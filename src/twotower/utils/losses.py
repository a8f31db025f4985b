"""Compute softmax losses over shared candidates with a correction for how candidates are sampled (corrected logQ).

All losses use one formula. The full softmax loss is −s₊ + log(e^{s₊} + Σ_{j≠+} e^{s_j}). If candidate j occurs `c_j` times in the
sample and is expected `q_j` times, `Σ_j c_j / q_j · e^{s_j}` is an unbiased estimate of the sum. The positive is always present, so
its term has weight one and no correction: the corrected logQ (Khrylchenko et al., "Correcting the LogQ Correction", RecSys 2025),
with the gradient −(1 − P₊)(∇s₊ − Σ_j w_j ∇s_j). The losses differ only in the candidates they sample (`candidates.py`).

The classical logQ (Yi et al., RecSys 2019) also divides the positive's term by q. The tests show the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from twotower.utils.types import Float, Int

BLOCK = 2**22  # logits in memory at once: 16 MB


@dataclass(frozen=True, slots=True)
class Masked:
    """Pairs (example, candidate) that are left out of the loss: the other items that the example's user interacted with.

    Attributes
    ----------
    example, column
        int64 [P]: positions among the examples, ascending, and among the candidates; never an example's own target.
    offsets
        int64 [Q + 1], in host memory: the pairs of example q are offsets[q]:offsets[q + 1]. The loss cuts its blocks by them
        without reading anything back from the device.
    """

    example: Tensor
    column: Tensor
    offsets: Int

    @classmethod
    def of(cls, example: Int, column: Int, examples: int) -> Masked:
        """Return the pairs with the offsets of each of `examples` examples; `example` must be ascending."""
        offsets = np.searchsorted(example, np.arange(examples + 1))
        return cls(torch.from_numpy(example), torch.from_numpy(column), offsets)


@dataclass(frozen=True, slots=True)
class Negatives:
    """Pairs (example, candidate) of explicit negatives, each with a log weight of its own in the sum of its example.

    Attributes
    ----------
    example, column, offsets
        As in `Masked`. A pair that is also masked is left out, and a pair of an example and its target has no effect.
    log_weight
        float [P]: replaces the log weight of the candidate, log(c / q + a), where a is the weight of the negative.
    """

    example: Tensor
    column: Tensor
    log_weight: Tensor
    offsets: Int

    @classmethod
    def of(cls, example: Int, column: Int, log_weight: Float, examples: int) -> Negatives:
        """Return the pairs with the offsets of each of `examples` examples; `example` must be ascending."""
        offsets = np.searchsorted(example, np.arange(examples + 1))
        return cls(torch.from_numpy(example), torch.from_numpy(column), torch.from_numpy(log_weight), offsets)


def softmax_loss(
    users: Tensor,
    items: Tensor,
    *,
    target: Tensor,
    log_weight: Tensor,
    masked: Masked | None,
    temperature: Tensor,
    negatives: Negatives | None = None,
    prior: Tensor | None = None,
    weight: Tensor | None = None,
    weight_sum: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Return the exact softmax cross-entropy over weighted candidates, computed in blocks of bounded memory.

    The logits of one block of examples are computed once and turned into its loss and gradients before the next block. Besides the
    inputs and their gradients, max(`block`, C) numbers are in memory. Gradients are computed in the forward pass, only if needed;
    the backward pass scales them. Second derivatives are not supported.

    Parameters
    ----------
    users, items
        Vectors [Q, D] and [C, D].
    target
        int64 [Q]: column of the positive.
    log_weight
        [C]: added to the logit of a candidate except where it is the positive; -inf leaves the candidate out.
    masked
        Pairs left out of the sum: other positives of the user.
    temperature
        Scalar that divides the inner products.
    negatives
        Pairs with a larger weight: explicit negatives of the user.
    prior
        [C], in nats: added to every logit of a candidate, including the positive's.
    weight
        [Q]: weight of each example; None: 1.
    weight_sum
        Scalar divisor of the weighted sum: with several processes, the weights of the whole batch. None: the sum of `weight`.
    block
        Logits in memory at once; at least the [C] of one example.

    Returns
    -------
    Tensor
        Scalar, weighted mean in nats. Computed in float32 (float64 if the vectors are), also under autocast.
    """
    with torch.autocast(users.device.type, enabled=False):
        wide = torch.promote_types(users.dtype, torch.float32)
        weight = users.new_ones(len(users), dtype=wide) if weight is None else weight.to(wide)
        prior = torch.zeros_like(log_weight, dtype=wide) if prior is None else prior.to(wide)
        shared = log_weight.to(wide) + prior, prior[target]
        problem = _Problem(target, *shared, masked, negatives, prior, weight, block, torch.is_grad_enabled())
        total: Tensor = _SoftmaxSum.apply(  # type: ignore[no-untyped-call]
            users.to(wide), items.to(wide), temperature.to(wide), problem
        )
        return total / (weight.sum() if weight_sum is None else weight_sum.to(wide))


@dataclass(frozen=True, slots=True)
class _Problem:
    """Inputs of `softmax_loss` that need no gradient."""

    target: Tensor
    offset: Tensor  # [C]: log weight and prior
    target_prior: Tensor  # [Q]
    masked: Masked | None
    negatives: Negatives | None
    prior: Tensor  # [C]
    weight: Tensor
    block: int
    differentiable: bool

    def blocks(self, width: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor] | None]]:
        """Yield the slice of examples of each block, and its masked pairs with examples counted from the start of the block."""
        size = max(self.block // width, 1)
        for start in range(0, len(self.target), size):
            stop = min(start + size, len(self.target))
            pairs = None
            if self.masked is not None:
                first, last = int(self.masked.offsets[start]), int(self.masked.offsets[stop])
                pairs = (self.masked.example[first:last] - start, self.masked.column[first:last]) if last > first else None
            yield slice(start, stop), pairs


class _SoftmaxSum(torch.autograd.Function):
    """Weighted sum of the losses; the forward pass also computes the gradients."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, temperature: Tensor, problem: _Problem) -> Tensor:
        grads = None
        if problem.differentiable and any(ctx.needs_input_grad):
            grads = (torch.empty_like(users), torch.zeros_like(items), torch.zeros_like(temperature))
        total = users.new_zeros(())
        buffer = users.new_empty(min(max(problem.block // len(items), 1), len(users)), len(items))
        for rows, masked in problem.blocks(len(items)):
            total += _block(users[rows], items, temperature, rows, masked, problem, buffer, grads)
        if grads is not None:
            ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad * upstream for grad in ctx.saved_tensors), None)


def _block(
    users: Tensor,
    items: Tensor,
    temperature: Tensor,
    rows: slice,
    masked: tuple[Tensor, Tensor] | None,
    problem: _Problem,
    buffer: Tensor,
    grads: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Return the weighted sum of the losses of the examples `rows`; add their gradients to `grads`. `buffer` holds their logits."""
    target, weight = problem.target[rows, None], problem.weight[rows, None]
    scaled = users / temperature
    positive = (scaled * items[target[:, 0]]).sum(dim=1, keepdim=True) + problem.target_prior[rows, None]
    logits = torch.addmm(problem.offset, scaled, items.T, out=buffer[: len(users)])
    if problem.negatives is not None:
        _raise(logits, scaled, items, rows, problem.negatives, problem.prior)
    if masked is not None:
        logits.index_put_(masked, logits.new_full((), float("-inf")))
    logits.scatter_(1, target, positive)
    # The largest logit and its softmax share give the log-sum without further exponentials.
    top = logits.amax(dim=1, keepdim=True)
    share = torch.softmax(logits, dim=1, out=logits)
    loss = top - share.amax(dim=1, keepdim=True).log() - positive
    if grads is not None:
        share.mul_(weight).scatter_add_(1, target, -weight)  # derivative of the weighted loss with respect to the logits
        own = torch.mm(share, items, out=grads[0][rows]).div_(temperature)
        grads[1].addmm_(share.T, scaled)
        grads[2].sub_((own * users).sum() / temperature)  # a logit is (user · item) / temperature plus constants
    return (loss * weight).sum()


def _raise(logits: Tensor, scaled: Tensor, items: Tensor, rows: slice, negatives: Negatives, prior: Tensor) -> None:
    """Set the logits of the explicit negatives of the examples `rows`, in place."""
    first, last = int(negatives.offsets[rows.start]), int(negatives.offsets[rows.stop])
    example, column = negatives.example[first:last] - rows.start, negatives.column[first:last]
    scores = (scaled[example] * items[column]).sum(dim=1)
    logits.index_put_((example, column), scores + prior[column] + negatives.log_weight[first:last].to(scores))
