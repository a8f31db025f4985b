"""What a model gains from the impressions of a simulated town, beside the same model that ignores them.

    python benchmarks/impressions.py --seeds 0,1,2 --weights 0,0.1,1

Simulates a small town with shown lists for each seed, trains the any-event recipe on narrow towers with each
`training.negative_weight`, fits the weights of the score on the validation part, and ranks the whole catalogue for all queries of
the test part. The choices from the lists are events of every arm. Prints NDCG@10 by seed, and appends a row with the mean of each
further weight beside that of the first one (0: impressions are ignored) to benchmarks/results/impressions.jsonl. Some minutes on
one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, claim, in_words, tell

from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, resolve, split_moment
from twotower.data.prepare import prepare
from twotower.data.simulator.simulate import simulate
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.trainers.calibration import calibrate
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import Config, parse_config

TOWN: dict[str, Any] = {"users": 500, "businesses": 400, "events": 8000}
ITEM_TOWER = {"embedding_dim": 64, "hidden_dims": [64]}
USER_TOWER = {**ITEM_TOWER, "num_blocks": 0, "max_history": 20}


def settings(seed: int, raw: Path, weight: float) -> Config:
    """Return the settings of one training."""
    training = {"recipe": "fixed", "negative_weight": weight, "num_epochs": 8, "eval_every_epochs": 2, "patience": 20}
    return parse_config(
        {
            "seed": seed,
            "data": {"path": str(raw)},
            "prepare": {"text_dim": 0},
            "model": {"user_tower": USER_TOWER, "item_tower": ITEM_TOWER},
            "training": training,
        }
    )


def measured(dataset: Dataset, config: Config, out: Path) -> float:
    """Train, calibrate, and return NDCG@10 on the test part."""
    TwoTowerTrainer(dataset, resolve(config, dataset), out).fit()
    model, resolved, _ = load_trained(out / "best.pt", dataset)
    calibrate(model, dataset, resolved)
    store, moment = open_store(dataset, "test", resolved.model), split_moment(dataset, "test")
    retriever = NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=moment)
    found = evaluate(retriever, dataset.held_out("test"), dataset, config.evaluation, metrics=["NDCG@10"], beyond_k=None)
    return found.mean("NDCG@10")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--weights", default="0,0.1,1")
    parser.add_argument("--results", type=Path, default=RESULTS / "impressions.jsonl", help="file the rows are appended to")
    asked = parser.parse_args(arguments)
    seeds, weights = [int(seed) for seed in asked.seeds.split(",")], [float(weight) for weight in asked.weights.split(",")]
    table = np.zeros((len(weights), len(seeds)))
    for column, seed in enumerate(seeds):
        with tempfile.TemporaryDirectory() as folder:
            raw, data = Path(folder) / "raw", Path(folder) / "data"
            counts = simulate(raw, seed=seed, impressions=True, **TOWN)
            prepare(settings(seed, raw, 0.0), data)
            print(f"seed {seed}: {counts}", flush=True)
            for row, weight in enumerate(weights):
                config = settings(seed, raw, weight)
                table[row, column] = measured(Dataset.open(data), config, Path(folder) / f"run-{weight}")
                print(f"seed {seed}: negative_weight {weight:g}: NDCG@10 {table[row, column]:.4f}", flush=True)
    for weight, row in zip(weights[1:], table[1:], strict=True):
        gains = {"by_seed": row.round(4).tolist(), "gain_by_seed": (row - table[0]).round(4).tolist()}
        against = f"with weight {weights[0]:g}"
        found = claim(f"NDCG@10 with impressions of weight {weight:g}", row.mean(), "", against, table[0].mean(), seeds[0], **gains)
        tell(found, asked.results)
        print(in_words(found), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
