"""Measure the time and memory of a fit from a frame, against a fit from Parquet files with the same rows.

    python benchmarks/frames.py --rows 10_000_000

Both fits run in processes of their own, with the same settings. These leave out what does not depend on where the rows come from:
five steps of training, no factors, no neighbours, one baseline and 200 queries. The frame is a pandas DataFrame of integer ids and
times, which its process reads from Parquet before the clock starts; its memory counts. The time is processor time. Each claim gives
a JSON line, appended to benchmarks/results/frames.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import RESULTS, claim, in_words, tell

USERS, ITEMS, DAYS = 300_000, 50_000, 730
FIT = """
import json, resource, sys, time
from pathlib import Path

kind, folder, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
settings = {
    "prepare": {"co_visited_items": 0},
    "model": {"item_tower": {"id_init": "random"}},
    "training": {"max_steps": 5, "recipe": "fixed", "eval_queries": 200},
    "evaluation": {"baselines": ["popular"], "max_queries": 200, "refresh_days": None},
}
named = {"user": "customer", "item": "product", "time": "ordered_at"}
if kind == "frame":
    import pandas as pd, twotower as tt
    events, items = (pd.read_parquet(folder / f"{name}.parquet") for name in ("orders", "products"))
    began = time.process_time()
    tt.Model(seed=0, verbose=0, **settings).fit(events, items=items, **named, folder=out)
else:
    from twotower.cli import main
    flat = [f"--set={section}.{key}={json.dumps(value)}" for section, part in settings.items() for key, value in part.items()]
    roles = [part for role, column in named.items() for part in (f"--{role}", column)]
    data = [part for name in ("orders", "products") for part in ("--data", str(folder / f"{name}.parquet"))]
    began = time.process_time()
    assert main(["--quiet", "run", *data, *roles, "--out", out, *flat]) == 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
manifest = json.loads((Path(out) / "dataset" / "manifest.json").read_text())
counts = {key: value for key, value in manifest["counts"].items() if isinstance(value, int)}
sys.stderr.write("\\n" + json.dumps({"seconds": time.process_time() - began, "peak": peak, "counts": counts}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--results", type=Path, default=RESULTS / "frames.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), given.rows)
        found = {}
        for kind in ("parquet", "frame"):
            child = subprocess.run([sys.executable, "-c", FIT, kind, folder, f"{folder}/{kind}"], stderr=subprocess.PIPE, text=True)
            if child.returncode:
                raise SystemExit(f"The fit from {kind} failed: {child.stderr}")
            found[kind] = json.loads(child.stderr.splitlines()[-1])
    if found["frame"]["counts"] != found["parquet"]["counts"]:
        raise SystemExit(f"The two datasets differ: {found}")
    for row in (
        claim(f"processor time of a fit of {given.rows:,} rows from a pandas DataFrame", *measured(found, "seconds", "s"), 0),
        claim(f"peak memory of a fit of {given.rows:,} rows from a pandas DataFrame", *measured(found, "peak", "GiB"), 0),
    ):
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


def measured(found: dict[str, dict[str, float]], figure: str, unit: str) -> tuple[float, str, str, float]:
    """Return what a claim states of a figure of both fits."""
    return found["frame"][figure], unit, "from Parquet", found["parquet"][figure]


def write_tables(folder: Path, rows: int) -> None:
    """Write orders.parquet and products.parquet: integer ids drawn by a power law, times in order, prices and brands."""
    rng = np.random.default_rng(0)
    users, items = (np.minimum((n * rng.random(rows) ** 2.5).astype(np.int64), n - 1) for n in (USERS, ITEMS))
    start = np.datetime64("2024-01-01", "s").astype(np.int64)
    seconds = np.sort(start + (rng.random(rows) * DAYS * 86_400).astype(np.int64))
    orders = {"customer": users, "product": items, "ordered_at": pa.array(seconds, pa.timestamp("s"))}
    pq.write_table(pa.table(orders), folder / "orders.parquet")
    products = {
        "product": np.arange(ITEMS),
        "title": [f"Product {at}" for at in range(ITEMS)],
        "brand": [f"Brand {at % 97}" for at in range(ITEMS)],
        "price": rng.integers(1, 500, ITEMS) / 4,
    }
    pq.write_table(pa.table(products), folder / "products.parquet")


if __name__ == "__main__":
    sys.exit(main())
