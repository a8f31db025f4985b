"""Measure time and memory of `twotower recommend --all`, against its user tower and index alone.

    python benchmarks/everyone.py BUNDLE

The command runs in a separate process. For comparison, this process runs the user tower and the search of the same index for a
sample of the same users, in blocks of the same size, and extrapolates to all. With --spark MASTER the same lists are also computed
on Spark, and the lists are compared. Each claim gives a JSON line, appended to benchmarks/results/everyone.jsonl.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from common import RESULTS, claim, in_words, tell

from twotower.bundle.bundle import load_bundle
from twotower.retrieval.recommend_all import BLOCK
from twotower.schema import FIRST_ROW
from twotower.utils.console import setup_logging

SAMPLE = 20  # blocks
K = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--spark", metavar="MASTER", help="also on Spark with this master, such as local[2]")
    parser.add_argument("--results", type=Path, default=RESULTS / "everyone.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lists.parquet"
        seconds, peak = _run([str(given.bundle), "--all", "--out", str(out)])
        rows = pq.ParquetFile(out).metadata.num_rows
        on_spark = _on_spark(given.bundle, given.spark, out, Path(folder) / "lists") if given.spark else None
        _, alone = _run([str(given.bundle), "--history", _some_item(given.bundle)])
    users, items, bare = bare_seconds(given.bundle)
    what = f"lists of {K} for {users:,} users among {items:,} items"
    rate = {"users_a_second": round(users / seconds), "rows": rows}
    found = [
        claim(what, seconds, "s", "user tower and index alone, from a sample", bare, 0, **rate),
        claim(f"peak memory of {what}", peak, "GiB", "a list for one", alone, 0),
    ]
    if on_spark is not None:
        cores = int(re.sub(r"\D", "", given.spark) or os.cpu_count() or 1)
        each = {"cores": cores, "lists_equal": on_spark[1], "seconds": round(on_spark[0], 1), "local_seconds": round(seconds, 1)}
        what = f"rows a second and core on Spark, {given.spark}: lists of {K} for {users:,} users among {items:,} items"
        found.append(claim(what, rows / on_spark[0] / cores, "rows", "this process on one core", rows / seconds, 0, **each))
    for row in found:
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


def bare_seconds(path: Path) -> tuple[int, int, float]:
    """Return the numbers of users and items of a bundle, and the estimated seconds of tower and search for all users."""
    bundle = load_bundle(path)
    dataset, spent = bundle.dataset, 0.0
    users = dataset.n_users
    blocks = range(0, users, BLOCK)
    for start in np.linspace(0, len(blocks) - 1, min(SAMPLE, len(blocks))).astype(int) * BLOCK:
        rows = FIRST_ROW + np.arange(start, min(start + BLOCK, users))
        queries = dataset.histories(rows, np.full(len(rows), bundle.moment_s))
        began = time.perf_counter()
        vectors = bundle.query_vectors(queries, np.zeros(len(rows), np.float32))
        bundle.index.search(vectors, K, exclude=(queries.offsets, queries.item_row))
        spent += time.perf_counter() - began
    return users, dataset.n_items, spent * len(blocks) / min(SAMPLE, len(blocks))


def _on_spark(bundle: Path, master: str, alone: Path, out: Path) -> tuple[float, bool]:
    """Compute the lists on Spark. Return the seconds, with the start of Spark, and whether users, ranks and items are the same."""
    seconds, _ = _run([str(bundle), "--all", "--engine", "spark", "--spark-master", master, "--out", str(out)])
    columns = ["user_id", "rank", "item_id"]
    return seconds, ds.dataset(out, format="parquet", partitioning="hive").to_table(columns).equals(
        pq.read_table(alone, columns=columns)
    )


def _some_item(path: Path) -> str:
    return str(load_bundle(path).dataset.item_ids[FIRST_ROW])


def _run(options: list[str]) -> tuple[float, float]:
    """Run `twotower recommend` in a separate process, and return its seconds and peak GiB."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "twotower", "recommend", *options], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"everyone: error: `twotower recommend {' '.join(options)}` must end well. It returned {status}.")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main())
