"""Dropout whose random numbers cost little on a CPU.

Enters: any tensor of floats. Leaves: the same with a share of its elements at zero and the others scaled up, so that the mean
stays. Promised: what is dropped follows from `torch.manual_seed`, and is dropped again when a checkpointed layer is recomputed.

PyTorch draws one random number an element, on one core. Here one word of 64 bits serves eight
elements. Eight bits tell shares apart in steps of 1/256, finer than any share of dropout is known to matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 256  # of one byte


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set a share of the elements to zero and divide the others by the share kept.

    Parameters
    ----------
    x
        Floats of any shape.
    p
        Share to drop, in [0, 1). On a CPU it is rounded to a multiple of 1/256, and to at most 255/256.
    training
        False: nothing is dropped.

    Returns
    -------
    Tensor
        Of the shape and type of `x`.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p, training)
    dropped = min(round(_LEVELS * p), _LEVELS - 1)
    if not training or dropped == 0:
        return x
    out: Tensor = _ByteDropout.apply(x, dropped)  # type: ignore[no-untyped-call]
    return out


class Dropout(nn.Module):
    """`dropout` as a layer of a sequence."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """See `dropout`."""
        return dropout(x, self.p, self.training)


class _ByteDropout(torch.autograd.Function):
    """An element is dropped where its random byte is below `dropped`. The bytes are kept for the backward pass: one an element."""

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
    """0 or 256 / (256 - dropped). Compared as floats, which hold a byte exactly: PyTorch compares bytes several times slower."""
    return draw.to(dtype).ge_(dropped).mul_(_LEVELS / (_LEVELS - dropped))
