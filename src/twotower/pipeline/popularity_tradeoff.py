"""Measure accuracy and coverage of a trained model at several values of the popularity bias.

It is the same bias that requests can set. It changes one number of the vectors and needs no retraining.
"""

from __future__ import annotations

from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.utils.config import EvaluationConfig

BIASES = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)


def popularity_tradeoff(
    system: NeuralRetriever, held_out: HeldOut, dataset: Dataset, settings: EvaluationConfig, *, metric: str, k: int = 10
) -> list[dict[str, float]]:
    """Return one row {"popularity_bias", `metric`, "coverage@k"} for each of `BIASES`."""
    rows = []
    for bias in BIASES:
        judged = evaluate(system.with_popularity_bias(bias), held_out, dataset, settings, metrics=(metric,), beyond_k=k)
        figures = {metric: judged.mean(metric), f"coverage@{k}": judged.beyond[f"coverage@{k}"]}
        rows.append({"popularity_bias": bias, **{name: round(value, 6) for name, value in figures.items()}})
    return rows
