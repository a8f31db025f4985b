"""Measure the throughput of a server with two workers beside that of one process.

    python benchmarks/serving_workers.py [--items 150000] [--dim 128] [--bundle FOLDER] [--rounds 12]

Two servers of one bundle run at the same time, and the load goes to one of them at a time, in turn. A round is a short run on each,
so that other load of the machine affects both; rows hold medians over the rounds. Servers and load generator share the cores, and
`cores` says how many the server had: its processor seconds for each second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, Row, claim, in_words, tell
from serving import K, make_bundle
from serving_load import Load, Server, closed, post

from twotower.retrieval.recommender import Recommender
from twotower.utils.console import setup_logging

WORKERS = (1, 2)
WANTED = 1.7
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=150_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--bundle", type=Path, help="bundle that benchmarks/serving.py made with these items (default: make one)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run (default: 3)")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "serving_workers.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = given.bundle or make_bundle(folder, given.items, given.dim, given.seed)
        users = [str(user) for user in Recommender.load(bundle).dataset.user_ids[2:1002]]
        row = compare(bundle, folder, [post("/v1/recommend", {"user": user, "k": K}) for user in users], given)
    tell(row, given.results)
    sys.stderr.write(in_words(row))
    return 0


def compare(bundle: Path, folder: Path, requests: Sequence[bytes], given: argparse.Namespace) -> Row:
    """Return the row of both servers."""
    rates: dict[int, list[float]] = {number: [] for number in WORKERS}
    cores: dict[int, list[float]] = {number: [] for number in WORKERS}
    servers: dict[int, Server] = {}
    try:
        for number in WORKERS:
            options = ("--rate", "0", "--workers", str(number))
            servers[number] = Server(bundle, f"sqlite:{folder}/{number}.sqlite", folder / f"log{number}", *options)
        for server in servers.values():  # the first answers are slow
            run(server, requests, given)
        for turn in range(given.rounds):
            for number in WORKERS if turn % 2 else reversed(WORKERS):
                before, load = processor_s(servers[number]), run(servers[number], requests, given)
                rates[number].append(load.rate)
                cores[number].append((processor_s(servers[number]) - before) / load.took_s)
    finally:
        for server in servers.values():
            server.end()
    ratios = sorted(two / one for one, two in zip(rates[1], rates[2], strict=True))
    what = f"answers a second, two workers; {given.items:,} items, dimension {given.dim}, {given.connections} connections"
    more = {
        "ratio_of_a_round": {"lowest": round(ratios[0], 3), "median": round(statistics.median(ratios), 3), "wanted": WANTED},
        "cores": {str(number): round(statistics.median(cores[number]), 2) for number in WORKERS},
        "load_average": round(os.getloadavg()[0], 1),
        "rounds": given.rounds,
    }
    return claim(what, statistics.median(rates[2]), "/s", "one", statistics.median(rates[1]), given.seed, **more)


def run(server: Server, requests: Sequence[bytes], given: argparse.Namespace) -> Load:
    """Return the result of one short run; raise if a request was refused."""
    load = asyncio.run(closed(server.port, requests, connections=given.connections, seconds=given.seconds))
    if set(load.statuses) != {200}:
        raise RuntimeError(f"statuses {load.statuses}")
    return load


def processor_s(server: Server) -> float:
    """Return the processor seconds of a server and its workers."""
    total, pids = 0, [server.process.pid]
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for pid in [*pids, *map(int, children)]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


if __name__ == "__main__":
    sys.exit(main())
