"""Define the two-tower model: both towers, the tables they share and the temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twotower.features.batches import FieldSpec, ItemBatch, Layout, UserBatch
from twotower.models.layers.embedding import EmbeddingTables, FieldEmbedding, GeoWaves, added
from twotower.models.priors import Priors
from twotower.models.towers.item_tower import ItemTower
from twotower.models.towers.user_tower import UserTower
from twotower.schema import NEIGHBOURS, PAD, UNKNOWN
from twotower.utils.config import ResolvedModel

TEMPERATURE_RANGE = (0.01, 1.0)
HIDDEN_STATE = 0.5  # in training: share of the items with a dropped id whose state is set to zero too
NEW_LENGTH = 0.85
"""Length of the vectors of new items. It is below one, because features predict less about an item than its events do."""


class TwoTower(nn.Module):
    """User tower and item tower; the score of a user and an item is the inner product of their vectors.

    `twotower.models.build.build_model` creates a model for a dataset. In all shapes, n is the number of items, Q of queries, F of
    fields, d the embedding dimension and D the dimension of the vectors.

    Parameters
    ----------
    layout
        The fields of users and items, with the sizes of their vocabularies.
    config
        The section `model`, without open choices.
    causal
        True: causal attention, so that each position of a history can be a query. False: attention over the whole history.
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
        """Return the temperature, a scalar that divides the inner products in the loss."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Clamp the temperature to [0.01, 1]. This changes the parameter itself, so its gradient does not vanish at a bound."""
        self.log_temperature.clamp_(*(math.log(bound) for bound in TEMPERATURE_RANGE))

    def encode_items(self, batch: ItemBatch) -> Tensor:
        """Return item vectors float32 [n, D], normalised to length one without `norm_shrinkage`.

        In evaluation mode, vectors of new items are shorter: see `item_length`.
        """
        vectors: Tensor = self.item_tower(self.offered_fields(batch))
        return vectors if self.training else vectors * self.item_length(batch.row)

    def item_length(self, row: Tensor) -> Tensor:
        """Return the factor [n, 1] of item vectors in evaluation mode.

        It is `NEW_LENGTH` for new items if the model has a popularity prior, else 1.

        Parameters
        ----------
        row
            int64 [n]: item rows; `UNKNOWN` for new items.
        """
        new_length = NEW_LENGTH if self.priors.prior else 1.0
        return torch.where(row == UNKNOWN, new_length, 1.0)[:, None]

    def as_if_new(self, batch: ItemBatch) -> ItemBatch:
        """Return a copy of the batch in which all items are new: without id, and with the state of an item without events."""
        fields = dict(batch.fields)
        if self.item_state.fields:
            fields["state"] = torch.zeros_like(fields["state"])
            fields["state"][:, -1] = 1.0
        return ItemBatch(torch.full_like(batch.row, UNKNOWN), fields)

    def offered_fields(self, batch: ItemBatch) -> list[Tensor]:
        """Return the input of the item tower: F embedded fields [n, d], the id first and the state, if any, last."""
        row = self._drop(batch.row, self.item_id_dropout)
        fields = self.item_fields(ItemBatch(row, batch.fields))
        if not self.item_state.fields:
            return fields
        return [*fields, *self.item_state({"state": self._state(batch.fields["state"], row)}, self.tables, None)]

    def encode_users(self, batch: UserBatch) -> Tensor:
        """Return user vectors float32 [Q, D], one per query, of length at most one; vectors are shorter for short histories."""
        vectors: Tensor = self.user_tower(self.user_fields(batch), self.history_items(batch.items), batch)
        return vectors

    def history_items(self, batch: ItemBatch) -> Tensor:
        """Return the representation of items in histories [n, d]: the sum of their static fields."""
        return added(self.item_fields(batch))

    def user_fields(self, batch: UserBatch) -> list[Tensor]:
        """Return the F embedded fields [Q, d] of the users, the id first."""
        row = self._drop(batch.user_row, self.user_id_dropout)
        fields: list[Tensor] = self.user_embedding({**batch.fields, "id": row}, self.tables, (self.waves, self.geo))
        return fields

    def item_fields(self, batch: ItemBatch) -> list[Tensor]:
        """Return the F embedded static fields [n, d] of the items, the id first."""
        values = {**batch.fields, "id": batch.row}
        if self.reads_neighbours:  # new items have no co-visited items; dropout hides some of the others
            mask = (batch.row != UNKNOWN)[:, None].expand_as(values[NEIGHBOURS])
            if self.training and self.neighbour_dropout:
                mask = mask & (torch.rand(mask.shape, device=mask.device) >= self.neighbour_dropout)
            values[NEIGHBOURS] = torch.where(mask, values[NEIGHBOURS], PAD)
        fields: list[Tensor] = self.item_embedding(values, self.tables, (self.waves, self.geo))
        return fields

    def _state(self, state: Tensor, row: Tensor) -> Tensor:
        """Return the state of items [n, 5], with zeros for new items without events, which may become popular.

        In training, the share `HIDDEN_STATE` of the items with a dropped id gets zeros too.
        """
        new = (row == UNKNOWN) & (state[:, -1] > 0)
        if self.training and self.item_id_dropout:
            new = new | (row == UNKNOWN) & (torch.rand(row.shape, device=row.device) < HIDDEN_STATE)
        return state.masked_fill(new[:, None], 0.0)

    def _drop(self, row: Tensor, share: float) -> Tensor:
        """Replace a random share of the rows by UNKNOWN (id dropout), in training only."""
        if not self.training or share == 0:
            return row
        return torch.where(torch.rand(row.shape, device=row.device) < share, UNKNOWN, row)
