"""Health checks of a training: at each validation of a run, its figures are taken, judged, logged and remembered.

Enters: the model, its answers to the validation questions, a batch. Leaves: a row of the training log.

Promise: the run is looked at and never touched; no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

from twotower.baselines.baselines import Popular
from twotower.data.data_loader import TrainBatch
from twotower.data.dataset import Dataset, HeldOut
from twotower.evaluation.evaluator import Evaluation, evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.models.two_tower import TwoTower
from twotower.schema import FIRST_ROW
from twotower.trainers.health.checks import ValidationStats, diagnose
from twotower.trainers.health.measurements import SAMPLE, batch_stats, question_loss, spread, untrained
from twotower.utils import distributed
from twotower.utils.config import Config
from twotower.utils.console import log

BEYOND_K = 10  # length of the lists whose popularity is looked at


class HealthMonitor:
    """Examines a run at each of its validations, and remembers.

    Parameters
    ----------
    model
        All processes of a run make their monitor together.
    held_out
        The validation questions.
    """

    def __init__(self, model: TwoTower, dataset: Dataset, held_out: HeldOut, config: Config) -> None:
        self.model, self.dataset, self.held_out, self.config = model, dataset, held_out, config
        self.history: list[ValidationStats] = []
        self.warned: set[str] = set()

    @cached_property
    def popular_lift(self) -> float:
        """How much more popular than the histories the most popular items are."""
        metric, settings = self.config.training.eval_metric, self.config.evaluation
        popular = evaluate(Popular(self.dataset), self.held_out, self.dataset, settings, metrics=[metric], beyond_k=BEYOND_K)
        return popular.beyond[f"popularity_lift@{BEYOND_K}"]

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Remember what was found and said up to where a resumed run goes on, from the rows that `check` returned."""
        for row in rows:
            if "stats" in row:
                self.history.append(ValidationStats.of(row["stats"]))
                self.warned |= {advice["name"] for advice in row["advice"]}

    def check(
        self, retriever: NeuralRetriever, judged: Evaluation, batch: TrainBatch, *, step: int, epoch: int, training_loss: float
    ) -> dict[str, Any]:
        """Look at a run, and tell the log what is new. All processes of a run check together.

        Parameters
        ----------
        retriever, judged
            The model and how it answered `held_out`, with `beyond_k=BEYOND_K`.
        batch
            Any training batch.
        training_loss
            Mean nats since the check before.

        Returns
        -------
        dict
            A row of the training log: "step", "epoch", "stats", "advice" (a list of {"name", "message"}, all that holds now).
        """
        vectors, temperature = retriever.index.vectors, float(self.model.temperature().detach())
        users = retriever.encode(self.held_out.queries.slice(0, SAMPLE))
        answers = self.held_out.target_offsets, self.held_out.target_row
        found = ValidationStats(
            step=step,
            epoch=epoch,
            metric=judged.mean(self.config.training.eval_metric),
            training_loss=training_loss,
            validation_loss=question_loss(users, vectors, *answers, temperature),
            temperature=temperature,
            learns_temperature=self.config.model.learn_temperature,
            items=spread(vectors[FIRST_ROW : FIRST_ROW + self.dataset.n_train_items, :-1]),  # the last number is no direction
            users=spread(users[:, :-1]),
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
