"""What the popularity dial costs and gives: accuracy and coverage of a trained model at several settings of it.

Enters: a model as a `Retriever`, a dataset and questions. Leaves: rows for the report. The dial is the one of requests: another
number in both vectors, and nothing trained again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from twotower.config import EvaluationConfig
from twotower.data.dataset import Dataset, HeldOut
from twotower.evaluation import evaluate
from twotower.retrieval.dials import with_popularity
from twotower.retrieval.index import ExactIndex, joined
from twotower.retrieval.item_arrays import popularity
from twotower.retrieval.neural import PORTION, NeuralRetriever
from twotower.retriever import Mask, Queries, Recommendations

DIALS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)


class Dialled:
    """A model with the popularity dial at `dial`."""

    def __init__(self, system: NeuralRetriever, counts: Any, dial: float) -> None:
        self.name, self.system, self.dial = f"{system.name} at {dial}", system, dial
        column = torch.from_numpy(popularity(counts))[:, None].to(system.device)
        self.index = ExactIndex(torch.cat([system.index.vectors, column], dim=1))

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """See `Retriever`."""
        found = []
        for start in range(0, len(queries), PORTION):
            part = queries.slice(start, min(start + PORTION, len(queries)))
            users = with_popularity(self.system.encode(part).cpu().numpy(), np.full(len(part), self.dial))
            seen = (part.offsets, part.item_row) if exclude_seen else None
            allowed = allow[start : start + PORTION] if allow is not None and allow.ndim == 2 else allow
            found.append(self.index.search(torch.from_numpy(users).to(self.system.device), k, exclude=seen, allow=allowed))
        return joined(found, k)


def dial_curve(
    system: NeuralRetriever, held_out: HeldOut, dataset: Dataset, settings: EvaluationConfig, *, metric: str, k: int = 10
) -> list[dict[str, float]]:
    """{"popularity", `metric`, "coverage@k"} at each of `DIALS`."""
    rows = []
    for dial in DIALS:
        judged = evaluate(
            Dialled(system, dataset.item_train_count, dial), held_out, dataset, settings, metrics=(metric,), beyond_k=k
        )
        figures = {metric: judged.mean(metric), f"coverage@{k}": judged.beyond[f"coverage@{k}"]}
        rows.append({"popularity": dial, **{name: round(value, 6) for name, value in figures.items()}})
    return rows
