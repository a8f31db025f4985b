"""A run once more, with what was held out: its settings, its length, its baselines' settings, and more events to learn from.

Enters: the folder of a judged run. Leaves: what `run_all` leaves, in a folder of its own.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from twotower.checkpoint import load_checkpoint
from twotower.config import Config, SplitConfig, parse_config
from twotower.errors import DataError
from twotower.pipeline import run_all, run_manifest


def refit(run: Path, out: Path, *, everything: bool = False, resume: bool = False) -> dict[str, Any] | None:
    """Prepare the data again with the validation part in training, train for as long as the best of `run` took, and judge.

    Parameters
    ----------
    run
        A trained run. The settings that its report found best for the baselines, in `run` or beside it, are theirs again.
    everything
        The test part becomes training too: for a model to serve. Nothing is left to judge by.

    Returns
    -------
    report
        On the test part; None with `everything`.

    Raises
    ------
    DataError
        `run` is no run, or has learned from its validation part already.
    """
    manifest = run_manifest(run)
    if manifest["best"]["value"] is None:
        raise DataError(f"A refit needs a run with a validation part, which says how long to train. {run} has none. Give another.")
    return run_all(_settings(run, manifest["best"], everything=everything), out, resume=resume)


def _settings(run: Path, best: dict[str, Any], *, everything: bool) -> Config:
    """Those of the checkpoint, which leave nothing to the data: another part of it must not make another model."""
    config = parse_config(load_checkpoint(run / "best.pt")["config"])
    prepare = config.prepare.model_copy(update={"split": _split(config.prepare.split, everything=everything)})
    training = config.training.model_copy(update={"stop_frac": best["step"] / best["total_steps"]})
    evaluation = config.evaluation.model_copy(update={"baseline_settings": _baselines(run) or config.evaluation.baseline_settings})
    return config.model_copy(update={"prepare": prepare, "training": training, "evaluation": evaluation})


def _split(split: SplitConfig, *, everything: bool) -> SplitConfig:
    if everything:
        return split.model_copy(update={"valid": 0.0, "test": 0.0})
    return split.model_copy(update={"valid": split.test if isinstance(split.test, date) else 0.0})


def _baselines(run: Path) -> dict[str, Any]:
    """Settings of the baselines in a run's report; none when there is no report."""
    for folder in (run, run.parent):
        if (folder / "report.json").is_file():
            settings: dict[str, Any] = json.loads((folder / "report.json").read_text())["settings"]
            return {name: values for name, values in settings.items() if values}
    return {}
