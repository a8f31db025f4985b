"""Encode histories with multi-head self-attention: pre-norm blocks, causal or bidirectional."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from twotower.models.layers.dropout import dropout

Widths = tuple[tuple[int, int], ...]
"""(number of histories, width) for each group of histories with the same width; see `UserBatch`."""
_ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionBlock(nn.Module):
    """Pre-norm attention block: x + attention(norm(x)), then x + MLP(norm(x)).

    Both branches start at zero, so a new block is the identity. Dropout is applied to the output of each branch. There is none
    inside the attention, because it would rule out the fused kernels.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for layer in (self.out, self.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, valid: Tensor, widths: Widths, causal: bool) -> Tensor:
        """Return the block's output [T, d] for concatenated histories [T, d]; `valid` bool [T] is False for padding."""
        qkv = self.qkv(self.norm_attention(x)).view(x.shape[0], 3, self.heads, -1)  # [T, 3, heads, d / heads]
        mixed, start = [], 0
        for size, width in widths:
            stop = start + size * width
            q, k, v = qkv[start:stop].view(size, width, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)  # [size, heads, width, d / heads]
            # Causal: padding comes after the events, so no event reads it. Otherwise padding is masked, except at the first
            # position: an empty history reads its own padding, because attention over nothing would be NaN.
            mask = (
                None
                if causal
                else (valid[start:stop].view(size, width) | (torch.arange(width, device=x.device) == 0))[:, None, None]
            )
            with _kernels(x.device):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            mixed.append(out.transpose(1, 2).reshape(size * width, -1))
            start = stop
        x = x + dropout(self.out(torch.cat(mixed)), self.dropout, self.training)
        return x + dropout(self.mlp(self.norm_mlp(x)), self.dropout, self.training)


def _kernels(device: torch.device) -> AbstractContextManager[None]:
    """Return the context that selects attention kernels: on a GPU all except cuDNN's, which are compiled for every new shape.

    A batch has five shapes, and they change in each step: compiling costs 0.5 s per step on an H100, where the step itself takes
    0.02 s (docs/log.md).
    """
    return nullcontext() if device.type != "cuda" else sdpa_kernel(_ANY_SHAPE)


class HistoryEncoder(nn.Module):
    """Stack of attention blocks with learned positions (counted from the start) and bucketed time gaps to the previous event.

    There is no final norm: before training, the output equals the input tokens, at their scale. Causal: position p reads positions
    ≤ p, so one pass encodes every prefix of a history. Otherwise every position reads all positions.
    """

    def __init__(
        self, dim: int, *, heads: int, blocks: int, dropout: float, max_length: int, gaps: int, causal: bool, save_memory: bool
    ) -> None:
        super().__init__()
        self.causal, self.save_memory = causal, save_memory
        self.position = nn.Parameter(torch.zeros(max_length, dim))
        self.gap = nn.Parameter(torch.zeros(gaps, dim))
        self.blocks = nn.ModuleList([AttentionBlock(dim, heads, dropout) for _ in range(blocks)])

    def forward(self, tokens: Tensor, gap: Tensor, valid: Tensor, widths: Widths) -> Tensor:
        """Return encoded tokens [T, d] from tokens [T, d], gap buckets int64 [T] and valid bool [T], grouped as `widths` says."""
        position = torch.cat([torch.arange(width, device=gap.device).repeat(size) for size, width in widths])
        x = tokens + F.embedding(position, self.position) + F.embedding(gap, self.gap)
        for block in self.blocks:
            if self.save_memory and self.training:
                x = checkpoint(block, x, valid, widths, self.causal, use_reentrant=False)
            else:
                x = block(x, valid, widths, self.causal)
        return x
