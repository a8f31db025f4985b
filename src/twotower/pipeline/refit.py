"""A run once more, with what was held out: its settings, its length, its baselines' settings, and more events to learn from.

Enters: the folder of a judged run. Leaves: what `run_all` leaves, in a folder of its own.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from twotower.errors import DataError
from twotower.pipeline.evaluate import run_manifest
from twotower.pipeline.stages import run_all
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import Config, SplitConfig, parse_config


def refit(run: Path, out: Path, *, include_test: bool = False, resume: bool = False) -> dict[str, Any] | None:
    """Prepare the raw data again with the validation part in training, train for as long as the best of `run` took, and judge.

    Parameters
    ----------
    run
        A judged run. The settings that its report, in `run` or beside it, found best for the baselines are theirs again.
    include_test
        The test part becomes training too: for a model to serve. Nothing is left to judge by.

    Returns
    -------
    report
        On the test part; None with `include_test`.

    Raises
    ------
    DataError
        `run` is no run, has no validation part, which says how long to train, or no report; or `out` is its own folder.
    """
    manifest = run_manifest(run)
    best = manifest["best"]
    if best["value"] is None:
        raise DataError(f"A refit needs a run with a validation part, which says how long to train. {run} has none. Give another.")
    if run.resolve() in (out.resolve(), out.resolve() / "model"):
        raise DataError(f"A refit needs a folder of its own. {out} is that of the run. Give another --out.")
    config = parse_config(load_checkpoint(run / "best.pt")["config"])
    prepare = config.prepare.model_copy(update={"split": _split(config.prepare.split, include_test=include_test)})
    training = config.training.model_copy(update={"stop_frac": best["step"] / best["total_steps"]})
    evaluation = config.evaluation
    if not include_test and evaluation.tune_baselines:
        evaluation = evaluation.model_copy(update={"baseline_settings": _chosen(run, config)})
    changed = config.model_copy(update={"prepare": prepare, "training": training, "evaluation": evaluation})
    return run_all(changed, out, resume=resume)


def _split(split: SplitConfig, *, include_test: bool) -> SplitConfig:
    if include_test:
        return SplitConfig(kind=split.kind, valid=0.0, test=0.0)
    return split.model_copy(update={"valid": split.test if isinstance(split.test, date) else 0.0})


def _chosen(run: Path, config: Config) -> dict[str, Any]:
    """Settings of the baselines in a run's report."""
    found = [folder / "report.json" for folder in (run, run.parent) if (folder / "report.json").is_file()]
    if not found:
        raise DataError(f"A refit takes the baselines' settings from a report. {run} has none. Run `twotower evaluate` first.")
    report = json.loads(found[0].read_text())
    seen = "masked" if config.evaluation.exclude_seen else "unmasked"
    if (report["protocol"]["seen"], report["protocol"]["metric"]) != (seen, config.training.eval_metric):
        raise DataError(f"A run and its report must be of one protocol. {found[0]} is of another. Run `twotower evaluate` again.")
    return {name: settings for name, settings in report["settings"].items() if settings}
