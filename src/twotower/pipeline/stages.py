"""Implement the stages of the pipeline. Each stage reads folders and writes one with a `manifest.json`, so it can be run alone.

simulate ─▶ raw files ─▶ prepare ─▶ dataset ─▶ train ─▶ run (checkpoints, bundle) ─▶ evaluate ─▶ report
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import torch

import twotower.trainers  # noqa: F401 - first, so that a missing extra is one line
from twotower.bundle.bundle import export_bundle, note_report
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import resolve
from twotower.data.prepare import prepare
from twotower.data.simulator.simulate import simulate
from twotower.data.sources.account import account_table
from twotower.errors import DataError
from twotower.evaluation.report import read_report
from twotower.pipeline.calibrate import calibrate_run
from twotower.pipeline.evaluate import evaluate_stage, has_test
from twotower.pipeline.run_folder import dataset_reference, run_dataset, run_manifest
from twotower.trainers.callbacks import Callback
from twotower.trainers.grown_checkpoint import Start
from twotower.trainers.loggers import TensorBoardLogger
from twotower.trainers.memory.duration import as_lines
from twotower.trainers.memory.plan import DEVICES, GB, WITH_BF16, Machine, explain, is_out_of_memory, make_plan
from twotower.trainers.memory.plan import as_table as as_plan
from twotower.trainers.memory.sizes import dataset_sizes, yelp_sizes
from twotower.trainers.optimizer import choose_device, choose_precision
from twotower.trainers.recipe_race import RECORD, choose_recipe, entrants
from twotower.trainers.run_files import config_diff
from twotower.trainers.time_limit import TimeLimit
from twotower.trainers.training_state import TrainingState
from twotower.trainers.two_tower_trainer import TwoTowerTrainer, check_validation
from twotower.utils import distributed
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import Config, ResolvedConfig
from twotower.utils.console import is_first_process, log, progress
from twotower.utils.documents import RecipeRecord, Report
from twotower.utils.hardware import memory, status, trim_heap
from twotower.utils.manifests import BestValidation, BundleManifest, DatasetManifest, RefitSettings, RunManifest
from twotower.utils.nouns import counted
from twotower.utils.registry import check_names
from twotower.utils.run_parts import BEGIN, MANIFEST, OF_A_TRAINING, REPORT, REPORT_PAGE, REPORTS, remove_parts

Result = TypeVar("Result")

NEVER_RAN = TrainingState(reached=-math.inf)  # a candidate of the recipe race that Ctrl-C kept from running
TOWN = {"users": 3000, "businesses": 1500, "events": 60_000}


def simulate_stage(out: Path, *, users: int, businesses: int, events: int, seed: int, impressions: bool = False) -> dict[str, int]:
    """Write a simulated town's raw files to `out`, and return the number of rows by file."""
    with progress() as report:
        sizes = {"users": users, "businesses": businesses, "events": events}
        return simulate(
            out, **sizes, seed=seed, impressions=impressions, progress=lambda done, total: report("simulate", done, total)
        )


@dataclass
class Watch:
    """Observers of a training, which may end it.

    Attributes
    ----------
    callbacks
        Called during the training; see `trainers.callbacks`.
    interruptible
        True: Ctrl-C ends the training, and the best model so far is exported. False: it raises `KeyboardInterrupt`.
    interrupted
        True after Ctrl-C has ended a training.
    """

    callbacks: Sequence[Callback] = ()
    interruptible: bool = False
    interrupted: bool = False


def prepare_stage(config: Config, out: Path, tables: Mapping[str, pa.Table] | None = None) -> DatasetManifest:
    """Turn raw files, or tables in memory, into the dataset folder `out`, and return its manifest."""
    with progress() as report:
        manifest = prepare(config, out, tables=tables, progress=lambda stage: report(f"prepare: {stage}", 0, 0))
    log.info("what was read:\n%s", "\n".join(account_table(manifest.counts.json_values())))
    for warning in manifest.warnings:
        log.warning("%s", warning)
    return manifest


def train_stage(
    config: Config,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    bundle: Path | None = None,
    refit: RefitSettings | None = None,
    watch: Watch | None = None,
) -> BestValidation:
    """Train on the dataset `data`; write checkpoints, the log and `manifest.json` to `out`, and a bundle to `bundle`.

    The default bundle folder is `out`/bundle. The `data` and `prepare` settings that the dataset was made with replace those of
    `config`. `refit` holds what a refit takes from the run that it repeats.

    Returns
    -------
    BestValidation
        Its value is None without a validation part.
    """
    check_names(config)
    watch, anew = watch or Watch(), not resume
    dataset = Dataset.open(data)
    config = as_made(config, dataset)
    valid, events = check_validation(dataset, config), dataset.n_train_events
    runners = entrants(config, ordered=dataset.ordered, validated=valid, events=events, negatives=dataset.negatives is not None)
    device, share = choose_device(config.training.device), refit.stop_frac if refit else 1.0
    limit = TimeLimit(config.training.max_hours)
    with distributed.process_group(device):
        race = partial(fit_within, dataset, device, watch, callbacks=[limit])
        chosen, recipe, resume = choose_recipe(runners, out, race, resume=resume)
        resolved = resolve(chosen, dataset)
        explained = partial(_or_explain, resolved, dataset, device, out)
        resolved, trim_above_bytes = explained(lambda: _within_budget(resolved, dataset, device))
        _remove_older(out, anew=anew)
        called = [limit, TensorBoardLogger(), *watch.callbacks]
        reached = explained(lambda: _fit(resolved, dataset, out, trim_above_bytes, watch, resume, share, callbacks=called))
        first = distributed.rank() == 0
    trim_heap()
    kept = None if refit is None else {name: torch.tensor(value) for name, value in refit.priors.items()}
    calibration = calibrate_run(resolved, dataset, out / "best.pt", priors=kept, fit=refit is None) if first else None
    best = BestValidation(
        metric=config.training.eval_metric, value=reached.best, step=reached.best_step, total_steps=reached.total_steps
    )
    if not first:
        return best  # only the first process writes the remaining files
    manifest = RunManifest(
        seed=config.seed,
        dataset=dataset_reference(data, out),
        data=dataset.fingerprint,
        config=resolved,
        best=best,
        recipe=None if recipe is None else RecipeRecord.model_validate(recipe),
        calibration=calibration,
        refit=refit,
    )
    (out / "manifest.json").write_text(json.dumps(manifest.json_values(), indent=1, sort_keys=True))
    trim_heap()
    explained(lambda: export_bundle(out / "best.pt", dataset, bundle or out / "bundle", metrics=best))
    return best


def _remove_older(out: Path, *, anew: bool) -> None:
    """Remove what an older run in this folder has beside the files that a new one writes."""
    if anew and distributed.rank() == 0:
        remove_parts(out, ("model", MANIFEST, BEGIN, *REPORTS))


def as_made(config: Config, dataset: Dataset) -> Config:
    """Return the settings with the dataset's own `data` and `prepare`; `model_fields_set` of the others is kept."""
    made = dataset.manifest.config
    return config.model_copy(update={"data": made.data, "prepare": made.prepare})


def _within_budget(config: ResolvedConfig, dataset: Dataset, device: torch.device) -> tuple[ResolvedConfig, int | None]:
    """Return settings within `training.memory_budget_gb`, and the process size above which freed memory is returned."""
    if config.training.memory_budget_gb is None:
        return config, None
    budget = int(config.training.memory_budget_gb * GB)
    plan = make_plan(dataset_sizes(dataset, config), config, _machine(config, device, budget))
    log.info("memory plan: %s", plan)
    return plan.config, plan.trim_above_bytes


def _fit(
    config: ResolvedConfig,
    dataset: Dataset,
    out: Path,
    trim_above_bytes: int | None,
    watch: Watch,
    resume: bool,
    stop_frac: float,
    label: str = "train",
    callbacks: Sequence[Callback] = (),
    start: Start | None = None,
) -> TrainingState:
    if watch.interrupted:  # in the recipe race: what there is of this candidate stays
        if not (out / "best.pt").is_file():
            return NEVER_RAN
        kept = TrainingState(**load_checkpoint(out / "best.pt")["progress"])
        return kept if kept.best_step else replace(kept, best=kept.reached, best_step=kept.step)
    trainer = TwoTowerTrainer(dataset, config, out, start)
    trainer.trim_above_bytes, trainer.interruptible, trainer.label = trim_above_bytes, watch.interruptible, label
    trainer.callbacks = [*callbacks]
    reached = trainer.fit(resume=resume, stop_frac=stop_frac)
    watch.interrupted = trainer.training.interrupted
    return reached


def fit_within(
    dataset: Dataset,
    device: torch.device,
    watch: Watch,
    config: Config,
    out: Path,
    resume: bool,
    stop_frac: float,
    label: str = "compare recipes",
    callbacks: Sequence[Callback] = (),
    start: Start | None = None,
) -> TrainingState:
    """Train within the memory budget, without a bundle: a candidate of the recipe race, a trial of a search, or an update."""
    resolved = resolve(config, dataset)
    explained = partial(_or_explain, resolved, dataset, device, out)
    planned, trim_above_bytes = explained(lambda: _within_budget(resolved, dataset, device))
    return explained(lambda: _fit(planned, dataset, out, trim_above_bytes, watch, resume, stop_frac, label, callbacks, start))


def _or_explain(config: ResolvedConfig, dataset: Dataset, device: torch.device, out: Path, work: Callable[[], Result]) -> Result:
    """Do the work; if memory runs out, raise an error with a plan that would have fitted."""
    try:
        return work()
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except block the objects of the failed work are freed: a plan needs some memory too.
    taken = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else status("VmHWM")
    raise explain(dataset, config, _machine(config, device, taken), out)


def _machine(config: Config, device: torch.device, budget: int) -> Machine:
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return Machine(device.type, budget, precision[choose_precision(config.training.precision, device)], distributed.world_size())


def plan_stage(config: Config, data: Path | dict[str, int], *, device: str, budget_gb: float | None, processes: int) -> str:
    """Return the memory use of training, part by part, settings that fit, and the predicted time, as text.

    Parameters
    ----------
    data
        A dataset, or {"users", "items", "events"}: the sizes of one that does not exist yet.
    device
        "cpu" or a name in `DEVICES`.
    budget_gb
        Memory to use instead of the device's, in GB.

    Raises
    ------
    TrainingError
        No settings fit; the message names a change that would.
    """
    if isinstance(data, Path):
        dataset = Dataset.open(data)
        workload, resolved = dataset_sizes(dataset, config), resolve(config, dataset)
    else:
        ids = data["users"] + data["items"]
        resolved = config.resolved(ordered=True, timed=True, events=data["events"], ids=ids)
        workload = yelp_sizes(**data, config=resolved)
    kind = "cpu" if device == "cpu" else "cuda"
    budget = memory().free_bytes if device == "cpu" else DEVICES[device]
    auto = "fp32" if kind == "cpu" else "bf16" if device in WITH_BF16 else "fp16"
    precision = auto if config.training.precision == "auto" else config.training.precision
    machine = Machine(kind, int(budget_gb * GB) if budget_gb else budget, precision, processes)
    plan = make_plan(workload, resolved, machine)
    return "\n".join([as_plan(plan), *as_lines(workload, plan.config, processes)])


def export_stage(run: Path, out: Path) -> BundleManifest:
    """Write the run's bundle to `out`, and return its manifest."""
    manifest = run_manifest(run)
    written = export_bundle(run / "best.pt", run_dataset(run, manifest), out, metrics=manifest.best)
    if (run / "report.json").is_file():
        return note_report(out, read_report(run / "report.json"))
    return written


def run_all(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    refit: RefitSettings | None = None,
    tables: Mapping[str, pa.Table] | None = None,
    watch: Watch | None = None,
) -> Report | None:
    """Prepare, train, export and evaluate: write dataset/, model/, bundle/, report.json and report.html to `out`.

    Parameters
    ----------
    refit
        Values that a refit takes from its run.
    tables
        Tables in memory by name, for the `tables` source; see `prepare`.

    Returns
    -------
    report
        None without a test part (`prepare.split.test: 0`), or if Ctrl-C ended the training: then nothing is evaluated.
    """
    check_names(config)
    watch = watch or Watch()
    if resume and (out / "dataset" / "manifest.json").is_file():
        made = Dataset.open(out / "dataset").manifest.config.json_values()
        changed = config_diff(made, config.model_dump(mode="json", include=set(made)))
        if changed:
            raise DataError(
                f"The settings differ from those of {out / 'dataset'}: {changed}. Restore them to resume, or use another --out."
            )
    else:
        prepared = prepare_stage(config, out / "dataset", tables)
        if is_first_process():
            remove_parts(out, (*REPORTS, *OF_A_TRAINING))  # of an older run, which had another dataset
        log.info(summary(prepared, out / "dataset"))
    resume = resume and any((out / "model" / name).is_file() for name in ("last.pt", RECORD))
    train_stage(config, out / "dataset", out / "model", resume=resume, bundle=out / "bundle", refit=refit, watch=watch)
    if watch.interrupted or not has_test(Dataset.open(out / "dataset")):
        remove_parts(out, (REPORT, REPORT_PAGE))  # left by another run
        return None
    report = evaluate_stage(out / "model", out)
    note_report(out / "bundle", report)
    return report


def summary(manifest: DatasetManifest, out: Path) -> str:
    """Return one line about a prepared dataset."""
    kept, items = manifest.counts.kept, manifest.config.data.items
    noun = "item" if items is None else items.noun
    return f"{out}: {counted(kept.events, 'event')} of {counted(kept.users, 'user')} at {counted(kept.items, noun)}"


def verdict(report: Report | None, out: Path) -> str:
    """Return the verdict of a report and the path of its page, as two lines."""
    if report is None:
        return f"No test part: nothing was evaluated.\nBundle: {out / 'bundle'}"
    return f"{report.verdict}\nReport: {out / 'report.html'}"
