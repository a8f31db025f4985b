"""Compare the trials of a search with the default recipe, and write what was found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.evaluation.bootstrap import resample
from twotower.evaluation.comparison import users_of
from twotower.pipeline.tune_study import RECIPE, TuningStudy
from twotower.utils.atomic_files import atomic_file
from twotower.utils.config import Config
from twotower.utils.documents import Interval
from twotower.utils.nouns import counted
from twotower.utils.types import Float64, Int, Json

VALUES, BEST, ROWS = "validation.npy", "best.yaml", "trials.jsonl"
MAX_PRINTED = 5
MIN_FOR_IMPORTANCES = 5
CONFIDENCE_PERCENT = 95
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
}
HEADER = "# Written by `twotower tune`: trial {number}, validation {metric} {value:.4f} (default recipe: {default:.4f}).\n"


@dataclass(frozen=True)
class TuneResult:
    """State of a search: finished trials, default and best.

    Attributes
    ----------
    trials
        All trials that have begun, by number.
    """

    study: TuningStudy
    trials: list[FrozenTrial]
    held_out: HeldOut

    @property
    def metric(self) -> str:
        """Name of the deciding metric."""
        return self.study.space.fixed.training.eval_metric

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials that were trained to their end, the best first; the earlier one of two equal ones."""
        done = [one for one in self.trials if one.state == TrialState.COMPLETE]
        return sorted(done, key=lambda one: (-(one.value or 0.0), one.number))

    @property
    def default(self) -> FrozenTrial | None:
        """The best of the default recipes; None before all of them are finished."""
        recipes = [one for one in self.finished if RECIPE in one.user_attrs]
        return recipes[0] if len(recipes) == len(self.study.space.defaults) else None

    @property
    def best(self) -> FrozenTrial | None:
        """The best finished trial that is no default recipe."""
        return next((one for one in self.finished if RECIPE not in one.user_attrs), None)

    @cached_property
    def difference(self) -> Interval | None:
        """The metric of the best trial minus that of the default recipe, with a 95 % interval that allows for the choice."""
        default, best = self.default, self.best
        if default is None or best is None:
            return None
        order = [one.number for one in self.finished]
        values = np.stack([np.load(self.study.folder(number) / VALUES) for number in order], 1)
        resamples = self.study.space.fixed.evaluation.bootstrap_resamples
        return lead(values, users_of(self.held_out), order.index(best.number), order.index(default.number), resamples=resamples)

    @property
    def beats(self) -> bool:
        """True if the best trial beats the default recipe by more than the noise."""
        return self.difference is not None and self.difference.low > 0

    @cached_property
    def importances(self) -> dict[str, float]:
        """Share of the variation between the trials that each setting explains; empty before there are enough trials."""
        values = {one.value for one in self.finished}
        if len(self.finished) < MIN_FOR_IMPORTANCES or len(values) == 1:
            return {}
        return optuna.importance.get_param_importances(self.study.optuna)

    def progress(self, number: int, left_s: float) -> str:
        """Return one line about trial `number` and the best so far."""
        one = next(one for one in self.trials if one.number == number)
        value = _value(one)
        text = f"trial {number} {STATES[one.state]}" + ("" if value is None else f" with {self.metric} {value:.4f}")
        first = self.finished[0] if self.finished else None
        best = f"; best so far {first.value:.4f} (trial {first.number}{_recipe(first)})" if first else ""
        default = f"; default {self.default.value:.4f}" if self.default else ""
        return f"{text}{best}{default}; {left_s / 3600:.2f} hours left"

    def table(self) -> str:
        """Return the best trials as a table, and the importances of the settings."""
        rows = [f"{'trial':>5}  {self.metric:>10}  {'steps':>7}  {'time':>7}"]
        for one in self.finished[:MAX_PRINTED]:
            attrs = one.user_attrs
            rows.append(f"{one.number:>5}  {one.value:>10.4f}  {attrs['steps']:>7,}  {attrs['seconds']:>5.0f} s{_recipe(one)}")
        counts = [(name, sum(one.state == state for one in self.trials)) for state, name in STATES.items()]
        states = ", ".join(f"{count} {name}" for name, count in counts if count)
        trials = counted(len(self.trials), "trial")
        rows.append(f"{trials}: {states}." if states else f"{trials}.")
        if self.importances:
            shares = [f"{name} {share:.0%}" for name, share in list(self.importances.items())[:MAX_PRINTED]]
            rows.append(f"Most important: {', '.join(shares)}.")
        return "\n".join(rows)

    def verdict(self) -> str:
        """Return one sentence: whether a trial beats the default recipe."""
        queries = f"{len(self.held_out.queries):,} validation queries"
        default, best, gap = self.default, self.best, self.difference
        count = len(self.study.space.defaults)
        if default is None:
            what = "default recipe is" if count == 1 else f"{count} default recipes are"
            trials = f" If you limit --trials, give at least {count}." if count > 1 else ""
            return f"The {what} not trained to the end yet: nothing can be compared. Repeat the command to continue.{trials}"
        if best is None or gap is None:
            trained = (
                "the default recipe was trained to its end; it"
                if count == 1
                else "default recipes were trained to their end; the best"
            )
            return f"Only {trained} has validation {self.metric} {default.value:.4f}."
        gain_text = f"{self.metric} {best.value:.4f} against {default.value:.4f} on {queries}"
        noise = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
        if not self.beats:
            return f"No trial beats the default recipe by more than the noise: trial {best.number} has {gain_text}, {noise}."
        return f"Trial {best.number} beats the default recipe: {gain_text}, {noise}."

    def rows(self) -> list[Json]:
        """Return one JSON object per trial."""
        return [
            {
                "trial": one.number,
                "state": STATES[one.state],
                "default_recipe": one.user_attrs.get(RECIPE),
                self.metric: _value(one),
                "steps": one.user_attrs.get("steps"),
                "seconds": one.user_attrs.get("seconds"),
                "error": one.user_attrs.get("error"),
                "settings": changed(self.study.config(one)),
            }
            for one in self.trials
        ]


def result_of(study: TuningStudy, dataset: Dataset) -> TuneResult:
    """Return what a study has found so far."""
    fixed = study.space.fixed
    held_out = dataset.held_out("valid", max_queries=fixed.training.eval_queries, seed=fixed.seed)
    return TuneResult(study, study.trials(), held_out)


def write_result(result: TuneResult) -> None:
    """Write `trials.jsonl`, and `best.yaml` if a trial beats the default recipe; if none does, remove an older one."""
    out = result.study.out
    with atomic_file(out / ROWS) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in result.rows()), encoding="utf-8")
    best, default = result.best, result.default
    if not result.beats or best is None or default is None:
        (out / BEST).unlink(missing_ok=True)
        return
    head = HEADER.format(number=best.number, metric=result.metric, value=best.value, default=default.value)
    text = yaml.safe_dump(changed(result.study.config(best)), sort_keys=False, allow_unicode=True, width=120)
    with atomic_file(out / BEST) as beside:
        beside.write_text(head + text, encoding="utf-8")


def lead(values: Float64, user: Int, best: int, other: int, *, resamples: int, seed: int = 0) -> Interval:
    """Return the difference of two columns with a 95 % interval that allows for the choice of the first one among all columns.

    The best of many trials is partly the luckiest one. The half-width of the interval is therefore a quantile of the largest
    deviation of any trial, over paired bootstrap resamples of the users (simultaneous intervals: Romano and Wolf, "Stepwise
    Multiple Testing as Formalized Data Snooping", Econometrica 2005).

    Parameters
    ----------
    values
        float64 [B, C]: one row per query, one column per trial.
    user
        int64 [B]: the user of each query.

    Examples
    --------
    >>> lead(np.array([[0.5, 0.25], [0.5, 0.25]]), np.array([2, 3]), 0, 1, resamples=10)
    Interval(value=0.25, low=0.25, high=0.25)
    """
    draws = resample(values, user, resamples, seed)
    gaps = values.mean(0) - values[:, other].mean()
    deviation = np.abs(draws - draws[:, [other]] - gaps).max(axis=1)
    margin = float(np.percentile(deviation, CONFIDENCE_PERCENT))
    value = float(gaps[best])
    return Interval(value=round(value, 6), low=round(value - margin, 6), high=round(value + margin, 6))


def changed(config: Config) -> Json:
    """Return the settings that differ from the defaults, as nested plain values.

    Examples
    --------
    >>> changed(Config(seed=3))
    {'seed': 3}
    """
    return _difference(config.model_dump(mode="json"), Config().model_dump(mode="json"))


def _difference(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = _difference(value, default), {}
        if value != default:
            found[name] = value
    return found


def _value(trial: FrozenTrial) -> float | None:
    """Return the result of a trial, or the last value of one that did not end."""
    return trial.value if trial.value is not None else trial.intermediate_values.get(trial.last_step or 0)


def _recipe(trial: FrozenTrial) -> str:
    return f', default recipe "{trial.user_attrs[RECIPE]}"' if RECIPE in trial.user_attrs else ""
