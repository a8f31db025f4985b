"""What one step of a two-tower is: encode both sides of a batch, contrast, and validate on the whole catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from twotower.config import Config
from twotower.data.data_loader import TrainBatch, TrainLoader, open_store, split_moment
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.evaluation import evaluate
from twotower.losses import softmax_loss
from twotower.models.build import build_model
from twotower.models.two_tower import TwoTower
from twotower.retrieval.neural import NeuralRetriever
from twotower.trainers.base_trainer import BaseTrainer


class TwoTowerTrainer(BaseTrainer):
    """Train a `TwoTower` on a prepared dataset."""

    model: TwoTower

    def __init__(self, dataset: Dataset, config: Config, out: Path) -> None:
        torch.manual_seed(config.seed)
        self.dataset = dataset
        self.store = open_store(dataset, "valid", config.model)
        self.loader = TrainLoader(dataset, self.store, config)
        super().__init__(build_model(dataset, config), config, out, data=dataset.fingerprint)
        self.held_out = dataset.held_out("valid", max_queries=config.training.eval_queries, seed=config.seed)
        if not len(self.held_out.queries):
            raise TrainingError(
                f"Training needs a validation part to stop by. {dataset.path} has none. Prepare another split (prepare.split)."
            )

    def batches(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        """See `BaseTrainer`."""
        return self.loader.iterate(epoch, start)

    def batches_per_epoch(self) -> int:
        """See `BaseTrainer`."""
        return len(self.loader.plan(0))

    def loss(self, batch: TrainBatch) -> tuple[Tensor, int]:
        """See `BaseTrainer`."""
        users = self.model.encode_users(batch.users)
        items = self.model.encode_items(batch.items)
        loss = softmax_loss(
            users,
            items,
            target=batch.target,
            log_weight=batch.log_weight,
            masked=batch.masked,
            temperature=self.model.temperature(),
            weight=batch.weight,
        )
        return loss, len(batch.target)

    def after_step(self) -> None:
        """Keep the temperature in its range."""
        self.model.clamp_temperature()

    def validate(self) -> dict[str, float]:
        """Full-catalogue metrics on (a sample of) the validation part, and the temperature."""
        retriever = NeuralRetriever(
            self.model, self.store, n_items=self.dataset.n_items, time_s=split_moment(self.dataset, "valid")
        )
        shown = list(dict.fromkeys([self.settings.eval_metric, "NDCG@10", "Recall@20"]))
        judged = evaluate(retriever, self.held_out, self.dataset, self.config.evaluation, metrics=shown, beyond_k=None)
        return {**{name: judged.mean(name) for name in shown}, "temperature": float(self.model.temperature().detach())}
