"""Measure the throughput of a server with two workers beside that of one process, and of one process on one thread.

    python benchmarks/serving_workers.py [--items 150000] [--dim 128] [--bundle FOLDER] [--rounds 12]

The servers of one bundle run at the same time, and the load goes to one of them at a time, in turn. A round is a short run on each,
so that other load of the machine affects all; rows hold medians over the rounds. Servers and load generator share the cores, and
`cores` says how many the server had: its processor seconds for each second. One process computes on all cores, so two workers gain
by what such a process loses; the process on one thread shows what a worker adds.
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

SERVERS: dict[str, tuple[int, dict[str, str]]] = {  # workers, and variables of the environment
    "one process": (1, {}),
    "one process on one thread": (1, {"OMP_NUM_THREADS": "1"}),
    "two workers": (2, {}),
}
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
        rows = compare(bundle, folder, [post("/v1/recommend", {"user": user, "k": K}) for user in users], given)
    for row in rows:
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


def compare(bundle: Path, folder: Path, requests: Sequence[bytes], given: argparse.Namespace) -> list[Row]:
    """Return the rows of two workers against each other server."""
    rates: dict[str, list[float]] = {name: [] for name in SERVERS}
    cores: dict[str, list[float]] = {name: [] for name in SERVERS}
    servers: dict[str, Server] = {}
    try:
        for at, (name, (workers, variables)) in enumerate(SERVERS.items()):
            options = ("--rate", "0", "--workers", str(workers))
            servers[name] = Server(bundle, f"sqlite:{folder}/{at}.sqlite", folder / f"log{at}", *options, **variables)
        for server in servers.values():  # the first answers are slow
            run(server, requests, given)
        for turn in range(given.rounds):
            for name in SERVERS if turn % 2 else reversed(SERVERS):
                before, load = processor_s(servers[name]), run(servers[name], requests, given)
                rates[name].append(load.rate)
                cores[name].append((processor_s(servers[name]) - before) / load.took_s)
    finally:
        for server in servers.values():
            server.end()
    *others, two = SERVERS
    what = f"answers a second, {two}; {given.items:,} items, dimension {given.dim}, {given.connections} connections"
    rows = []
    for other in others:
        ratios = sorted(more / less for less, more in zip(rates[other], rates[two], strict=True))
        more = {
            "ratio_of_a_round": {"lowest": round(ratios[0], 3), "median": round(statistics.median(ratios), 3), "wanted": WANTED},
            "cores": {name: round(statistics.median(cores[name]), 2) for name in (other, two)},
            "load_average": round(os.getloadavg()[0], 1),
            "rounds": given.rounds,
        }
        rows.append(claim(what, statistics.median(rates[two]), "/s", other, statistics.median(rates[other]), given.seed, **more))
    return rows


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
