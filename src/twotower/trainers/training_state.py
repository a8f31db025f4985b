"""The progress of a training, saved with every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainingState:
    """Progress of a run.

    Attributes
    ----------
    total_steps
        Steps of the learning-rate schedule.
    best, best_step
        Best validation metric (None without a validation part), and the step of the saved model (0: none is saved yet).
    validations_since_best
        Number of validations since the best one.
    reached
        Best metric of all validations, those included that only a pause of the recipe race caused. Only the race reads it.
    earlier_steps
        Steps of the trainings that this one goes on from.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    total_steps: int = 1
    examples: int = 0
    best: float | None = None
    best_step: int = 0
    validations_since_best: int = 0
    reached: float | None = None
    earlier_steps: int = 0

    def take(self, value: float | None, *, due: bool, last: bool) -> bool:
        """Record a validation; return True if the model is to be saved as the best one.

        Parameters
        ----------
        value
            The metric; None without a validation part.
        due
            False: only a pause caused the validation, so that it changes `reached` alone.
        last
            True after the last step. Without a validation part, that model is the best one.

        Examples
        --------
        >>> state = TrainingState(step=10)
        >>> state.take(0.3, due=False, last=True), state.reached, state.best
        (False, 0.3, None)
        >>> state.take(0.2, due=True, last=False), state.best, state.best_step
        (True, 0.2, 10)
        """
        if value is not None:
            self.reached = value if self.reached is None else max(value, self.reached)
            if not due:
                return False
        better = last if value is None else self.best is None or value > self.best
        if better:
            self.best, self.best_step, self.validations_since_best = value, self.step, 0
        elif value is not None:
            self.validations_since_best += 1
        return better

    def summary(self, metric: str) -> str:
        """Return the result as one line of text."""
        if self.best_step == 0 and self.reached is not None:
            return f"paused at step {self.step} with {metric} {self.reached:.4f}"
        reached = "no validation part" if self.best is None else f"best {metric} {self.best:.4f}"
        return f"{reached}; the saved model is from step {self.best_step} of {self.step}"
