"""Quality, and quality over time, of RecTools' SASRec and eSASRec, with the split, the evaluator and the cores of our own figures.

    python benchmarks/peers.py toys --peer-python PEER/.venv/bin/python --minutes 60

Settings are from the grid of the authors of eSASRec (RecSys 2025): width 64 or 256, two blocks, 256 sampled negatives, learning
rate 0.001, dropout 0.2. A peer trains until the validation figure has not risen for ten epochs, or the minutes of training (CPU
time) are over; its lists at the best epoch answer the test questions. Prints a JSON line for each validation and for each metric of
the test part, appended to benchmarks/results/peers.jsonl, beside the figures of the two-tower in the results of
quality_over_time.py and quality.py, which run before. Only leave-one-out sets can be used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import QUALITY_SETS, RESULTS, ROOT, claim, in_words, tell
from quality import MODEL, prepared
from quality_over_time import METRIC, curves_of, told
from report import latest_settings, read_rows

from twotower.data.dataset import Dataset
from twotower.errors import DataError, TwoTowerError
from twotower.evaluation.evaluator import evaluate
from twotower.retriever import Queries, Recommendations
from twotower.utils.config import Config
from twotower.utils.console import setup_logging
from twotower.utils.types import Int, Mask

TITLES = {"sasrec": "RecTools SASRec, sampled softmax", "esasrec": "RecTools eSASRec"}
METRICS = ("HitRate@10", "NDCG@10")
PATIENCE = 10


@dataclass
class Lists:
    """A retriever that returns lists written by a peer, a row for each user row."""

    name: str
    lists: Int

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """Return the first `k` of each user's list."""
        if not exclude_seen or allow is not None:
            raise NotImplementedError("The lists of a peer leave out seen items and nothing else.")
        items = self.lists[queries.user_row, :k]
        return Recommendations(items, np.where(items >= 0, -np.arange(items.shape[1]), -np.inf).astype(np.float32))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=QUALITY_SETS)
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--peer-python", type=Path, required=True, help="Python of an environment with RecTools")
    parser.add_argument("--minutes", type=float, default=60, help="most minutes of training of a peer, CPU time")
    parser.add_argument("--factors", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "peers.jsonl")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    try:
        ours = figures_of_ours(given.set)
        with tempfile.TemporaryDirectory() as folder:
            config, dataset = prepared(given.set, given.seed, Path(folder))
            write_events(dataset, Path(folder))
            for model in given.models:
                command = [str(given.peer_python.absolute()), str(ROOT / "benchmarks" / "rectools_peer.py"), folder, model]
                command += ["--factors", str(given.factors), "--seed", str(given.seed)]
                peer = Peer(given.set, f"{TITLES[model]}, width {given.factors}", command, Path(folder) / model, given.seed)
                fit(peer, ours, config, dataset, given.minutes, given.results)
    except TwoTowerError as error:
        sys.stderr.write(f"peers: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def write_events(dataset: Dataset, folder: Path) -> None:
    """Write the events for the peer."""
    events = dataset.events
    kept = events.positive & (events.split >= 0)
    np.savez(folder / "events.npz", user=events.user_row[kept], item=events.item_row[kept], split=events.split[kept])


@dataclass(frozen=True)
class Peer:
    """A peer on a dataset.

    Attributes
    ----------
    command
        Fits it, and writes its lists to `lists`-valid.npy and `lists`-test.npy.
    """

    set: str
    name: str
    command: list[str]
    lists: Path
    seed: int


@dataclass(frozen=True)
class Ours:
    """What the two-tower reached on the dataset: its last validation (CPU seconds, metric), and its test metrics."""

    valid: tuple[float, float]
    test: dict[str, float]


def figures_of_ours(name: str) -> Ours:
    """Return the two-tower's figures of a dataset: of its last curve, and the mean over the seeds of its latest settings.

    Raises
    ------
    DataError
        They were not measured.
    """
    curve = curves_of(read_rows(RESULTS / "quality_over_time.jsonl")).get(name, {}).get(MODEL)
    rows = [row for row in read_rows(RESULTS / "quality.jsonl") if row["set"] == name]
    if not curve or not rows:
        raise DataError(
            f"The results have no figures of the two-tower on {name}. Run quality.py and quality_over_time.py {name} first."
        )
    seeds = [row["metrics"] for row in latest_settings(rows) if row["system"] == MODEL and not row.get("refit")]
    return Ours(curve[-1], {metric: statistics.fmean(metrics[metric] for metrics in seeds) for metric in METRICS})


def fit(peer: Peer, ours: Ours, config: Config, dataset: Dataset, minutes: float, results: Path) -> None:
    """Drive the peer to its best validation figure, and evaluate that on the test part."""
    best, spent = -1.0, {"epoch": 0, "cpu_s": 0.0}
    with subprocess.Popen(peer.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            done = json.loads(line)
            value = figures(peer, "valid", config, dataset)[METRIC]
            tell(told(peer.set, peer.name, (done["cpu_s"], value), (MODEL, *ours.valid), peer.seed, epoch=done["epoch"]), results)
            if value > best:
                best, spent = value, done
                say(process, "test")
                process.stdout.readline()
            say(process, "go" if done["epoch"] < spent["epoch"] + PATIENCE and done["cpu_s"] < 60 * minutes else "stop")
    if process.returncode:
        raise TwoTowerError(f"{' '.join(peer.command)} ended with {process.returncode}. Run it alone to see why.")
    for metric, value in figures(peer, "test", config, dataset).items():
        title = f"{peer.set}, test {metric} of {peer.name}"
        more = {"set": peer.set, "system": peer.name, "epoch": spent["epoch"], "cpu_s": spent["cpu_s"]}
        tell(row := claim(title, value, "", MODEL, ours.test[metric], peer.seed, **more), results)
        sys.stderr.write(in_words(row))


def say(process: subprocess.Popen[str], order: str) -> None:
    """Answer the peer."""
    assert process.stdin is not None
    process.stdin.write(order + "\n")
    process.stdin.flush()


def figures(peer: Peer, part: str, config: Config, dataset: Dataset) -> dict[str, float]:
    """The mean metrics of the peer's lists on the questions of a part; of the validation part those of the two-tower's training."""
    system = Lists(peer.name, np.load(f"{peer.lists}-{part}.npy"))
    held_out = dataset.held_out(part, max_queries=config.training.eval_queries if part == "valid" else None, seed=config.seed)
    found = evaluate(system, held_out, dataset, config.evaluation, metrics=METRICS, beyond_k=None)
    return {metric: found.mean(metric) for metric in METRICS}


if __name__ == "__main__":
    sys.exit(main())
