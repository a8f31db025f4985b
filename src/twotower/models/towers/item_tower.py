"""Encode an item from its id, categories, attributes, context and text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from twotower.models.towers.head import TowerHead
from twotower.utils.config_model import ResolvedItemTower


class ItemTower(nn.Module):
    """Item tower: feature interaction and MLP over the embedded fields (see `TowerHead`)."""

    def __init__(self, fields: int, config: ResolvedItemTower) -> None:
        super().__init__()
        self.head = TowerHead(fields, config)

    def forward(self, fields: Sequence[Tensor]) -> Tensor:
        """Return item vectors float32 [n, D], of length one without `norm_shrinkage`, from F embedded fields [n, d] (id first)."""
        vectors: Tensor = self.head(fields)
        return vectors
