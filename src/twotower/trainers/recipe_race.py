"""Choose the training recipe of a dataset: train every candidate for a share of its steps, and continue with the best.

All candidates use the same data, seed and validation queries. A candidate runs on the learning-rate schedule of its full length, so
the winner's steps are kept: training continues from its checkpoint. The race changes only settings that the user did not set.

Examples
--------
>>> from twotower.utils.config import load_config
>>> [entrant.name for entrant in entrants(load_config(None, ["training.objective=next_event"]))]
['next event']
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from twotower.errors import TrainingError
from twotower.trainers.run_files import disk_errors_as_training_errors
from twotower.trainers.schedule import MAX_EPOCHS, MIN_STEPS
from twotower.trainers.training_state import TrainingState
from twotower.utils import distributed
from twotower.utils.config import Config, parse_config
from twotower.utils.console import log
from twotower.utils.types import Json

Fit = Callable[[Config, Path, bool, float], TrainingState]
"""Trains with the given settings in a folder, from its last checkpoint if the flag is set, for a share of the steps."""

CANDIDATES: dict[str, Json] = {
    "any event": {"training.objective": "any_event"},
    "next event": {
        "training.objective": "next_event",
        "training.batch_size": 4096,
        "model.user_tower.num_blocks": 2,
        "model.user_tower.pooling": "last",
        "model.user_tower.norm_shrinkage": 0.0,
    },
}
"""Name → settings on top of the defaults, in order of preference: a tie goes to the first candidate."""

NEGATIVE_WEIGHTS = (0.1,)
"""Values of `training.negative_weight` that each candidate also races with if there are explicit negatives or impressions."""
RUNGS = (0.125, 0.25)
"""Shares of the full training at which candidates are compared. The best one at the last rung wins."""
CLOSE = 0.9
"""Before the last rung, a candidate continues if it has at least this share of the best metric."""
TIE = 0.97
"""At the end, candidates with at least this share of the best metric are tied; the first of `CANDIDATES` wins."""
MIN_TOKENS = 512
FOLDER, RECORD = "recipe", "recipe.json"
UNITS = ("training.objective", "training.batch_size")
"""The batch size counts examples for one objective and tokens for the other. Set alone, it implies the default objective."""


@dataclass(frozen=True)
class Entrant:
    """A candidate of the race on this dataset.

    Attributes
    ----------
    settings
        "a.b" → value: settings of the candidate that the user did not set.
    config
        All settings of its run.
    results
        One row per rung: {"share", "step", "value", "seconds"}; "seconds" since the previous rung.
    """

    name: str
    settings: Json
    config: Config
    results: tuple[Json, ...] = field(default=())

    @property
    def value(self) -> float:
        """Validation metric at the last rung."""
        return float(self.results[-1]["value"])

    @property
    def seconds(self) -> float:
        """Training time in the race."""
        return float(sum(row["seconds"] for row in self.results))

    def row(self) -> Json:
        """Return the candidate's entry in the record."""
        return {"name": self.name, "settings": self.settings, "results": list(self.results), "seconds": round(self.seconds, 2)}


def is_given(config: Config, name: str) -> bool:
    """Return True if the user set "a.b" explicitly.

    Examples
    --------
    >>> is_given(parse_config({"training": {"batch_size": 64}}), "training.batch_size")
    True
    """
    section: BaseModel = config
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in section.model_fields_set:
            return False
        section = getattr(section, parent)
    return leaf in section.model_fields_set


def entrants(
    config: Config, *, ordered: bool = True, validated: bool = True, events: int | None = None, negatives: bool = False
) -> list[Entrant]:
    """Return the candidates that are compatible with the user's settings, in order of preference.

    Parameters
    ----------
    config
        The user's settings; `model_fields_set` shows which ones the user set.
    ordered
        True if test events come after the history. If not, there is no next event to predict.
    validated
        True if there is a validation part to compare candidates on.
    events
        Number of positive training events, which determines the batch size in tokens (see `token_budget`). None: the default size.
    negatives
        True if there are explicit negatives or impressions to learn from.
    """
    fixed = config.model_copy(update={"training": config.training.model_copy(update={"recipe": "fixed"})})
    plain = [Entrant("as configured", {}, fixed)]
    if config.training.recipe == "fixed":
        return plain
    objective_given, size_given = (is_given(config, name) for name in UNITS)
    found: list[Entrant] = []
    for name, settings in _candidates(negatives and not is_given(config, "training.negative_weight")).items():
        objective = config.training.objective if objective_given or size_given else settings["training.objective"]
        if settings["training.objective"] != objective or (objective != "any_event" and not ordered):
            continue
        free = {key: value for key, value in settings.items() if not is_given(config, key)}
        if objective != "any_event" and events is not None and "training.batch_size" in free:
            free["training.batch_size"] = token_budget(events, most=free["training.batch_size"])
        entrant = Entrant(name, free, with_settings(fixed, free))
        if all(entrant.config != other.config for other in found):
            found.append(entrant)
    return (found if validated else found[:1]) or plain


def _candidates(negatives: bool) -> dict[str, Json]:
    """Return the candidates, and with negatives each of them also with every weight; those without come first."""
    weighted = {
        f"{name}, negatives x {weight:g}": {**settings, "training.negative_weight": weight}
        for weight in NEGATIVE_WEIGHTS
        for name, settings in CANDIDATES.items()
        if negatives
    }
    return CANDIDATES | weighted


def token_budget(events: int, *, most: int) -> int:
    """Return a batch size in tokens: a power of two, at most `most`.

    With it, `MAX_EPOCHS` epochs have about `MIN_STEPS` steps.

    Examples
    --------
    >>> token_budget(128_000, most=4096), token_budget(45_000, most=4096)
    (4096, 1024)
    """
    wanted = max(events * MAX_EPOCHS / MIN_STEPS, MIN_TOKENS)
    return min(1 << round(math.log2(wanted)), most)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a copy of the configuration with the settings "a.b" → value applied.

    Examples
    --------
    >>> with_settings(parse_config({}), {"training.batch_size": 64}).training.batch_size
    64
    """
    values = config.model_dump(mode="json")
    for name, value in settings.items():
        *parents, leaf = name.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return parse_config(values)


def choose_recipe(runners: list[Entrant], out: Path, fit: Fit, *, resume: bool = False) -> tuple[Config, Json | None, bool]:
    """Run the race if there is more than one candidate, and move the winner's checkpoints into `out`.

    Parameters
    ----------
    resume
        Continue the race of a killed run; finished rungs are not repeated.

    Returns
    -------
    config, record, started
        The winner's settings; the candidates and the reason for the choice; True if `out` has checkpoints to continue from.
    """
    record = read_record(out) if resume else None
    if record is not None and record.get("chosen"):
        chosen = next((one for one in runners if one.name == record["chosen"]), None)
        if chosen is None:
            raise TrainingError(
                f"{out / RECORD} chose the recipe {record['chosen']!r}, which the given settings exclude. "
                "A resumed run needs the same settings. Use another --out, or the settings of that run."
            )
        _keep_winner(chosen, out)
        return chosen.config, record, True
    if not resume:
        _forget(out)
    if len(runners) == 1 or (resume and record is None):  # one recipe, or a run of a version without the race
        return runners[0].config, None, resume
    winner, record = _race(_restored(runners, record), out, fit)
    _write(out, record)
    log.info("recipe: %s", record["why"])
    _keep_winner(winner, out)
    return winner.config, record, True


def _race(runners: list[Entrant], out: Path, fit: Fit) -> tuple[Entrant, Json]:
    """Run the race and return the winner and the record."""
    log.info("recipe: comparing %s on the validation part", " and ".join(f'"{one.name}"' for one in runners))
    done: dict[str, Entrant] = {one.name: one for one in runners}
    _write(out, {"tried": [one.row() for one in runners]})
    racing = list(done.values())
    for number, share in enumerate(RUNGS):
        for one in racing:
            if len(one.results) <= number:
                done[one.name] = _run(one, share, out, fit)
                _write(out, {"tried": [each.row() for each in done.values()]})
        at_rung = {one.name: float(done[one.name].results[number]["value"]) for one in racing}
        best = max(at_rung.values())
        racing = [done[one.name] for one in racing if at_rung[one.name] >= CLOSE * best]
        if len(racing) == 1:
            break
    tied = [one for one in racing if one.value >= TIE * max(each.value for each in racing)]
    winner = tied[0]
    return winner, _recorded(winner, list(done.values()), tied=len(tied) > 1)


def _run(one: Entrant, share: float, out: Path, fit: Fit) -> Entrant:
    """Train a candidate until `share` of its steps and return it with the result of this rung."""
    folder = out / FOLDER / _slug(one.name)
    began = time.perf_counter()
    state = fit(one.config, folder, (folder / "last.pt").is_file(), share)
    assert state.reached is not None, "a race needs a validation part"
    seconds = distributed.broadcast([time.perf_counter() - began])[0]
    row = {"share": share, "step": state.step, "value": state.reached, "seconds": round(seconds, 2)}
    metric = one.config.training.eval_metric
    log.info('recipe: "%s" reached %s %.4f at step %d in %.0f s', one.name, metric, state.reached, state.step, seconds)
    return replace(one, results=(*one.results, row))


def _recorded(winner: Entrant, runners: list[Entrant], *, tied: bool) -> Json:
    """Return the record of a finished race; `tied`: the winner was chosen by the order of preference."""
    metric, share = winner.config.training.eval_metric, winner.results[-1]["share"]
    others = [f'"{one.name}" {one.value:.4f} after {one.results[-1]["share"]:.1%}' for one in runners if one.name != winner.name]
    figures = ", ".join(others)
    seconds = sum(one.seconds for one in runners)
    reason = "is within 3 % of the best and preferred: validation" if tied else "has the best validation"
    if not winner.value:
        reason = "is preferred, because no candidate has found a target: validation"
    why = (
        f'"{winner.name}" {reason} {metric} after {share:.1%} of its steps {winner.value:.4f}; {figures}. '
        f"The comparison took {seconds:.0f} s; {winner.seconds:.0f} s of it are part of this run's training."
    )
    tried = [one.row() for one in runners]
    return {
        "chosen": winner.name,
        "why": why,
        "settings": winner.settings,
        "metric": metric,
        "tried": tried,
        "seconds": round(seconds, 2),
    }


# Files.


def read_record(out: Path) -> Json | None:
    """Return the record of a run's folder, or None if there is no readable one."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _write(out: Path, record: Json) -> None:
    if distributed.rank() > 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    beside = out / f".{RECORD}.partial"
    with disk_errors_as_training_errors(out):
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        beside.replace(out / RECORD)


def _restored(runners: list[Entrant], record: Json | None) -> list[Entrant]:
    """Return the candidates with the results of the rungs that a killed race finished."""
    rows = {row["name"]: row for row in (record or {}).get("tried", []) if isinstance(row, dict)}
    known = [rows.get(one.name) for one in runners]
    return [
        replace(one, results=tuple(row["results"])) if row and row["settings"] == one.settings else one
        for one, row in zip(runners, known, strict=True)
    ]


def _keep_winner(winner: Entrant, out: Path) -> None:
    """Move the winner's files into `out`, `last.pt` at the end, and delete the rest. Safe to repeat after an interruption."""
    folder = out / FOLDER / _slug(winner.name)
    if distributed.rank() == 0 and (folder / "last.pt").is_file():
        for name in ("metrics.jsonl", "best.pt", "last.pt"):
            if (folder / name).exists():
                (folder / name).replace(out / name)
    if distributed.rank() == 0:
        shutil.rmtree(out / FOLDER, ignore_errors=True)
    distributed.broadcast([0.0])  # a barrier: all processes wait for the files


def _forget(out: Path) -> None:
    """Remove the race of an earlier run in this folder."""
    if distributed.rank() == 0:
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        (out / RECORD).unlink(missing_ok=True)


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")
