"""Compare the memory plan of training with measured peaks, for very different configurations.

    TWOTOWER_DATA=FOLDER python benchmarks/memory.py [NAME …]

Each configuration trains a few steps, validates and exports in a separate process on the CPU. The predicted peak is its budget, so
freed memory is returned to the system. The measured peak is that of the process (VmHWM; Linux), including Python and PyTorch.
Prints a JSON line for each and a table, and appends the lines to benchmarks/results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS, ROOT, claim, tell

S3REC = ("--config", str(ROOT / "configs" / "s3rec.yaml"))
SHORT = ("training.max_steps=12", "training.device=cpu", "training.eval_queries=2000")
DEEP = ("model.user_tower.num_blocks=3", "model.user_tower.hidden_dims=[128,64]", "model.item_tower.hidden_dims=[128,64]")
MILLION_USERS, MILLION_ITEMS, MILLION_EVENTS = 1_000_000, 50_000, 4  # events: of each user

CONFIGURATIONS = {
    "town": ("town", "the town, as it is", ()),
    "micro": ("town", "batches of 2,048 in micro-batches of 512", ("training.batch_size=2048", "training.micro_batch_size=512")),
    "large": ("town", "batches of 8,192", ("training.batch_size=8192",)),
    "cache": (
        "s3rec",
        "batches of 65,536 in micro-batches of 512",
        ("training.batch_size=65536", "training.micro_batch_size=512", "training.max_steps=3"),
    ),
    "causal": (
        "town",
        "causal view, 16,384 tokens, three blocks",
        ("training.objective=next_event", "training.batch_size=16384", "model.user_tower.num_blocks=3"),
    ),
    "checkpointing": (
        "town",
        "batches of 4,096, three blocks recomputed, cross networks and MLPs",
        (*DEEP, "training.batch_size=4096", "training.gradient_checkpointing=true"),
    ),
    "s3rec": ("s3rec", "the literature's split, as it is", ()),
    "full": ("s3rec", "full softmax over the catalogue", ("training.loss=full_softmax",)),
    "rows": ("million", "a million users, tables by rows", ()),
    "dense": (
        "million",
        "a million users, dense tables, no attention",
        ("model.sparse_update_from_rows=100000000", "model.user_tower.num_blocks=0"),
    ),
}

PREDICT = """
import sys
from pathlib import Path
from twotower.utils.config import load_config
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import resolve
from twotower.trainers.memory.plan import Machine
from twotower.trainers.memory.sizes import dataset_sizes
config = load_config(Path(sys.argv[2]) if sys.argv[2] else None, sys.argv[3:])
dataset = Dataset.open(Path(sys.argv[1]))
print(Machine("cpu", 1).parts(dataset_sizes(dataset, config), resolve(config, dataset)).peak)
"""
TRAIN = """
import sys
from twotower.cli import main
code = main(sys.argv[1:])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
sys.exit(code)
"""


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(CONFIGURATIONS), help=", ".join(CONFIGURATIONS))
    parser.add_argument("--results", type=Path, default=RESULTS / "memory.jsonl")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names:
            data, about, settings = CONFIGURATIONS[name]
            predicted, measured = compare(made(data, Path(folder)), S3REC if data == "s3rec" else (), (*SHORT, *settings))
            what = f"peak memory of training, {data}: {about}"
            rows.append(claim(what, measured / 1e6, "MB", "predicted", predicted / 1e6, 0))
            tell(rows[-1], given.results)
    for row in rows:
        figures = f"{row['against_figure']:>7,} MB predicted {row['figure']:>7,} MB measured {row['ratio']:.2f}"
        sys.stderr.write(f"{figures}  {row['claim']}\n")
    return 0


def compare(data: Path, config: tuple[str, ...], settings: tuple[str, ...]) -> tuple[int, int]:
    """Return the predicted and the measured peak in bytes."""
    predicted = int(run(PREDICT, str(data), config[1] if config else "", *settings))
    budget = math.ceil(predicted / 1e6) / 1e3
    with tempfile.TemporaryDirectory() as out:
        chosen = [part for setting in (*settings, f"training.memory_budget_gb={budget}") for part in ("--set", setting)]
        said = run(TRAIN, "--quiet", "train", "--data", str(data), "--out", f"{out}/run", *config, *chosen)
    found = re.search(r"VmHWM:\s+(\d+) kB", said)
    assert found is not None, said
    return predicted, int(found[1]) * 1024


def made(name: str, folder: Path) -> Path:
    """Return the dataset called `name`, which is created at the first call."""
    out = folder / name
    if out.exists():
        return out
    raw, given = folder / f"{name}-raw", ["--data-dir", str(folder / f"{name}-raw")]
    if name == "town":
        twotower("simulate", "--out", str(raw))
    elif name == "s3rec":
        given = [*S3REC, "--data-dir", str(Path(os.environ["TWOTOWER_DATA"]) / "s3rec-yelp")]
    else:
        raw.mkdir()
        write_million(raw / "Yelp.txt")
        chosen = ("data.source=sequences", "prepare.split.kind=leave_one_out", "prepare.text_dim=0")
        given += [part for setting in chosen for part in ("--set", setting)]
    twotower("prepare", "--output-dir", str(out), *given)
    return out


def write_million(path: Path) -> None:
    """Write sequences of a million users over random items."""
    draw = random.Random(0)
    with path.open("w") as file:
        for user in range(MILLION_USERS):
            file.write(f"{user} {' '.join(map(str, draw.sample(range(MILLION_ITEMS), MILLION_EVENTS)))}\n")


def twotower(*arguments: str) -> None:
    """Run the command line in a separate process."""
    subprocess.run([sys.executable, "-m", "twotower", *arguments], check=True, stdout=subprocess.DEVNULL)


def run(code: str, *arguments: str) -> str:
    """Run Python code in a separate process and return its output."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
