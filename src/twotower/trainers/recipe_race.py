"""Choose the training recipe of a dataset by a race: train every candidate for a share of its steps, and go on with the best.

All candidates see the same data, the same seed and the same validation questions. A candidate runs on the learning-rate schedule of
its full length, so the winner's steps are not lost: training goes on from its checkpoint. The race settles only settings that the
user left alone.

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
from twotower.trainers.base_trainer import MAX_EPOCHS, MIN_STEPS, TrainingState
from twotower.trainers.run_files import disk_errors_as_training_errors
from twotower.utils import distributed
from twotower.utils.config import Config, parse_config
from twotower.utils.console import log
from twotower.utils.types import Json

Fit = Callable[[Config, Path, bool], TrainingState]
"""Train with these settings in this folder, from its last checkpoint if the flag is set; stops after `training.stop_frac`."""

CANDIDATES: dict[str, Json] = {
    "any event": {"training.objective": "any_event"},
    "next event": {
        "training.objective": "next_event",
        "training.batch_size": 4096,
        "model.user_tower.num_blocks": 2,
        "model.user_tower.pooling": "last",
    },
}
"""Name → settings on top of the defaults, in the order of preference: of equal candidates the first is taken."""

RUNGS = (0.125, 0.25)
"""Shares of a candidate's steps at which candidates are compared. At the last the best one wins."""
CLOSE = 0.9
"""At the rungs before the last, a candidate goes on if it has at least this share of the best metric."""
TIE = 0.97
"""Candidates with at least this share of the best metric at the end count as equal; the first of `CANDIDATES` is taken."""
MIN_TOKENS = 512
FOLDER, RECORD = "recipe", "recipe.json"
UNITS = ("training.objective", "training.batch_size")
"""A batch size counts examples under one objective and tokens under the other: given alone, it means the default objective."""


@dataclass(frozen=True)
class Entrant:
    """A candidate as it runs on this dataset.

    Attributes
    ----------
    settings
        "a.b" → value: what the candidate sets, without what the user set.
    config
        All settings of its run.
    results
        One row per rung: {"share", "step", "value", "seconds"}; "seconds" are those since the rung before.
    """

    name: str
    settings: Json
    config: Config
    results: tuple[Json, ...] = field(default=())

    @property
    def value(self) -> float:
        """The validation metric at the last rung."""
        return float(self.results[-1]["value"])

    @property
    def seconds(self) -> float:
        """Time spent on it in the race."""
        return float(sum(row["seconds"] for row in self.results))

    def row(self) -> Json:
        """The entry of the record."""
        return {"name": self.name, "settings": self.settings, "results": list(self.results), "seconds": round(self.seconds, 2)}


def is_given(config: Config, name: str) -> bool:
    """Return whether the user set "a.b" explicitly."""
    section: BaseModel = config
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in section.model_fields_set:
            return False
        section = getattr(section, parent)
    return leaf in section.model_fields_set


def entrants(config: Config, *, ordered: bool = True, validated: bool = True, events: int | None = None) -> list[Entrant]:
    """Return the candidates that agree with the user's settings, best guess first.

    Parameters
    ----------
    config
        As the user gave it: its `model_fields_set` says which settings are theirs.
    ordered
        Whether test events come after the history. If not, there is no next event to predict.
    validated
        Whether there is a validation part to choose by.
    events
        Positive training events: a candidate's token budget is made small enough for them. None: it stays as it is.
    """
    fixed = config.model_copy(update={"training": config.training.model_copy(update={"recipe": "fixed"})})
    plain = [Entrant("as configured", {}, fixed)]
    if config.training.recipe == "fixed":
        return plain
    objective_given, size_given = (is_given(config, name) for name in UNITS)
    found: list[Entrant] = []
    for name, settings in CANDIDATES.items():
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


def token_budget(events: int, *, most: int) -> int:
    """Return the power of two, at most `most`, with which the longest training has about the least number of steps.

    Examples
    --------
    >>> token_budget(128_000, most=4096), token_budget(45_000, most=4096)
    (4096, 1024)
    """
    wanted = max(events * MAX_EPOCHS / MIN_STEPS, MIN_TOKENS)
    return min(1 << round(math.log2(wanted)), most)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the configuration with "a.b" → value on top."""
    values = config.model_dump(mode="json")
    for name, value in settings.items():
        *parents, leaf = name.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return parse_config(values)


def choose_recipe(runners: list[Entrant], out: Path, fit: Fit, *, resume: bool = False) -> tuple[Config, Json | None, bool]:
    """Run the race, if there is more than one entrant, and put the winner's checkpoints into `out`.

    Parameters
    ----------
    resume
        Go on with the race of a killed run: rungs that were finished are not run again.

    Returns
    -------
    config, record, started
        The winner's settings; what was tried and why this was chosen; whether `out` holds its checkpoints to go on from.
    """
    record = read_record(out) if resume else None
    if record is not None and record.get("chosen"):
        chosen = next((one for one in runners if one.name == record["chosen"]), None)
        if chosen is None:
            raise TrainingError(
                f"A resumed run must keep its settings. {out / RECORD} chose the recipe {record['chosen']!r}, which these settings "
                "exclude. Use another --out, or the settings of that run."
            )
        _hand_over(chosen, out)
        return chosen.config, record, True
    if not resume:
        _forget(out)
    if len(runners) == 1 or (resume and record is None):  # a run of one recipe, or of a version before the race
        return runners[0].config, None, resume
    winner, record = _race(_restored(runners, record), out, fit)
    _write(out, record)
    log.info("recipe: %s", record["why"])
    _hand_over(winner, out)
    return winner.config, record, True


def _race(runners: list[Entrant], out: Path, fit: Fit) -> tuple[Entrant, Json]:
    """Return the winner and the record."""
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
    """Train a candidate up to `share` of its steps; return it with the row of this rung."""
    folder = out / FOLDER / _slug(one.name)
    began = time.perf_counter()
    training = one.config.training.model_copy(update={"stop_frac": share * one.config.training.stop_frac})
    reached = fit(one.config.model_copy(update={"training": training}), folder, (folder / "last.pt").is_file())
    assert reached.best is not None, "a race needs a validation part"
    seconds = distributed.broadcast([time.perf_counter() - began])[0]
    row = {"share": share, "step": reached.step, "value": reached.best, "seconds": round(seconds, 2)}
    metric = one.config.training.eval_metric
    log.info('recipe: "%s" reached %s %.4f at step %d in %.0f s', one.name, metric, reached.best, reached.step, seconds)
    return replace(one, results=(*one.results, row))


def _recorded(winner: Entrant, runners: list[Entrant], *, tied: bool) -> Json:
    """Return the record of a finished race; `tied`: the winner was taken by its order."""
    metric, share = winner.config.training.eval_metric, winner.results[-1]["share"]
    others = [f'"{one.name}" {one.value:.4f} after {one.results[-1]["share"]:.1%}' for one in runners if one.name != winner.name]
    figures = ", ".join(others)
    seconds = sum(one.seconds for one in runners)
    reason = (
        "is within 3 % of the best, and comes first in the order of candidates: validation" if tied else "has the best validation"
    )
    why = (
        f'"{winner.name}" {reason} {metric} after {share:.1%} of its steps {winner.value:.4f}; {figures}. '
        f"The comparison took {seconds:.0f} s, of which {winner.seconds:.0f} s are steps of this run."
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
    """Return the record in a run's folder, None where there is none that can be read."""
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
    """Return the entrants with the rungs that a killed race finished."""
    rows = {row["name"]: row for row in (record or {}).get("tried", []) if isinstance(row, dict)}
    known = [rows.get(one.name) for one in runners]
    return [
        replace(one, results=tuple(row["results"])) if row and row["settings"] == one.settings else one
        for one, row in zip(runners, known, strict=True)
    ]


def _hand_over(winner: Entrant, out: Path) -> None:
    """Move the winner's files into `out`, `last.pt` at the end, and drop the rest. It may be cut off and called again."""
    folder = out / FOLDER / _slug(winner.name)
    if distributed.rank() == 0 and (folder / "last.pt").is_file():
        if (folder / "tensorboard").is_dir():
            shutil.rmtree(out / "tensorboard", ignore_errors=True)
        for name in ("tensorboard", "metrics.jsonl", "best.pt", "last.pt"):
            if (folder / name).exists():
                (folder / name).replace(out / name)
    if distributed.rank() == 0:
        shutil.rmtree(out / FOLDER, ignore_errors=True)
    distributed.broadcast([0.0])  # all wait until the files are there


def _forget(out: Path) -> None:
    """Remove the race of an earlier run in this folder."""
    if distributed.rank() == 0:
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        (out / RECORD).unlink(missing_ok=True)


def _slug(name: str) -> str:
    return name.replace(" ", "-")
