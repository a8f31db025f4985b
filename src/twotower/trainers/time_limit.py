"""Say what an epoch takes, and end a training in time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from twotower.trainers.callbacks import Callback, Training
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.console import log
from twotower.utils.nouns import counted

FIRST_STEPS, MEASURED_STEPS = 2, 8  # the first steps allocate memory and are slower
RESERVED_VALIDATIONS = 3  # a last validation, the calibration and the export take about as long as three


class TimeLimit(Callback):
    """Log the time of an epoch after the first steps, and stop the training before its time is over.

    The clock starts when the object is made: it covers the recipe race and the training.

    Parameters
    ----------
    hours
        `training.max_hours`; None: no limit.
    """

    def __init__(self, hours: float | None) -> None:
        self.limit_s = None if hours is None else hours * 3600
        self._began = self._mark = time.perf_counter()
        self._start = self._validation_s = 0.0

    def on_start(self, training: Training) -> None:
        """See `Callback`."""
        self._start = training.step

    def on_step(self, training: Training) -> None:
        """See `Callback`."""
        now, done = time.perf_counter(), training.step - self._start
        if done == FIRST_STEPS:
            self._mark = now
        if done == FIRST_STEPS + MEASURED_STEPS:
            self._tell(training, (now - self._mark) / MEASURED_STEPS, now)
        if self.limit_s is None or training.stopped:
            return
        if now - self._began >= self.limit_s - RESERVED_VALIDATIONS * self._validation_s and training.step < training.last_step:
            log.warning(
                "training.max_hours is over: stopping at step %d of %d; --resume goes on from here",
                training.step,
                training.last_step,
            )
            training.stop()

    def on_log(self, training: Training, figures: Mapping[str, float]) -> None:  # noqa: ARG002
        """See `Callback`."""
        self._validation_s = max(self._validation_s, figures.get("validation_s", 0.0))

    def _tell(self, training: Training, step_s: float, now: float) -> None:
        left = training.last_step - training.step
        epoch = counted(training.steps_per_epoch, "step")
        measured = f"an epoch of {epoch} takes about {duration(step_s * training.steps_per_epoch)}"
        log.info("%s, the rest (%s) %s, validations aside", measured, counted(left, "step"), duration(step_s * left))
        if self.limit_s is not None and step_s * left > self.limit_s - (now - self._began):
            reached = training.step + int(max(self.limit_s - (now - self._began), 0) / step_s)
            log.warning("training.max_hours will end the training at about step %d of %d", reached, training.last_step)


def duration(seconds: float) -> str:
    """Return a time in a unit that suits it.

    Examples
    --------
    >>> duration(4.21), duration(600), duration(9000)
    ('4.2 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def is_unfinished(run: Path) -> bool:
    """Return True if a run has steps left that its early stopping did not spare: `--resume` would go on.

    Raises
    ------
    TrainingError
        The checkpoint cannot be read.
    """
    state = load_checkpoint(run / "last.pt")
    progress, patience = state["progress"], state["config"]["training"]["patience"]
    return bool(progress["step"] < progress["total_steps"] and progress["validations_since_best"] < patience)
