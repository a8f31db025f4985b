"""Both towers, the tables they share and the temperature. Either side encodes alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twotower.features.batches import FieldSpec, ItemBatch, Layout, UserBatch
from twotower.models.layers.embedding import EmbeddingTables, FieldEmbedding, GeoWaves
from twotower.models.towers.item_tower import ItemTower
from twotower.models.towers.user_tower import UserTower
from twotower.schema import NEIGHBOURS, PAD, UNKNOWN
from twotower.utils.config import ModelConfig

TEMPERATURE_RANGE = (0.01, 1.0)
HIDDEN_STATE = 0.5  # share of the items shown without an id whose state is hidden too
NEW_LENGTH = 0.85
"""Of the vectors of items that training never saw: features alone tell less of an item than those who went there."""


class TwoTower(nn.Module):
    """User tower and item tower whose vectors meet in one inner product.

    Parameters
    ----------
    causal
        Whether a history is read left to right (every position a moment) or as a set.
    save_memory
        Recompute attention blocks in the backward pass (gradient checkpointing).
    """

    def __init__(self, layout: Layout, config: ModelConfig, *, causal: bool, save_memory: bool = False) -> None:
        super().__init__()
        config = layout.resolve(config)
        dim = config.user_tower.width
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
        self.popularity_prior = config.popularity_prior
        self.recent_item_boost = config.recent_item_boost if layout.ordered else 0.0
        self.new_popularity: Tensor
        """Scalar, nats: the log popularity that new items count as; see `trainers.new_item_popularity`."""
        self.register_buffer("new_popularity", torch.zeros(()))
        self.reads_neighbours = any(spec.name == NEIGHBOURS for spec in static)
        self.neighbour_dropout = config.item_tower.neighbour_dropout
        self.item_id_dropout, self.user_id_dropout = config.item_tower.id_dropout, config.user_tower.id_dropout

    def temperature(self) -> Tensor:
        """The scalar that divides inner products."""
        return self.log_temperature.exp()

    def popularity_weight(self) -> float:
        """What a nat of log popularity is worth in an inner product: the prior of the logits, which are products / temperature."""
        return self.popularity_prior * float(self.temperature().detach())

    def recent_item_weight(self) -> float:
        """What is added to a user's vector of that of the item they visited last, where it may be recommended again; 0 where order
        says nothing. It is no part of training: in a set of visits, of which those after the target are seen too, a repetition is
        easier to foresee than it will be."""
        return self.recent_item_boost * float(self.temperature().detach())

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring the temperature back into [0.01, 1]: the parameter itself, so that its gradient never dies at a bound."""
        self.log_temperature.clamp_(*(math.log(bound) for bound in TEMPERATURE_RANGE))

    def encode_items(self, batch: ItemBatch) -> Tensor:
        """Items → vectors float32 [n, D]: of length one without `norm_shrinkage`, those of new items `NEW_LENGTH` as long."""
        vectors: Tensor = self.item_tower(self.offered_fields(batch))
        return vectors if self.training else vectors * self.item_length(batch.row)

    def item_length(self, row: Tensor) -> Tensor:
        """What the vectors of items are multiplied by once training is over [n, 1]."""
        shorter = NEW_LENGTH if self.popularity_prior else 1.0
        return torch.where(row == UNKNOWN, shorter, 1.0)[:, None]

    def popularity(self, logs: Tensor, new: Tensor) -> Tensor:
        """Return the log popularity [n] that items count as.

        Parameters
        ----------
        logs
            float [n]: what is counted of them; NaN for an item without an event.
        new
            bool [n]: items that training has not seen. They count as `new_popularity` until their events exceed it.
        """
        return torch.where(new, torch.fmax(logs, self.new_popularity.to(logs.dtype)), logs)

    def as_if_new(self, batch: ItemBatch) -> ItemBatch:
        """The same items as they would be if training and nobody else had ever seen them."""
        fields = dict(batch.fields)
        if self.item_state.fields:
            fields["state"] = torch.zeros_like(fields["state"])
            fields["state"][:, -1] = 1.0
        return ItemBatch(torch.full_like(batch.row, UNKNOWN), fields)

    def offered_fields(self, batch: ItemBatch) -> Tensor:
        """Embedded fields of the items as the item tower reads them [n, F, d]: the id first, the state last where there is one."""
        row = self._drop(batch.row, self.item_id_dropout)
        fields = self.item_fields(ItemBatch(row, batch.fields))
        if not self.item_state.fields:
            return fields
        state = self.item_state({"state": self._state(batch.fields["state"], row)}, self.tables, None)
        return torch.cat([fields, state], dim=1)

    def encode_users(self, batch: UserBatch) -> Tensor:
        """Moments of histories → vectors float32 [Q, D], no longer than one: the shorter the less is known."""
        vectors: Tensor = self.user_tower(self.user_fields(batch), self.history_items(batch.items), batch)
        return vectors

    def history_items(self, batch: ItemBatch) -> Tensor:
        """What a history reads of each item: the sum of its static fields [n, d]."""
        return self.item_fields(batch).sum(dim=1)

    def user_fields(self, batch: UserBatch) -> Tensor:
        """Embedded fields of the users [Q, F, d], the id first."""
        row = self._drop(batch.user_row, self.user_id_dropout)
        fields: Tensor = self.user_embedding({**batch.fields, "id": row}, self.tables, (self.waves, self.geo))
        return fields

    def item_fields(self, batch: ItemBatch) -> Tensor:
        """Embedded static fields of the items [n, F, d], the id first."""
        values = {**batch.fields, "id": batch.row}
        if self.reads_neighbours:  # an item that is not known has none; of the others each is left out now and then
            shown = (batch.row != UNKNOWN)[:, None].expand_as(values[NEIGHBOURS])
            if self.training and self.neighbour_dropout:
                shown = shown & (torch.rand(shown.shape, device=shown.device) >= self.neighbour_dropout)
            values[NEIGHBOURS] = torch.where(shown, values[NEIGHBOURS], PAD)
        fields: Tensor = self.item_embedding(values, self.tables, (self.waves, self.geo))
        return fields

    def _state(self, state: Tensor, row: Tensor) -> Tensor:
        """State of items [n, 5], zeros where nothing is known of one: an item that came after training and had no visit yet is new,
        not one that nobody goes to. In training half of the items without an id are new in this sense."""
        new = (row == UNKNOWN) & (state[:, -1] > 0)
        if self.training and self.item_id_dropout:
            new = new | (row == UNKNOWN) & (torch.rand(row.shape, device=row.device) < HIDDEN_STATE)
        return state.masked_fill(new[:, None], 0.0)

    def _drop(self, row: Tensor, share: float) -> Tensor:
        """In training, show a share of the ids as UNKNOWN."""
        if not self.training or share == 0:
            return row
        return torch.where(torch.rand(row.shape, device=row.device) < share, UNKNOWN, row)
