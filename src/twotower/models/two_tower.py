"""Define the two-tower model: both towers, the tables they share and the temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twotower.features.batches import FieldSpec, ItemBatch, Layout, UserBatch
from twotower.models.layers.embedding import EmbeddingTables, FieldEmbedding, GeoWaves
from twotower.models.priors import Priors
from twotower.models.towers.item_tower import ItemTower
from twotower.models.towers.user_tower import UserTower
from twotower.schema import NEIGHBOURS, PAD, UNKNOWN
from twotower.utils.config import ResolvedModel

TEMPERATURE_RANGE = (0.01, 1.0)
HIDDEN_STATE = 0.5  # share of the items with a dropped id whose state is hidden too
NEW_LENGTH = 0.85
"""Length of the vectors of new items: features alone say less about an item than its events."""


class TwoTower(nn.Module):
    """User tower and item tower; the score of a user and an item is the inner product of their vectors.

    Parameters
    ----------
    causal
        True: attention reads a history from left to right, so every position is a query. False: it reads it as a set.
    save_memory
        Recompute attention blocks in the backward pass (gradient checkpointing).
    """

    def __init__(self, layout: Layout, config: ResolvedModel, *, causal: bool, save_memory: bool = False) -> None:
        super().__init__()
        dim = config.user_tower.embedding_dim
        item_id = FieldSpec("id", "rows", (layout.items,), "item.id")
        user_id = FieldSpec("id", "rows", (layout.users,), "user.id")
        static = tuple(spec for spec in layout.item_fields if spec.name != "state")
        self.tables = EmbeddingTables(config)
        self.item_embedding = FieldEmbedding((item_id, *static), dim, self.tables)
        self.item_state = FieldEmbedding(tuple(spec for spec in layout.item_fields if spec.name == "state"), dim, self.tables)
        self.user_embedding = FieldEmbedding((user_id, *layout.user_fields), dim, self.tables)
        self.tables.check()
        self.waves = GeoWaves()
        self.geo = nn.Linear(self.waves.width, dim, bias=False)
        nn.init.normal_(self.geo.weight, std=0.05)
        self.item_tower = ItemTower(1 + len(layout.item_fields), config.item_tower)
        self.user_tower = UserTower(
            1 + len(layout.user_fields), layout.event_types, config.user_tower, causal=causal, save_memory=save_memory
        )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)), requires_grad=config.learn_temperature)
        self.priors = Priors(config.popularity_prior, layout.half_lives)
        self.reads_neighbours = any(spec.name == NEIGHBOURS for spec in static)
        self.neighbour_dropout = config.item_tower.neighbour_dropout
        self.item_id_dropout, self.user_id_dropout = config.item_tower.id_dropout, config.user_tower.id_dropout

    def temperature(self) -> Tensor:
        """Return the scalar that divides inner products."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Clamp the temperature to [0.01, 1]. The parameter itself is clamped, so its gradient does not vanish at a bound."""
        self.log_temperature.clamp_(*(math.log(bound) for bound in TEMPERATURE_RANGE))

    def encode_items(self, batch: ItemBatch) -> Tensor:
        """Return item vectors float32 [n, D], of length one without `norm_shrinkage`.

        Outside training, vectors of new items are multiplied by `item_length`.
        """
        vectors: Tensor = self.item_tower(self.offered_fields(batch))
        return vectors if self.training else vectors * self.item_length(batch.row)

    def item_length(self, row: Tensor) -> Tensor:
        """Return the factor [n, 1] of item vectors outside training: `NEW_LENGTH` for new items with a popularity prior, else 1."""
        shorter = NEW_LENGTH if self.priors.prior else 1.0
        return torch.where(row == UNKNOWN, shorter, 1.0)[:, None]

    def as_if_new(self, batch: ItemBatch) -> ItemBatch:
        """Return the same items as if they were new: without id, and with the state of an item without events."""
        fields = dict(batch.fields)
        if self.item_state.fields:
            fields["state"] = torch.zeros_like(fields["state"])
            fields["state"][:, -1] = 1.0
        return ItemBatch(torch.full_like(batch.row, UNKNOWN), fields)

    def offered_fields(self, batch: ItemBatch) -> Tensor:
        """Return the input of the item tower [n, F, d]: embedded fields, the id first and the state, if any, last."""
        row = self._drop(batch.row, self.item_id_dropout)
        fields = self.item_fields(ItemBatch(row, batch.fields))
        if not self.item_state.fields:
            return fields
        state = self.item_state({"state": self._state(batch.fields["state"], row)}, self.tables, None)
        return torch.cat([fields, state], dim=1)

    def encode_users(self, batch: UserBatch) -> Tensor:
        """Return user vectors float32 [Q, D], one per query, of at most length one; shorter if little is known about the user."""
        vectors: Tensor = self.user_tower(self.user_fields(batch), self.history_items(batch.items), batch)
        return vectors

    def history_items(self, batch: ItemBatch) -> Tensor:
        """Return the representation of items in histories [n, d]: the sum of their static fields."""
        return self.item_fields(batch).sum(dim=1)

    def user_fields(self, batch: UserBatch) -> Tensor:
        """Return the embedded fields of the users [Q, F, d], the id first."""
        row = self._drop(batch.user_row, self.user_id_dropout)
        fields: Tensor = self.user_embedding({**batch.fields, "id": row}, self.tables, (self.waves, self.geo))
        return fields

    def item_fields(self, batch: ItemBatch) -> Tensor:
        """Return the embedded static fields of the items [n, F, d], the id first."""
        values = {**batch.fields, "id": batch.row}
        if self.reads_neighbours:  # new items have no co-visited items; in training some of the others are dropped
            kept = (batch.row != UNKNOWN)[:, None].expand_as(values[NEIGHBOURS])
            if self.training and self.neighbour_dropout:
                kept = kept & (torch.rand(kept.shape, device=kept.device) >= self.neighbour_dropout)
            values[NEIGHBOURS] = torch.where(kept, values[NEIGHBOURS], PAD)
        fields: Tensor = self.item_embedding(values, self.tables, (self.waves, self.geo))
        return fields

    def _state(self, state: Tensor, row: Tensor) -> Tensor:
        """Return the state of items [n, 5], zeros for new items without events: they are new, not unpopular.

        In training, the share `HIDDEN_STATE` of the items with a dropped id is treated in the same way.
        """
        new = (row == UNKNOWN) & (state[:, -1] > 0)
        if self.training and self.item_id_dropout:
            new = new | (row == UNKNOWN) & (torch.rand(row.shape, device=row.device) < HIDDEN_STATE)
        return state.masked_fill(new[:, None], 0.0)

    def _drop(self, row: Tensor, share: float) -> Tensor:
        """Replace a share of the ids by UNKNOWN, in training only."""
        if not self.training or share == 0:
            return row
        return torch.where(torch.rand(row.shape, device=row.device) < share, UNKNOWN, row)
