"""Resolve the number of steps of a training, its validations and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from twotower.utils.config import TrainingConfig

# Used where the settings leave them open. More than MAX_STEPS steps are made only within the first epoch.
MIN_EPOCHS, MIN_STEPS, MAX_EPOCHS, MAX_STEPS = 4, 600, 16, 10_000
MIN_VALIDATIONS, MAX_VALIDATIONS = 4, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Steps of a training.

    Attributes
    ----------
    epochs
        Number of epochs, if `training.max_steps` does not replace it.
    steps_per_epoch
        Batches of an epoch.
    total_steps
        Steps of the learning-rate schedule.
    last_step
        Step after which training ends at the latest.
    validate_every
        Steps between validations.
    warmup_steps, learning_rate
        Steps of the linear warm-up, and the rate that it reaches.
    """

    epochs: int
    steps_per_epoch: int
    total_steps: int
    last_step: int
    validate_every: int
    warmup_steps: int
    learning_rate: float

    @classmethod
    def of(cls, settings: TrainingConfig, steps_per_epoch: int) -> Schedule:
        """Return the schedule of the settings, for an epoch of `steps_per_epoch` batches.

        Examples
        --------
        >>> schedule = Schedule.of(TrainingConfig(), steps_per_epoch=100)
        >>> schedule.epochs, schedule.total_steps, schedule.validate_every
        (6, 600, 100)
        >>> [Schedule.of(TrainingConfig(), steps_per_epoch=steps).epochs for steps in (10, 1_000, 4_000, 40_000)]
        [16, 4, 2, 1]
        >>> Schedule.of(TrainingConfig(), steps_per_epoch=40_000).validate_every
        10000
        """
        epochs = settings.num_epochs or _epochs(steps_per_epoch)
        total = settings.max_steps or epochs * steps_per_epoch
        longest = 1 if settings.num_epochs else min(1, epochs / MIN_VALIDATIONS)
        between = settings.eval_every_epochs or max(longest, total / steps_per_epoch / MAX_VALIDATIONS)
        return cls(
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            last_step=total,
            validate_every=max(round(between * steps_per_epoch), 1),
            warmup_steps=max(round(total * settings.warmup_frac), 1),
            learning_rate=settings.learning_rate,
        )

    def until(self, share: float) -> Schedule:
        """Return the same schedule, of which training does only a share, above 0 and at most 1."""
        return replace(self, last_step=max(round(share * self.total_steps), 1))

    def validates(self, step: int) -> bool:
        """Return True if the full schedule has a validation after `step` steps."""
        return step % self.validate_every == 0 or step >= self.total_steps

    def rate(self, step: int) -> float:
        """Return the learning rate at `step` (from 0): linear warm-up, then cosine decay to zero.

        Examples
        --------
        >>> schedule = Schedule.of(TrainingConfig(max_steps=10, warmup_frac=0.2, learning_rate=1.0), steps_per_epoch=5)
        >>> [round(schedule.rate(step), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps * self.learning_rate
        done = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done)) * self.learning_rate


def _epochs(steps_per_epoch: int) -> int:
    """Return the smallest number from `MIN_EPOCHS` on that gives `MIN_STEPS` steps, with limits for small and for large data."""
    wanted = min(max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch)), MAX_EPOCHS)
    return max(1, min(wanted, MAX_STEPS // steps_per_epoch))
