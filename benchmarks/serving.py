"""Measure requests over HTTP against the user tower and the index alone.

    python benchmarks/serving.py [--items 150000] [--dim 128] [--tune]

A separate process serves a bundle of random items; server and load generator share the cores. Its index is the exact one, or with
--tune the choice of `twotower tune-index`. For comparison, the same user tower and index compute the same lists in one process,
with inputs built beforehand. Rows:

- median latency of sequential requests, over HTTP and without it;
- the same with a filter that 1 % of the items match, against no filter;
- the 99th percentile of the latency at half of the highest sustained rate, against 25 ms;
- requests per second with many connections (answered in batches), against one connection;
- processor time of the server per response when it logs its answers, against a server that does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import RESULTS, claim, in_words, tell
from serving_load import Load, Server, at_rate, closed, median_ms, post, wire

from twotower.bundle.index_tuning import tune_index
from twotower.data.prepare import prepare
from twotower.models.neural_retriever import query_vectors
from twotower.pipeline.stages import train_stage
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Request
from twotower.utils.config import parse_config
from twotower.utils.console import setup_logging

K = 10
ONE_PERCENT = "shelf == 7"
PATIENCE_MS = 25
ROUNDS, EACH = 8, 60
CONNECTIONS = (2, 4, 8, 16, 32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    setup_logging(quiet=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = given.bundle or make_bundle(folder, given.items, given.dim, given.seed)
        if given.tune:
            tune_index(bundle)
        recommender = Recommender.load(bundle)
        users = [str(user) for user in recommender.dataset.user_ids[2:1002]]
        bare = bare_call(recommender, users)
        with Server(bundle, f"sqlite:{folder / 'events.sqlite'}", folder / "log", "--rate", "0") as server:
            rows = asyncio.run(measure(server, users, bare, recommender.index.kind, given))
        rows.append(asyncio.run(cost_of_logging(bundle, folder, users, recommender.index.kind, given)))
    for row in rows:
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


async def measure(
    server: Server, users: Sequence[str], bare: Callable[[int], Any], kind: str, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rows."""
    port = server.port
    plain = [post("/v1/recommend", {"user": user, "k": K}) for user in users]
    narrow = [post("/v1/recommend", {"user": user, "k": K, "filter": ONE_PERCENT}) for user in users]
    http, alone, filtered, stages = [], [], [], []
    async with wire(port) as connection:
        for requests in (plain, narrow):
            await _one_by_one(connection, requests[:EACH])
        for number in range(ROUNDS):  # in turn, so that the load of the machine affects all
            begin = number * EACH % (len(users) - EACH)
            http.append(await _one_by_one(connection, plain[begin : begin + EACH], stages))
            alone.append(median_ms(lambda at, begin=begin: bare(begin + at), EACH))
            filtered.append(await _one_by_one(connection, narrow[begin : begin + EACH]))
    what = f"{given.items:,} items, dimension {given.dim}, index {kind}"
    p50 = statistics.median(http)
    single = await closed(port, plain, connections=1, seconds=given.seconds)
    best = max([await closed(port, plain, connections=n, seconds=given.seconds) for n in CONNECTIONS], key=lambda load: load.rate)
    half = await at_rate(port, plain, rate=best.rate / 2, seconds=3 * given.seconds)
    seed, alike = given.seed, {"stages_ms": profile(stages)}
    tower = "its user tower and index alone"
    return [
        claim(f"one request over HTTP, median; {what}", p50, "ms", tower, statistics.median(alone), seed, **alike),
        claim(f"one request with a 1 % filter, median; {what}", statistics.median(filtered), "ms", "without", p50, seed),
        claim(
            f"99 of 100 answers at half of the most requests a second; {what}",
            half.ms(0.99),
            "ms",
            "wanted",
            PATIENCE_MS,
            seed,
            at_rate=round(best.rate / 2),
            p50=round(half.ms(0.5), 2),
            statuses=sound(half, best),
        ),
        claim(
            f"answers a second, many connections; {what}",
            best.rate,
            "/s",
            "one connection",
            single.rate,
            seed,
            start_s=round(server.start_s, 2),
            memory_mb=round(server.memory_mb()),
        ),
    ]


async def cost_of_logging(bundle: Path, folder: Path, users: Sequence[str], kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return the row of two servers in turn, of which one keeps its answers for 30 days and one keeps none."""
    requests = [post("/v1/recommend", {"user": user, "k": K}) for user in users]
    spent: dict[int, list[float]] = {30: [], 0: []}
    rates: dict[int, list[float]] = {30: [], 0: []}
    with ExitStack() as stack:
        servers = {}
        for days in spent:
            options = ("--rate", "0", "--set", f"serving.keep_answers_days={days}")
            servers[days] = stack.enter_context(
                Server(bundle, f"sqlite:{folder / f'kept-{days}.sqlite'}", folder / "log", *options)
            )
        for number in range(ROUNDS + 1):
            for days, server in servers.items():
                before = server.processor_s()
                load = await closed(server.port, requests, connections=8, seconds=given.seconds / 2)
                await asyncio.sleep(0.5)  # what it still has to write
                if number:  # the first round warms up
                    spent[days].append(1000 * (server.processor_s() - before) / len(load.seconds))
                    rates[days].append(load.rate)
    return claim(
        f"processor time per response, answers logged; {given.items:,} items, dimension {given.dim}, index {kind}",
        statistics.median(spent[30]),
        "ms",
        "answers not logged",
        statistics.median(spent[0]),
        given.seed,
        rate=round(statistics.median(rates[30])),
        rate_without=round(statistics.median(rates[0])),
    )


def profile(stages: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median milliseconds by stage; "rest" is the server's time outside of all stages."""
    names = dict.fromkeys(name for one in stages for name in one)
    return {name: round(statistics.median(one.get(name, 0.0) for one in stages), 3) for name in names}


def sound(*loads: Load) -> dict[int, int]:
    """Return the number of responses by status."""
    total: dict[int, int] = {}
    for load in loads:
        for status, count in load.statuses.items():
            total[status] = total.get(status, 0) + count
    return total


async def _one_by_one(connection: Any, requests: Sequence[bytes], stages: list[dict[str, float]] | None = None) -> float:
    load = Load()
    loop = asyncio.get_running_loop()
    for request in requests:
        due = loop.time()
        status, body = await connection.ask(request)
        load.seconds.append(loop.time() - due)
        if status != 200:
            raise RuntimeError(f"status {status}: {body[:300]!r}")
        if stages is not None:
            answer = json.loads(body)
            spent = answer["stages_ms"]
            stages.append({**spent, "rest": answer["took_ms"] - sum(spent.values())})
    return load.ms(0.5)


def bare_call(recommender: Recommender, users: Sequence[str]) -> Callable[[int], Any]:
    """Return a function that computes the list of user number i from prepared inputs, by the tower and the index."""
    bundle, read = recommender.bundle, recommender.reader.read
    asked = [read(Request(user=user, k=K)).history for user in users]
    tower, items = bundle.tower, torch.from_numpy(bundle.arrays.vectors)
    bias = np.zeros(1, np.float32)
    inputs: list[Any] = [bundle.store.padded(one) if tower is not None else bundle.store.users(one) for one in asked]

    def run(number: int) -> Any:
        one = asked[number]
        with torch.inference_mode():
            vector = tower(inputs[number]) if tower is not None else bundle.model.encode_users(inputs[number]).numpy()
        whole = query_vectors(bundle.model, bundle.store, torch.from_numpy(vector), one, items, popularity_bias=bias)
        return recommender.index.search(whole, K, exclude=(one.offsets, one.item_row))

    return run


def make_bundle(folder: Path, items: int, dim: int, seed: int) -> Path:
    """Write a bundle of random items with locations, categories and a column of a hundred values; train its model for one step."""
    chance, users, events = np.random.default_rng(seed), max(items // 10, 1010), 3 * items
    at = np.arange(items)
    catalogue = {
        "item_id": [f"i{number}" for number in at],
        "name": [f"Place {number}" for number in at],
        "latitude": 27 + chance.random(items),
        "longitude": -82 - chance.random(items),
        "categories": [[f"kind {number % 40}", f"sort {number % 7}"] for number in at],
        "price": 1 + at % 4,
        "shelf": at % 100,
    }
    log = {
        "user_id": [f"u{number}" for number in np.concatenate([np.arange(users), chance.integers(0, users, events)])],
        "item_id": [f"i{number}" for number in np.concatenate([at, chance.integers(0, items, users + events - items)])],
        "t": 1_600_000_000 + np.sort(chance.integers(0, 10**8, users + events)),
    }
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    pq.write_table(pa.table(log), folder / "events.parquet")
    features = [
        {"name": "location", "kind": "geo", "columns": ["latitude", "longitude"]},
        {"name": "categories", "kind": "multi"},
        {"name": "price", "kind": "number"},
        {"name": "shelf", "kind": "number"},
    ]
    tower = {"embedding_dim": dim, "hidden_dims": [dim]}
    settings = {
        "data": {
            "source": "tables",
            "path": str(folder),
            "interactions": {"path": "events.parquet", "time": "t"},
            "items": {"path": "items.parquet", "features": features},
        },
        "prepare": {"text_dim": 0},
        "model": {"user_tower": tower, "item_tower": tower},
        "training": {"max_steps": 1, "recipe": "fixed", "eval_queries": 500},
        "seed": seed,
    }
    config = parse_config(settings)
    prepare(config, folder / "dataset")
    train_stage(config, folder / "dataset", folder / "run", bundle=folder / "bundle")
    return folder / "bundle"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=150_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--bundle", type=Path, help="bundle of that size to use instead of a made-up one")
    parser.add_argument("--tune", action="store_true", help="choose the index first: some minutes")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.jsonl", help="file the rows are appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
