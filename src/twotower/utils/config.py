"""Read and validate settings: frozen pydantic models, one per stage, from YAML and `--set a.b=c`.

An unknown key is an error that names the nearest known one; every error is one line. Without a configuration file the defaults
apply. Counts are in rows, times in days (`_days`), fractions in [0, 1], unless the field says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from twotower.errors import ConfigError, nearest
from twotower.utils.config_data import (
    ColumnConfig,
    DataConfig,
    InteractionTableConfig,
    ItemTableConfig,
    LongFormConfig,
    SequencesConfig,
    SessionsConfig,
    Settings,
    TableConfig,
    UserTableConfig,
)
from twotower.utils.config_model import (
    EmbeddingConfig,
    ItemTowerConfig,
    ModelConfig,
    Positive,
    ResolvedModel,
    ResolvedTower,
    TowerConfig,
    UserTowerConfig,
)
from twotower.utils.config_prepare import PrepareConfig, SplitConfig
from twotower.utils.config_serving import FromEnvironment, ServingConfig, serving_settings
from twotower.utils.registry import Names, check_names

__all__ = [
    "ColumnConfig",
    "Config",
    "DataConfig",
    "EmbeddingConfig",
    "EvaluationConfig",
    "InteractionTableConfig",
    "ItemTableConfig",
    "ItemTowerConfig",
    "LongFormConfig",
    "ModelConfig",
    "PrepareConfig",
    "ResolvedConfig",
    "ResolvedModel",
    "ResolvedTower",
    "SequencesConfig",
    "ServingConfig",
    "SessionsConfig",
    "SplitConfig",
    "TableConfig",
    "TowerConfig",
    "TrainingConfig",
    "UpdateConfig",
    "UserTableConfig",
    "UserTowerConfig",
    "load_config",
    "merged",
    "parse_config",
    "read_settings",
]

COMPARED = ("popular", "recent", "nearby", "repeat", "transitions", "item_knn", "content_knn", "ease", "ials")


class TrainingConfig(Settings):
    """Objective, loss, optimizer, schedule and stopping rule of the training."""

    recipe: Literal["auto", "fixed"] = "auto"
    """Choice of the recipe. "auto": if you set none of them, a recipe race on the validation part chooses `objective`,
    `batch_size`, and `num_blocks`, `pooling` and `norm_shrinkage` of the user tower. "fixed": no race; a finished run's
    configuration has this value."""
    objective: Annotated[str, Names("objective", ("any_event", "next_event"))] = "any_event"
    """Training objective. "any_event": predict any one event of a user from the other ones; "next_event": predict each event from
    those before it."""
    loss: Annotated[str, Names("loss", ("infonce", "sampled_softmax", "full_softmax"))] = "infonce"
    """Candidates that each target is compared with. "infonce": in-batch items and uniform negatives; "sampled_softmax": uniform
    negatives only; "full_softmax": all items."""
    negatives_per_positive: int = Field(4, ge=0)
    """Uniform negatives per example; the whole batch shares them (512 × 4 = 2,048)."""
    negative_weight: float | None = Field(None, ge=0)
    """Weight of an explicit negative or an impression, relative to an item of the catalogue, in the loss of its user's later
    targets. 0: they are not learned from. null: the recipe race chooses the weight; 0 without a race."""
    batch_size: int = Field(512, ge=2)
    """Examples per step over all processes, slightly more if they cannot be split evenly. With `next_event`: tokens per step,
    padding included."""
    micro_batch_size: int | None = Field(None, ge=2)
    """Examples (or tokens), and candidates, encoded at once in a process. The loss still compares the whole batch with the same
    gradients (gradient cache); the cost is a second forward pass. null: all at once."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate, reached after the warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW; not applied to embedding tables, norms and biases."""
    warmup_frac: float = Field(0.05, ge=0, le=1)
    """Share of the steps for linear warm-up; then the learning rate follows a cosine to zero."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    num_epochs: int | None = Field(None, ge=1)
    """Number of epochs. null: the smallest number ≥ 4 that gives 600 steps, at most 16; fewer, at least 1, above 10,000 steps."""
    max_steps: int | None = Field(None, ge=1)
    """Number of training steps; replaces `num_epochs`. null: computed from `num_epochs`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numeric precision. "auto": fp32 on a CPU; on a GPU bf16 if the hardware supports it, else fp16 with loss scaling."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: needs less memory and more time."""
    memory_budget_gb: float | None = Field(None, gt=0)
    """Memory limit. micro_batch_size, gradient_checkpointing and the storage of the tables are chosen so that training stays below
    it; see `twotower plan`. null: no limit."""
    max_hours: float | None = Field(None, gt=0)
    """Hours after which training stops, with a validation and a usable model; the recipe race counts. The log says after the first
    steps what an epoch takes, and `--resume` goes on later. null: no limit."""
    loader_processes: int = Field(0, ge=0, le=64)
    """Processes that build batches (Linux only). 0: a thread. For a GPU that is faster than the thread; not yet run with one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for training. "auto": a GPU if one is usable, else the CPU."""
    checkpoint_every_s: float = Field(300.0, gt=0)
    """Seconds between checkpoints for `--resume`; one is also written at each validation."""
    eval_every_epochs: float | None = Field(None, gt=0)
    """Epochs between validations; each scores all items. null: 1, or more if that would exceed 16 validations.
    If `num_epochs` is null and fewer than 4 are chosen: less, for 4 validations."""
    eval_metric: Annotated[str, Names("metric", ("Recall", "HitRate", "NDCG", "MRR", "MAP", "Precision"), at_k=True)] = "NDCG@10"
    """Validation metric, as NAME@K, that selects the best checkpoint and decides early stopping."""
    eval_queries: int = Field(20_000, ge=1)
    """Number of validation queries scored during training (a seeded sample)."""
    patience: int = Field(5, ge=1)
    """Validations without improvement after which training stops."""
    log_every: int = Field(50, ge=1)
    """Number of steps between log lines."""

    @model_validator(mode="after")
    def _something_to_contrast_with(self) -> TrainingConfig:
        if self.loss == "sampled_softmax" and not self.negatives_per_positive:
            raise ValueError(
                "negatives_per_positive is 0, but loss: sampled_softmax uses uniform negatives only; it must be above 0"
            )
        return self


class EvaluationConfig(Settings):
    """Metrics, protocol and baselines of the evaluation."""

    ks: list[Positive] = Field([5, 10, 20], min_length=1)
    """List lengths k that metrics are computed for."""
    exclude_seen: bool = True
    """true: items of the user's history, and disliked ones, are not recommended (masked protocol); false: they may be (unmasked
    protocol)."""
    max_queries: int | None = Field(100_000, ge=1)
    """Largest number of held-out queries to evaluate; of more, a seeded sample is used. null: all."""
    refresh_days: float | None = Field(7.0, ge=0.01, le=36_500)
    """Days between refreshes of the index during the test period, from 0.01 to 36,500; weights stay. The report shows results
    with and without refreshes. null: not evaluated. Used only if the dataset is split by time."""
    baselines: list[Annotated[str, Names("baseline", (*COMPARED, "oracle"))]] = Field(list(COMPARED))
    """Names of the baselines that the model is compared with."""
    tune_baselines: bool = True
    """Tune the settings of the baselines (`baselines.GRIDS`) on the validation part, for a fair comparison."""
    bootstrap_resamples: int = Field(1000, ge=10)
    """Number of paired bootstrap resamples for each interval."""
    max_ease_items: int = Field(25_000, ge=1)
    """Largest number of items for EASE, which inverts an items × items matrix. With more items, the report leaves EASE out."""


class UpdateConfig(Settings):
    """Training that goes on with new events (`twotower update`)."""

    replay_frac: float = Field(0.1, ge=0, le=1)
    """Share of the old training events that an epoch trains again, drawn anew in each. With `next_event`: share of the windows of
    a history without a new event. 0: new events alone, which forgets."""
    num_epochs: int = Field(2, ge=1)
    """Number of epochs. An epoch has each new event once, and the replayed ones."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate, reached after the warm-up; then it follows a cosine to zero."""
    valid_frac: float = Field(0.5, gt=0, lt=1)
    """Share of the new events, the newest ones, that validates. The next update trains on them."""
    max_worse_frac: float = Field(0.975, ge=0, le=1)
    """The new model is not published if it is worse than the one before in a larger share of bootstrap resamples of the validation
    queries. The default refuses it where the 95 % interval of the difference lies below zero. 0.5: any lower metric is refused;
    1: none is."""


class Config(Settings):
    """All settings of a run."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Random seed of the split, initial weights, batches and intervals."""
    data: DataConfig = DataConfig()
    prepare: PrepareConfig = PrepareConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    updating: UpdateConfig = UpdateConfig()
    serving: ServingConfig = Field(ServingConfig(), exclude=True)

    def resolved(self, *, ordered: bool, timed: bool, events: int, ids: int) -> ResolvedConfig:
        """Return the same settings with the sizes of the model; see `ModelConfig.resolved`."""
        return ResolvedConfig(**dict(self) | {"model": self.model.resolved(ordered=ordered, timed=timed, events=events, ids=ids)})


class ResolvedConfig(Config):
    """All settings of a run, with the sizes of its model: what a training starts with, and a checkpoint and a bundle hold."""

    model: ResolvedModel


Some = TypeVar("Some", bound=Config)


def load_config(
    path: Path | None = None,
    overrides: list[str] | None = None,
    base: dict[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: dict[str, Any] | None = None,
) -> Config:
    """Read a YAML file (or the defaults when None) and apply overrides of the form "a.b=value", the value read as YAML.

    Parameters
    ----------
    base
        Settings that all others replace, one by one.
    environment
        Environment with settings of the server; see `utils.config_serving`. It comes after the file and before the overrides.
    flags
        Settings that replace all others.

    Raises
    ------
    ConfigError
        The file is missing or not a mapping, a key or a name is unknown (the nearest known one is named), or a value is invalid.

    Examples
    --------
    >>> load_config(overrides=["training.num_epochs=2"]).training.num_epochs
    2
    """
    config = parse_config(merged(read_settings(path, overrides, base, environment), flags or {}))
    check_names(config)
    return config


def read_settings(
    path: Path | None,
    overrides: list[str] | None = None,
    base: dict[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the plain values that `load_config` validates."""
    values: Any = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"No configuration file at {path}. It must be a YAML file. Check --config.")
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an invalid date
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Correct the file.") from None
        values = {} if loaded is None else loaded
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}. A configuration must be a mapping of sections.")
    settings = merged(base or {}, values)
    if found := serving_settings(environment or {}):
        settings = merged(settings, {"serving": found})
    for override in overrides or []:
        _apply_override(settings, override)
    return settings


@overload
def parse_config(values: dict[str, Any]) -> Config: ...
@overload
def parse_config(values: dict[str, Any], kind: type[Some]) -> Some: ...
def parse_config(values: dict[str, Any], kind: type[Config] = Config) -> Config:
    """Validate plain values and return a `Config`. All problems are reported in one `ConfigError`.

    Names of registry entries are checked where they are used: a run can be opened where its loss or source is not registered.

    Examples
    --------
    >>> parse_config({"seed": 3}).seed
    3
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with those of `over` in place of equal ones.

    Examples
    --------
    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    found = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = merged(found[name], value) if both else value
    return found


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} is not of the form a.b=value. Example: --set training.num_epochs=2.")
    *parents, leaf = key.strip().split(".")
    node = values
    for name in parents:
        child = node[name] = {} if node.get(name) is None else node[name]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {name!r} is a value, not a section. Name a setting inside a section.")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {override}: {text!r} is not valid YAML. Quote the value.") from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if isinstance(problem["input"], FromEnvironment):
        where = problem["input"].variable
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
    return [field.alias or name for name, field in model.model_fields.items()]
