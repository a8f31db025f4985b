"""Measure the full-catalogue ranking of all users, against RecTools' `recommend` and the matrix product of all scores.

    python benchmarks/evaluation_speed.py --peer-python PEER/.venv/bin/python

All 30,431 users of the S3-Rec Yelp split get their 20 best of 20,033 items, without items of their history, in the batches of the
evaluation. The model is the untrained one of `training_speed.py`. The peer is trained for one epoch, and its `recommend` is timed.
The matrix product multiplies the same vectors in the same blocks, and drops the scores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, claim, in_words, tell
from torch import Tensor
from training_speed import add_peer, open_trainer, run_peer

from twotower.data.dataset_features import open_store, split_moment
from twotower.errors import TwoTowerError
from twotower.models.neural_retriever import NeuralRetriever
from twotower.retriever import Queries
from twotower.search.index import BLOCK
from twotower.search.topk import top_k
from twotower.utils.console import setup_logging

K = 20
PORTION = 1024  # queries at once, as in the evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    setup_logging(quiet=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            retriever, queries = everybody(Path(folder), given.seed)
        vectors = retriever.encode(queries)
        ours, bare = [], []
        for _ in range(given.repeats):
            ours.append(_seconds(lambda: recommend(retriever, queries)))
            bare.append(_seconds(lambda: multiply(vectors, retriever.index.vectors)))
        parts = stages(retriever, queries)
        against = {"the bare product of all scores": min(bare)}
        if given.peer_python:
            against["RecTools SASRec, recommend"] = run_peer(given.peer, given.peer_python, 1)["recommend_s"]
    except TwoTowerError as error:
        sys.stderr.write(f"evaluation_speed: error: {' '.join(str(error).split())}\n")
        return 2
    for name, seconds in against.items():
        what = f"the {K} best of {len(retriever.index.vectors):,} rows for {len(queries):,} users"
        row = claim(what, min(ours), "s", name, seconds, given.seed, threads=torch.get_num_threads(), stages_s=parts)
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


def everybody(folder: Path, seed: int) -> tuple[NeuralRetriever, Queries]:
    """Return an untrained model as a retriever, and the test queries of all users."""
    trainer = open_trainer(folder, seed)
    dataset, config = trainer.dataset, trainer.config
    store = open_store(dataset, "test", config.model)
    retriever = NeuralRetriever(trainer.model, store, n_item_rows=dataset.n_item_rows, time_s=split_moment(dataset, "test"))
    return retriever, dataset.held_out("test").queries


def recommend(retriever: NeuralRetriever, queries: Queries) -> None:
    """Recommend to all queries, one batch at a time."""
    for start in range(0, len(queries), PORTION):
        retriever.retrieve(queries.slice(start, min(start + PORTION, len(queries))), K)


@torch.inference_mode()
def stages(retriever: NeuralRetriever, queries: Queries) -> dict[str, float]:
    """Return the seconds of each stage of `recommend`, run one after the other."""
    spent = {"histories encoded": 0.0, "scores": 0.0, "the best chosen": 0.0}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = work()
        spent[part] += time.perf_counter() - began
        return found

    for start in range(0, len(queries), BLOCK):
        part = queries.slice(start, min(start + BLOCK, len(queries)))
        vectors = timed("histories encoded", partial(retriever.encode, part))
        scores = timed("scores", lambda vectors=vectors: vectors @ retriever.index.vectors.T)
        timed("the best chosen", partial(top_k, scores, K, exclude=(part.offsets, part.item_row)))
    return {part: round(seconds, 3) for part, seconds in spent.items()}


@torch.inference_mode()
def multiply(users: Tensor, items: Tensor) -> None:
    """Compute all scores, in the blocks of the index."""
    for start in range(0, len(users), BLOCK):
        users[start : start + BLOCK] @ items.T


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer(parser, required=False)
    parser.add_argument("--repeats", type=int, default=5, help="times ours and the bare product are run, in turn (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "evaluation_speed.jsonl", help="file the rows are appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
