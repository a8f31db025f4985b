"""Keep the trials of `twotower tune` in an Optuna study that survives a killed process and serves several processes at once.

A trial belongs to the process that holds the lock on its folder. The system releases the lock when the process ends, however it
ends; then any process of the study continues the trial from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, Trial, TrialState

from twotower.data.dataset import Dataset
from twotower.errors import DataError
from twotower.pipeline.search_space import SearchSpace
from twotower.trainers.run_files import config_diff
from twotower.utils.config import Config

DATABASE, TRIALS, LOCK = "study.db", "trials", "lock"
RECIPE, IDENTITY = "default_recipe", "identity"
LOCK_TIMEOUT_S = 60.0
STARTUP_TRIALS = 6
"""Trials before the values are no longer drawn at random, and pruning begins after the first four."""
EIGHTHS = 8
"""Validations are compared at these shares of a training, because trainings have different lengths."""


@dataclass(frozen=True)
class TuningStudy:
    """The study in a folder.

    Attributes
    ----------
    out
        Folder with `study.db`, and in `trials/` one folder for each trial.
    """

    out: Path
    space: SearchSpace
    seed: int
    optuna: optuna.Study

    @classmethod
    def open(cls, out: Path, config: Config, dataset: Dataset) -> TuningStudy:
        """Open the study of a folder, or start one whose first trials are the default recipes.

        Raises
        ------
        DataError
            The folder holds something else, a study of other data or settings, or a damaged one.
        """
        if not (out / DATABASE).is_file() and out.is_dir() and (found := sorted(path.name for path in out.iterdir())):
            raise DataError(f"{out} is not a study of `twotower tune`: it contains {found[0]}. Choose another folder.")
        space = SearchSpace.of(config, dataset)
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / LOCK), storage_errors(out):
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            study = optuna.create_study(
                storage=_database(out / DATABASE),
                study_name="tune",
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=EIGHTHS // 4),
            )
            _identify(study, out, config, dataset, space)
            there = {trial.user_attrs.get(RECIPE) for trial in study.get_trials(deepcopy=False)}
            for recipe in space.defaults:
                if recipe.name not in there:
                    study.enqueue_trial(space.values(recipe, dataset), user_attrs={RECIPE: recipe.name})
        return cls(out, space, config.seed, study)

    def folder(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.out / TRIALS / str(number)

    def trials(self) -> list[FrozenTrial]:
        """Return the trials that have begun."""
        with storage_errors(self.out):
            return [one for one in self.optuna.get_trials(deepcopy=False) if one.state != TrialState.WAITING]

    def config(self, trial: FrozenTrial | Trial) -> Config:
        """Return all settings of a trial."""
        name = trial.user_attrs.get(RECIPE)
        recipes = {recipe.name: recipe.config for recipe in self.space.defaults}
        return recipes[name] if name else self.space.config(trial.params)

    @contextmanager
    def claim(self, most: int | None) -> Iterator[Trial | None]:
        """Yield a trial that no other process works on: an unfinished one, or a new one; None if there are `most` already."""
        with ExitStack() as locks, storage_errors(self.out):
            with locked(self.out / LOCK):
                trial = self._unfinished(locks) or self._new(locks, most)
            yield trial

    def _unfinished(self, locks: ExitStack) -> Trial | None:
        for one in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if locks.enter_context(locked(self.folder(one.number) / LOCK, wait=False)):
                trial = Trial(self.optuna, one._trial_id)
                self.space.suggest(trial)  # values that a process killed here did not choose
                return trial
        return None

    def _new(self, locks: ExitStack, most: int | None) -> Trial | None:
        trials = self.optuna.get_trials(deepcopy=False)
        number = sum(one.state != TrialState.WAITING for one in trials)
        if most is not None and number >= most:
            return None
        # One sampler for each trial: a study that was continued tries the same values as one that was not interrupted.
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self.optuna.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP_TRIALS)
        trial = self.optuna.ask()
        self.space.suggest(trial)
        locks.enter_context(locked(self.folder(trial.number) / LOCK))
        return trial


def _database(path: Path) -> optuna.storages.RDBStorage:
    """Open a SQLite database by its path, which a URL would have to quote."""

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, check_same_thread=False)

    return optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect})


def _identify(study: optuna.Study, out: Path, config: Config, dataset: Dataset, space: SearchSpace) -> None:
    """Note what a new study searches, and check that an old one searches the same."""
    identity = {"data": dataset.fingerprint, "settings": config.model_dump(mode="json"), "ranges": space.as_json()}
    known = study.user_attrs.get(IDENTITY)
    if known is None:
        study.set_user_attr(IDENTITY, identity)
        return
    if known["data"] != identity["data"]:
        raise DataError(f"{out} holds a study of another dataset. A study continues on the same data. Use another --out.")
    changed = config_diff({key: known[key] for key in ("settings", "ranges")}, {k: identity[k] for k in ("settings", "ranges")})
    if changed:
        raise DataError(
            f"{out} holds another study; the settings differ: {changed}. Restore them to continue, or use another --out."
        )


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file; yield False if another process holds it and `wait` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    """Turn errors of the database into one line."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, StorageInternalError) or type(error).__module__.startswith("sqlalchemy")):
            raise
        cause = str(error.__cause__ or error).partition("[SQL")[0]
        raise DataError(f"{out / DATABASE} cannot be read or written: {cause}. Restore it, or use another --out.") from error
