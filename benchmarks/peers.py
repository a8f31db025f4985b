"""Quality, and quality over time, of RecTools' SASRec and eSASRec, with the split, the evaluator and the cores of our own figures.

    python benchmarks/peers.py toys --peer-python PEER/.venv/bin/python --minutes 60

Settings are those of the authors of eSASRec (RecSys 2025): two blocks, 256 sampled negatives, learning rate 0.001, dropout 0.2. A
peer trains until the validation figure has not risen for ten epochs, or the minutes of training (CPU time) are over; its lists at
the best epoch answer the test questions. Prints a JSON line for each validation and one for the test part, appended to
benchmarks/results/peers.jsonl. Only leave-one-out sets can be used.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import QUALITY_SETS, RESULTS, ROOT, Row, commit, machine, tell
from quality import prepared

from twotower.data.dataset import Dataset
from twotower.errors import TwoTowerError
from twotower.evaluation.evaluator import evaluate
from twotower.retriever import Queries, Recommendations
from twotower.utils.config import Config
from twotower.utils.console import setup_logging
from twotower.utils.types import Int, Mask

TITLES = {"sasrec": "RecTools SASRec, sampled softmax", "esasrec": "RecTools eSASRec"}
METRICS = ("NDCG@10", "HitRate@10", "NDCG@20", "HitRate@20")
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
        with tempfile.TemporaryDirectory() as folder:
            config, dataset = prepared(given.set, given.seed, Path(folder))
            write_events(dataset, Path(folder))
            for model in given.models:
                shared = {"set": given.set, "system": TITLES[model], "factors": given.factors, "seed": given.seed}
                shared |= {"machine": machine(), "commit": commit()}
                command = [str(given.peer_python.absolute()), str(ROOT / "benchmarks" / "rectools_peer.py"), folder, model]
                command += ["--factors", str(given.factors), "--seed", str(given.seed)]
                fit(command, model, Path(folder), config, dataset, given.minutes, shared, given.results)
    except TwoTowerError as error:
        sys.stderr.write(f"peers: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def write_events(dataset: Dataset, folder: Path) -> None:
    """Write the events for the peer."""
    events = dataset.events
    kept = events.positive & (events.split >= 0)
    np.savez(folder / "events.npz", user=events.user_row[kept], item=events.item_row[kept], split=events.split[kept])


def fit(
    command: list[str], model: str, folder: Path, config: Config, dataset: Dataset, minutes: float, shared: Row, results: Path
) -> None:
    """Drive the peer to its best validation figure, and evaluate that on the test part."""
    best, spent = -1.0, {"epoch": 0, "seconds": 0.0, "cpu_s": 0.0}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        for line in peer.stdout:
            told = json.loads(line)
            values = figures(TITLES[model], folder / f"{model}-valid.npy", "valid", config, dataset)
            tell({**shared, "part": "valid", **told, "metrics": values}, results)
            if values["NDCG@10"] > best:
                best, spent = values["NDCG@10"], told
                say(peer, "test")
                peer.stdout.readline()
            say(peer, "go" if told["epoch"] < spent["epoch"] + PATIENCE and told["cpu_s"] < 60 * minutes else "stop")
    if peer.returncode:
        raise TwoTowerError(f"{' '.join(command)} ended with {peer.returncode}. Run it alone to see why.")
    values = figures(TITLES[model], folder / f"{model}-test.npy", "test", config, dataset)
    tell({**shared, "part": "test", **spent, "metrics": values}, results)


def say(peer: subprocess.Popen[str], order: str) -> None:
    """Answer the peer."""
    assert peer.stdin is not None
    peer.stdin.write(order + "\n")
    peer.stdin.flush()


def figures(name: str, file: Path, part: str, config: Config, dataset: Dataset) -> dict[str, float]:
    """The mean metrics of lists on the questions of a part."""
    system = Lists(name, np.load(file))
    found = evaluate(system, dataset.held_out(part), dataset, config.evaluation, metrics=METRICS, beyond_k=None)
    return {metric: round(found.mean(metric), 5) for metric in METRICS}


if __name__ == "__main__":
    sys.exit(main())
