"""Define callbacks: code of your own that runs at steps, log lines and validations of a training, and may stop it.

Examples
--------
>>> class StopAtStep(Callback):
...     def on_step(self, training: Training) -> None:
...         if training.step == 100:
...             training.stop()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from twotower.trainers.run_files import read_rows
from twotower.utils import distributed
from twotower.utils.config import Config

NO_FIGURES = ("step", "epoch", "health")


@dataclass
class Training:
    """State of a running training, as callbacks see it.

    Attributes
    ----------
    config
        All settings, with the values that were chosen for this dataset.
    folder
        Folder of the run, with its checkpoints and `metrics.jsonl`.
    model
        The two-tower model, in training mode during `on_step`.
    step, last_step, steps_per_epoch, epoch, examples
        Steps done, the step at which training ends, steps of an epoch, epochs done, examples seen.
    best, best_step
        Best value of `training.eval_metric` so far (None: not validated yet), and its step.
    stopped, interrupted
        True once `stop` was called, or Ctrl-C was pressed.
    """

    config: Config
    folder: Path
    model: nn.Module
    last_step: int
    steps_per_epoch: int
    step: int = 0
    epoch: int = 0
    examples: int = 0
    best: float | None = None
    best_step: int = 0
    stopped: bool = field(default=False, init=False)
    interrupted: bool = field(default=False, init=False)

    def stop(self) -> None:
        """End the training after this step, with a validation."""
        self.stopped = True

    def logged(self) -> list[tuple[int, dict[str, float]]]:
        """Return what was logged so far, as (step, figures): also the steps before a resumed run or from the recipe race."""
        rows = read_rows(self.folder / "metrics.jsonl")
        found = [(int(row["step"]), figures_of(row)) for row in rows if "step" in row]
        return [(step, figures) for step, figures in found if figures and step <= self.step]


class Callback:
    """Base class of callbacks. Override what you need; all methods do nothing by default.

    Callbacks run in the first process only. Those of the training itself are called, not those of the recipe race before it.
    """

    def on_start(self, training: Training) -> None:
        """Run before the first step, which is not 0 where a run is resumed or the recipe race has made steps."""

    def on_step(self, training: Training) -> None:
        """Run after every step."""

    def on_log(self, training: Training, figures: Mapping[str, float]) -> None:
        """Run with the figures of every log line and of every validation."""

    def on_validation(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Run after every validation, with its metrics and "train_loss", the mean loss since the one before."""

    def on_end(self, training: Training) -> None:
        """Run once after the last step, also if the training was stopped or failed."""


class Dispatcher:
    """Call callbacks, and keep what they see up to date. As a context, it calls `on_start` and, also after an error, `on_end`.

    Parameters
    ----------
    state
        Progress of the trainer, whose values are copied into `training` before each call.
    """

    def __init__(self, callbacks: list[Callback], training: Training, state: Any) -> None:
        self.callbacks, self.training, self.state = callbacks, training, state
        self._started: list[Callback] = []
        self._look()

    def __enter__(self) -> None:
        for one in self.callbacks if distributed.rank() == 0 else []:
            self._started.append(one)
            one.on_start(self.training)

    def __exit__(self, *_: object) -> None:
        self._look()
        for one in self._started:
            one.on_end(self.training)

    def __call__(self, event: str, *values: Any) -> None:
        """Call a method of all callbacks. If one stops the training, all processes stop at the same step."""
        self._look()
        for one in self._started:
            getattr(one, event)(self.training, *values)
        if self.callbacks and event != "on_log" and distributed.world_size() > 1:
            self.training.stopped = bool(distributed.broadcast([float(self.training.stopped)])[0])

    def _look(self) -> None:
        for name in ("step", "epoch", "examples", "best", "best_step"):
            setattr(self.training, name, getattr(self.state, name))


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of `metrics.jsonl` by name.

    Examples
    --------
    >>> figures_of({"step": 3, "epoch": 0, "loss": 2.5, "note": "x"})
    {'loss': 2.5}
    """
    return {
        name: float(value)
        for name, value in row.items()
        if name not in NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
    }
