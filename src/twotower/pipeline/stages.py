"""The journey, a function a stage: each reads folders and writes one with a `manifest.json`, so that any stage runs again alone.

simulate ─▶ raw files ─▶ prepare ─▶ dataset ─▶ train ─▶ run (checkpoints, bundle) ─▶ evaluate ─▶ report
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TypeVar

import torch

from twotower.baselines.baselines import BASELINES
from twotower.bundle.bundle import export_bundle, load_trained, note_report
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.data.prepare import prepare
from twotower.data.simulator.simulate import simulate
from twotower.errors import ConfigError, DataError, nearest
from twotower.evaluation.evaluator import judge, metric_names
from twotower.evaluation.report import write_report
from twotower.models.neural_retriever import NeuralRetriever
from twotower.pipeline.popularity_curve import dial_curve
from twotower.schema import FIRST_ROW, FORMAT_VERSION
from twotower.trainers.base_trainer import Progress
from twotower.trainers.health.checks import told
from twotower.trainers.memory.plan import DEVICES, GB, Machine, explain, is_out_of_memory, make_plan
from twotower.trainers.memory.plan import as_table as as_plan
from twotower.trainers.memory.sizes import facts_from_sizes, facts_of
from twotower.trainers.optimizer import choose_device, choose_precision
from twotower.trainers.recipe_race import RECORD, entrants, settle
from twotower.trainers.run_files import differences, read_rows
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils import distributed
from twotower.utils.config import Config, load_config, parse_config
from twotower.utils.console import log, progress
from twotower.utils.hardware import give_back, memory, status
from twotower.utils.types import Json

Result = TypeVar("Result")

DIAL_QUERIES = 5000  # of the test part, for the curve of the popularity dial
TOWN = {"users": 3000, "businesses": 1500, "events": 60_000}


def simulate_stage(out: Path, *, users: int, businesses: int, events: int, seed: int) -> dict[str, int]:
    """Write a simulated town's raw files to `out`; returns rows by file."""
    with progress() as report:
        return simulate(
            out,
            users=users,
            businesses=businesses,
            events=events,
            seed=seed,
            progress=lambda done, total: report("simulate", done, total),
        )


def prepare_stage(config: Config, out: Path) -> Json:
    """Raw tables → dataset folder `out`; returns its manifest."""
    with progress() as report:
        return prepare(config, out, progress=lambda stage: report(f"prepare: {stage}", 0, 0))


def train_stage(config: Config, data: Path, out: Path, *, resume: bool = False, bundle: Path | None = None) -> Json:
    """Train on the dataset `data`; leaves checkpoints, figures and `manifest.json` in `out`, and a bundle (in `out`/bundle).

    The dataset's own settings of `data` and `prepare` win over those of `config`: they are what it was made with.

    Returns
    -------
    dict
        "metric", "value" and "step" of the best validation, and "total_steps" of the schedule. Value None: no validation part.
    """
    check_settings(config)
    dataset = Dataset.open(data)
    config = _as_made(config, dataset)
    runners = entrants(config, ordered=dataset.ordered, validated=config.prepare.split.has_valid)
    device = choose_device(config.training.device)
    with distributed.joined(device):
        config, recipe, resume = settle(runners, out, partial(_fit_within, dataset, device), resume=resume)
        explained = partial(_or_explain, config, dataset, device, out)
        config, keep_below = explained(lambda: _within_budget(config, dataset, device))
        reached = explained(lambda: _fit(config, dataset, out, keep_below, resume=resume))
        first = distributed.rank() == 0
    best = {
        "metric": config.training.eval_metric,
        "value": reached.best,
        "step": reached.best_step,
        "total_steps": reached.total_steps,
    }
    manifest = {
        "format": FORMAT_VERSION,
        "kind": "run",
        "command": "train",
        "seed": config.seed,
        "dataset": str(data.resolve()),
        "data": dataset.fingerprint,
        "config": config.model_dump(mode="json"),
        "best": best,
        "recipe": recipe,
    }
    if not first:
        return best  # the first process has written the checkpoints, and writes the rest
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    give_back()
    explained(lambda: export_bundle(out / "best.pt", dataset, bundle or out / "bundle", metrics=best))
    return best


def _as_made(config: Config, dataset: Dataset) -> Config:
    """Return the settings with the dataset's own `data` and `prepare`; which others the user set stays known."""
    made = dataset.manifest["config"]
    own = parse_config({"data": made["data"], "prepare": made["prepare"]})
    return config.model_copy(update={"data": own.data, "prepare": own.prepare})


def _within_budget(config: Config, dataset: Dataset, device: torch.device) -> tuple[Config, int | None]:
    """The settings that keep training within `training.memory_budget_gb`, and from which size on freed memory is given back."""
    if config.training.memory_budget_gb is None:
        return config, None
    budget = int(config.training.memory_budget_gb * GB)
    plan = make_plan(facts_of(dataset, config), config, _machine(config, device, budget))
    log.info("memory plan: %s", plan)
    return plan.config, plan.keep_below


def _fit(config: Config, dataset: Dataset, out: Path, keep_below: int | None, *, resume: bool) -> Progress:
    trainer = TwoTowerTrainer(dataset, config, out)
    trainer.keep_below = keep_below
    return trainer.fit(resume=resume)


def _fit_within(dataset: Dataset, device: torch.device, config: Config, out: Path, resume: bool) -> Progress:
    """Train within the memory budget, for the recipe race."""
    explained = partial(_or_explain, config, dataset, device, out)
    planned, keep_below = explained(lambda: _within_budget(config, dataset, device))
    return explained(lambda: _fit(planned, dataset, out, keep_below, resume=resume))


def _or_explain(config: Config, dataset: Dataset, device: torch.device, out: Path, work: Callable[[], Result]) -> Result:
    """Do the work; for want of memory, end with the plan that would have fitted."""
    try:
        return work()
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    # Past the exception all that the work held is let go of: a plan needs some memory too.
    taken = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else status("VmHWM")
    raise explain(dataset, config, _machine(config, device, taken), out)


def _machine(config: Config, device: torch.device, budget: int) -> Machine:
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return Machine(device.type, budget, precision[choose_precision(config.training.precision, device)], distributed.world())


def plan_stage(config: Config, data: Path | dict[str, int], *, device: str, budget_gb: float | None, processes: int) -> str:
    """What training takes of memory, part by part, and the settings that fit, as text.

    Parameters
    ----------
    data
        A dataset, or {"users", "items", "events"} of one that nobody has made yet.
    device
        "cpu" or a name of `DEVICES`.
    budget_gb
        Instead of the device's memory.

    Raises
    ------
    TrainingError
        Nothing fits; a change that would is named.
    """
    facts = facts_of(Dataset.open(data), config) if isinstance(data, Path) else facts_from_sizes(**data, config=config)
    kind = "cpu" if device == "cpu" else "cuda"
    budget = memory().free_bytes if device == "cpu" else DEVICES[device]
    auto = "fp32" if kind == "cpu" else "fp16"  # these GPUs have no bf16
    precision = auto if config.training.precision == "auto" else config.training.precision
    machine = Machine(kind, int(budget_gb * GB) if budget_gb else budget, precision, processes)
    return as_plan(make_plan(facts, config, machine))


def evaluate_stage(run: Path, out: Path, overrides: list[str] | None = None) -> Json:
    """Judge the run on its dataset's test part beside every baseline; write report.json and report.html to `out`."""
    manifest = run_manifest(run)
    dataset = Dataset.open(Path(manifest["dataset"]))
    if not has_test(dataset):
        raise DataError(f"A judgement needs a test part. {dataset.path} has none (prepare.split.test: 0). Judge another run.")
    model, config, _ = load_trained(run / "best.pt", dataset)
    for override in overrides or []:
        if not override.startswith("evaluation."):
            raise ConfigError(
                f"Only settings of the evaluation can change after training. Got {override!r}. Train again for others."
            )
    if overrides:
        wanted = load_config(None, overrides).evaluation.model_dump(exclude_unset=True)
        config = parse_config(
            {**config.model_dump(mode="json"), "evaluation": {**config.evaluation.model_dump(mode="json"), **wanted}}
        )
        check_settings(config)
    store = open_store(dataset, "test", config.model)
    system = NeuralRetriever(model, store, n_items=dataset.n_items, time_s=split_moment(dataset, "test"))
    with progress() as report:
        result = judge(
            [system],
            dataset,
            config.evaluation,
            metric=config.training.eval_metric,
            seed=config.seed,
            progress=lambda done, total: report("evaluate", done, total),
        )
    asked = dataset.held_out("test", max_queries=min(config.evaluation.max_queries or DIAL_QUERIES, DIAL_QUERIES), seed=config.seed)
    result["dial"] = dial_curve(system, asked, dataset, config.evaluation, metric=config.training.eval_metric)
    result["recipe"] = manifest.get("recipe")
    rows = read_rows(run / "metrics.jsonl")
    write_report(result, out, curves=rows, advice=told(rows))
    return result


def has_test(dataset: Dataset) -> bool:
    """Whether there is a test part."""
    return bool(dataset.manifest["counts"]["kept"]["test_events"])


def check_settings(config: Config) -> None:
    """Refuse names of metrics, baselines and their settings that nobody knows, before hours are spent.

    Raises
    ------
    ConfigError
        The nearest known name is in the message.
    """
    metric_names(config.evaluation, config.training.eval_metric)
    settings = config.evaluation.baseline_settings
    for place, names in {"baselines": config.evaluation.baselines, "baseline_settings": settings}.items():
        for name in names:
            if name not in BASELINES:
                raise ConfigError(f"evaluation.{place} must name known baselines. Got {name!r}.{nearest(name, BASELINES)}")
    for name, values in settings.items():
        known = [*signature(BASELINES[name]).parameters][1:]
        for key in values:
            if key not in known:
                raise ConfigError(f"evaluation.baseline_settings.{name} has no {key!r}.{nearest(key, known)}")


def export_stage(run: Path, out: Path) -> Json:
    """Write the run's bundle to `out`; returns its manifest."""
    manifest = run_manifest(run)
    written = export_bundle(run / "best.pt", Dataset.open(Path(manifest["dataset"])), out, metrics=manifest["best"])
    if (run / "report.json").is_file():
        return note_report(out, json.loads((run / "report.json").read_text()))
    return written


def run_all(config: Config, out: Path, *, resume: bool = False) -> Json | None:
    """Prepare → train → export → evaluate: `out` gets dataset/, model/, bundle/, report.json and report.html.

    Without a test part (`prepare.split.test: 0`) nothing is judged, and None is returned instead of the report.
    """
    check_settings(config)
    if resume and (out / "dataset" / "manifest.json").is_file():
        made = Dataset.open(out / "dataset").manifest["config"]
        changed = differences(made, config.model_dump(mode="json", include=set(made)))
        if changed:
            raise DataError(
                f"A resumed run must keep its data. In {out / 'dataset'} {changed}. Use another --out, or those settings."
            )
    else:
        prepared = prepare_stage(config, out / "dataset")
        log.info(summary(prepared, out / "dataset"))
    resume = resume and any((out / "model" / name).is_file() for name in ("last.pt", RECORD))
    train_stage(config, out / "dataset", out / "model", resume=resume, bundle=out / "bundle")
    if not has_test(Dataset.open(out / "dataset")):
        for name in ("report.json", "report.html"):
            (out / name).unlink(missing_ok=True)  # of another run
        return None
    report = evaluate_stage(out / "model", out)
    note_report(out / "bundle", report)
    return report


def summary(manifest: Json, out: Path) -> str:
    """One line about a prepared dataset."""
    kept = manifest["counts"]
    users, items = manifest["n_users"] - FIRST_ROW, manifest["n_items"] - FIRST_ROW
    return f"{out}: {kept['kept']['events']:,} events of {users:,} users at {items:,} items"


def verdict(report: Json | None, out: Path) -> str:
    """What the report decided, and where it lies."""
    if report is None:
        return f"No test part: nothing was judged.\nBundle: {out / 'bundle'}"
    return f"{report['verdict']}\nReport: {out / 'report.html'}"


def run_manifest(run: Path) -> Json:
    """What stands of a run in its folder.

    Raises
    ------
    DataError
        `run` is no run's folder.
    """
    try:
        manifest = json.loads((run / "manifest.json").read_text())
    except (OSError, ValueError):
        raise DataError(
            f"{run} is not a run: it has no manifest.json. Expected a folder written by `twotower train` or `twotower run`. "
            "Check the path, or train first."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "run":
        raise DataError(
            f"{run} is not a run: its manifest.json is of another kind. "
            "Expected a folder written by `twotower train` or `twotower run`. Check the path."
        )
    return manifest
