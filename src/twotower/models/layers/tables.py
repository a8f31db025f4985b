"""Store embedding tables: dense ones, and ones updated by rows, whose cost per step depends only on the rows read.

A table of many ids may have fewer rows; then the vector of an id is the sum of two rows (hashing).

Row PAD is always zero. Row UNKNOWN starts at zero, so a value that training never saw contributes nothing. `RowTable` gives exactly
the result of AdamW without momentum on the whole table, with one second moment per row instead of one per number: updates that a
row misses while it is not read are applied when it is read next.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.errors import ConfigError
from twotower.schema import FIRST_ROW, PAD
from twotower.utils import distributed
from twotower.utils.config import EmbeddingConfig

INIT_STD = 0.05
FROM_ZERO = ("user.id",)  # a user starts as their history alone: random user vectors cost quality (docs/log.md)
BETA, EPS = 0.98, 1e-8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BITS_LOST = {torch.bfloat16: 16, torch.float16: 13}  # of the 23 of float32
_BLOCK = 1 << 16  # rows initialised or rescaled at once
_FOLD_BELOW = 0.5


class Table(nn.Module):
    """Dense table of `rows` vectors of width `dim`; its gradient is as large as the table.

    Parameters
    ----------
    ids
        Number of ids, with the reserved ones.
    """

    weight: Tensor

    def __init__(self, name: str, ids: int, dim: int, config: EmbeddingConfig) -> None:
        super().__init__()
        self.ids = ids
        self.hashing = Hashing(name, ids, config) if config.max_rows is not None and ids > config.max_rows else None
        self.rows = ids if config.max_rows is None else min(ids, config.max_rows)
        self.std = 0.0 if name in FROM_ZERO else INIT_STD / math.sqrt(2 if self.hashing else 1)
        self._make(name, dim, config)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors float32 [n, d] of ids int64 [n]."""
        if self.hashing is not None:
            return self.mean(ids[:, None])
        return _looked_up(*self.read(ids))

    def mean(self, ids: Tensor) -> Tensor:
        """Return the mean vectors [n, d] of ids int64 [n, w]. PAD is ignored; a row of only PAD gives zeros."""
        if self.hashing is None:
            return _looked_up(*self.read(ids))
        return 2 * _looked_up(*self.read(self.hashing.rows_of(ids).flatten(1)))  # an id is the sum of its two rows, not their mean

    def read(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions in the shape of `row`, and a matrix [m, d] that they index; PAD is at position 0."""
        return row, self.weight

    def _make(self, name: str, dim: int, config: EmbeddingConfig) -> None:  # noqa: ARG002 - one signature
        weight = torch.empty(self.rows, dim)
        nn.init.normal_(weight, std=self.std)
        weight[:FIRST_ROW] = 0
        self.weight = nn.Parameter(weight)


class RowTable(Table):
    """Table updated by rows: each step reads the rows it needs and writes them back.

    Several processes share it: of W processes, process p holds rows p, p + W, p + 2W … Each row also has a second moment and the
    step at which it was last read. Weight decay is one factor for the whole table, multiplied into the weights when it falls below
    one half.
    """

    moments: Tensor  # [rows, 2] float32, adjacent in memory; step numbers are exact below 2^24
    scale: Tensor
    least_scale: float
    """Value of `scale` if no step had been skipped: a lower bound that is known without reading the device."""

    def _make(self, name: str, dim: int, config: EmbeddingConfig) -> None:
        local = distributed.local_rows(self.rows)
        self.decay = config.weight_decay
        self.register_buffer("weight", _normal_rows(name, self.rows, dim, self.std, DTYPES[config.dtype]))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.least_scale = 1.0
        self.register_buffer("moments", torch.zeros(local, 2), persistent=False)
        self.pending: list[tuple[Tensor, Tensor]] = []

    def read(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions and the distinct rows as a separate matrix, which is kept for `collect`."""
        distinct, at = distinct_rows(torch.cat([row.new_full((1,), PAD), row.flatten()]))
        wide = distributed.gather_rows(distinct, self.weight)
        wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
        leaf = wide * self.scale.to(wide.dtype)
        if torch.is_grad_enabled():
            leaf.requires_grad_()
            self.pending.append((distinct, leaf))
        return at[1:].view(row.shape), leaf

    def collect(self) -> Tensor:
        """Gather the gradients of all reads since the last step at the processes that own the rows.

        Returns
        -------
        Tensor
            Squared norm of the gradients of this process's rows, a float64 scalar.
        """
        none = torch.zeros(
            0, self.weight.shape[1], dtype=torch.promote_types(self.weight.dtype, torch.float32), device=self.weight.device
        )
        used = [(row, leaf.grad) for row, leaf in self.pending if leaf.grad is not None]
        row = torch.cat([torch.zeros(0, dtype=torch.int64, device=none.device), *(row for row, _ in used)])
        grad = torch.cat([none, *(grad for _, grad in used)])
        row, grad = _merged(row, grad)
        if distributed.world_size() > 1:
            row, grad = _merged(*distributed.scatter_rows(row, grad))
        self.merged = (row, grad)  # may include PAD, whose gradient is zero
        self.pending = []
        return grad.double().square().sum()

    @torch.no_grad()
    def step(self, number: int, rate: float, factor: Tensor, taken: Tensor) -> None:
        """Update the collected rows at step `number` (from 1).

        Parameters
        ----------
        factor
            Scalar factor of the gradients.
        taken
            bool scalar. False: the weights stay unchanged, as in a step that read no row.
        """
        row, grad = self.merged
        grad = (grad * factor).masked_fill_(~taken, 0.0)
        self._shrink(1 - rate * self.decay, taken)
        second, touched = self.moments[row].unbind(dim=1)
        second = second * BETA ** (number - touched) + (1 - BETA) * grad.square().mean(dim=1)
        self.moments[row] = torch.stack([second, torch.full_like(second, number)], dim=1)
        step = rate * grad / ((second / (1 - BETA**number)).sqrt() + EPS)[:, None]
        stored = self.weight[row]
        self.weight[row] = rounded(stored.to(step.dtype) - step / self.scale.to(step.dtype), stored.dtype)

    def _shrink(self, factor: float, taken: Tensor) -> None:
        if factor == 1:
            return
        self.scale.copy_(torch.where(taken, self.scale * factor, self.scale))
        self.least_scale *= factor
        if self.least_scale < _FOLD_BELOW:
            for start in range(0, len(self.weight), _BLOCK):
                block = self.weight[start : start + _BLOCK]
                block.copy_(rounded(block.float() * self.scale.float(), block.dtype))
            self.scale.fill_(1.0)
            self.least_scale = 1.0

    def state(self) -> dict[str, Tensor]:
        """Return the state of the whole table for a checkpoint: weights, their factor, second moments and steps."""
        local = {"weight": self.weight, "moments": self.moments}
        scales = {"scale": self.scale, "least_scale": torch.tensor(self.least_scale, dtype=torch.float64)}
        return {name: distributed.gather_full(value, self.rows) for name, value in local.items()} | scales

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned, with any number of processes."""
        for name in ("weight", "moments"):
            getattr(self, name).copy_(distributed.local_part(state[name]))
        self.scale.copy_(state["scale"])
        self.least_scale = float(state["least_scale"])


class Hashing:
    """Map each id to two rows of a smaller table; PAD and UNKNOWN have rows of their own.

    "double": two hash functions (Zhang et al., "Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems",
    RecSys 2020, without its frequency part). "quotient_remainder": (id mod m, id div m), unique for each id (Shi et al.,
    "Compositional Embeddings Using Complementary Partitions", KDD 2020, with the sum of both rows).

    Raises
    ------
    ConfigError
        The quotients and remainders do not fit into `max_rows`.
    """

    _PRIME = (1 << 31) - 1

    def __init__(self, name: str, ids: int, config: EmbeddingConfig) -> None:
        assert config.max_rows is not None
        self.free, self.kind = config.max_rows - FIRST_ROW, config.hashing
        if self.kind == "quotient_remainder":
            discriminant = self.free**2 - 4 * ids
            if discriminant < 0:
                least = 2 * math.isqrt(ids) + FIRST_ROW + 2
                raise ConfigError(
                    f"model.tables.{name}.max_rows is {config.max_rows:,}, too small for quotient_remainder with {ids:,} ids. "
                    f"It needs at least {least:,} rows. Raise max_rows, or use hashing: double."
                )
            self.modulus = (self.free + math.isqrt(discriminant)) // 2
            self.modulus -= self.modulus + -(-ids // self.modulus) > self.free

    def rows_of(self, ids: Tensor) -> Tensor:
        """Return the two rows of each id, int64 […, 2]."""
        number = ids - FIRST_ROW
        if self.kind == "quotient_remainder":
            pair = [number % self.modulus, self.modulus + number // self.modulus]
        else:
            pair = [(number * a + b) % self._PRIME % self.free for a, b in ((48_271, 11), (1_588_635_695, 7_919))]
        reserved = torch.stack([ids, ids], dim=-1)
        return torch.where((ids < FIRST_ROW)[..., None], reserved, torch.stack(pair, dim=-1) + FIRST_ROW)


def _looked_up(at: Tensor, weight: Tensor) -> Tensor:
    """Return the rows [n, d] of `weight` at int64 [n], or the means of rows at [n, w]. PAD is ignored; only PAD gives zeros."""
    if weight.device.type == "cpu" and weight.requires_grad and weight.is_leaf:
        vectors: Tensor = _AddedInPlace.apply(weight, at)  # type: ignore[no-untyped-call]
        return vectors
    return _rows_or_means(at, weight)


def _rows_or_means(at: Tensor, weight: Tensor) -> Tensor:
    if at.dim() == 1:
        return F.embedding(at, weight, padding_idx=PAD)
    return F.embedding_bag(at, weight, mode="mean", padding_idx=PAD)


class _AddedInPlace(torch.autograd.Function):
    """`_rows_or_means`, whose backward adds to `weight.grad` only the rows read.

    PyTorch's backward makes a gradient of the table's size for every lookup, and then adds these. With four lookups in 130,000 rows
    of 256 numbers, that took a third of a training step on a CPU. `torch.autograd.grad` does not see this gradient.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, at: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(at)
        return _rows_or_means(at, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        (at,), weight, grad = ctx.saved_tensors, ctx.weight, grads[0]
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        columns = [at] if at.dim() == 1 else at.unbind(dim=1)
        if at.dim() == 2:
            grad = grad / (at != PAD).sum(dim=1, keepdim=True).clamp(min=1)
        for column in columns:
            weight.grad.index_add_(0, column, grad)
        weight.grad[PAD] = 0
        return None, None


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 numbers stochastically to a shorter type, so that the expected value is unchanged.

    A random number is added to the bits that will be cut off; it carries over with the right probability.
    """
    if dtype not in _BITS_LOST:
        return x.to(dtype)
    x, lost = x.float(), _BITS_LOST[dtype]
    carried = x.view(torch.int32) + torch.randint(1 << lost, x.shape, dtype=torch.int32, device=x.device)
    result = (carried & -(1 << lost)).view(torch.float32)
    if dtype is torch.float16:  # fp16 subnormals have steps of 2^-24
        steps = torch.floor(x * 2**24 + torch.rand_like(x)) / 2**24
        result = torch.where(x.abs() < 2**-14, steps, result)
    return result.to(dtype)


def distinct_rows(row: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of int64 [m], ascending, and each entry's position among them.

    On one GPU the result has the length of `row`, padded with PAD: reading the number of distinct rows would wait for the device.
    On a CPU, and with several processes, whose messages need that number anyway, it has only the distinct rows.

    Examples
    --------
    >>> [part.tolist() for part in distinct_rows(torch.tensor([5, 3, 5]))]
    [[3, 5], [1, 0, 1]]
    """
    if row.device.type == "cpu" or distributed.world_size() > 1:
        distinct, at = torch.unique(row, return_inverse=True)
        return distinct, at
    return padded_distinct_rows(row)


def padded_distinct_rows(row: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of int64 [m], ascending, padded with PAD to [m], and each entry's position among them.

    Examples
    --------
    >>> [part.tolist() for part in padded_distinct_rows(torch.tensor([5, 3, 5]))]
    [[3, 5, 0], [1, 0, 1]]
    """
    ordered, order = torch.sort(row)
    new = ordered != torch.roll(ordered, 1)
    new[:1] = False
    rank = torch.cumsum(new, dim=0)
    return torch.full_like(row, PAD).scatter_(0, rank, ordered), torch.empty_like(rank).scatter_(0, order, rank)


def _merged(row: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    distinct, at = distinct_rows(row)
    return distinct, grad.new_zeros(len(distinct), grad.shape[1]).index_add_(0, at, grad)


def _normal_rows(name: str, rows: int, dim: int, std: float, dtype: torch.dtype) -> Tensor:
    """Return this process's rows of a random matrix that is the same for any number of processes and is never built whole."""
    if not std:
        return torch.zeros(distributed.local_rows(rows), dim, dtype=dtype)  # takes memory only where it is written
    local = torch.empty(distributed.local_rows(rows), dim, dtype=dtype)
    seed, filled = zlib.crc32(name.encode()) ^ (torch.initial_seed() & 0x7FFF_FFFF), 0
    for start in range(0, rows, _BLOCK):
        block = torch.randn(min(_BLOCK, rows - start), dim, generator=torch.Generator().manual_seed(seed * 1_000_003 + start)) * std
        if start == 0:
            block[:FIRST_ROW] = 0
        mine = block[(distributed.rank() - start) % distributed.world_size() :: distributed.world_size()]
        local[filled : filled + len(mine)] = mine
        filled += len(mine)
    return local
