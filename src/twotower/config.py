"""Settings: frozen pydantic models, one per stage; YAML in, `--set a.b=c` on top, every error in one line.

An unknown key is an error that names the nearest known one. The defaults are the recipe a user gets without a configuration.
Counts are in rows, times in days (`_days`), fractions in [0, 1], unless the field says otherwise.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twotower.errors import ConfigError, nearest

Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of every section: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """A section whose keys are all commented out is null in YAML: it has its defaults."""
        if not isinstance(values, dict):
            return values
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.annotation, type(BaseModel))}
        return {name: value for name, value in values.items() if value is not None or name not in sections}


class ColumnConfig(Settings):
    """One declared feature column of a user's own table (`tables` source)."""

    name: str = Field(min_length=1)
    kind: Literal["categorical", "multi", "number", "geo", "hours", "text", "vector"]
    columns: list[str] = []
    """Raw columns; defaults to the feature's own name. Two (latitude, longitude) for "geo"."""
    separator: str = ","
    """Splits a "multi" column that is a string."""


class TableConfig(Settings):
    """One table of the `tables` source: a CSV, Parquet or JSON-lines file (or glob). Values of other keys name its columns."""

    path: Path
    """Relative to `data.path`."""


class InteractionTableConfig(TableConfig):
    """Who met what, and when."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    time: str | None = None
    """A date, a timestamp, or epoch seconds / milliseconds. None: the order of the rows."""
    stars: str | None = None
    """0 to 5."""
    event_type: str | None = None
    text: str | None = None
    """What the user wrote: part of the item's text."""


class ItemTableConfig(TableConfig):
    """What is recommended."""

    item_id: str = "item_id"
    name: str | None = None
    """Shown to people."""
    features: list[ColumnConfig] = []


class UserTableConfig(TableConfig):
    """Whom it is recommended to."""

    user_id: str = "user_id"
    since: str | None = None
    """When they became users, in the forms of `InteractionTableConfig.time`."""
    features: list[ColumnConfig] = []


class SequencesConfig(Settings):
    """Files of the literature: "user item item …" a line."""

    train: Path = Path("Yelp.txt")
    """Relative to `data.path`."""
    test: Path | None = None
    """A second file of the same form: its items are the test part (use `prepare.split.kind: given`)."""
    attributes: Path | None = None
    """JSON object: item → list of attribute ids, read as the multi-valued feature "categories"."""
    items: Path | None = None
    """JSON lines with `item` and any of name, categories, city, latitude, longitude: shown to people and used by filters."""


class DataConfig(Settings):
    """Where raw data comes from."""

    source: Literal["yelp", "tables", "sequences"] = "yelp"
    path: Path = Path("data/raw")
    events: list[str] = ["review", "tip", "checkin"]
    """Yelp tables read as events, when present. Check-ins carry no user: they count towards an item's popularity only."""
    max_reject_frac: float = Field(0.01, ge=0.0, le=1.0)
    """Larger shares of unreadable rows are an error."""
    interactions: InteractionTableConfig | None = None
    users: UserTableConfig | None = None
    items: ItemTableConfig | None = None
    sequences: SequencesConfig = SequencesConfig()


class SplitConfig(Settings):
    """How held-out events are chosen."""

    kind: Literal["time", "leave_one_out", "given"] = "time"
    """"time": one cut for everybody; "leave_one_out": each user's last event is test, the one before validation (users with
    at least three events); "given": the source's own test part, and a random `valid` share of the rest."""
    valid: float | date = 0.1
    """"time": share of the events, or first day of the validation period. "given": share of each user's events."""
    test: float | date = 0.1
    """"time": share of the events, or first day of the test period."""

    @model_validator(mode="after")
    def _same_type(self) -> SplitConfig:
        if isinstance(self.valid, date) != isinstance(self.test, date):
            raise ValueError("valid and test must both be fractions or both be dates")
        if isinstance(self.valid, date) and isinstance(self.test, date) and self.valid >= self.test:
            raise ValueError("valid must be a day before test")
        if isinstance(self.valid, float) and isinstance(self.test, float):
            if not (0 <= self.valid < 1 and 0 <= self.test < 1):
                raise ValueError(f"valid and test must be at least 0 and below 1; got {self.valid} and {self.test}")
            if self.valid + self.test >= 1:
                raise ValueError("valid + test must leave something to train on (sum below 1)")
        return self


class PrepareConfig(Settings):
    """From raw tables to a dataset."""

    positive_min_stars: float | None = Field(None, ge=0, le=5)
    """Events with fewer stars are history, never targets. None: every event is a target. Events without stars always are."""
    event_weights: dict[str, float] = {}
    """Weight of an event type in the loss; 1 unless named here. 0: history only."""
    repeats: Literal["keep", "fold"] = "keep"
    """"fold" keeps the first event of each (user, item)."""
    min_user_events: int = Field(1, ge=1)
    min_item_events: int = Field(1, ge=1)
    """Users and items with fewer events in the training period are dropped; those first seen after it are new, and stay.
    (leave_one_out: counted over all events, as the literature does.)"""
    k_core: bool = False
    """Repeat both minimum counts until nothing changes."""
    split: SplitConfig = SplitConfig()
    text_dim: int = Field(32, ge=0)
    """Width of the text vectors; 0 leaves text out."""
    text_max_chars: int = Field(2000, ge=0)
    """Review text kept per item, from before the cut. 0: the name alone."""
    exclude_features: list[str] = []
    """Names of features to leave out."""


class TowerConfig(Settings):
    """What both towers have."""

    embedding_dim: int = Field(64, ge=1)
    """Width of every feature's embedding; the same for both towers, which share the item table."""
    hidden_dims: list[Positive] = Field([64], min_length=1)
    """Hidden layers of the MLP, and last the width of the vectors, the same for both towers. A single entry: no MLP, and no
    interaction; the vector is then the (projected) sum of the features' embeddings."""
    dropout: float = Field(0.1, ge=0, lt=1)
    interaction: Literal["dcn", "fm", "none"] = "dcn"
    cross_layers: int = Field(2, ge=1)
    id_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of ids shown as UNKNOWN in training, so that the features and the UNKNOWN row learn."""


class UserTowerConfig(TowerConfig):
    """History and profile → vector."""

    num_heads: int = Field(4, ge=1)
    num_blocks: int = Field(1, ge=0)
    """Self-attention blocks over the history; 0 pools the items as they are."""
    pooling: Literal["mean", "last", "attention"] = "mean"
    max_history: int = Field(50, ge=1)
    """Most recent events read."""
    history_dropout: float = Field(0.2, ge=0, lt=1)
    """Share of history events hidden in training."""

    @model_validator(mode="after")
    def _heads(self) -> UserTowerConfig:
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embedding_dim; got {self.num_heads} and {self.embedding_dim}")
        return self


class ItemTowerConfig(TowerConfig):
    """Item features → vector."""


class ModelConfig(Settings):
    """Both towers and the temperature."""

    user_tower: UserTowerConfig = UserTowerConfig()
    item_tower: ItemTowerConfig = ItemTowerConfig()
    request_place: bool = False
    """Whether the user tower reads where a request comes from. In training half of the requests come from near their target."""
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    learn_temperature: bool = True

    @model_validator(mode="after")
    def _towers_meet(self) -> ModelConfig:
        u, i = self.user_tower.embedding_dim, self.item_tower.embedding_dim
        if u != i:
            raise ValueError(f"user_tower.embedding_dim and item_tower.embedding_dim must be equal (shared table); got {u} and {i}")
        u, i = self.user_tower.hidden_dims[-1], self.item_tower.hidden_dims[-1]
        if u != i:
            raise ValueError(f"the last of user_tower.hidden_dims and item_tower.hidden_dims must be equal; got {u} and {i}")
        return self


class TrainingConfig(Settings):
    """The training strategy."""

    view: Literal["set", "causal"] = "set"
    """"set": predict any one event of a user from the others; "causal": every position predicts the next event."""
    loss: Literal["infonce", "sampled_softmax", "full_softmax"] = "infonce"
    negatives_per_positive: int = Field(4, ge=0)
    """Uniform negatives per example, pooled and shared by the whole batch (512 × 4 = 2,048)."""
    batch_size: int = Field(512, ge=2)
    """Examples per optimiser step. Causal view: also the token budget of a batch, padding included."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per step; each contrasts within itself."""
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    """AdamW; never on tables, norms and biases."""
    warmup_frac: float = Field(0.05, ge=0, le=1)
    """Share of the steps with a rising learning rate; cosine to zero afterwards."""
    clip_norm: float = Field(1.0, gt=0)
    num_epochs: int = Field(30, ge=1)
    max_steps: int | None = Field(None, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """"auto": fp32 on CPU; on a GPU bf16 where it has it in hardware, else fp16 with loss scaling."""
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_every: float = Field(1.0, gt=0)
    """Epochs between validations; each scores the whole catalogue."""
    eval_metric: str = "NDCG@10"
    eval_queries: int = Field(5000, ge=1)
    """Validation queries scored during training (a seeded sample)."""
    patience: int = Field(5, ge=1)
    """Validations without improvement before stopping."""
    log_every: int = Field(50, ge=1)
    """Steps between log lines."""


class EvaluationConfig(Settings):
    """The judgement."""

    ks: list[Positive] = Field([5, 10, 20], min_length=1)
    exclude_seen: bool = True
    """True: items of the user's history are not recommended (protocol M). False: they may be (protocol U)."""
    max_queries: int | None = Field(None, ge=1)
    """A seeded sample of the held-out queries; None: all."""
    baselines: list[str] = ["popular", "recent", "nearby", "repeat", "item_knn", "ease", "ials"]
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
