"""Compare the training speed with RecTools' SASRec, at equal model size on the same data: examples per second, in turn.

    python benchmarks/training_speed.py --peer PEER/rectools_sasrec.py --peer-python PEER/.venv/bin/python

Both train two attention blocks of width 64 over histories of 50 on the S3-Rec Yelp split. Every position of a history predicts the
next item against at least 256 negatives: the peer draws 256 per position, ours shares the negatives of a batch. An example is a
predicted position. The peer script times its `fit`; ours is timed from opening the dataset to the last step, without validation,
which the peer does not do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import QUALITY_SETS, RESULTS, ROOT, Row, claim, in_words, tell

from twotower.data.dataset import Dataset
from twotower.errors import DataError, TwoTowerError
from twotower.pipeline.stages import prepare_stage
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import load_config
from twotower.utils.console import setup_logging

PEER_SETTINGS = ("--loss", "sampled_softmax", "--negatives", "256")
SASREC_SIZE = (
    "prepare.co_visited_items=0",
    "training.objective=next_event",
    "training.batch_size=2048",
    "training.negatives_per_positive=0",
    "training.learning_rate=0.001",
    "training.log_every=1000000",
    "model.user_tower.num_blocks=2",
    "model.user_tower.num_heads=1",
    "model.user_tower.embedding_dim=64",
    "model.user_tower.hidden_dims=[64]",
    "model.user_tower.dropout=0.2",
    "model.user_tower.max_history=50",
    "model.user_tower.pooling=last",
    "model.item_tower.embedding_dim=64",
    "model.item_tower.hidden_dims=[64]",
    "model.item_tower.id_init=random",
)
"""Settings on top of configs/s3rec.yaml: two blocks, one head, width 64, history 50, as the peer script has them,
which knows no neighbours, and whose ids begin as noise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    setup_logging(quiet=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(given.repeats):
                ours = train(Path(folder), given.seed + repeat, given.epochs, given.overrides)
                peer = run_peer(given.peer, given.peer_python, given.epochs)
                against = f"{peer['model']}, {' '.join(PEER_SETTINGS)}"
                what, more = "training, two attention blocks, width 64, history 50", {"threads": torch.get_num_threads()}
                figures = ours["examples_per_s"], "examples/s", against, peer["examples_per_s"]
                idle = "seconds that training waits for its batches"
                for row in (
                    claim(what, *figures, given.seed + repeat, **ours, peer=peer, **more),
                    claim(idle, ours["waited_s"], "s", "the whole of it", ours["fit_s"], given.seed + repeat, **more),
                ):
                    tell(row, given.results)
                    sys.stderr.write(in_words(row))
    except TwoTowerError as error:
        sys.stderr.write(f"training_speed: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def real_data(name: str = "s3rec") -> Path:
    """Return the folder of raw files of a dataset of `QUALITY_SETS`, below TWOTOWER_DATA."""
    folder = os.environ.get("TWOTOWER_DATA", "")
    if not folder or not Path(folder).is_dir():
        raise DataError(f"TWOTOWER_DATA must name the folder of the real data. It is {folder!r}. Set it.")
    return Path(folder) / str(QUALITY_SETS[name].raw)


def open_trainer(folder: Path, seed: int, overrides: Sequence[str] = ()) -> TwoTowerTrainer:
    """Return a trainer of the peer's size on the S3-Rec split, which is prepared in `folder` if it is missing."""
    settings = [f"data.path={json.dumps(str(real_data()))}", f"seed={seed}", *SASREC_SIZE, *overrides]
    config = load_config(ROOT / "configs" / QUALITY_SETS["s3rec"].config, settings)
    dataset = folder / "dataset"
    if not dataset.exists():
        prepare_stage(config, dataset)
    return TwoTowerTrainer(Dataset.open(dataset), config, folder / "run")


def train(folder: Path, seed: int, epochs: int, overrides: Sequence[str] = ()) -> Row:
    """Train for some epochs; return examples per second, the number of negatives, and seconds."""
    overrides = [*overrides, f"training.num_epochs={epochs}"]
    open_trainer(folder, seed, overrides)  # prepares the data; the next call is timed
    examples = candidates = steps = 0
    waited, began = 0.0, time.perf_counter()
    trainer = open_trainer(folder, seed, overrides)
    trainer.begin()
    opened = time.perf_counter() - began
    for epoch in range(epochs):
        batches, asked = iter(trainer.batches(epoch, 0)), time.perf_counter()
        while (batch := next(batches, None)) is not None:
            waited += time.perf_counter() - asked
            trainer._step(batch)
            examples, candidates, steps = examples + len(batch.target), candidates + len(batch.log_weight), steps + 1
            asked = time.perf_counter()
    spent = time.perf_counter() - began
    return {
        "examples_per_s": examples / spent,
        "examples": examples,
        "fit_s": round(spent, 2),
        "open_s": round(opened, 2),
        "waited_s": round(waited, 3),
        "candidates": round(candidates / steps),
    }


def run_peer(script: Path, python: Path, epochs: int) -> dict[str, Any]:
    """Run the peer's script with its own Python, and return its JSON line."""
    command = [str(python), str(script.name), "--epochs", str(epochs), *PEER_SETTINGS]
    environment = {**os.environ, "SPLIT_FILE": str(real_data() / "Yelp.txt")}
    done = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise DataError(f"The peer must run. {' '.join(command)} ended with {done.returncode}: {done.stderr[-300:]}")
    peer: dict[str, Any] = json.loads(lines[-1])
    return peer


def add_peer(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options of the peer's location."""
    parser.add_argument(
        "--peer", type=_absolute, default=ROOT.parent / "shared" / "peers" / "rectools_sasrec.py", help="its script"
    )
    parser.add_argument("--peer-python", type=_absolute, required=required, help="Python of the peer's own environment")


def _absolute(text: str) -> Path:
    return Path(text).absolute()  # not resolved: the symbolic link selects the virtual environment


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer(parser)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="times both are trained, in turn (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--results", type=Path, default=RESULTS / "training_speed.jsonl", help="file the rows are appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
