"""Feature interaction: embeddings of all fields [n, F, d] → one vector [n, width] that the tower's MLP reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.utils.registry import Registry


class Interaction(nn.Module):
    """Base: made of the number of fields, their width and `cross_layers`; `width` is that of the vector it returns."""

    width: int


class Flatten(Interaction):
    """No interaction: the fields side by side."""

    def __init__(self, fields: int, dim: int, layers: int) -> None:  # noqa: ARG002 - one signature for all interactions
        super().__init__()
        self.width = fields * dim

    def forward(self, x: Tensor) -> Tensor:
        """[n, F, d] → [n, F · d]."""
        return x.flatten(1)


class CrossNetwork(Interaction):
    """DCN-v2 (Wang et al., 2021): x ← x₀ ⊙ (W x + b) + x, once per layer; each layer adds one degree of products."""

    def __init__(self, fields: int, dim: int, layers: int) -> None:
        super().__init__()
        self.width = fields * dim
        self.layers = nn.ModuleList([nn.Linear(self.width, self.width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """[n, F, d] → [n, F · d]."""
        x0 = x.flatten(1)
        crossed = x0
        for layer in self.layers:
            crossed = x0 * layer(crossed) + crossed
        return crossed


class FactorizationMachine(Interaction):
    """Second-order products (Rendle, 2010; kept as a vector as in NFM, He & Chua, 2017), beside the fields themselves."""

    def __init__(self, fields: int, dim: int, layers: int) -> None:  # noqa: ARG002 - one signature for all interactions
        super().__init__()
        self.width = fields * dim + dim

    def forward(self, x: Tensor) -> Tensor:
        """[n, F, d] → [n, F · d + d]: Σ over pairs i < j of xᵢ ⊙ xⱼ, by (Σ x)² − Σ x²."""
        pairs = 0.5 * (x.sum(dim=1).square() - x.square().sum(dim=1))
        return torch.cat([x.flatten(1), pairs], dim=1)


INTERACTIONS: Registry[type[Interaction]] = Registry(
    "interaction", {"dcn": CrossNetwork, "fm": FactorizationMachine, "none": Flatten}
)
