"""Measure a run's health at each validation, log advice and keep the history.

The monitor does not change the run and draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

from twotower.baselines.baselines import Popular
from twotower.data.data_loader import TrainBatch
from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.evaluation.comparison import Evaluation
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.models.two_tower import TwoTower
from twotower.schema import FIRST_ROW
from twotower.trainers.health_checks import ValidationStats, diagnose
from twotower.trainers.health_measurements import SAMPLE, batch_stats, question_loss, spread, untrained
from twotower.utils import distributed
from twotower.utils.config import Config
from twotower.utils.console import log

BEYOND_K = 10  # list length for popularity lift and coverage


class HealthMonitor:
    """Checks a run at each validation and keeps the measurements.

    Parameters
    ----------
    model
        The model in training. All processes of a run must create their monitor together.
    held_out
        The validation queries.
    """

    def __init__(self, model: TwoTower, dataset: Dataset, held_out: HeldOut, config: Config) -> None:
        self.model, self.dataset, self.held_out, self.config = model, dataset, held_out, config
        self.history: list[ValidationStats] = []
        self.warned: set[str] = set()

    @cached_property
    def popular_lift(self) -> float:
        """Popularity lift of the baseline "popular" on the validation queries."""
        metric, settings = self.config.training.eval_metric, self.config.evaluation
        popular = evaluate(Popular(self.dataset), self.held_out, self.dataset, settings, metrics=[metric], beyond_k=BEYOND_K)
        return popular.beyond[f"popularity_lift@{BEYOND_K}"]

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Restore the history of a resumed run from the rows that `check` returned."""
        for row in rows:
            if "stats" in row:
                self.history.append(ValidationStats.of(row["stats"]))
                self.warned |= {advice["name"] for advice in row["advice"]}

    def check(
        self, retriever: NeuralRetriever, judged: Evaluation, batch: TrainBatch, *, step: int, epoch: int, training_loss: float
    ) -> dict[str, Any]:
        """Check a run and log new advice. All processes of a run must call it together.

        Parameters
        ----------
        retriever, judged
            The model and its evaluation on `held_out`, with `beyond_k=BEYOND_K`.
        batch
            Any training batch.
        training_loss
            Mean loss in nats since the previous check.

        Returns
        -------
        dict
            A row of the training log: "step", "epoch", "stats" and "advice" (a list of {"name", "message"} that apply now).
        """
        vectors, temperature = retriever.index.vectors, float(self.model.temperature().detach())
        users = retriever.encode(self.held_out.queries.slice(0, SAMPLE))
        width = vectors.shape[1] - self.model.priors.width  # of the towers' output
        answers = self.held_out.target_offsets, self.held_out.target_row
        found = ValidationStats(
            step=step,
            epoch=epoch,
            metric=judged.mean(self.config.training.eval_metric),
            training_loss=training_loss,
            validation_loss=question_loss(users, vectors, *answers, temperature),
            temperature=temperature,
            learns_temperature=self.config.model.learn_temperature,
            items=spread(vectors[FIRST_ROW : self.dataset.n_train_item_rows, :width]),
            users=spread(users[:, :width]),
            batch_stats=batch_stats(batch),
            popularity_lift=judged.beyond[f"popularity_lift@{BEYOND_K}"],
            popular_lift=self.popular_lift,
            coverage=judged.beyond[f"coverage@{BEYOND_K}"],
            untrained=untrained(self.model),
        )
        self.history.append(found)
        advice = diagnose(self.history)
        for one in advice:
            if one.name not in self.warned and distributed.rank() == 0:
                log.warning("health: %s", one.message)
        self.warned |= {one.name for one in advice}
        return {"step": step, "epoch": epoch, "stats": asdict(found), "advice": [asdict(one) for one in advice]}
