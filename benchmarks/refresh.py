"""Measure the cost of refreshing the items of a server, and the difference from an index built offline.

    python benchmarks/refresh.py [--items 150000] [--dim 128] [--bundle FOLDER]

New events arrive one minute apart, and the items are refreshed after every thousand. Rows:

- seconds of one core for the first refresh, which computes all items, and for the following ones, against 2 s;
- the largest difference of a vector from one computed offline, against 1e-5;
- the 99th percentile of the latency at half of the highest rate, with a refresh every minute, against periods without refreshes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, claim, in_words, tell
from serving import K, make_bundle
from serving_load import Load, Server, at_rate, closed, post, wire

from twotower.bundle.bundle import Bundle, load_bundle
from twotower.bundle.item_arrays import encode_items
from twotower.bundle.refresh import Refresher
from twotower.schema import FIRST_ROW
from twotower.utils.console import setup_logging

ROUNDS, NEW, LOADS = 6, 1000, 2
ALLOWED_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    setup_logging(quiet=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = given.bundle or make_bundle(folder, given.items, given.dim, given.seed)
        rows = cost(load_bundle(path), given.seed)
        if given.seconds:
            rows += answers(path, folder, given.seconds, given.every_s, given.seed)
    for row in rows:
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


def cost(bundle: Bundle, seed: int) -> list[dict[str, Any]]:
    """Return the rows of refreshes in this process, on one core."""
    dataset, chance, refresher = bundle.dataset, np.random.default_rng(seed), Refresher(bundle)
    now, spent, computed = bundle.moment_s, [], []
    fresh = bundle
    for _ in range(ROUNDS):
        now += 60
        items = dataset.item_ids[chance.integers(FIRST_ROW, dataset.n_item_rows, NEW)].tolist()
        users = dataset.user_ids[chance.integers(FIRST_ROW, dataset.n_user_rows, NEW)].tolist()
        began, before = time.process_time(), fresh
        refresher.add(users, items, [now] * NEW, [None] * NEW, [None] * NEW)
        found = refresher.bundle_at(now)
        spent.append(time.process_time() - began)
        assert found is not None
        fresh = found
        computed.append(int((fresh.vectors != before.vectors).any(dim=1).sum()))
    store, dynamics = fresh.store, fresh.store.dynamics
    if dynamics is not None:
        store = store.with_popularity(store.log_popularity, dynamics.exact())
    offline, _ = encode_items(bundle.model, store, np.arange(dataset.n_item_rows), fresh.moment_s)
    off = float(np.abs(offline - fresh.arrays.vectors).max())
    what = f"{dataset.n_items:,} items, dimension {fresh.vectors.shape[1]}, {NEW:,} new events"
    return [
        claim(f"first refresh, one core; {what}", spent[0], "s", "allowed", ALLOWED_S, seed, items_computed=computed[0]),
        claim(
            f"next refresh, one core; {what}",
            statistics.median(spent[1:]),
            "s",
            "allowed",
            ALLOWED_S,
            seed,
            items_computed=round(statistics.median(computed[1:])),
        ),
        claim(f"largest difference from vectors made offline; {what}", off, "", "allowed", 1e-5, seed),
    ]


def answers(path: Path, folder: Path, seconds: float, every_s: float, seed: int) -> list[dict[str, Any]]:
    """Return the row of latencies with refreshes, in turn with periods without refreshes."""
    with Server(path, f"sqlite:{folder / 'events.sqlite'}", folder / "log", "--rate", "0", "--refresh-s", "0") as server:
        users = [one["user"] for one in json.loads(server.get("/v1/users?limit=100")[1])["users"]]
        items = [one["item_id"] for one in json.loads(server.get("/v1/items?limit=100")[1])["items"]]
        return [asyncio.run(_in_turn(server.port, users, items, seconds, every_s, seed))]


async def _in_turn(
    port: int, users: Sequence[str], items: Sequence[str], seconds: float, every_s: float, seed: int
) -> dict[str, Any]:
    plain = [post("/v1/recommend", {"user": user, "k": K}) for user in users]
    rate = (await closed(port, plain, connections=8, seconds=min(seconds, 5))).rate / 2
    quiet, busy, refreshes = Load(), Load(), 0
    for number in range(LOADS):
        _add(quiet, await at_rate(port, plain, rate=rate, seconds=seconds))
        ended = asyncio.Event()
        work = asyncio.create_task(_refresh_until(ended, port, items, number, every_s))
        _add(busy, await at_rate(port, plain, rate=rate, seconds=seconds))
        ended.set()
        refreshes += await work
    return claim(
        f"99 of 100 answers at half of the most requests a second, items refreshed every {every_s:g} s",
        busy.ms(0.99),
        "ms",
        "without",
        quiet.ms(0.99),
        seed,
        at_rate=round(rate),
        refreshes=refreshes,
        statuses=busy.statuses,
    )


async def _refresh_until(ended: asyncio.Event, port: int, items: Sequence[str], number: int, every_s: float) -> int:
    done, due = 0, time.monotonic() + every_s / 2
    while not ended.is_set():
        await asyncio.sleep(0.05)
        if time.monotonic() < due:
            continue
        due += every_s
        events = [{"event_id": f"{number}-{done}-{at}", "user": f"u{at}", "item_id": one} for at, one in enumerate(items)]
        async with wire(port) as connection:
            for path, body in (("/v1/events", {"events": events}), ("/admin/refresh", {})):
                status, answer = await connection.ask(post(path, body))
                if status != 200:
                    raise RuntimeError(f"status {status}: {answer[:300]!r}")
        done += 1
    return done


def _add(total: Load, more: Load) -> None:
    total.seconds += more.seconds
    for status, count in more.statuses.items():
        total.statuses[status] = total.statuses.get(status, 0) + count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=150_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--bundle", type=Path, help="bundle to use instead of a made-up one")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load; 0: none (default: 60)")
    parser.add_argument("--every-s", type=float, default=60.0, help="between two refreshes under load (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "refresh.jsonl", help="file the rows are appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
