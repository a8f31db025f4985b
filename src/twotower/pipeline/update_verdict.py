"""Judge an updated model on the newest events."""

from __future__ import annotations

from pathlib import Path

from twotower.data.dataset import Dataset
from twotower.evaluation.evaluator import evaluate
from twotower.models.two_tower import TwoTower
from twotower.trainers.calibration import refresh_interval_days, refreshed_system
from twotower.utils.config import ResolvedConfig
from twotower.utils.manifests import UpdateRecord
from twotower.utils.types import Float64

FEW_QUERIES = 100
"""With fewer validation queries, a comparison says little."""


class Newest:
    """The newest events of an extended dataset, which judge models whose items are refreshed."""

    def __init__(self, dataset: Dataset, config: ResolvedConfig) -> None:
        self.dataset, self.config = dataset, config
        self.held_out = dataset.held_out("valid", max_queries=config.training.eval_queries, seed=config.seed).by_time()
        self.every_days = refresh_interval_days(dataset, self.held_out, config)

    def values(self, model: TwoTower, known: Dataset) -> Float64:
        """Return the metric of a model for each query, float64 [B]; `known` is the dataset as the model knows it."""
        system, metrics = refreshed_system(model, known, self.config, self.every_days), [self.config.training.eval_metric]
        return evaluate(system, self.held_out, known, self.config.evaluation, metrics=metrics, beyond_k=None).values[:, 0]


def in_words(record: UpdateRecord) -> str:
    """Return what an update added and gained, as two lines; a third one if few queries decided."""
    gained = record.difference
    few = "" if record.queries >= FEW_QUERIES else "\nSo few queries say little about which model is better."
    return (
        f"{record.new_events:,} new events, {record.new_users:,} new users, {record.new_items:,} new items\n"
        f"{record.metric} on the newest events ({record.queries:,} queries): {record.before:.4f} before, {record.after:.4f} after "
        f"({gained.value:+.4f}, interval {gained.low:+.4f} to {gained.high:+.4f}){few}"
    )


def worse_in_words(record: UpdateRecord, run: Path) -> str:
    """Return why an update of `run` was not published, as one line."""
    gained = record.difference
    return (
        f"The new model is worse on the newest events: {record.metric} {record.after:.4f}, and {record.before:.4f} with the model "
        f"before ({gained.value:+.4f}, interval {gained.low:+.4f} to {gained.high:+.4f}; worse in {record.worse_frac:.0%} of the "
        f"resamples of {record.queries:,} queries). It was not published; {run} is as it was. Check the new data, lower "
        "updating.learning_rate, or train again with all data."
    )
