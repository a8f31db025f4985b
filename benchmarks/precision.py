"""Compare training in bf16 and fp16 with fp32: the same runs of the town, evaluated on the same queries.

    python benchmarks/precision.py --seeds 0,1,2 --set training.max_steps=200

Prints a JSON line for each seed and precision and appends it to benchmarks/results/precision.jsonl: NDCG@10, that of fp32, and the
95 % interval of the difference (paired bootstrap of users). On a CPU, autocast uses the same types as on a GPU, but fp16 products
are many times slower. With fewer steps than the default of the town, it takes less than an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import RESULTS, ROOT, claim, tell

from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.evaluation.evaluator import judge
from twotower.models.neural_retriever import NeuralRetriever
from twotower.pipeline.stages import TOWN, prepare_stage, simulate_stage, train_stage
from twotower.utils.config import Config, load_config
from twotower.utils.console import setup_logging

METRIC = "NDCG@10"


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--results", type=Path, default=RESULTS / "precision.jsonl")
    given = parser.parse_args()
    setup_logging(quiet=True)
    for seed in map(int, given.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            measure(seed, Path(folder), given.overrides, given.results)
    return 0


def measure(seed: int, out: Path, overrides: list[str], results: Path) -> None:
    """Measure one town: three runs."""
    simulate_stage(out / "raw", **TOWN, seed=seed)
    settings = [f"data.path={json.dumps(str(out / 'raw'))}", f"seed={seed}", "training.recipe=fixed", *overrides]
    config = load_config(ROOT / "configs" / "quickstart.yaml", settings)
    prepare_stage(config, out / "dataset")
    dataset = Dataset.open(out / "dataset")
    systems, steps = zip(*(trained(config, dataset, out, precision) for precision in ("fp32", "bf16", "fp16")), strict=True)
    evaluation = config.evaluation.model_copy(update={"baselines": []})
    report = judge(systems, dataset, evaluation, main="fp32", metric=METRIC, seed=seed)
    reached = report.systems["fp32"][METRIC].value
    for precision in ("bf16", "fp16"):
        figure, gap = report.systems[precision][METRIC].value, report.differences[precision][METRIC]
        ahead = f"fp32 is ahead by {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        what = f"{METRIC} of the town after {steps[0]} steps in {precision}, seed {seed}: {ahead}"
        tell(claim(what, figure, METRIC, f"fp32, seed {seed}", reached, seed), results)


def trained(config: Config, dataset: Dataset, out: Path, precision: str) -> tuple[NeuralRetriever, int]:
    """Return the best model of a run in one precision, as a retriever of the test part, and the steps of its schedule."""
    chosen = config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})
    steps = train_stage(chosen, dataset.path, out / precision).total_steps
    model, _, _ = load_trained(out / precision / "best.pt", dataset)
    store = open_store(dataset, "test", config.model)
    moment = split_moment(dataset, "test")
    return NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=moment, name=precision), steps


if __name__ == "__main__":
    sys.exit(main())
