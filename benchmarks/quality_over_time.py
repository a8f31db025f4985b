"""Measure quality over training time: the model with the default recipe, and tuned iALS, on the same validation queries.

    python benchmarks/quality_over_time.py toys beauty s3rec
    python benchmarks/quality_over_time.py --plot docs/quality_over_time.svg

Seconds are of CPU time; run it on one core. Those of the model include the recipe race, the iALS factors that initialise the item
ids, and its validations. iALS is fitted separately for each number of iterations, with tuned settings. Each point gives a JSON
line, appended to benchmarks/results/quality_over_time.jsonl, with the final value of iALS for comparison. --plot draws all points
of the results, and those of `peers.py` beside them.
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
from common import QUALITY_SETS, RESULTS, Row, claim, in_words, tell
from matplotlib import pyplot
from quality import MODEL, prepared
from report import read_rows

from twotower.baselines.baselines import IALS
from twotower.data.dataset import Dataset
from twotower.errors import TwoTowerError
from twotower.evaluation.evaluator import evaluate, fit_baseline
from twotower.pipeline.stages import Watch, train_stage
from twotower.trainers.callbacks import Callback, Training
from twotower.utils.config import Config
from twotower.utils.console import setup_logging

METRIC = "NDCG@10"
ITERATIONS = (1, 2, 3, 5, 8, 15)
COLOURS = ("#8a6d3b", "#0b6e99", "#7a4b94", "#3c7a57")
Curve = list[tuple[float, float]]  # CPU seconds, METRIC


class Clock(Callback):
    """Record the CPU time and value of each validation."""

    def __init__(self) -> None:
        self.curve: Curve = []
        self.began = time.process_time()

    def on_validation(self, training: Training, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """Add a point."""
        self.curve.append((time.process_time() - self.began, metrics[METRIC]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append and draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"what to measure: {', '.join(QUALITY_SETS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="file of the picture (.svg)")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality_over_time.jsonl")
    given = parser.parse_args(arguments)
    if unknown := set(given.sets) - set(QUALITY_SETS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(QUALITY_SETS)}")
    setup_logging(quiet=True)
    try:
        for name in given.sets:
            with tempfile.TemporaryDirectory() as folder:
                config, dataset = prepared(name, given.seed, Path(folder))
                curves = {
                    "iALS": factorised(dataset, config, tuned(dataset, config)),
                    MODEL: trained(dataset, config, Path(folder) / "run"),
                }
            against = curves["iALS"][-1]
            for system, curve in curves.items():
                for point in curve:
                    tell(row := told(name, system, point, ("iALS", *against), given.seed), given.results)
                    sys.stderr.write(in_words(row))
        if given.plot:
            files = [given.results, given.results.with_name("peers.jsonl")]
            draw([row for file in files if file.is_file() for row in read_rows(file)], given.plot)
    except TwoTowerError as error:
        sys.stderr.write(f"quality_over_time: error: {error}\n")
        return 2
    return 0


def told(name: str, system: str, point: tuple[float, float], against: tuple[str, float, float], seed: int, **more: Any) -> Row:
    """Return the row of a point (CPU seconds, metric) of a system on the validation part, beside one of another system."""
    rival, rival_s, rival_value = against
    title = f"{name}, validation {METRIC} of {system}"
    named = f"{rival} after {rival_s:.0f} CPU s"
    return claim(title, point[1], "", named, rival_value, seed, set=name, system=system, cpu_s=round(point[0], 1), **more)


def trained(dataset: Dataset, config: Config, out: Path) -> Curve:
    """Return the curve of the model."""
    clock = Clock()
    train_stage(config, dataset.path, out, watch=Watch([clock]))
    return clock.curve


def tuned(dataset: Dataset, config: Config) -> dict[str, Any]:
    """Return the settings of iALS that are best on the validation part."""
    return fit_baseline("ials", dataset, config.evaluation, metric=METRIC, seed=config.seed).settings


def factorised(dataset: Dataset, config: Config, settings: Mapping[str, Any]) -> Curve:
    """Return the curve of iALS with these settings, over the number of iterations."""
    held_out = dataset.held_out("valid", max_queries=config.training.eval_queries, seed=config.seed)
    curve = []
    for iterations in ITERATIONS:
        began = time.process_time()
        system = IALS(dataset, **{**settings, "iterations": iterations})
        seconds = time.process_time() - began
        curve.append(
            (seconds, evaluate(system, held_out, dataset, config.evaluation, metrics=[METRIC], beyond_k=None).mean(METRIC))
        )
    return curve


def curves_of(rows: Sequence[Row]) -> dict[str, dict[str, Curve]]:
    """Return set → system → curve: the points of the last run, whose seconds rise."""
    found: dict[str, dict[str, Curve]] = {}
    for row in rows:
        if "cpu_s" in row and row["claim"].endswith(f"validation {METRIC} of {row['system']}"):
            curve = found.setdefault(row["set"], {}).setdefault(row["system"], [])
            if curve and row["cpu_s"] <= curve[-1][0]:
                curve.clear()
            curve.append((row["cpu_s"], row["figure"]))
    return found


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw a panel for each set: every system over the logarithm of the CPU seconds."""
    matplotlib.rcParams["svg.hashsalt"] = "two-tower"  # the same curves are the same file
    found, colours = curves_of(rows), dict[str, str]()
    figure, panels = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), layout="constrained", squeeze=False)
    for axes, (name, curves) in zip(panels[0], found.items(), strict=True):
        for system, curve in curves.items():
            colour = colours.setdefault(system, COLOURS[len(colours) % len(COLOURS)])
            seconds, values = zip(*curve, strict=True)
            axes.plot(seconds, values, marker="o", markersize=2.5, color=colour, label=system)
        axes.set_xscale("log")
        axes.set_xlabel("CPU seconds of training, one core")
        axes.set_title(QUALITY_SETS[name].title, loc="left", fontsize=10)
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel(f"validation {METRIC}")
    named = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
