"""Histories → one vector per moment: pools over the events the moment has seen, for many moments in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.models.layers.attention import Widths
from twotower.utils.registry import Registry


class Pooling(nn.Module):
    """Base: a learned vector stands for the empty history."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:
        """Events [T, d] laid out as `widths` says; place of the last event seen and number seen, int64 [Q] → [Q, d]."""
        pooled = self.pool(x, widths, at, seen)
        return torch.where((seen > 0)[:, None], pooled, self.empty.to(pooled.dtype))

    def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:
        """The pool itself; moments that have seen nothing are replaced afterwards."""
        raise NotImplementedError


class LastPooling(Pooling):
    """The most recent event seen."""

    def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:  # noqa: ARG002 - one signature
        """See `Pooling`."""
        return x[at]


class MeanPooling(Pooling):
    """The mean of the events seen."""

    def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:
        """See `Pooling`."""
        return (running_sum(widened(x), widths)[at] / seen.clamp(min=1)[:, None]).to(x.dtype)


class AttentionPooling(Pooling):
    """A learned weighting of the events seen: softmax over each prefix, computed for all prefixes by two running sums."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.score = nn.Linear(dim, 1)
        nn.init.zeros_(self.score.weight)

    def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:  # noqa: ARG002 - one signature
        """See `Pooling`."""
        # Bounded scores keep every prefix's sum far from underflow: the ratio of two weights is at most e^10.
        weight = (5 * torch.tanh(widened(self.score(x)) / 5)).exp()  # [T, 1]
        return (running_sum(weight * widened(x), widths)[at] / running_sum(weight, widths)[at]).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """At least float32, whatever the mixed precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def running_sum(x: Tensor, widths: Widths) -> Tensor:
    """Sums [T, d] over each history up to and including every place."""
    runs = torch.split(x, [size * width for size, width in widths])
    sums = [run.view(size, width, -1).cumsum(dim=1).flatten(0, 1) for run, (size, width) in zip(runs, widths, strict=True)]
    return torch.cat(sums)


POOLINGS: Registry[type[Pooling]] = Registry("pooling", {"last": LastPooling, "mean": MeanPooling, "attention": AttentionPooling})
