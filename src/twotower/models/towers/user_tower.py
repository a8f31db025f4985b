"""Encode users from their history (self-attention), profile, id and context, for any number of queries per history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.features.batches import GAP_BUCKETS, STARS_BUCKETS, UserBatch
from twotower.models.layers.attention import HistoryEncoder
from twotower.models.layers.pooling import POOLINGS
from twotower.models.towers.head import TowerHead
from twotower.utils.config_model import ResolvedUserTower


class UserTower(nn.Module):
    """User tower: encodes the history and combines it with the embedded fields. Vectors have at most length one."""

    def __init__(
        self, fields: int, event_types: int, config: ResolvedUserTower, *, causal: bool, save_memory: bool = False
    ) -> None:
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

    def forward(self, fields: Sequence[Tensor], items: Tensor, batch: UserBatch) -> Tensor:
        """Return user vectors float32 [Q, D].

        Parameters
        ----------
        fields
            F embedded fields [Q, d], the id first.
        items
            Embeddings [n, d] of the distinct items of the histories.
        """
        vectors: Tensor = self.head(self.beside_history(fields, self.event_embeddings(items, batch), batch))
        return vectors

    def event_embeddings(self, items: Tensor, batch: UserBatch) -> Tensor:
        """Return a vector for every event [T, d]: the sum of its item, event type and stars embeddings."""
        tokens = F.embedding(batch.history, items, padding_idx=0)  # its gradient skips PAD, which fills many slots
        return tokens + F.embedding(batch.event_type, self.event_type) + F.embedding(batch.stars, self.stars)

    def beside_history(self, fields: Sequence[Tensor], tokens: Tensor, batch: UserBatch) -> list[Tensor]:
        """Return the input of the head, F + 1 tensors [Q, d]: the fields, then the encoded history from the events [T, d]."""
        if self.encoder is not None:
            tokens = self.encoder(tokens, batch.gap, batch.history > 0, batch.widths)
        history = self.pooling(tokens, batch.widths, batch.at, batch.seen)  # [Q, d]
        return [*fields, history.to(fields[0].dtype)]
