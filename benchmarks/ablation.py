"""Measure the effect of each part of the recipe and of each group of features, by training without it.

    python benchmarks/ablation.py parts s3rec --seeds 0,1,2
    python benchmarks/ablation.py parts toys --recipe "next event"
    python benchmarks/ablation.py features town --seeds 0,1,2

The dataset is prepared once per seed. The complete recipe, a candidate of the recipe race, is trained, then the recipe without each
part. All models answer the queries of the validation part, on which defaults are chosen. Each seed and part gives a JSON line,
appended to benchmarks/results/ablation.jsonl: NDCG@10 with and without the part, and the 95 % interval of the difference (paired
bootstrap of users).
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

from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import layout, open_store, resolve, split_moment
from twotower.errors import ConfigError, TwoTowerError
from twotower.evaluation.evaluator import judge
from twotower.features.batches import Layout
from twotower.models.neural_retriever import NeuralRetriever
from twotower.pipeline.stages import prepare_stage, train_stage
from twotower.trainers.recipe_race import CANDIDATES, entrants, with_settings
from twotower.utils.config import Config, load_config
from twotower.utils.console import setup_logging
from twotower.utils.types import Json

METRIC, PART, WHOLE = "NDCG@10", "valid", "whole"
FIELDS = {  # groups that a dataset lacks are skipped
    "the item's state (visits, stars and recency up to the moment)": ("item.state",),
    "the user's state (events, stars and recency up to the moment)": ("user.state",),
    "the clock (hour, weekday, month)": ("user.hour", "user.weekday", "user.month"),
    "the user's home": ("user.home",),
    "the item's place": ("item.location", "item.city"),
    "categories": ("item.categories",),
    "attributes and price": ("item.attributes", "item.price"),
    "opening hours": ("item.hours",),
    "text": ("item.text",),
}
PARTS: dict[str, dict[str, Json]] = {
    "any event": {
        "attention": {"model.user_tower.num_blocks": 0},
        "holding users back, and the lower temperature that it allows": {
            "model.user_tower.norm_shrinkage": 0,
            "model.temperature": 0.15,
        },
        "hiding half of the history": {"model.user_tower.history_dropout": 0},
    },
    "next event": {
        "attention": {"model.user_tower.num_blocks": 0},
        "the second block of attention": {"model.user_tower.num_blocks": 1},
        "pooling of the last event": {"model.user_tower.pooling": "mean"},
    },
}
"""Parts of one candidate of the recipe race."""
SHARED_PARTS: dict[str, Json] = {
    "factors that ids begin with": {"model.item_tower.id_init": "random"},
    "the popularity prior": {"model.popularity_prior": 0},
    "neighbours": {"model.exclude_features": ["item.neighbours"]},
    "hiding half of the users' ids": {"model.user_tower.id_dropout": 0},
    "hiding a tenth of the items' ids": {"model.item_tower.id_dropout": 0},
    "uniform negatives": {"training.negatives_per_positive": 0},
    "negatives of the batch": {"training.loss": "sampled_softmax"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("of", choices=["parts", "features"])
    parser.add_argument("set", choices=QUALITY_SETS)
    parser.add_argument("--recipe", choices=CANDIDATES, default="any event", help="candidate of the recipe race")
    parser.add_argument("--seeds", type=seeds, default=[0], metavar="0,1,2")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--results", type=Path, default=RESULTS / "ablation.jsonl")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    try:
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                measure(given.of, given.set, given.recipe, seed, Path(folder), given.overrides, given.results)
    except TwoTowerError as error:
        sys.stderr.write(f"ablation: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def measure(of: str, name: str, recipe: str, seed: int, out: Path, overrides: Sequence[str], results: Path) -> None:
    """Measure one seed: the complete recipe, then without each part."""
    chosen = QUALITY_SETS[name]
    raw = raw_folder(chosen, out, seed)
    settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}", f"seed={seed}", *overrides]
    given = load_config(ROOT / "configs" / chosen.config, settings)
    prepare_stage(given, out / "dataset")
    dataset = Dataset.open(out / "dataset")
    candidates = {one.name: one.config for one in entrants(given, ordered=dataset.ordered, events=dataset.n_train_events)}
    if recipe not in candidates:
        raise ConfigError(f"{name} has no recipe {recipe!r}, only {', '.join(candidates)}.")
    config = candidates[recipe]
    whole = trained(config, dataset, out, WHOLE)
    sizes = layout(dataset, open_store(dataset, PART, config.model), config.model)
    for part, changes in (SHARED_PARTS | PARTS[recipe] if of == "parts" else without_fields(sizes)).items():
        changed = with_settings(config, changes)
        same_model = resolve(changed, dataset).model == resolve(config, dataset).model
        if same_model and changed.training == config.training:  # the dataset does not use the part
            continue
        without = trained(changed, dataset, out, part)
        evaluation = config.evaluation.model_copy(update={"baselines": []})
        report = judge([whole, without], dataset, evaluation, part=PART, main=WHOLE, metric=METRIC, seed=seed)
        figures = {system: report.systems[system][METRIC].value for system in (WHOLE, part)}
        lost = report.differences[part][METRIC]
        interval = [lost.low, lost.high]
        title = f"{name}, {recipe}, seed {seed}, {PART} {METRIC} without {part}"
        row = claim(title, figures[part], "", "with it", figures[WHOLE], seed, lost=lost.value, interval=interval)
        tell(row, results)
        sys.stderr.write(in_words(row))


def without_fields(sizes: Layout) -> dict[str, Json]:
    """Return the settings that leave out each group of features, for groups of which the dataset has a field."""
    known = {f"item.{spec.name}" for spec in sizes.item_fields} | {f"user.{spec.name}" for spec in sizes.user_fields}
    found = {group: [field for field in fields if field in known] for group, fields in FIELDS.items()}
    return {group: {"model.exclude_features": fields} for group, fields in found.items() if fields}


def trained(config: Config, dataset: Dataset, out: Path, name: str) -> NeuralRetriever:
    """Train and return the best model, as a retriever of the validation part."""
    folder = out / str(len(list(out.iterdir())))
    train_stage(config, dataset.path, folder)
    model, settings, _ = load_trained(folder / "best.pt", dataset)
    store = open_store(dataset, PART, settings.model)
    return NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=split_moment(dataset, PART), name=name)


if __name__ == "__main__":
    sys.exit(main())
