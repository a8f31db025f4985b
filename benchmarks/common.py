"""Define what all benchmarks share: the datasets, the results folder, machine and commit.

This module imports nothing of the package, so that it is fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class QualitySet:
    """A dataset on which systems are compared.

    Attributes
    ----------
    title, about
        For people.
    config
        File in configs/.
    raw
        Folder below TWOTOWER_DATA, or inside the wheel; None: a town is simulated.
    wheel
        Package, with its version, whose wheel carries the data.
    settings
        Overrides of the file, "a.b=value".
    """

    title: str
    about: str
    config: str
    raw: str | None
    settings: tuple[str, ...] = ()
    wheel: str | None = None


_S3REC = "30,431 users, 20,033 items, 316,354 interactions; leave one out, the whole catalogue ranked."
QUALITY_SETS = {
    "s3rec": QualitySet(
        "The literature's Yelp split, masked", f"{_S3REC} Items of the history are masked.", "s3rec.yaml", "s3rec-yelp"
    ),
    "s3rec-unmasked": QualitySet(
        "The literature's Yelp split, unmasked",
        f"{_S3REC} Items of the history may be recommended again.",
        "s3rec.yaml",
        "s3rec-yelp",
        ("evaluation.exclude_seen=false",),
    ),
    "yelp2018": QualitySet(
        "LightGCN's yelp2018",
        "31,668 users, 38,048 items, 1,237,259 training interactions; ids only, sets without order; the literature's own test part "
        "of several items a user, a tenth of each user's training items set aside for validation.",
        "lightgcn.yaml",
        "lightgcn-yelp2018",
    ),
    "toys": QualitySet(
        "Amazon Toys and Games",
        "19,412 users, 11,924 items, 167,597 interactions; leave one out, the whole catalogue ranked. Seen items are masked.",
        "toys.yaml",
        "amazon-toys",
    ),
    "beauty": QualitySet(
        "Amazon Beauty",
        "22,363 users, 12,101 items, 198,502 interactions; leave one out, the whole catalogue ranked. Seen items are masked.",
        "beauty.yaml",
        "amazon-beauty",
    ),
    "town": QualitySet(
        "The simulated town",
        "A town of its own for each seed; split by time; the oracle knows everybody's true preferences and is the ceiling.",
        "quickstart.yaml",
        None,
    ),
    "boston2015": QualitySet(
        "Boston 2015", "Raw files of the 2015 release, tips as events; split by time.", "boston2015.yaml", "yelp-raw/2015-boston"
    ),
    "ml100k": QualitySet(
        "MovieLens 100K",
        "A set of another field, on which nothing was chosen: 943 users, 1,682 films, 100,000 ratings with times; leave one out.",
        "movielens.yaml",
        "recbole/dataset_example/ml-100k/",
        wheel="recbole==1.2.1",
    ),
}


def machine(device: str = "") -> str:
    """Return a description of the machine, such as "2 cores, 24 GiB, AMD EPYC with AVX2, AVX-512"; `device`: instead of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} cores, {memory:.0f} GiB, {device or processor()}"


def processor(about: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model of the processor with its instruction sets for vectors and matrices, on which ratios to kernels depend."""
    said = about.read_text(encoding="utf-8") if about.is_file() else ""
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in said.splitlines())}
    flags = found.get("flags", "").split()
    sets = [name for flag, name in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_tile", "AMX")) if flag in flags]
    return " with ".join([found.get("model name", "unknown processor"), *([", ".join(sets)] if sets else [])])


def commit() -> str:
    """Return the current commit, followed by "+" if files of the package differ from it; "none" outside a repository."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--", "src", "configs") else "") if head else "none"


def claim(name: str, figure: float, unit: str, against: str, against_figure: float, seed: int, **more: Any) -> Row:
    """Return a row with a figure, the figure it is compared with, and their ratio, rounded to four digits."""
    return {
        "claim": name,
        "figure": float(f"{figure:.4g}"),
        "unit": unit,
        "against": against,
        "against_figure": float(f"{against_figure:.4g}"),
        "ratio": round(figure / against_figure, 3),
        **more,
        "seed": seed,
        "machine": machine(),
        "commit": commit(),
    }


def in_words(row: Mapping[str, Any]) -> str:
    """Return a claim as a line of text."""
    return f"{row['claim']}: {row['figure']} {row['unit']}; {row['against']}: {row['against_figure']}; ratio {row['ratio']}\n"


def tell(row: Mapping[str, Any], file: Path) -> None:
    """Print a result as one JSON line and append it to `file`."""
    line = json.dumps(row, ensure_ascii=False)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as target:
        target.write(line + "\n")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
