"""Settings: frozen pydantic models, one per stage; YAML in, `--set a.b=c` on top, every error in one line.

An unknown key is an error that names the nearest known one. The defaults are the recipe a user gets without a configuration.
Counts are in rows, times in days (`_days`), fractions in [0, 1], unless the field says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from twotower.errors import ConfigError, nearest
from twotower.utils.config_data import (
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
from twotower.utils.config_model import EmbeddingConfig, ItemTowerConfig, ModelConfig, Positive, TowerConfig, UserTowerConfig
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

INTERNAL = ("training.stop_frac", "evaluation.baseline_settings")
"""What `twotower refit` carries over from a run. The configuration of a finished run holds it; `--set` cannot name it."""


class TrainingConfig(Settings):
    """The training strategy."""

    recipe: Literal["auto", "fixed"] = "auto"
    """"auto": a short race on the validation part chooses `objective`, `batch_size`, `model.user_tower.num_blocks` and `pooling`
    where you set none of them (`trainers.recipe_race`). "fixed": the settings as they are; a finished run's configuration says
    so."""
    objective: Annotated[str, Names("objective", ("any_event", "next_event"))] = "any_event"
    """"any_event": predict any one event of a user from the others; "next_event": every position predicts the next event."""
    loss: Annotated[str, Names("loss", ("infonce", "sampled_softmax", "full_softmax"))] = "infonce"
    """Candidates that each target is compared with. "infonce": the items of the batch and uniform negatives; "sampled_softmax":
    uniform negatives alone; "full_softmax": the whole catalogue."""
    negatives_per_positive: int = Field(4, ge=0)
    """Uniform negatives per example, pooled and shared by the whole batch (512 × 4 = 2,048)."""
    batch_size: int = Field(512, ge=2)
    """Examples per step, over all processes; a few more where they do not come out even. `next_event`: the token budget of a batch,
    padding included."""
    micro_batch_size: int | None = Field(None, ge=2)
    """Examples (or tokens), and candidates, encoded at once in one process; the whole batch is contrasted all the same, with the
    same gradients, for a second pass through the towers (gradient cache). None: all at once."""
    learning_rate: float = Field(2e-3, gt=0)
    """Highest learning rate, reached after the warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW; never on tables, norms and biases."""
    warmup_frac: float = Field(0.05, ge=0, le=1)
    """Share of the steps with a rising learning rate; cosine to zero afterwards."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    num_epochs: int | None = Field(None, ge=1)
    """None: four, or as many as make 600 steps, at most sixteen."""
    max_steps: int | None = Field(None, ge=1)
    """Number of training steps, in place of `num_epochs`. null: as many as `num_epochs` gives."""
    stop_frac: float = Field(1.0, gt=0, le=1)
    """Share of these steps after which training ends, the learning rate's schedule being that of all: `twotower refit` sets it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """"auto": fp32 on CPU; on a GPU bf16 where it has it in hardware, else fp16 with loss scaling."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    memory_budget_gb: float | None = Field(None, gt=0)
    """Choose micro_batch_size, gradient_checkpointing and the tables' storage so that training stays below it; see `twotower
    plan`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs. "auto": a GPU where there is one."""
    checkpoint_every_s: float = Field(300.0, gt=0)
    """Seconds between checkpoints to resume from, besides the one at each validation."""
    eval_every_epochs: float | None = Field(None, gt=0)
    """Epochs between validations; each scores the whole catalogue. None: one, or more where that would be above 16 validations."""
    eval_metric: str = "NDCG@10"
    """Metric of the validation that chooses the best checkpoint and stops training early, as NAME@K."""
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
    """Lengths of the lists that metrics are computed for."""
    exclude_seen: bool = True
    """True: items of the user's history are not recommended (masked protocol). False: they may be (unmasked protocol)."""
    max_queries: int | None = Field(None, ge=1)
    """A seeded sample of the held-out queries; None: all."""
    refresh_days: float | None = Field(7.0, gt=0)
    """Days between refreshes of the index along the test part, from the events so far; the weights stay. Judged beside the index
    that is never refreshed. None: not judged. Only where the parts of the dataset follow one another in time."""
    baselines: list[str] = Field(["popular", "recent", "nearby", "repeat", "item_knn", "content_knn", "ease", "ials"])
    """Names of the systems that the model is compared with."""
    tune_baselines: bool = True
    """Choose the settings of the baselines that have any to choose (`baselines.GRIDS`) on the validation part, as fairness asks."""
    baseline_settings: dict[str, dict[str, int | float]] = Field({})
    """By name of the baseline: settings it is fitted with, and not tuned; `twotower refit` sets those of the run."""
    bootstrap_resamples: int = Field(1000, ge=10)
    """Paired resamples behind every interval."""
    max_ease_items: int = Field(25_000, ge=1)
    """EASE inverts an items × items matrix: larger catalogues leave it out, and the report says so."""


class Config(Settings):
    """Everything a run needs; the seed README's YAML loads unchanged."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything that is drawn at random: split, initial weights, batches, intervals."""
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
        The file is missing or no mapping, a key or a name is unknown (the nearest known one is named), or a value does not fit.
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
    config = parse_config(values)
    check_names(config)
    return config


def parse_config(values: dict[str, Any]) -> Config:
    """Validate plain values into a `Config`; every problem becomes one `ConfigError` line.

    Names of registry entries are checked where they are used: a run may be opened where its loss or source is not registered.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set takes a.b=value. Got {override!r}.")
    if key.strip().startswith(INTERNAL):
        raise ConfigError(f"Unknown setting {key.strip()!r}. Only `twotower refit` sets it.")
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
