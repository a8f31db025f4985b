"""Measure the simulation of a town, against writing the same rows with the standard library.

`--large` adds a town of the size of Yelp's full dump. Prints a JSON line for each claim and appends it to
benchmarks/results/simulate.jsonl. One thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, claim, tell

from twotower.data.simulator.simulate import simulate

SIZES = {"users": 5_000, "businesses": 2_500, "events": 100_000}
LARGE = {"users": 2_000_000, "businesses": 150_000, "events": 7_000_000}
REQUIRED_S, REQUIRED_GIB = 5.0, 3.0


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="also 7,000,000 events: about 4 GB of disk and several minutes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        simulate(out, users=100, businesses=50, events=100, seed=0)  # imports and first calls
        ours, cpu = _seconds(lambda: simulate(out, **SIZES, seed=arguments.seed))
        theirs = _rewrite(out)
    _tell("100,000 events of a town: seconds, all files written", ours, "s", "the limit set", REQUIRED_S, arguments.seed)
    _tell("100,000 events of a town: processor seconds", cpu, "s", "the limit set", REQUIRED_S, arguments.seed)
    _tell("100,000 events of a town: seconds, all files written", ours, "s", "json.dumps of the same rows", theirs, arguments.seed)
    if arguments.large:
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu = _seconds(lambda: simulate(Path(folder), **LARGE, seed=arguments.seed))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        _tell(
            "7,000,000 events, 2,000,000 users, 150,000 places: peak memory",
            peak,
            "GiB",
            "the limit set",
            REQUIRED_GIB,
            arguments.seed,
        )
        _tell(
            "7,000,000 events, 2,000,000 users, 150,000 places: processor seconds",
            cpu,
            "s",
            "70 × the limit for 100,000",
            350,
            arguments.seed,
        )
        _tell(
            "7,000,000 events, 2,000,000 users, 150,000 places: seconds",
            wall,
            "s",
            "70 × the limit for 100,000",
            350,
            arguments.seed,
        )


def _seconds(work: Any) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _rewrite(out: Path) -> float:
    """Return the seconds in which the standard library writes the rows of all files again, from memory."""
    rows = [
        json.loads(line) for file in sorted(out.glob("*.json")) for line in file.read_text(encoding="utf-8").split("\n") if line
    ]
    with (out / "again.json").open("w", encoding="utf-8") as file:
        return _seconds(lambda: file.writelines(json.dumps(row) + "\n" for row in rows))[0]


def _tell(name: str, figure: float, unit: str, against: str, against_figure: float, seed: int) -> None:
    row = claim(name, figure, unit, against, against_figure, seed)
    tell(row, RESULTS / "simulate.jsonl")


if __name__ == "__main__":
    main()
