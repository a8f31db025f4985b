"""What both towers end with: a straight path from the fields, and an MLP over their interaction, → a vector no longer than one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.models.layers.dropout import Dropout
from twotower.models.layers.interaction import INTERACTIONS
from twotower.models.layers.pooling import widened
from twotower.utils.config import TowerConfig

MLP_DROPOUT = 0.5  # of what the MLP reads: it learns products by heart where the straight path cannot
MIN_SQUARED_NORM = 1e-6
"""Of a squared length. The gradient of a vector of zeros, as an item has of which nothing is known, is 1 / √MIN_SQUARED_NORM times
that of what comes behind: with less, clipping would undo the steps of all others, and a short type overflow."""


class TowerHead(nn.Module):
    """x / √(|x|² + shrinkage²), where x = W Σ fields + MLP(interaction(fields)).

    The straight path alone is matrix factorisation with features, which learns fast and generalises; the MLP's last layer starts
    at zero and adds what products of features know beyond it. With a single entry in `hidden_dims` there is no MLP, and no
    interaction. W is the identity where the widths agree. Nothing is normalised before the MLP: fields start small, and blowing
    their noise up made it overfit. With `norm_shrinkage`, whoever little is known of has a short vector, instead of a taste of full
    length made of noise.
    """

    def __init__(self, fields: int, config: TowerConfig) -> None:
        super().__init__()
        dim, (*hidden, out) = config.width, config.layers
        self.straight: nn.Module = nn.Identity()
        if dim != out:
            linear = nn.Linear(dim, out, bias=False)
            nn.init.eye_(linear.weight)
            self.straight = linear
        self.least = max(config.norm_shrinkage**2, MIN_SQUARED_NORM)
        self.mlp: nn.Module | None = None
        if hidden:
            interaction = INTERACTIONS[config.interaction](fields, dim, config.cross_layers)
            layers: list[nn.Module] = [interaction, Dropout(MLP_DROPOUT)]
            for width, wider in zip([interaction.width, *hidden], hidden, strict=False):
                layers += [nn.Linear(width, wider), nn.GELU(), Dropout(config.dropout)]
            last = nn.Linear(hidden[-1], out)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(*layers, last)

    def forward(self, fields: Tensor) -> Tensor:
        """Embeddings [n, F, d] → vectors float32 [n, D] of length one or, with `norm_shrinkage`, below."""
        raw = self.raw(fields)
        return raw / self.divisor(raw)

    def divisor(self, raw: Tensor) -> Tensor:
        """What brings vectors [n, D] to their length: [n, 1]."""
        return torch.sqrt(raw.square().sum(dim=-1, keepdim=True) + self.least)

    def raw(self, fields: Tensor) -> Tensor:
        """Embeddings [n, F, d] → vectors float32 [n, D] before they are brought to their length."""
        vectors: Tensor = self.straight(fields.sum(dim=1))
        if self.mlp is not None:
            vectors = vectors + self.mlp(fields)
        return widened(vectors)
