"""Measure a single search of every index, with and without filters, against NumPy's product and partial sort.

    python benchmarks/index.py
    python benchmarks/index.py --kinds exact,int8,sq --items 20000

The data are random: 150,000 items and 200 users, unit vectors of dimension 128 around 1,000 centres. The variance falls from one
component to the next, as in a trained model. A user is the mean of four items with a little noise. Each search runs alone, on one
thread, for the 100 best items; filters are random.

Approximate indexes use the cheapest settings tried that reach a recall of 0.99 without a filter. Each figure is the median over the
users; all indexes of one filter are measured in turn in the same process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, claim, in_words, tell

from twotower.bundle.index_tuning import SWEEPS
from twotower.errors import TwoTowerError
from twotower.schema import FIRST_ROW
from twotower.search.approximate import Approximate, one_thread
from twotower.search.index import ExactIndex, Index
from twotower.search.registry import INDEXES
from twotower.utils.types import Array

K, WIDTH, USERS, CENTRES, RECALL = 100, 128, 200, 1000, 0.99
SHARES = (1.0, 0.5, 0.1, 0.01, 0.001)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    items, users = drawn(given.items, given.seed)
    try:
        indexes = {kind: tuned(kind, items, users) for kind in given.kinds.split(",")}
        for share in SHARES:
            allow = None if share == 1 else np.random.default_rng(given.seed).random(len(items)) < share
            compare(indexes, items, users, allow, share, given)
    except TwoTowerError as error:
        sys.stderr.write(f"index: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def drawn(size: int, seed: int) -> tuple[Array, Array]:
    """Return item vectors, with the two reserved rows, and user vectors; all have length one."""
    rng = np.random.default_rng(seed)
    spread = 1 / np.sqrt(1 + np.arange(WIDTH) / 8)
    centres = rng.standard_normal((CENTRES, WIDTH)) * spread
    items = _unit(
        centres[rng.integers(0, CENTRES, size + FIRST_ROW)] + 0.7 * spread * rng.standard_normal((size + FIRST_ROW, WIDTH))
    )
    users = _unit(items[rng.integers(0, size, (USERS, 4))].mean(axis=1) + 0.02 * rng.standard_normal((USERS, WIDTH)))
    return items, users


def tuned(kind: str, items: Array, users: Array) -> Index:
    """Return the index of a kind with the first settings tried that reach the recall, else with the last ones."""
    vectors = torch.from_numpy(items)
    truth = ExactIndex(vectors).search(users, K).items
    built, searched = SWEEPS[kind][0]
    index = INDEXES[kind].build(vectors, **built)
    for setting in searched:
        tried = index.changed(**setting, exact_scan_below=0) if isinstance(index, Approximate) else index
        if recall(tried.search(users, K).items, truth) >= RECALL:
            break
    return tried.with_break_even() if isinstance(tried, Approximate) else tried


def compare(
    indexes: dict[str, Index], items: Array, users: Array, allow: Array | None, share: float, given: argparse.Namespace
) -> None:
    """Return the rows of one filter: every index against NumPy."""
    calls: dict[str, Callable[[Array], Any]] = {
        name: (lambda user, index=index: index.search(user[None], K, allow=allow)) for name, index in indexes.items()
    }
    with one_thread():
        figures = medians({"numpy": lambda user: plain(items, user, allow), **calls}, users)
    truth = ExactIndex(torch.from_numpy(items)).search(users, K, allow=allow).items
    for name, index in indexes.items():
        found = recall(index.search(users, K, allow=allow).items, truth)
        what = f"{name}: {K} best of {len(items) - FIRST_ROW:,} × {WIDTH}, " + (
            f"{share:.1%} allowed" if share < 1 else "no filter"
        )
        more = {"recall": round(found, 4), "bytes": index.nbytes, "settings": index.settings}
        row = claim(what, 1000 * figures[name], "ms", "NumPy product and argpartition", 1000 * figures["numpy"], given.seed, **more)
        tell(row, given.results)
        sys.stderr.write(in_words(row))


def plain(items: Array, user: Array, allow: Array | None) -> Array:
    """Compute all inner products with NumPy, mask the filtered items, and return the best in order."""
    scores = items @ user
    scores[:FIRST_ROW] = -np.inf
    if allow is not None:
        scores[~allow] = -np.inf
    best = np.argpartition(-scores, K)[:K]
    return best[np.argsort(-scores[best])]


def medians(calls: dict[str, Callable[[Array], Any]], users: Array) -> dict[str, float]:
    """Return the median seconds of each call, with the calls in turn for every user."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for user in users:
        for name, call in calls.items():
            began = time.perf_counter()
            call(user)
            taken[name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def recall(found: Array, truth: Array) -> float:
    """Return the mean share of the exact lists that was found."""
    return float(np.mean([np.isin(b[b >= 0], a).mean() for a, b in zip(found, truth, strict=True) if (b >= 0).any()]))


def _unit(vectors: Array) -> Array:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=150_000)
    parser.add_argument("--kinds", default=",".join(INDEXES), help="separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "index.jsonl", help="file the rows are appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
