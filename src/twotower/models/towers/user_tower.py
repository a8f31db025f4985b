"""User tower: history through self-attention, profile, id and context → unit vector, for as many moments as are asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.batches import GAP_BUCKETS, STARS_BUCKETS, UserBatch
from twotower.config import UserTowerConfig
from twotower.models.layers.attention import HistoryEncoder
from twotower.models.layers.pooling import POOLINGS
from twotower.models.towers.head import TowerHead


class UserTower(nn.Module):
    """Embedded history and fields of users → unit vectors."""

    def __init__(self, fields: int, event_types: int, config: UserTowerConfig, *, causal: bool, save_memory: bool = False) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.event_type = nn.Parameter(torch.zeros(event_types + 1, dim))
        self.stars = nn.Parameter(torch.zeros(STARS_BUCKETS, dim))
        self.encoder = (
            HistoryEncoder(
                dim,
                heads=config.num_heads,
                blocks=config.num_blocks,
                dropout=config.dropout,
                max_length=config.max_history,
                gaps=GAP_BUCKETS,
                causal=causal,
                save_memory=save_memory,
            )
            if config.num_blocks
            else None
        )
        self.pooling = POOLINGS[config.pooling](dim)
        self.head = TowerHead(fields + 1, config)

    def forward(self, fields: Tensor, items: Tensor, batch: UserBatch) -> Tensor:
        """Embeddings of the fields [Q, F, d] (id first), of the histories' distinct items [n, d] → unit vectors float32 [Q, D]."""
        valid = batch.history > 0
        tokens = items[batch.history]  # [T, d]
        tokens = tokens + F.embedding(batch.event_type, self.event_type) + F.embedding(batch.stars, self.stars)
        if self.encoder is not None:
            tokens = self.encoder(tokens, batch.gap, valid, batch.widths)
        history = self.pooling(tokens, batch.widths, batch.at, batch.seen)  # [Q, d]
        vectors: Tensor = self.head(torch.cat([fields, history[:, None].to(fields.dtype)], dim=1))
        return vectors
