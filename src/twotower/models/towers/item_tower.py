"""Item tower: id, categories, attributes, context and text of an item → unit vector."""

from __future__ import annotations

from torch import Tensor, nn

from twotower.models.towers.head import TowerHead
from twotower.utils.config import ItemTowerConfig


class ItemTower(nn.Module):
    """Embedded fields of items → interaction → MLP → unit vectors."""

    def __init__(self, fields: int, config: ItemTowerConfig) -> None:
        super().__init__()
        self.head = TowerHead(fields, config)

    def forward(self, fields: Tensor) -> Tensor:
        """Embeddings of the fields [n, F, d] (id first) → unit vectors float32 [n, D]."""
        vectors: Tensor = self.head(fields)
        return vectors
