"""Evaluate a run: the model, its baselines and a refreshed index on the test part of its dataset."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from twotower.bundle.bundle import load_trained
from twotower.bundle.sealed_folder import MANIFEST
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import can_refresh, log_popularity, open_store, split_moment
from twotower.errors import ConfigError, DataError
from twotower.evaluation.evaluator import judge
from twotower.evaluation.examples import examples
from twotower.evaluation.insights import seen_targets
from twotower.evaluation.pictures import pictures
from twotower.evaluation.report import write_report
from twotower.evaluation.verdict import refreshed
from twotower.models.neural_retriever import NeuralRetriever, RefreshedRetriever
from twotower.pipeline.popularity_tradeoff import popularity_tradeoff
from twotower.pipeline.run_folder import run_dataset, run_manifest
from twotower.trainers.health_checks import advice_lines
from twotower.trainers.run_files import read_rows
from twotower.utils.config import Config, ResolvedConfig, load_config, parse_config
from twotower.utils.console import log, progress
from twotower.utils.documents import Report, finite
from twotower.utils.manifests import RunManifest

TRADEOFF_QUERIES = 2000  # test queries for the popularity-bias table


def evaluate_stage(run: Path, out: Path, overrides: list[str] | None = None) -> Report:
    """Evaluate a run and its baselines on the test part, and write report.json and report.html to `out`."""
    manifest = run_manifest(run)
    dataset = run_dataset(run, manifest)
    _check_test(run, manifest, dataset)
    model, config, _ = load_trained(run / "best.pt", dataset)
    for override in overrides or []:
        if not override.startswith("evaluation."):
            raise ConfigError(
                f"{override!r} cannot change after training. Only evaluation.* settings can. Train again to change it."
            )
    if overrides:
        wanted = load_config(None, overrides).evaluation.model_dump(exclude_unset=True)
        config = parse_config(
            {**config.model_dump(mode="json"), "evaluation": {**config.evaluation.model_dump(mode="json"), **wanted}},
            ResolvedConfig,
        )
    store = open_store(dataset, "test", config.model)
    system = NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=split_moment(dataset, "test"))
    held_out = dataset.held_out("test", max_queries=config.evaluation.max_queries, seed=config.seed).by_time()
    with progress() as tell:
        judged = judge(
            [system, *_refreshed(system, dataset, config)],
            dataset,
            config.evaluation,
            held_out=held_out,
            metric=config.training.eval_metric,
            seed=config.seed,
            baseline_settings=manifest.refit.baseline_settings if manifest.refit else {},
            progress=lambda done, total: tell("evaluate", done, total),
        )
    sample = dataset.held_out(
        "test", max_queries=min(config.evaluation.max_queries or TRADEOFF_QUERIES, TRADEOFF_QUERIES), seed=config.seed
    )
    tradeoff = popularity_tradeoff(system, sample, dataset, config.evaluation, metric=config.training.eval_metric)
    rows = read_rows(run / "metrics.jsonl")
    added: dict[str, Any] = {
        "popularity_tradeoff": tradeoff,
        "recipe": manifest.recipe,
        "calibration": manifest.calibration,
        "curves": finite(rows),
        "advice": advice_lines(rows),
        "pictures": pictures(dataset),
        "examples": examples(system, held_out, dataset, exclude_seen=config.evaluation.exclude_seen, seed=config.seed),
    }
    report = judged.model_copy(update=added)
    if config.evaluation.exclude_seen:
        for sentence in seen_targets(report.protocol.seen_targets, report.protocol.targets, "test"):
            log.info("%s", sentence)
    write_report(report, out)
    return report


def _check_test(run: Path, manifest: RunManifest, dataset: Dataset) -> None:
    if has_test(dataset):
        return
    if manifest.update is not None:
        raise DataError(
            f"{run} was updated: its events are trained on or validate, and none is left to evaluate on. Its comparison with the "
            f"model before is `update` in {run / MANIFEST}. To evaluate, train again on all data with a test part."
        )
    raise DataError(f"{dataset.path} has no test part (prepare.split.test: 0). An evaluation needs one. Choose another run.")


def _refreshed(system: NeuralRetriever, dataset: Dataset, config: Config) -> list[RefreshedRetriever]:
    """Return the model with an index that is refreshed along the test part, if the dataset allows it."""
    days = config.evaluation.refresh_days
    if days is None or not can_refresh(dataset):
        return []
    return [
        RefreshedRetriever(
            system.model,
            open_store(dataset, "future", config.model),
            partial(log_popularity, dataset),
            n_item_rows=dataset.n_item_rows,
            start_s=split_moment(dataset, "test"),
            every_days=days,
            name=refreshed(system.name, days),
        )
    ]


def has_test(dataset: Dataset) -> bool:
    """Return whether the dataset has a test part."""
    return bool(dataset.manifest.counts.kept.test_events)
