"""Settings: frozen pydantic models, one per stage; YAML in, `--set a.b=c` on top, every error in one line.

An unknown key is an error that names the nearest known one. The defaults are the recipe a user gets without a configuration.
Counts are in rows, times in days (`_days`), fractions in [0, 1], unless the field says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from twotower.config_data import (
    ColumnConfig,
    DataConfig,
    InteractionTableConfig,
    ItemTableConfig,
    PrepareConfig,
    SequencesConfig,
    Settings,
    SplitConfig,
    TableConfig,
    UserTableConfig,
)
from twotower.errors import ConfigError, nearest

__all__ = [
    "ColumnConfig",
    "Config",
    "DataConfig",
    "EmbeddingConfig",
    "EvaluationConfig",
    "InteractionTableConfig",
    "ItemTableConfig",
    "ItemTowerConfig",
    "ModelConfig",
    "PrepareConfig",
    "SequencesConfig",
    "SplitConfig",
    "TableConfig",
    "TowerConfig",
    "TrainingConfig",
    "UserTableConfig",
    "UserTowerConfig",
    "load_config",
    "parse_config",
]

Positive = Annotated[int, Field(ge=1)]

WIDTHS, MANY_EVENTS = (128, 256), 1_000_000
"""Widths that are left to the data, and from how many training events on the second is taken: where there is much to tell apart."""
UNSETTLED = "what is left to the data is settled first: ModelConfig.settled"


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
    interaction: Literal["dcn", "fm", "none"] = "dcn"
    cross_layers: int = Field(2, ge=1)
    id_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of ids shown as UNKNOWN in training, so that the features and the UNKNOWN row learn."""
    shrinkage: float = Field(0.0, ge=0)
    """A vector x becomes x / √(|x|² + shrinkage²): with 0 all have length one, else the shorter the less there is to go by."""

    @property
    def width(self) -> int:
        """`embedding_dim` once it is settled."""
        assert self.embedding_dim is not None, UNSETTLED
        return self.embedding_dim

    @property
    def layers(self) -> list[int]:
        """`hidden_dims` once they are settled."""
        assert self.hidden_dims is not None, UNSETTLED
        return self.hidden_dims


class UserTowerConfig(TowerConfig):
    """History and profile → vector."""

    id_dropout: float = Field(0.5, ge=0, lt=1)
    """Share of the users' ids shown as UNKNOWN in training: half, so that whoever is unknown is answered as well."""
    shrinkage: float = Field(2.0, ge=0)
    """Of the users' vectors: who nothing is known of is answered by popularity, and the more is known the more taste counts."""
    num_heads: int = Field(4, ge=1)
    num_blocks: int | None = Field(None, ge=0)
    """Self-attention blocks over the history; 0 pools the items as they are. None: one where events have times and what is asked
    for comes after them, else none."""
    pooling: Literal["mean", "last", "attention"] = "mean"
    max_history: int = Field(50, ge=1)
    """Most recent events read."""
    history_dropout: float = Field(0.5, ge=0, lt=1)
    """Share of history events hidden in training."""

    @property
    def blocks(self) -> int:
        """`num_blocks` once it is settled."""
        assert self.num_blocks is not None, UNSETTLED
        return self.num_blocks

    @model_validator(mode="after")
    def _heads(self) -> UserTowerConfig:
        for dim in WIDTHS if self.embedding_dim is None else (self.embedding_dim,):
            if dim % self.num_heads:
                raise ValueError(f"num_heads must divide embedding_dim; got {self.num_heads} and {dim}")
        return self


class ItemTowerConfig(TowerConfig):
    """Item features → vector."""

    initial_ids: Literal["factors", "noise"] = "factors"
    """What the ids' table begins as: item factors of iALS over the training part, or noise. Tables that are hashed or updated by
    rows begin as noise."""
    neighbour_dropout: float = Field(0.3, ge=0, lt=1)
    """Share of an item's neighbours hidden in training."""


class EmbeddingConfig(Settings):
    """How one embedding table is stored and learns."""

    update: Literal["dense", "rows"] = "dense"
    """"dense": AdamW over the whole table in every step. "rows": only the rows that a step reads, with two numbers of state a row
    (row-wise Adam without momentum); several processes share such a table row by row."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the stored weights. The short types need `update: rows`, and are rounded at random, so that small updates count."""
    weight_decay: float = Field(0.0, ge=0)
    """With `update: rows`: as in AdamW, on every row at every step, whether it was read or not."""
    max_rows: int | None = Field(None, ge=8)
    """A table of more ids than this holds so many rows, and an id is the sum of two of them."""
    hashing: Literal["double", "quotient_remainder"] = "double"
    """Which two: by two hash functions, or by remainder and quotient, which no other id shares both of."""

    @model_validator(mode="after")
    def _short_types_by_rows(self) -> EmbeddingConfig:
        if self.update == "dense" and (self.dtype != "fp32" or self.weight_decay):
            raise ValueError("dtype and weight_decay of a table need update: rows")
        return self


class ModelConfig(Settings):
    """Both towers, their tables and the temperature."""

    user_tower: UserTowerConfig = UserTowerConfig()
    item_tower: ItemTowerConfig = ItemTowerConfig()
    exclude_fields: list[str] = Field([])
    """Fields that the towers do without, as "item.categories" or "user.hour"; never an id. The data keep them."""
    request_place: bool = False
    """Whether the user tower reads where a request comes from. In training half of the requests come from near their target."""
    tables: dict[str, EmbeddingConfig] = Field({})
    """By name of the table: "item.id", "user.id", "item.categories" …"""
    rows_from: int = Field(200_000, ge=1)
    """Tables of at least so many rows have `update: rows` unless named in `tables`."""
    popularity_prior: float = Field(1.0, ge=0, le=2)
    """Share of an item's log popularity that every logit begins with: with 1, towers that know nothing answer by popularity, and
    vectors are left to say how a taste differs from everybody's. 0: vectors say it all."""
    revisit_prior: float = Field(3.0, ge=0, le=10)
    """Nats that the item a user visited last gains where visited items may be recommended again; the one before gains half of it,
    and so on. Items like them gain a part. Not where a dataset is of sets, whose order says nothing."""
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    learn_temperature: bool = False

    def stored(self, table: str, ids: int) -> EmbeddingConfig:
        """How a table of so many ids is stored: as `tables` says, else by its size."""
        return self.tables.get(table) or EmbeddingConfig(update="rows" if ids >= self.rows_from else "dense")

    def settled(self, *, ordered: bool, timed: bool, events: int) -> ModelConfig:
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
        dim = given[0] if given else WIDTHS[events >= MANY_EVENTS]
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
        ends = [tower.hidden_dims[-1] for tower in (self.user_tower, self.item_tower) if tower.hidden_dims]
        if len(set(ends)) > 1:
            raise ValueError(
                f"the last of user_tower.hidden_dims and item_tower.hidden_dims must be equal; got {ends[0]} and {ends[1]}"
            )
        return self


class TrainingConfig(Settings):
    """The training strategy."""

    view: Literal["set", "causal"] = "set"
    """"set": predict any one event of a user from the others; "causal": every position predicts the next event."""
    loss: Literal["infonce", "sampled_softmax", "full_softmax"] = "infonce"
    negatives_per_positive: int = Field(4, ge=0)
    """Uniform negatives per example, pooled and shared by the whole batch (512 × 4 = 2,048)."""
    batch_size: int = Field(512, ge=2)
    """Examples per step, over all processes. Causal view: the token budget of a batch, padding included."""
    micro_batch: int | None = Field(None, ge=2)
    """Examples (or tokens), and candidates, encoded at once in one process; the whole batch is contrasted all the same, with the
    same gradients, for a second pass through the towers (gradient cache). None: all at once."""
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    """AdamW; never on tables, norms and biases."""
    warmup_frac: float = Field(0.05, ge=0, le=1)
    """Share of the steps with a rising learning rate; cosine to zero afterwards."""
    clip_norm: float = Field(1.0, gt=0)
    num_epochs: int | None = Field(None, ge=1)
    """None: four, or as many as make 600 steps, at most sixteen."""
    max_steps: int | None = Field(None, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """"auto": fp32 on CPU; on a GPU bf16 where it has it in hardware, else fp16 with loss scaling."""
    gradient_checkpointing: bool = False
    memory_budget_gb: float | None = Field(None, gt=0)
    """Choose micro_batch, gradient_checkpointing and the tables' storage so that training stays below it; see `twotower plan`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    save_every_s: float = Field(300.0, gt=0)
    """Seconds between checkpoints to resume from, besides the one at each validation."""
    eval_every: float | None = Field(None, gt=0)
    """Epochs between validations; each scores the whole catalogue. None: one, or more where that would be above 16 validations."""
    eval_metric: str = "NDCG@10"
    eval_queries: int = Field(20_000, ge=1)
    """Validation queries scored during training (a seeded sample)."""
    patience: int = Field(5, ge=1)
    """Validations without improvement before stopping."""
    log_every: int = Field(50, ge=1)
    """Steps between log lines."""

    @model_validator(mode="after")
    def _something_to_contrast_with(self) -> TrainingConfig:
        if self.loss == "sampled_softmax" and not self.negatives_per_positive:
            raise ValueError("loss: sampled_softmax contrasts with uniform negatives alone; negatives_per_positive must be above 0")
        return self


class EvaluationConfig(Settings):
    """The judgement."""

    ks: list[Positive] = Field([5, 10, 20], min_length=1)
    exclude_seen: bool = True
    """True: items of the user's history are not recommended (protocol M). False: they may be (protocol U)."""
    max_queries: int | None = Field(None, ge=1)
    """A seeded sample of the held-out queries; None: all."""
    baselines: list[str] = Field(["popular", "recent", "nearby", "repeat", "item_knn", "content_knn", "ease", "ials"])
    tune_baselines: bool = True
    """Choose the settings of the baselines that have any to choose (`baselines.GRIDS`) on the validation part, as fairness asks."""
    bootstrap: int = Field(1000, ge=10)
    """Paired resamples behind every interval."""
    max_ease_items: int = Field(25_000, ge=1)
    """EASE inverts an items × items matrix: larger catalogues leave it out, and the report says so."""


class Config(Settings):
    """Everything a run needs; the seed README's YAML loads unchanged."""

    seed: int = Field(0, ge=0, lt=2**32)
    data: DataConfig = DataConfig()
    prepare: PrepareConfig = PrepareConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file (or the defaults when None) and apply overrides of the form "a.b=value", the value read as YAML.

    Raises
    ------
    ConfigError
        The file is missing or no mapping, a key is unknown (the nearest known key is named), or a value does not fit.
    """
    values: Any = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"The configuration must be a YAML file. Found none at {path}. Check --config.")
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
            raise ConfigError(f"The configuration must be valid YAML. {path}: {' '.join(str(error).split())}.") from None
        values = {} if loaded is None else loaded
        if not isinstance(values, dict):
            raise ConfigError(f"The configuration must be a mapping of sections. {path} holds a {type(values).__name__}.")
    for override in overrides or []:
        _apply_override(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Validate plain values into a `Config`; every problem becomes one `ConfigError` line."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set takes a.b=value. Got {override!r}.")
    *parents, leaf = key.strip().split(".")
    node = values
    for name in parents:
        child = node[name] = {} if node.get(name) is None else node[name]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {name!r} is a value, not a section.")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {override}: the value must be valid YAML.") from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if problem["type"] == "extra_forbidden":
        return f"Unknown setting {where!r}.{nearest(str(problem['loc'][-1]), _section(problem['loc'][:-1]))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"Setting {where!r}: {message}."
    return f"Setting {where!r}: {message[0].lower()}{message[1:]}. Got {problem['input']!r}."


def _section(loc: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in (part for part in loc if isinstance(part, str)):
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(option for option in options if isinstance(option, type(BaseModel)))
    return list(model.model_fields)
