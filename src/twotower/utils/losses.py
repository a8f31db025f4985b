"""Contrastive losses over shared candidates, with each candidate weighted by how likely it was to be there.

One formula serves all: the full softmax is −s₊ + log(e^{s₊} + Σ_{j≠+} e^{s_j}); when candidate j stands in the sum `c_j` times and
was expected `q_j` times, `Σ_j c_j / q_j · e^{s_j}` estimates the sum without bias. The positive is always there: its own term has
weight one and no correction: that is the corrected logQ (Khrylchenko et al., "Correcting the LogQ Correction", RecSys 2025), whose
gradient −(1 − P₊)(∇s₊ − Σ_j w_j ∇s_j) this form has by itself. Losses differ in the candidates they propose (`candidates.py`).

The classical logQ (Yi et al., RecSys 2019) also divides the positive's term by q; the tests show the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from twotower.utils.types import Int

BLOCK = 2**22  # logits held at once: 16 MB


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
        """Count the pairs of each of `examples` examples."""
        offsets = np.searchsorted(example, np.arange(examples + 1))
        return cls(torch.from_numpy(example), torch.from_numpy(column), offsets)


def softmax_loss(
    users: Tensor,
    items: Tensor,
    *,
    target: Tensor,
    log_weight: Tensor,
    masked: Masked | None,
    temperature: Tensor,
    prior: Tensor | None = None,
    weight: Tensor | None = None,
    weight_sum: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Softmax cross-entropy over weighted candidates, exact, in memory that grows neither with the examples nor with the catalogue.

    Examples are taken in blocks. The logits of a block are made once, and become its loss and its gradients before the next block
    takes their place: beside the inputs and their gradients, max(`block`, C) numbers are held. The gradients are made in the
    forward pass, once, and only where one is wanted; the backward pass multiplies them. They are constants: there are no second
    derivatives.

    Parameters
    ----------
    users, items
        Vectors [Q, D] and [C, D].
    target
        int64 [Q]: column of the positive.
    log_weight
        [C]: added to the logit of a candidate wherever it is not the positive; -inf leaves it out.
    masked
        Pairs left out of the sum: the user's other positives.
    temperature
        Scalar that divides the inner products.
    prior
        [C] nats: added to every logit of a candidate, the positive's too.
    weight
        [Q]: weight of each example; 1 when None.
    weight_sum
        Scalar that the weighted sum is divided by: of all processes' examples where these are but a part. Default: of `weight`.
    block
        Logits held at once, as far as one example's [C] allow.

    Returns
    -------
    Tensor
        Scalar, weighted mean in nats. Computed in float32 (float64 when the vectors are), under autocast too.
    """
    with torch.autocast(users.device.type, enabled=False):
        wide = torch.promote_types(users.dtype, torch.float32)
        weight = users.new_ones(len(users), dtype=wide) if weight is None else weight.to(wide)
        prior = torch.zeros_like(log_weight, dtype=wide) if prior is None else prior.to(wide)
        problem = _Problem(target, log_weight.to(wide) + prior, prior[target], masked, weight, block, torch.is_grad_enabled())
        total: Tensor = _SoftmaxSum.apply(  # type: ignore[no-untyped-call]
            users.to(wide), items.to(wide), temperature.to(wide), problem
        )
        return total / (weight.sum() if weight_sum is None else weight_sum.to(wide))


@dataclass(frozen=True, slots=True)
class _Problem:
    """What `softmax_loss` is not differentiated by."""

    target: Tensor
    offset: Tensor  # [C]: log weight and prior
    target_prior: Tensor  # [Q]
    masked: Masked | None
    weight: Tensor
    block: int
    differentiable: bool

    def blocks(self, width: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor] | None]]:
        """Examples start:stop of each block, and its masked pairs counted from `start`."""
        size = max(self.block // width, 1)
        for start in range(0, len(self.target), size):
            stop = min(start + size, len(self.target))
            pairs = None
            if self.masked is not None:
                first, last = int(self.masked.offsets[start]), int(self.masked.offsets[stop])
                pairs = (self.masked.example[first:last] - start, self.masked.column[first:last]) if last > first else None
            yield slice(start, stop), pairs


class _SoftmaxSum(torch.autograd.Function):
    """Σ w · loss; both passes are one."""

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
    """Weighted losses of the examples `rows`, summed; their gradients go into `grads`. `buffer` is room for their logits."""
    target, weight = problem.target[rows, None], problem.weight[rows, None]
    scaled = users / temperature
    positive = (scaled * items[target[:, 0]]).sum(dim=1, keepdim=True) + problem.target_prior[rows, None]
    logits = torch.addmm(problem.offset, scaled, items.T, out=buffer[: len(users)])
    if masked is not None:
        logits.index_put_(masked, logits.new_full((), float("-inf")))
    logits.scatter_(1, target, positive)
    # The greatest logit and its share of the sum say what the sum is, with no exponential but the softmax's own.
    top = logits.amax(dim=1, keepdim=True)
    share = torch.softmax(logits, dim=1, out=logits)
    loss = top - share.amax(dim=1, keepdim=True).log() - positive
    if grads is not None:
        share.mul_(weight).scatter_add_(1, target, -weight)  # the derivative of the weighted loss by the logits
        own = torch.mm(share, items, out=grads[0][rows]).div_(temperature)
        grads[1].addmm_(share.T, scaled)
        grads[2].sub_((own * users).sum() / temperature)  # a logit is (user · item) / temperature, and constants
    return (loss * weight).sum()
