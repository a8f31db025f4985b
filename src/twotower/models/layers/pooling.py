"""Pool the events of a history into one vector per query, for many queries on the same history in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.models.layers.attention import Widths
from twotower.utils.registry import Registry


class Pooling(nn.Module):
    """Base class: a learned vector represents the empty history."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:
        """Return one vector per query.

        Parameters
        ----------
        x
            Events [T, d], grouped as `widths` says.
        at, seen
            int64 [Q]: position of the last event before the query, and number of events before it.

        Returns
        -------
        Tensor
            [Q, d].
        """
        pooled = self.pool(x, widths, at, seen)
        return torch.where((seen > 0)[:, None], pooled, self.empty.to(pooled.dtype))

    def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:
        """Return the pooled events [Q, d]; rows of empty histories are replaced afterwards."""
        raise NotImplementedError


class LastPooling(Pooling):
    """Takes the most recent event."""

    def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:  # noqa: ARG002 - one signature
        """Return the pooled events [Q, d]; see `Pooling`."""
        return x[at]


class MeanPooling(Pooling):
    """Takes the mean of the events."""

    def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:
        """Return the pooled events [Q, d]; see `Pooling`."""
        return (running_sum(widened(x), widths)[at] / seen.clamp(min=1)[:, None]).to(x.dtype)


class AttentionPooling(Pooling):
    """Weights the events with a learned softmax over each prefix, computed for all prefixes by two running sums."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.score = nn.Linear(dim, 1)
        nn.init.zeros_(self.score.weight)

    def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:  # noqa: ARG002 - one signature
        """Return the pooled events [Q, d]; see `Pooling`."""
        # Bounded scores prevent underflow of the sums: the ratio of two weights is at most e^10.
        weight = (5 * torch.tanh(widened(self.score(x)) / 5)).exp()  # [T, 1]
        return (running_sum(weight * widened(x), widths)[at] / running_sum(weight, widths)[at]).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return `x` in at least float32, also with mixed precision.

    Examples
    --------
    >>> widened(torch.zeros(1, dtype=torch.float16)).dtype
    torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def running_sum(x: Tensor, widths: Widths) -> Tensor:
    """Return the cumulative sums [T, d] of each history, up to and including every position.

    Examples
    --------
    >>> running_sum(torch.ones(4, 1), ((2, 2),)).flatten().tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    runs = torch.split(x, [size * width for size, width in widths])
    sums = [run.view(size, width, -1).cumsum(dim=1).flatten(0, 1) for run, (size, width) in zip(runs, widths, strict=True)]
    return torch.cat(sums)


POOLINGS: Registry[type[Pooling]] = Registry("pooling", {"last": LastPooling, "mean": MeanPooling, "attention": AttentionPooling})
