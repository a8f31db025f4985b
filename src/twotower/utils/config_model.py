"""Settings of the model: both towers, how their tables are stored, and what is left to the data.

Frozen pydantic models, as all settings; `config.py` holds the other sections and reads the files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from twotower.utils.config_data import Settings
from twotower.utils.registry import Names

Positive = Annotated[int, Field(ge=1)]

WIDTHS, WIDE_FROM_EVENTS = (128, 256), 1_000_000
"""Widths that are left to the data, and from how many training events on the second is taken: where there is much to tell apart."""
UNRESOLVED = "what is left to the data is resolved first: ModelConfig.resolved"


class TowerConfig(Settings):
    """What both towers have."""

    embedding_dim: int | None = Field(None, ge=1)
    """Width of every feature's embedding; the same for both towers, which share the item table. None: 128, or 256 from a million
    training events on (what one tower says holds for both)."""
    hidden_dims: list[Positive] | None = Field(None, min_length=1)
    """Hidden layers of the MLP, and last the width of the vectors, the same for both towers. A single entry: no MLP, and no
    interaction; the vector is then the (projected) sum of the features' embeddings. None: the width of the embeddings alone."""
    dropout: float = Field(0.3, ge=0, lt=1)
    """Inside the attention blocks and the MLP; the straight path has none, which fits rare ids better."""
    interaction: Annotated[str, Names("interaction", ("dcn", "fm", "none"))] = "dcn"
    """Layer that combines the features' embeddings before the MLP. "dcn": cross network (DCNv2); "fm": factorization machine. Used
    only where `hidden_dims` has two entries or more."""
    cross_layers: int = Field(2, ge=1)
    """Layers of the cross network. Used only with `interaction: dcn`."""
    id_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of ids shown as UNKNOWN in training, so that the features and the UNKNOWN row learn."""
    norm_shrinkage: float = Field(0.0, ge=0)
    """A vector x becomes x / √(|x|² + shrinkage²): with 0 all have length one, else the shorter the less there is to go by."""

    @property
    def width(self) -> int:
        """`embedding_dim` once it is resolved."""
        assert self.embedding_dim is not None, UNRESOLVED
        return self.embedding_dim

    @property
    def layers(self) -> list[int]:
        """`hidden_dims` once they are resolved."""
        assert self.hidden_dims is not None, UNRESOLVED
        return self.hidden_dims


class UserTowerConfig(TowerConfig):
    """History and profile → vector."""

    id_dropout: float = Field(0.5, ge=0, lt=1)
    """Share of the users' ids shown as UNKNOWN in training: half, so that whoever is unknown is answered as well."""
    norm_shrinkage: float = Field(2.0, ge=0)
    """Of the users' vectors: who nothing is known of is answered by popularity, and the more is known the more taste counts."""
    num_heads: int = Field(4, ge=1)
    """Heads of each self-attention block; must divide `embedding_dim`."""
    num_blocks: int | None = Field(None, ge=0)
    """Self-attention blocks over the history; 0 pools the items as they are. None: one where events have times and what is asked
    for comes after them, else none."""
    pooling: Annotated[str, Names("pooling", ("mean", "last", "attention"))] = "mean"
    """How the history becomes one vector. "mean": average; "last": the latest event; "attention": learned weights."""
    max_history: int = Field(50, ge=1)
    """Most recent events read."""
    history_dropout: float = Field(0.5, ge=0, lt=1)
    """Share of history events hidden in training."""

    @property
    def blocks(self) -> int:
        """`num_blocks` once it is resolved."""
        assert self.num_blocks is not None, UNRESOLVED
        return self.num_blocks


class ItemTowerConfig(TowerConfig):
    """Item features → vector."""

    id_init: Literal["als", "random"] = "als"
    """What the ids' table begins as: "als", item factors of iALS over the training part, or "random". Tables that are hashed or
    updated by rows begin random."""
    neighbour_dropout: float = Field(0.3, ge=0, lt=1)
    """Share of an item's neighbours hidden in training."""


class EmbeddingConfig(Settings):
    """How one embedding table is stored and learns."""

    update: Literal["dense", "sparse"] = "dense"
    """"dense": AdamW over the whole table in every step. "sparse": only the rows that a step reads, with two numbers of state a row
    (row-wise Adam without momentum); several processes share such a table row by row."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the stored weights. The short types need `update: sparse`, and are rounded at random, so that small updates count."""
    weight_decay: float = Field(0.0, ge=0)
    """With `update: sparse`: as in AdamW, on every row at every step, whether it was read or not."""
    max_rows: int | None = Field(None, ge=8)
    """A table of more ids than this holds so many rows, and an id is the sum of two of them."""
    hashing: Literal["double", "quotient_remainder"] = "double"
    """Which two: by two hash functions, or by remainder and quotient, which no other id shares both of."""

    @model_validator(mode="after")
    def _short_types_by_rows(self) -> EmbeddingConfig:
        if self.update == "dense" and (self.dtype != "fp32" or self.weight_decay):
            raise ValueError("dtype and weight_decay of a table need update: sparse")
        return self


class ModelConfig(Settings):
    """Both towers, their tables and the temperature."""

    user_tower: UserTowerConfig = UserTowerConfig()
    item_tower: ItemTowerConfig = ItemTowerConfig()
    exclude_features: list[str] = Field([])
    """Fields that the towers do without, as "item.categories" or "user.hour"; never an id. The data keep them."""
    request_location: bool = False
    """Whether the user tower reads where a request comes from. In training half of the requests come from near their target."""
    tables: dict[str, EmbeddingConfig] = Field({})
    """By name of the table: "item.id", "user.id", "item.categories" …"""
    sparse_update_from_rows: int = Field(200_000, ge=1)
    """Tables of at least so many rows have `update: sparse` unless named in `tables`."""
    popularity_prior: float = Field(1.0, ge=0, le=2)
    """Share of an item's log popularity that every logit begins with: with 1, towers that know nothing answer by popularity, and
    vectors are left to say how a taste differs from everybody's. 0: vectors say it all."""
    recent_item_boost: float = Field(3.0, ge=0, le=10)
    """Nats that the item a user visited last gains where visited items may be recommended again; the one before gains half of it,
    and so on. Items like them gain a part. Not where a dataset is of sets, whose order says nothing."""
    popularity_half_life_days: float | None = Field(None, ge=0)
    """Age in days at which an event counts half for the popularity of its item in a refreshed index and in a bundle; 0: all events
    count alike. None: chosen on the validation part where the parts of the dataset follow one another in time, else popularity is
    that of training."""
    new_item_exposure: float = Field(0.035, ge=0, lt=1)
    """Share of the first ten places that items which training never saw take together, over all who ask, if they are as many as
    the catalogue has, or a twentieth of it. More or fewer are shown more or less. Without `popularity_prior` it means nothing."""
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Divisor of the scores in the softmax loss; the first value where `learn_temperature` is true."""
    learn_temperature: bool = False
    """Learn the temperature, between 0.01 and 1."""

    def stored(self, table: str, ids: int) -> EmbeddingConfig:
        """How a table of so many ids is stored: as `tables` says, else by its size."""
        return self.tables.get(table) or EmbeddingConfig(update="sparse" if ids >= self.sparse_update_from_rows else "dense")

    def resolved(self, *, ordered: bool, timed: bool, events: int) -> ModelConfig:
        """The same with what it leaves to the data.

        Attention reads the order of a history and the time between its events: without times it made the model worse (S3-Rec's
        split), and where there is no order it means nothing. Widths grow with what there is to tell apart.

        Parameters
        ----------
        ordered, timed
            Whether what is asked for comes after the history; whether events have times.
        events
            Positive ones of the training part.
        """
        both = (self.user_tower, self.item_tower)
        given = [tower.embedding_dim for tower in both if tower.embedding_dim is not None]
        ends = [tower.hidden_dims[-1:] for tower in both if tower.hidden_dims is not None]
        dim = given[0] if given else WIDTHS[events >= WIDE_FROM_EVENTS]
        end = ends[0] if ends else [dim]
        sizes: list[dict[str, Any]] = [{"embedding_dim": dim, "hidden_dims": tower.hidden_dims or end} for tower in both]
        if self.user_tower.num_blocks is None:
            sizes[0]["num_blocks"] = int(ordered and timed)
        towers = {
            "user_tower": self.user_tower.model_copy(update=sizes[0]),
            "item_tower": self.item_tower.model_copy(update=sizes[1]),
        }
        return self.model_copy(update=towers)

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
