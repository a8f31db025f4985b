"""Measure time and memory of training steps and an evaluation at Yelp's full size, on a simulated release.

    python benchmarks/full_size.py --dataset FOLDER      # made by `twotower prepare` from the simulated release

The release: twotower simulate --users 2000000 --businesses 150000 --events 7000000. Prints a JSON line for each claim, appended to
benchmarks/results/full_size.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, claim, tell

from twotower.data.data_loader import TrainLoader
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.pipeline.stages import TOWN, prepare_stage, simulate_stage
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import load_config
from twotower.utils.console import setup_logging

LOADED = 60  # batches whose making is timed


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--results", type=Path, default=RESULTS / "full_size.jsonl")
    given = parser.parse_args()
    setup_logging()
    limits = [f"training.max_steps={given.steps}", "training.eval_every_epochs=1000", "training.eval_queries=1000"]
    config = load_config(given.config, [*given.overrides, *limits])
    dataset = Dataset.open(given.dataset)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TwoTowerTrainer(dataset, config, Path(folder))
        began = time.perf_counter()
        trainer.begin()
        beginning = time.perf_counter() - began
        began = time.perf_counter()
        batches, asked, waited = iter(trainer.batches(0, 0)), time.perf_counter(), 0.0
        for _ in range(given.steps):
            batch = next(batches)
            waited += time.perf_counter() - asked
            trainer._step(batch)
            asked = time.perf_counter()
        seconds = time.perf_counter() - began
        batches.close()
        plan = trainer.loader.plan(0)
        began = time.perf_counter()
        for step in range(LOADED):
            trainer.loader.batch(plan[step], 0, step)
        loading = 1000 * (time.perf_counter() - began) / LOADED
    size, per_epoch, peak = trainer.state.examples, trainer.batches_per_epoch(), gigabytes()
    what = f"{dataset.n_users:,} users, {dataset.n_items:,} items, batches of {config.training.batch_size:,}"
    rows = [
        ("factors that the ids begin with", beginning, "s"),
        (f"{given.steps} training steps ({what})", seconds, "s"),
        (f"an epoch of {per_epoch:,} such steps, from these", seconds / given.steps * per_epoch / 3600, "hours"),
        ("peak memory of training at that size", peak, "GiB"),
    ]
    small = small_loader(given.overrides)
    loader = [
        claim("training at that size waits for its batches", waited, "s", "the whole of it", seconds, config.seed),
        claim("the loader makes a batch at that size", loading, "ms", "on the simulated town of 60,000 events", small, config.seed),
    ]
    held_out = dataset.held_out("test", max_queries=given.users, seed=0)
    began = time.perf_counter()
    store = open_store(dataset, "test", trainer.config.model)
    retriever = NeuralRetriever(trainer.model, store, n_item_rows=dataset.n_item_rows, time_s=split_moment(dataset, "test"))
    evaluate(retriever, held_out, dataset, config.evaluation, metrics=["NDCG@10"], beyond_k=None)
    asked = f"evaluation of {len(held_out.queries):,} questions on the whole catalogue"
    rows += [(asked, time.perf_counter() - began, "s"), (f"peak memory after the {asked}", gigabytes(), "GiB")]
    for what, figure, unit in rows:
        more = {"examples_per_s": round(size / seconds)} if unit == "hours" else {}
        tell(claim(what, figure, unit, "nothing", figure, config.seed, **more), given.results)
    for row in loader:
        tell(row, given.results)
    return 0


def small_loader(overrides: Sequence[str]) -> float:
    """Return the milliseconds of the loader for a batch of the town, with the same settings."""
    with tempfile.TemporaryDirectory() as folder:
        simulate_stage(Path(folder) / "raw", **TOWN, seed=0)
        config = load_config(None, [f"data.path={json.dumps(folder + '/raw')}", *overrides])
        prepare_stage(config, Path(folder) / "dataset")
        dataset = Dataset.open(Path(folder) / "dataset")
        store = open_store(dataset, "valid", config.model)
        loader = TrainLoader(dataset, store, config)
        plan = loader.plan(0)
        began = time.perf_counter()
        for step in range(LOADED):
            loader.batch(plan[step], 0, step)
        return 1000 * (time.perf_counter() - began) / LOADED


def gigabytes() -> float:
    """Return the peak memory of this process."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    sys.exit(main())
