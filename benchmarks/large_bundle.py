"""Measure the server of a large bundle: start, first answer, memory, and the latency of each kind of request.

    python benchmarks/large_bundle.py BUNDLE [--filter 'category == "Restaurants"']

Requests follow one another on one connection, so the latency is that of a server without other load. The memory of the process is
split into its own, and pages of files, which the system can drop. `--results` gets a JSON line for each claim.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Row, claim, in_words, tell
from serving_load import Load, Server, post, wire

from twotower.bundle.bundle import load_bundle
from twotower.schema import FIRST_ROW
from twotower.utils.console import setup_logging

K, HISTORY = 10, 5
START_S, FIRST_MS, LIMIT_GIB, PATIENT_S = 10.0, 50.0, 16.0, 600.0
Body = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--filter", action="append", default=[], help="filter to measure too; may be repeated")
    parser.add_argument("--requests", type=int, default=300, help="of each kind (default: 300)")
    parser.add_argument("--results", type=Path, default=RESULTS / "large_bundle.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    what, kinds = asked(given.bundle, given.filter, given.requests)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ("--rate", "0")
        with Server(given.bundle, f"sqlite:{folder / 'events.sqlite'}", folder / "log", *options, start_s=PATIENT_S) as server:
            rows = [claim(f"{what}: start of the server", server.start_s, "s", "wanted", START_S, 0)]
            first = run(server, next(iter(kinds.values()))[:1]).ms(0.5)
            rows.append(claim(f"{what}: first answer", first, "ms", "wanted", FIRST_MS, 0))
            for kind, bodies in kinds.items():
                load = run(server, bodies)
                more = {"p99_ms": round(load.ms(0.99), 1), "first_ms": round(1000 * load.seconds[0], 1)}
                rows.append(claim(f"{what}: p50, {kind}", load.ms(0.5), "ms", "first answer", first, 0, **more))
            rows += memory(server, what)
    for row in rows:
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


def asked(folder: Path, filters: Sequence[str], count: int) -> tuple[str, dict[str, list[Body]]]:
    """Return what the bundle is, in words, and the bodies of the requests of each kind."""
    bundle = load_bundle(folder)
    dataset, rng = bundle.dataset, np.random.default_rng(0)
    rows = rng.choice(dataset.n_users, count, replace=dataset.n_users < count)
    users = [str(dataset.user_ids[row + FIRST_ROW]) for row in rows]
    items = rng.integers(0, dataset.n_items, (count, HISTORY)) + FIRST_ROW
    histories = [[str(dataset.item_ids[row]) for row in some] for some in items]
    kinds: dict[str, list[Body]] = {
        "known users": [{"user": user, "k": K} for user in users],
        f"unknown users with {HISTORY} items": [
            {"history": [{"item_id": item} for item in history], "k": K} for history in histories
        ],
    }
    for filter_ in filters:
        kinds[f"known users, {filter_}"] = [{"user": user, "k": K, "filter": filter_} for user in users]
    index = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("index") or {"kind": "exact"}
    return f"{dataset.n_items:,} items, {dataset.n_users:,} users, index {index['kind']}", kinds


def run(server: Server, bodies: Sequence[Body]) -> Load:
    """Send requests one after the other on one connection; raise if one was refused."""

    async def follow() -> Load:
        load = Load()
        async with wire(server.port) as connection:
            for body in bodies:
                began = time.perf_counter()
                status, answer = await connection.ask(post("/v1/recommend", body))
                load.note(began, status)
                if status != 200:
                    raise RuntimeError(f"{body}: status {status}, {answer[:500]!r}")
        return load

    return asyncio.run(follow())


def memory(server: Server, what: str) -> list[Row]:
    """Return the memory of the process after the requests."""
    found = {}
    for line in Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "VmHWM"):
            found[name] = int(value.split()[0]) / 2**20
    return [
        claim(f"{what}: memory of its own", found["RssAnon"], "GiB", "pages of files", found["RssFile"], 0),
        claim(f"{what}: peak memory, pages of files included", found["VmHWM"], "GiB", "limit", LIMIT_GIB, 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
