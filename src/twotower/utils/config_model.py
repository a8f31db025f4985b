"""Settings of the model: both towers, their embedding tables, and the sizes chosen from the data.

All settings are frozen pydantic models. `config.py` holds the other sections and reads the files.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twotower.utils.config_data import Settings
from twotower.utils.registry import Names

Positive = Annotated[int, Field(ge=1)]

WIDTHS = (128, 256)
"""Default embedding widths. The second is used if there is much to learn, both in all and for each user and item."""
WIDE_FROM_EVENTS, WIDE_FROM_EVENTS_PER_ID = 1_000_000, 10
"""Positive training events, in all and per user or item, from which the second width is used. With fewer per id it took twice the
time for nothing: see docs/log.md, "At the size of Yelp's dump"."""


class TowerConfig(Settings):
    """Settings that both towers have."""

    embedding_dim: int | None = Field(None, ge=1)
    """Width of every feature's embedding, equal in both towers: they share the item table. null: the value of the other tower;
    without one, 128, or 256 from 1,000,000 positive training events on if there are at least ten per user and item."""
    hidden_dims: list[Positive] | None = Field(None, min_length=1)
    """Widths of the MLP's hidden layers; the last is the width of the output vectors, equal in both towers. A single entry: no
    MLP and no interaction layer, the vector is the (projected) sum of the embeddings. null: one entry, `embedding_dim`."""
    dropout: float = Field(0.3, ge=0, lt=1)
    """Dropout rate in the attention blocks and the MLP. The skip path has no dropout, which fits rare ids better."""
    tower: Annotated[str, Names("tower", ("mlp",))] = "mlp"
    """Network from the embedded fields to the output vector. "mlp": their sum, plus an MLP over their interaction. Others: see
    `twotower.register_tower`."""
    interaction: Annotated[str, Names("interaction", ("dcn", "fm", "none"))] = "dcn"
    """Layer that combines the features' embeddings before the MLP. "dcn": cross network (DCNv2); "fm": factorization machine. Used
    only if `hidden_dims` has at least two entries."""
    cross_layers: int = Field(2, ge=1)
    """Number of layers of the cross network. Used only with `interaction: dcn`."""
    id_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of ids replaced by UNKNOWN in training, so that the features and the UNKNOWN embedding are trained."""
    norm_shrinkage: float = Field(0.0, ge=0)
    """Shrinkage c of the output: a vector x becomes x / √(|x|² + c²). 0: all vectors have length 1; above 0: short ones shrink."""


class UserTowerConfig(TowerConfig):
    """Settings of the user tower, which turns history and profile into a vector."""

    id_dropout: float = Field(0.5, ge=0, lt=1)
    """Share of user ids replaced by UNKNOWN in training, so that recommendations also work for new users."""
    norm_shrinkage: float = Field(2.0, ge=0)
    """Shrinkage c of user vectors: x becomes x / √(|x|² + c²). With less known, vectors are shorter and popularity counts more."""
    num_heads: int = Field(4, ge=1)
    """Number of heads of each self-attention block; must divide `embedding_dim`."""
    num_blocks: int | None = Field(None, ge=0)
    """Number of self-attention blocks over the history; 0 pools the items directly. null: 1 if events have times and targets come
    after the history, else 0."""
    pooling: Annotated[str, Names("pooling", ("mean", "last", "attention"))] = "mean"
    """Method that turns the history into one vector. "mean": average; "last": the latest event; "attention": learned weights."""
    max_history: int = Field(50, ge=1)
    """Number of most recent events that are read."""
    history_dropout: float = Field(0.5, ge=0, lt=1)
    """Share of history events hidden in training."""


class ItemTowerConfig(TowerConfig):
    """Settings of the item tower, which turns item features into a vector."""

    id_init: Literal["als", "random"] = "als"
    """Initial values of the item id table. "als": item factors of iALS, fitted on the training part; "random". A table that is
    hashed or has more than a million ids starts random."""
    neighbour_dropout: float = Field(0.3, ge=0, lt=1)
    """Share of an item's co-visited items hidden in training."""


class EmbeddingConfig(Settings):
    """Storage and update rule of one embedding table."""

    update: Literal["dense", "sparse"] = "dense"
    """Update rule. "dense": AdamW on the whole table in every step. "sparse": only the rows that a step reads, by row-wise Adam
    without momentum (two state values per row); several processes share such a table by rows."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the stored weights. "bf16" and "fp16" need `update: sparse`; they use stochastic rounding to keep small updates."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay as in AdamW, on every row at every step, read or not. Needs `update: sparse`."""
    max_rows: int | None = Field(None, ge=8)
    """Largest number of rows. A table with more ids is hashed into this many rows, and an id is the sum of two. null: no limit."""
    hashing: Literal["double", "quotient_remainder"] = "double"
    """Choice of the two rows: "double": two hash functions; "quotient_remainder": quotient and remainder (unique pairs)."""

    @model_validator(mode="after")
    def _short_types_by_rows(self) -> EmbeddingConfig:
        if self.update == "dense" and (self.dtype != "fp32" or self.weight_decay):
            raise ValueError("dtype and weight_decay of a table need update: sparse; set it or remove them")
        return self


class ModelConfig(Settings):
    """Settings of the model: both towers, their embedding tables and the temperature."""

    user_tower: UserTowerConfig = UserTowerConfig()
    item_tower: ItemTowerConfig = ItemTowerConfig()
    exclude_features: list[str] = Field([])
    """Input fields that the towers ignore, as "item.categories" or "user.hour"; ids cannot be excluded. The dataset keeps them."""
    request_location: bool = False
    """Use the location of the request as a feature. In training, half of the requests are located near their target."""
    tables: dict[str, EmbeddingConfig] = Field({})
    """Settings by table name: "item.id", "user.id", "item.categories", …"""
    sparse_update_from_rows: int = Field(200_000, ge=1)
    """Tables with at least this many rows use `update: sparse`, unless `tables` names them."""
    popularity_prior: float = Field(1.0, ge=0, le=2)
    """Weight of an item's log popularity, added to every logit. 1: without other information items rank by popularity, and the
    vectors learn the deviation from it. 0: no prior."""
    new_item_exposure: float = Field(0.035, ge=0, lt=1)
    """Share of the top-10 positions that new items take over all users, calibrated as if they were at least 5 % of the known items.
    With more or fewer new items the real share differs. 0 if no feature distinguishes new items. Has no effect if
    `popularity_prior` is 0."""
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Divisor of the scores in the softmax loss; the initial value if `learn_temperature` is true."""
    learn_temperature: bool = False
    """Learn the temperature, within 0.01 to 1."""

    def stored(self, table: str, ids: int) -> EmbeddingConfig:
        """Return the settings of a table with `ids` ids: those in `tables`, else chosen by its size."""
        return self.tables.get(table) or EmbeddingConfig(update="sparse" if ids >= self.sparse_update_from_rows else "dense")

    def resolved(self, *, ordered: bool, timed: bool, events: int, ids: int) -> ResolvedModel:
        """Return the same settings with widths and number of attention blocks chosen from the data where they are None.

        Attention uses the order of a history and the time between events. On data without times it made the model worse (S3-Rec's
        split), and without an order it has no meaning. Widths grow with the number of events, in all and per id.

        Parameters
        ----------
        ordered
            True if targets come after the history.
        timed
            True if events have times.
        events
            Number of positive events of the training part.
        ids
            Number of users and items that have such events.

        Examples
        --------
        >>> sizes = {"yelp2018": (1_237_259, 69_716), "the whole dump": (5_600_000, 2_150_000)}
        >>> for name, (events, ids) in sizes.items():
        ...     model = ModelConfig().resolved(ordered=True, timed=True, events=events, ids=ids)
        ...     print(name, model.user_tower.embedding_dim)
        yelp2018 256
        the whole dump 128
        """
        user, item = self.user_tower, self.item_tower
        dim = user.embedding_dim or item.embedding_dim or WIDTHS[events >= max(WIDE_FROM_EVENTS, WIDE_FROM_EVENTS_PER_ID * ids)]
        ends = [tower.hidden_dims[-1:] for tower in (user, item) if tower.hidden_dims]
        end = ends[0] if ends else [dim]
        blocks = int(ordered and timed) if user.num_blocks is None else user.num_blocks
        sizes = [{"embedding_dim": dim, "hidden_dims": tower.hidden_dims or end} for tower in (user, item)]
        return ResolvedModel(
            **dict(self)
            | {
                "user_tower": ResolvedUserTower(**dict(user) | sizes[0] | {"num_blocks": blocks}),
                "item_tower": ResolvedItemTower(**dict(item) | sizes[1]),
            }
        )

    @model_validator(mode="after")
    def _towers_meet(self) -> ModelConfig:
        u, i = self.user_tower.embedding_dim, self.item_tower.embedding_dim
        if u and i and u != i:
            raise ValueError(f"user_tower.embedding_dim and item_tower.embedding_dim must be equal (shared table); got {u} and {i}")
        heads = self.user_tower.num_heads
        given = u or i
        for dim in (given,) if given else WIDTHS:
            if dim % heads and self.user_tower.num_blocks != 0:
                raise ValueError(f"user_tower.num_heads must divide embedding_dim; got {heads} and {dim}")
        ends = [tower.hidden_dims[-1] for tower in (self.user_tower, self.item_tower) if tower.hidden_dims]
        if len(set(ends)) > 1:
            raise ValueError(
                f"the last of user_tower.hidden_dims and item_tower.hidden_dims must be equal; got {ends[0]} and {ends[1]}"
            )
        return self


class ResolvedUserTower(UserTowerConfig):
    """Settings of the user tower with all its sizes."""

    embedding_dim: int
    hidden_dims: list[Positive]
    num_blocks: int


class ResolvedItemTower(ItemTowerConfig):
    """Settings of the item tower with all its sizes."""

    embedding_dim: int
    hidden_dims: list[Positive]


class ResolvedModel(ModelConfig):
    """Settings of a model with all its sizes, as `ModelConfig.resolved` returns them."""

    user_tower: ResolvedUserTower
    item_tower: ResolvedItemTower


ResolvedTower = ResolvedUserTower | ResolvedItemTower
