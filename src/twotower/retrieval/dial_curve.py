"""What the popularity dial costs and gives: accuracy and coverage of a trained model at several settings of it.

Enters: a model as a `Retriever`, a dataset and questions. Leaves: rows for the report. The dial is the one of requests: another
number in both vectors, and nothing trained again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.config import EvaluationConfig
from twotower.data.dataset import Dataset, HeldOut
from twotower.evaluation import evaluate
from twotower.retrieval.dials import with_popularity
from twotower.retrieval.index import ExactIndex
from twotower.retrieval.item_arrays import popularity
from twotower.retrieval.neural import NeuralRetriever
from twotower.retriever import Queries

DIALS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)


class Dialled(NeuralRetriever):
    """A model with the popularity dial at `dial`: one more number in both vectors.

    Parameters
    ----------
    visits
        int64 [n_items]: positive training events of each item.
    """

    def __init__(self, system: NeuralRetriever, visits: NDArray[Any], dial: float) -> None:
        self.name, self.model, self.store, self.device = f"{system.name} at {dial}", system.model, system.store, system.device
        self.dial, column = dial, torch.from_numpy(popularity(visits))[:, None].to(system.device)
        self.index = ExactIndex(torch.cat([system.index.vectors, column], dim=1))

    def encode(self, queries: Queries) -> Tensor:
        """User vectors float32 [B, D + 1]."""
        users = super().encode(queries)
        dialled = with_popularity(users.cpu().numpy(), np.full(len(users), self.dial))
        return torch.from_numpy(dialled).to(self.device)


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
