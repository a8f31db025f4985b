"""Define the settings that `twotower tune` searches, with their ranges, for a dataset and the settings of the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from twotower.data.data_loader import TrainLoader
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import layout, open_store, resolve
from twotower.schema import NEIGHBOURS, TRAIN
from twotower.trainers.recipe_race import UNITS, Entrant, entrants, is_given, with_settings
from twotower.trainers.schedule import Schedule
from twotower.utils.config import Config
from twotower.utils.types import Json

OBJECTIVE, BATCH_SIZE = UNITS
DIM, HISTORY = "model.user_tower.embedding_dim", "model.user_tower.max_history"
NEGATIVE_WEIGHT = "training.negative_weight"
MAX_HISTORY = 200

RANGES: dict[str, BaseDistribution] = {
    OBJECTIVE: CategoricalDistribution(("any_event", "next_event")),
    BATCH_SIZE: CategoricalDistribution((0.5, 1.0, 2.0)),
    "training.learning_rate": FloatDistribution(3e-4, 1e-2, log=True),
    "training.weight_decay": FloatDistribution(1e-4, 0.3, log=True),
    "training.num_epochs": IntDistribution(2, 32, log=True),
    NEGATIVE_WEIGHT: CategoricalDistribution((0.0, 0.1, 1.0, 10.0)),
    "training.negatives_per_positive": IntDistribution(1, 16, log=True),
    "model.temperature": FloatDistribution(0.03, 0.3, log=True),
    DIM: CategoricalDistribution((64, 128, 256)),
    "model.user_tower.norm_shrinkage": FloatDistribution(0.0, 4.0),
    "model.user_tower.dropout": FloatDistribution(0.0, 0.6),
    "model.user_tower.id_dropout": FloatDistribution(0.0, 0.9),
    "model.user_tower.num_blocks": IntDistribution(0, 2),
    "model.user_tower.pooling": CategoricalDistribution(("mean", "last", "attention")),
    HISTORY: IntDistribution(10, MAX_HISTORY, log=True),
    "model.user_tower.history_dropout": FloatDistribution(0.0, 0.8),
    "model.item_tower.id_dropout": FloatDistribution(0.0, 0.5),
    "model.item_tower.neighbour_dropout": FloatDistribution(0.0, 0.7),
}
"""Setting → values that are tried. Those of the batch size are multiples of the objective's default: it counts examples for one
objective and tokens for the other."""


@dataclass(frozen=True)
class SearchSpace:
    """The settings that are searched on one dataset.

    Attributes
    ----------
    ranges
        Setting → values that are tried; none that the user set.
    batch_sizes
        Objective → batch size that 1.0 stands for.
    defaults
        The default recipes, which are trained before anything else is tried.
    fixed
        The settings of the user, without a recipe race.
    """

    ranges: dict[str, BaseDistribution]
    batch_sizes: dict[str, int]
    defaults: tuple[Entrant, ...]
    fixed: Config

    @classmethod
    def of(cls, config: Config, dataset: Dataset) -> SearchSpace:
        """Return the space for a dataset and the settings of the user, which are not searched."""
        defaults = entrants(config, ordered=dataset.ordered, validated=True, events=dataset.n_train_events)
        every = entrants(_with_recipe(config, "auto"), ordered=dataset.ordered, validated=True, events=dataset.n_train_events)
        sizes = {one.config.training.objective: one.config.training.batch_size for one in every}
        return cls(_ranges(config, dataset), sizes, tuple(defaults), _with_recipe(config, "fixed"))

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Return a value for every searched setting; values that the trial already has are kept."""
        found: dict[str, Any] = {}
        for name, values in self.ranges.items():
            match values:
                case CategoricalDistribution():
                    found[name] = trial.suggest_categorical(name, values.choices)
                case IntDistribution():
                    found[name] = trial.suggest_int(name, values.low, values.high, log=values.log)
                case FloatDistribution():
                    found[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
        return found

    def config(self, values: Mapping[str, Any]) -> Config:
        """Return all settings of a trial."""
        chosen = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
        if BATCH_SIZE in chosen:
            objective = str(chosen.get(OBJECTIVE, self.fixed.training.objective))
            size = self.batch_sizes.get(objective, self.fixed.training.batch_size)
            chosen[BATCH_SIZE] = max(round(size * chosen[BATCH_SIZE]), 2)
        return with_settings(self.fixed, chosen)

    def values(self, recipe: Entrant, dataset: Dataset) -> dict[str, Any]:
        """Return the values of a default recipe, those that depend on the data included."""
        resolved = resolve(recipe.config, dataset)
        settings: Any = resolved.model_dump(mode="json")
        found: dict[str, Any] = {}
        for name in self.ranges:
            value = settings
            for part in name.split("."):
                value = value[part]
            found[name] = 1.0 if name == BATCH_SIZE else 0.0 if value is None and name == NEGATIVE_WEIGHT else value
        if "training.num_epochs" in found:
            loader = TrainLoader(dataset, open_store(dataset, "valid", resolved.model), resolved, rank=0, world_size=1)
            found["training.num_epochs"] = Schedule.of(resolved.training, len(loader.plan(0))).epochs
        return found

    def as_json(self) -> Json:
        """Return the ranges as JSON: a study continues only with the same ones."""
        return {name: repr(values) for name, values in self.ranges.items()}


def _with_recipe(config: Config, recipe: str) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"recipe": recipe})})


def _ranges(config: Config, dataset: Dataset) -> dict[str, BaseDistribution]:
    """Return the ranges without what the user set, and without what has no effect on this dataset."""
    left_out = {name for name in RANGES if is_given(config, name)}
    if is_given(config, BATCH_SIZE) or not dataset.ordered:
        left_out.add(OBJECTIVE)  # a batch size has another meaning for the other objective
    if not dataset.ordered:
        left_out |= {"model.user_tower.num_blocks", "model.user_tower.pooling"}
    if config.training.max_steps is not None:
        left_out.add("training.num_epochs")
    if dataset.negatives is None:
        left_out.add(NEGATIVE_WEIGHT)
    if config.training.loss == "full_softmax":
        left_out.add("training.negatives_per_positive")
    fields = layout(dataset, open_store(dataset, "valid", config.model), config.model).item_fields
    if all(spec.name != NEIGHBOURS for spec in fields):
        left_out.add("model.item_tower.neighbour_dropout")
    ranges = {name: values for name, values in RANGES.items() if name not in left_out}
    if is_given(config, "model.item_tower.embedding_dim") or 64 % config.model.user_tower.num_heads:
        ranges.pop(DIM, None)
    if HISTORY in ranges:
        events = dataset.events
        longest = int(np.bincount(events.user_row[events.split == TRAIN], minlength=1).max())
        most = min(max(longest, config.model.user_tower.max_history), MAX_HISTORY)
        ranges[HISTORY] = IntDistribution(10, most, log=True)
    return ranges
