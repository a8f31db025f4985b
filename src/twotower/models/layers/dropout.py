"""Apply dropout with cheap random numbers on a CPU.

PyTorch draws one random number per element, on one core. Here one 64-bit word serves eight elements, so the dropout rate has steps
of 1/256, which is fine enough. The result depends only on `torch.manual_seed`, and is the same when a checkpointed layer is
recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 256  # values of one byte


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set a random share of the elements to zero and divide the others by the share kept.

    Parameters
    ----------
    x
        Floats of any shape.
    p
        Share to drop, in [0, 1). On a CPU it is rounded to a multiple of 1/256, and to at most 255/256.
    training
        If false, `x` is returned unchanged.

    Returns
    -------
    Tensor
        Same shape and dtype as `x`.

    Examples
    --------
    >>> sorted(set(dropout(torch.ones(1000), 0.5, training=True).tolist()))
    [0.0, 2.0]
    """
    if x.device.type != "cpu":
        return F.dropout(x, p, training)
    dropped = min(round(_LEVELS * p), _LEVELS - 1)
    if not training or dropped == 0:
        return x
    out: Tensor = _ByteDropout.apply(x, dropped)  # type: ignore[no-untyped-call]
    return out


class Dropout(nn.Module):
    """Layer that applies `dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` after dropout."""
        return dropout(x, self.p, self.training)


class _ByteDropout(torch.autograd.Function):
    """Drops an element if its random byte is below `dropped`. The bytes, one per element, are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
        draw = words.view(torch.uint8)[: x.numel()].view(x.shape)
        ctx.save_for_backward(draw)
        ctx.dropped = dropped
        return _factor(draw, dropped, x.dtype).mul_(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (draw,) = ctx.saved_tensors
        return _factor(draw, ctx.dropped, upstream.dtype).mul_(upstream), None


def _factor(draw: Tensor, dropped: int, dtype: torch.dtype) -> Tensor:
    """Return 0 or 256 / (256 - dropped) per element. Bytes are compared as floats (exact): several times faster in PyTorch."""
    return draw.to(dtype).ge_(dropped).mul_(_LEVELS / (_LEVELS - dropped))
