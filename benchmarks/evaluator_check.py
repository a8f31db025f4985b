"""Check the evaluator against trec_eval, query by query, on the lists of real systems.

    python benchmarks/evaluator_check.py s3rec [--run FOLDER]

Popularity, item-kNN and iALS (with their defaults) answer every query of the test part, and with --run also the model that
`quality.py s3rec --out` wrote to FOLDER. The 20 best items of each query are exported as a run in TREC's format, with the
judgements (`--out` keeps both files). pytrec_eval, which contains trec_eval, reads and scores them.

Each system gives a JSON line, appended to benchmarks/results/evaluator_check.jsonl: the largest difference, over all metrics and
queries, from `twotower.evaluation.evaluator.evaluate`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
from common import QUALITY_SETS, RESULTS, claim, in_words, tell
from quality import prepared

from twotower.baselines.baselines import BASELINES
from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.data.held_out import HeldOut
from twotower.errors import TwoTowerError
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.retriever import Retriever
from twotower.utils.config import EvaluationConfig
from twotower.utils.console import setup_logging
from twotower.utils.types import Int

SYSTEMS = ("popular", "item_knn", "ials")
TREC = {"Recall": "recall", "HitRate": "success", "NDCG": "ndcg_cut", "MAP": "map_cut", "Precision": "P"}
KS = (5, 10, 20)
LIMIT = 1e-6


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=QUALITY_SETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="what a run left: its model's lists too")
    parser.add_argument("--out", type=Path, help="keep the runs and judgements here (default: nowhere)")
    parser.add_argument("--results", type=Path, default=RESULTS / "evaluator_check.jsonl")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config, dataset = prepared(given.set, given.seed, Path(folder))
            out = given.out or Path(folder)
            systems: list[Callable[[], Retriever]] = [partial(BASELINES[name], dataset) for name in SYSTEMS]
            systems += [partial(trained, given.run, dataset)] if given.run else []
            for system in systems:
                row = check(system(), dataset, config.evaluation, out, given.set, given.seed)
                tell(row, given.results)
                sys.stderr.write(in_words(row))
    except TwoTowerError as error:
        sys.stderr.write(f"evaluator_check: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def trained(run: Path, dataset: Dataset) -> NeuralRetriever:
    """Return the model of a run on this dataset."""
    model, config, _ = load_trained(run / "model" / "best.pt", dataset)
    store = open_store(dataset, "test", config.model)
    return NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=split_moment(dataset, "test"))


def check(retriever: Retriever, dataset: Dataset, settings: EvaluationConfig, out: Path, name: str, seed: int) -> dict[str, Any]:
    """Return the claim of one system."""
    held_out = dataset.held_out("test")
    names = [f"{metric}@{k}" for metric in TREC for k in KS]
    ours = evaluate(retriever, held_out, dataset, settings, metrics=names, beyond_k=None).values
    items = retriever.retrieve(held_out.queries, max(KS), exclude_seen=settings.exclude_seen).items
    run, judged = out / f"{name}-{retriever.name}.run", out / f"{name}.qrels"
    export(items, held_out, dataset.item_ids, run, judged, retriever.name)
    with run.open(encoding="utf-8") as lists, judged.open(encoding="utf-8") as truth:
        evaluator = pytrec_eval.RelevanceEvaluator(
            pytrec_eval.parse_qrel(truth), {f"{measure}.{k}" for measure in TREC.values() for k in KS}
        )
        found = evaluator.evaluate(pytrec_eval.parse_run(lists))
    keys = [f"{TREC[metric]}_{k}" for metric in TREC for k in KS]
    theirs = np.array([[found[str(question)][key] for key in keys] for question in range(len(held_out.queries))])
    title = f"{name}, {retriever.name}: greatest difference from trec_eval of {len(names)} metrics of a question"
    apart = float(np.abs(ours - theirs).max())
    return claim(
        title,
        apart,
        "",
        "wanted",
        LIMIT,
        seed,
        questions=len(theirs),
        ndcg_10=round(float(ours[:, names.index("NDCG@10")].mean()), 6),
    )


def export(items: Int, held_out: HeldOut, ids: Any, run: Path, judged: Path, tag: str) -> None:
    """Write lists int64 [B, k] and targets as TREC's run and judgements. Items are named by row and id: ids may contain spaces."""
    word = [f"{row}:{''.join(str(one).split())}" for row, one in enumerate(ids)]
    with run.open("w", encoding="utf-8") as file:
        for question, rows in enumerate(items):
            file.writelines(f"{question} Q0 {word[row]} {at} {-at} {tag}\n" for at, row in enumerate(rows) if row >= 0)
    owner = np.repeat(np.arange(len(held_out.queries)), np.diff(held_out.target_offsets))
    with judged.open("w", encoding="utf-8") as file:
        file.writelines(f"{question} 0 {word[row]} 1\n" for question, row in zip(owner, held_out.target_row, strict=True))


if __name__ == "__main__":
    sys.exit(main())
