"""Measure quality over training time: the model and tuned iALS on the same validation queries.

    python benchmarks/quality_over_time.py s3rec --plot docs/quality_over_time.svg

The model is validated four times per epoch. Its seconds include the iALS factors that initialise the item ids, but not the
validations. iALS is fitted separately for each number of iterations, with tuned settings. Each point gives a JSON line, appended to
benchmarks/results/quality_over_time.jsonl, with the final value of iALS for comparison.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from common import QUALITY_SETS, RESULTS, claim, in_words, machine, tell
from matplotlib import pyplot
from quality import prepared

from twotower.baselines.baselines import IALS
from twotower.data.dataset import Dataset
from twotower.errors import TwoTowerError
from twotower.evaluation.evaluator import evaluate, fit_baseline
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import Config
from twotower.utils.console import setup_logging

METRIC = "NDCG@10"
ITERATIONS = (1, 2, 3, 5, 8, 15)
Curve = list[tuple[float, float]]  # seconds, METRIC


class Timed(TwoTowerTrainer):
    """Trainer that records the time and value of each validation."""

    def begin(self) -> None:
        """Start the clock."""
        self.curve: Curve = []
        self.began, self.apart = time.perf_counter(), 0.0
        super().begin()

    def validate(self) -> dict[str, float]:
        """Validate without counting the time."""
        began = time.perf_counter()
        found = super().validate()
        self.curve.append((began - self.began - self.apart, found[METRIC]))
        self.apart += time.perf_counter() - began
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append and draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=QUALITY_SETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="file of the picture (.svg)")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality_over_time.jsonl")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            often = ("training.eval_every_epochs=0.25", "training.patience=20")
            config, dataset = prepared(given.set, given.seed, Path(folder), *often)
            curves = {
                "iALS": factorised(dataset, config, tuned(dataset, config)),
                "two-tower": trained(dataset, config, Path(folder) / "run"),
            }
    except TwoTowerError as error:
        sys.stderr.write(f"quality_over_time: error: {' '.join(str(error).split())}\n")
        return 2
    seconds, best = curves["iALS"][-1]
    for name, curve in curves.items():
        for after, value in curve:
            title = f"{given.set}, validation {METRIC} of {name} after {after:.0f} s"
            row = claim(
                title, value, "", f"iALS after {seconds:.0f} s", best, given.seed, set=given.set, system=name, seconds=after
            )
            tell(row, given.results)
            sys.stderr.write(in_words(row))
    if given.plot:
        draw(curves, given.plot, QUALITY_SETS[given.set].title)
    return 0


def trained(dataset: Dataset, config: Config, out: Path) -> Curve:
    """Return the curve of the model."""
    trainer = Timed(dataset, config, out)
    trainer.fit()
    return trainer.curve


def tuned(dataset: Dataset, config: Config) -> dict[str, Any]:
    """Return the settings of iALS that are best on the validation part."""
    return fit_baseline("ials", dataset, config.evaluation, metric=METRIC, seed=config.seed).settings


def factorised(dataset: Dataset, config: Config, settings: Mapping[str, Any]) -> Curve:
    """Return the curve of iALS with these settings, over the number of iterations."""
    held_out = dataset.held_out("valid", max_queries=config.training.eval_queries, seed=config.seed)
    curve = []
    for iterations in ITERATIONS:
        began = time.perf_counter()
        system = IALS(dataset, **{**settings, "iterations": iterations})
        seconds = time.perf_counter() - began
        curve.append(
            (seconds, evaluate(system, held_out, dataset, config.evaluation, metrics=[METRIC], beyond_k=None).mean(METRIC))
        )
    return curve


def draw(curves: dict[str, Curve], file: Path, title: str) -> None:
    """Draw both curves over the logarithm of the seconds."""
    matplotlib.rcParams["svg.hashsalt"] = "two-tower"  # the same curves are the same file
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for (name, curve), colour in zip(curves.items(), ("#8a6d3b", "#0b6e99"), strict=True):
        seconds, values = zip(*curve, strict=True)
        axes.plot(seconds, values, marker="o", markersize=3.5, color=colour, label=name)
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds of training ({machine()})")
    axes.set_ylabel(f"validation {METRIC}")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
