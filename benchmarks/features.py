"""Whether groups of features earn their place: the same model without each of them in turn, judged on the same questions.

    python benchmarks/features.py town --seeds 0,1,2
    python benchmarks/features.py boston2015 --seeds 0,1,2

The set is prepared once for each seed and the recipe trained on it whole, then again without each group (`model.exclude_fields`).
The questions are those of the validation part: this is how defaults are chosen. Prints a JSON line for each seed and group,
appended to benchmarks/results/features.jsonl: NDCG@10 without the group beside that of the whole, and the 95 % interval of the
difference (paired bootstrap of users).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import QUALITY_SETS, RESULTS, ROOT, claim, in_words, tell
from quality import raw_folder, seeds

from twotower.config import Config, load_config
from twotower.console import setup_logging
from twotower.data.data_loader import layout, open_store, split_moment
from twotower.data.dataset import Dataset
from twotower.errors import TwoTowerError
from twotower.evaluation import judge
from twotower.pipeline import prepare_stage, train_stage
from twotower.retrieval.bundle import load_trained
from twotower.retrieval.neural import NeuralRetriever

METRIC, PART = "NDCG@10", "valid"
GROUPS = {  # those that a set has none of are passed over
    "the item's state: visits, stars and recency up to the moment": ("item.state",),
    "the user's state: events, stars and recency up to the moment": ("user.state",),
    "the clock: hour, weekday, month": ("user.hour", "user.weekday", "user.month"),
    "the user's home": ("user.home",),
    "the item's place": ("item.location", "item.city"),
    "categories": ("item.categories",),
    "attributes and price": ("item.attributes", "item.price"),
    "opening hours": ("item.hours",),
    "text": ("item.text",),
    "neighbours": ("item.neighbours",),
}
WHOLE = "whole"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=QUALITY_SETS)
    parser.add_argument("--seeds", type=seeds, default=[0], metavar="0,1,2")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--results", type=Path, default=RESULTS / "features.jsonl")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    try:
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                measure(given.set, seed, Path(folder), given.overrides, given.results)
    except TwoTowerError as error:
        sys.stderr.write(f"features: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def measure(name: str, seed: int, out: Path, overrides: Sequence[str], results: Path) -> None:
    """One seed: the whole, then the whole without each group."""
    chosen = QUALITY_SETS[name]
    raw = raw_folder(chosen, out, seed)
    settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}", f"seed={seed}", *overrides]
    config = load_config(ROOT / "configs" / chosen.config, settings)
    prepare_stage(config, out / "dataset")
    dataset = Dataset.open(out / "dataset")
    whole = trained(config, dataset, out, WHOLE, ())
    for group, fields in groups(dataset, config).items():
        evaluation = config.evaluation.model_copy(update={"baselines": []})
        without = trained(config, dataset, out, group, fields)
        report = judge([whole, without], dataset, evaluation, part=PART, main=WHOLE, metric=METRIC, seed=seed)
        figures = {system: report["systems"][system][METRIC]["value"] for system in (WHOLE, group)}
        lost = report["differences"][group][METRIC]
        interval = [lost["low"], lost["high"]]
        title = f"{name}, seed {seed}, {PART} {METRIC} without {group}"
        row = claim(
            title, figures[group], "", "with all", figures[WHOLE], seed, lost=lost["value"], interval=interval, fields=fields
        )
        tell(row, results)
        sys.stderr.write(in_words(row))


def groups(dataset: Dataset, config: Config) -> dict[str, tuple[str, ...]]:
    """The groups of which the set has a field, with those fields."""
    sizes = layout(dataset, open_store(dataset, PART, config.model), config.model)
    known = {f"item.{spec.name}" for spec in sizes.item_fields} | {f"user.{spec.name}" for spec in sizes.user_fields}
    found = {group: tuple(field for field in fields if field in known) for group, fields in GROUPS.items()}
    return {group: fields for group, fields in found.items() if fields}


def trained(config: Config, dataset: Dataset, out: Path, name: str, without: Sequence[str]) -> NeuralRetriever:
    """The best model of a run without some fields, as a retriever of the validation part."""
    model = config.model.model_copy(update={"exclude_fields": [*config.model.exclude_fields, *without]})
    folder = out / str(len(list(out.iterdir())))
    train_stage(config.model_copy(update={"model": model}), dataset.path, folder)
    best, settings, _ = load_trained(folder / "best.pt", dataset)
    store = open_store(dataset, PART, settings.model)
    return NeuralRetriever(best, store, n_items=dataset.n_items, time_s=split_moment(dataset, PART), name=name)


if __name__ == "__main__":
    sys.exit(main())
