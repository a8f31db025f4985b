"""Measure a step by the size of the embedding table: sparse updates against AdamW over the full table.

    python benchmarks/tables.py

A step looks up 8,192 random ids (users, histories and candidates of a batch), computes gradients and updates the table. Sizes are
measured in turn for several rounds; the figure is the median. Prints a JSON line for each claim and appends it to
benchmarks/results/tables.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, claim, tell

from twotower.models.layers.tables import RowTable, Table
from twotower.utils.config import EmbeddingConfig

DIM, IDS, SEED = 64, 8192, 0
CLAIM = "one step of a table of {rows:,} rows × 64, updated by rows ({dtype}), 8,192 ids read"


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS / "tables.jsonl")
    given = parser.parse_args()
    torch.manual_seed(SEED)
    sizes = (100_000, 1_000_000, 10_000_000)
    for dtype in ("fp32", "fp16"):
        steps = {rows: by_rows(rows, dtype) for rows in sizes}
        times = rounds(steps, given.rounds)
        for rows in sizes[1:]:
            tell(
                claim(CLAIM.format(rows=rows, dtype=dtype), times[rows], "ms", f"{sizes[0]:,} rows", times[sizes[0]], SEED),
                given.results,
            )
    steps = {"rows": by_rows(1_000_000, "fp32"), "dense": dense(1_000_000)}
    found = rounds(steps, max(given.rounds // 5, 3))
    name = CLAIM.format(rows=1_000_000, dtype="fp32")
    tell(claim(name, found["rows"], "ms", "the same table, dense AdamW", found["dense"], SEED), given.results)
    return 0


def by_rows(rows: int, dtype: str) -> Callable[[], None]:
    """Return a step of a table with sparse updates."""
    table = RowTable("table", rows, DIM, EmbeddingConfig.model_validate({"update": "sparse", "dtype": dtype, "weight_decay": 0.01}))
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        table(torch.randint(2, rows, (IDS,))).square().sum().backward()
        table.collect()
        table.step(number, 0.001, torch.tensor(1.0), torch.tensor(True))

    return step


def dense(rows: int) -> Callable[[], None]:
    """Return a step of AdamW over the full table."""
    table = Table("table", rows, DIM, EmbeddingConfig())
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.001, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        table(torch.randint(2, rows, (IDS,))).square().sum().backward()
        optimizer.step()

    return step


def rounds(steps: dict[Any, Callable[[], None]], count: int) -> dict[Any, float]:
    """Return the median milliseconds of each step, measured in turn."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for turn in range(count + 3):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    sys.exit(main())
