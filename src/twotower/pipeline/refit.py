"""Train a finished run again with the held-out events, with its settings and for the number of steps of its best checkpoint.

The output is that of `run_all`, in a new folder.
"""

from __future__ import annotations

from datetime import date
from inspect import signature
from pathlib import Path
from typing import Any

from twotower.baselines.baselines import BASELINES
from twotower.errors import DataError, nearest
from twotower.evaluation.report import read_report
from twotower.pipeline.run_folder import run_manifest
from twotower.pipeline.stages import run_all
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import Config, SplitConfig, parse_config
from twotower.utils.documents import Report
from twotower.utils.manifests import RefitSettings


def refit(run: Path, out: Path, *, include_test: bool = False, resume: bool = False) -> Report | None:
    """Prepare the raw data with the validation part in training, train as long as the best checkpoint of `run`, and evaluate.

    Parameters
    ----------
    run
        An evaluated run. The baselines get the settings of its report, which is in `run` or its parent folder.
    include_test
        Train on the test part too, for a model to serve. Then there is no evaluation.

    Returns
    -------
    report
        Evaluation on the test part; None with `include_test`.

    Raises
    ------
    DataError
        `run` is not a run, has no validation part (which determines the number of steps) or no report; or `out` is its folder.
    """
    manifest = run_manifest(run)
    if manifest.update is not None:
        raise DataError(f"{run} is an update: its raw data are not all in one place. Train them anew with `twotower run`.")
    best = manifest.best
    if best.value is None:
        raise DataError(f"{run} has no validation part. A refit needs one to know how long to train. Choose another run.")
    if run.resolve() in (out.resolve(), out.resolve() / "model"):
        raise DataError(f"{out} is the folder of the run. A refit needs its own folder. Choose another --out.")
    checkpoint = load_checkpoint(run / "best.pt")
    config, weights = parse_config(checkpoint["config"]), checkpoint["model"]
    prepare = config.prepare.model_copy(update={"split": _split(config.prepare.split, include_test=include_test)})
    tuned = not include_test and config.evaluation.tune_baselines
    taken = RefitSettings(
        stop_frac=best.step / best.total_steps,
        baseline_settings=_chosen(run, config) if tuned else {},
        priors={name.removeprefix("priors."): value.tolist() for name, value in weights.items() if name.startswith("priors.")},
    )
    return run_all(config.model_copy(update={"prepare": prepare}), out, resume=resume, refit=taken)


def _split(split: SplitConfig, *, include_test: bool) -> SplitConfig:
    if include_test:
        return SplitConfig(kind=split.kind, valid=0.0, test=0.0)
    return split.model_copy(update={"valid": split.test if isinstance(split.test, date) else 0.0})


def _chosen(run: Path, config: Config) -> dict[str, Any]:
    """Return the settings of the baselines in a run's report."""
    found = [folder / "report.json" for folder in (run, run.parent) if (folder / "report.json").is_file()]
    if not found:
        raise DataError(f"{run} has no report. A refit takes the baselines' settings from it. Run `twotower evaluate` first.")
    report = read_report(found[0])
    seen = "masked" if config.evaluation.exclude_seen else "unmasked"
    if (report.protocol.seen, report.protocol.metric) != (seen, config.training.eval_metric):
        raise DataError(
            f"{found[0]} has another metric or rule for seen items than the run. They must agree. Run `twotower evaluate` again."
        )
    chosen = {name: settings for name, settings in report.settings.items() if settings}
    for name in chosen.keys() & BASELINES.keys():
        known = [*signature(BASELINES[name]).parameters][1:]
        for key in chosen[name]:
            if key not in known:
                raise DataError(f"{found[0]} has the unknown setting {key!r} of the baseline {name!r}.{nearest(key, known)}")
    return chosen
