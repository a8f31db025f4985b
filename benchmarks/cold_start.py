"""Measure cold start: accuracy for users and items without training events, against trained ones and content-kNN.

    python benchmarks/cold_start.py s3rec --seeds 0,1,2

The dataset's configuration is trained twice per seed: on all training events, and with 10 % of the users and 5 % of the items
withheld (`prepare.split.withhold_user_frac`, `withhold_item_frac`). Both models answer the same test queries:

- queries of withheld users, served from their history alone: NDCG@10, against the model that was trained on them;
- queries whose targets are withheld items, served from their features alone: Recall@50, against content-kNN over the same features;
- all other queries: NDCG@10 and Recall@50 with the withheld items in the catalogue, against the same model without them.

Intervals are 95 % intervals of the ratio, from a paired bootstrap over the queries. Each claim gives a JSON line, appended to
benchmarks/results/cold_start.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import QUALITY_SETS, RESULTS, ROOT, Row, claim, in_words, tell
from quality import raw_folder, seeds

from twotower.baselines.baselines import BASELINES
from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.data.held_out import HeldOut
from twotower.errors import TwoTowerError
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.pipeline.stages import prepare_stage, train_stage
from twotower.retriever import Queries, Recommendations, Retriever
from twotower.utils.config import Config, EvaluationConfig, load_config
from twotower.utils.console import setup_logging
from twotower.utils.types import Mask

NEW_USERS, NEW_ITEMS = 0.1, 0.05
METRICS = ("NDCG@10", "Recall@50")


class Without:
    """Retriever that never returns some items."""

    def __init__(self, retriever: Retriever, allow: Mask) -> None:
        self.name, self.retriever, self.allow = retriever.name, retriever, allow

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        assert allow is None
        return self.retriever.retrieve(queries, k, exclude_seen=exclude_seen, allow=self.allow)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=QUALITY_SETS)
    parser.add_argument("--seeds", type=seeds, default=[0], metavar="0,1,2")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--part", choices=["valid", "test"], default="test", help="choose on valid, look at test once")
    parser.add_argument("--results", type=Path, default=RESULTS / "cold_start.jsonl")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    try:
        for seed in given.seeds:
            for row in measure(given.set, seed, given.overrides, given.part):
                tell(row, given.results)
                sys.stderr.write(in_words(row))
    except TwoTowerError as error:
        sys.stderr.write(f"cold_start: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def measure(name: str, seed: int, overrides: Sequence[str], part: str) -> list[Row]:
    """Return the claims of one seed."""
    chosen = QUALITY_SETS[name]
    with tempfile.TemporaryDirectory() as folder:
        raw = raw_folder(chosen, Path(folder), seed)
        settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}", f"seed={seed}", *overrides]
        withheld = [f"prepare.split.withhold_user_frac={NEW_USERS}", f"prepare.split.withhold_item_frac={NEW_ITEMS}"]
        whole, cold = (
            Trained(load_config(ROOT / "configs" / chosen.config, [*settings, *more]), Path(folder) / which, part)
            for which, more in (("whole", []), ("cold", withheld))
        )
        known_item = np.arange(cold.dataset.n_item_rows) < cold.dataset.n_train_item_rows
        values = {
            "whole": whole.values(whole.model)[whole.places_of(cold)],
            "cold": cold.values(cold.model),
            "without": cold.values(Without(cold.model, known_item)),
            "content": cold.values(BASELINES["content_knn"](cold.dataset)),
        }
        held = cold.held_out
        asked = np.repeat(np.arange(len(held.queries)), np.diff(held.target_offsets))
        new_item = np.bincount(asked, ~known_item[held.target_row], len(held.queries)) == np.diff(held.target_offsets)
        new_user = held.queries.user_row >= cold.dataset.n_train_user_rows
    shared: dict[str, Any] = {"set": name, "part": part, "new_users": NEW_USERS, "new_items": NEW_ITEMS}
    groups = [
        ("withheld users, NDCG@10 from their history alone", new_user & ~new_item, "cold", "the model that knows them", "whole", 0),
        ("withheld items, Recall@50 from their features alone", new_item, "cold", "content-kNN", "content", 1),
        ("all others, NDCG@10 with withheld items in the catalogue", ~new_user & ~new_item, "cold", "without them", "without", 0),
        ("all others, Recall@50 with withheld items in the catalogue", ~new_user & ~new_item, "cold", "without them", "without", 1),
    ]
    return [
        claim(
            f"{title}, {name}",
            values[own][mask, column].mean(),
            METRICS[column].split("@")[0],
            against,
            max(values[other][mask, column].mean(), 1e-9),
            seed,
            interval=ratio_interval(values[own][mask, column], values[other][mask, column], seed),
            questions=int(mask.sum()),
            **shared,
        )
        for title, mask, own, against, other, column in groups
    ]


class Trained:
    """A prepared dataset, the model trained on it, and the queries of a part."""

    def __init__(self, config: Config, folder: Path, part: str) -> None:
        prepare_stage(config, folder / "dataset")
        train_stage(config, folder / "dataset", folder / "model")
        self.dataset, self.settings = Dataset.open(folder / "dataset"), config.evaluation
        model, config, _ = load_trained(folder / "model" / "best.pt", self.dataset)
        store = open_store(self.dataset, part, config.model)
        self.model = NeuralRetriever(model, store, n_item_rows=self.dataset.n_item_rows, time_s=split_moment(self.dataset, part))
        self.held_out: HeldOut = self.dataset.held_out(part)

    def values(self, retriever: Retriever) -> np.ndarray[Any, Any]:
        """Return the metrics of each query, float64 [queries, METRICS]."""
        settings = EvaluationConfig(**{**self.settings.model_dump(), "ks": [10, 50]})
        return evaluate(retriever, self.held_out, self.dataset, settings, metrics=METRICS, beyond_k=None).values

    def places_of(self, other: Trained) -> np.ndarray[Any, Any]:
        """Return the positions of the other one's queries among these, matched by user and time."""
        place = {key: at for at, key in enumerate(self._keys())}
        return np.array([place[key] for key in other._keys()])

    def _keys(self) -> list[tuple[str, int]]:
        queries = self.held_out.queries
        return list(zip(self.dataset.user_ids[queries.user_row], queries.time_s.tolist(), strict=True))


def ratio_interval(own: np.ndarray[Any, Any], other: np.ndarray[Any, Any], seed: int, draws: int = 1000) -> list[float]:
    """Return the 95 % interval of mean(own) / mean(other) over resampled queries."""
    rng = np.random.default_rng(seed)
    picks = [rng.integers(0, len(own), len(own)) for _ in range(draws)]
    ratios = [own[pick].mean() / max(other[pick].mean(), 1e-9) for pick in picks]
    return [round(float(bound), 3) for bound in np.quantile(ratios, (0.025, 0.975))]


if __name__ == "__main__":
    sys.exit(main())
