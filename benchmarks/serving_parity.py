"""Check that PyTorch, ONNX Runtime and the server return the same lists.

    python benchmarks/serving_parity.py BUNDLE [--users 1000]

The 100 best items of known users are computed by the PyTorch towers, by the ONNX graph, and over HTTP by `twotower serve`. Rows:
the number of equal lists against that of all lists, and the largest difference of a score against 1e-4. Items whose scores
differ by less than 1e-6 in both may be in either order. The exit code is 1 if a list differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common import RESULTS, claim, in_words, tell
from serving_load import Server, post, wire

from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Request
from twotower.utils.console import setup_logging

K = 100
ROUNDING, WANTED = 1e-6, 1e-4
List = list[tuple[str, float]]
"""Item ids and scores, best first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    setup_logging(quiet=True)
    onnx = Recommender.load(given.bundle)
    if onnx.bundle.tower is None:
        sys.stderr.write(f"serving_parity: error: The bundle must have ONNX towers, and ONNX Runtime be there. {given.bundle}\n")
        return 2
    users = [str(user) for user in onnx.dataset.user_ids[2 : 2 + given.users]]
    lists = {"ONNX Runtime": answers(onnx, users), "PyTorch": answers(Recommender(replace(onnx.bundle, tower=None)), users)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Server(given.bundle, f"sqlite:{folder / 'events.sqlite'}", folder / "log", "--rate", "0") as server:
            lists["HTTP"] = asyncio.run(over_http(server.port, users))
    sound = True
    for other in ("ONNX Runtime", "HTTP"):
        pairs = list(zip(lists["PyTorch"], lists[other], strict=True))
        same = sum(alike(one, two) for one, two in pairs)
        swapped = sum([i for i, _ in one] != [i for i, _ in two] for one, two in pairs)
        apart = max(abs(a - b) for one, two in pairs for (_, a), (_, b) in zip(one, two, strict=True))
        what = f"{given.bundle.name}: {other} beside PyTorch, {K} best of {onnx.dataset.n_items:,} items"
        rows = [
            claim(f"{what}: the same lists", same, "lists", "all", len(pairs), 0, places_traded_in=swapped),
            claim(f"{what}: greatest difference of a score", apart, "", "wanted", WANTED, 0),
        ]
        for row in rows:
            tell(row, given.results)
            sys.stderr.write(in_words(row))
        sound = sound and same == len(pairs) and apart <= WANTED
    return 0 if sound else 1


def answers(recommender: Recommender, users: Sequence[str]) -> list[List]:
    """Return the lists computed in one process, with unrounded scores."""
    found = recommender.find([Request(user=user, k=K) for user in users])
    ids = recommender.dataset.item_ids
    return [list(zip(ids[one.rows].tolist(), one.scores.tolist(), strict=True)) for one in found]  # type: ignore[union-attr]


async def over_http(port: int, users: Sequence[str]) -> list[List]:
    """Return the lists from the server; scores are rounded to four digits."""
    lists = []
    async with wire(port) as connection:
        for user in users:
            status, body = await connection.ask(post("/v1/recommend", {"user": user, "k": K}))
            if status != 200:
                raise RuntimeError(f"status {status}: {body[:300]!r}")
            lists.append([(place["item_id"], place["score"]) for place in json.loads(body)["items"]])
    return lists


def alike(one: List, two: List) -> bool:
    """Return True if both lists are equal, except for the order of neighbours whose scores in `one` differ only by rounding."""
    if len(one) != len(two):
        return False
    score = dict(one)
    last = one[-1][1]
    return all(a == b or abs(score.get(b, last) - s) <= ROUNDING for (a, s), (b, _) in zip(one, two, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=RESULTS / "serving_parity.jsonl", help="file the rows are appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
