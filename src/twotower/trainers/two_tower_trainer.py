"""Train a two-tower model: encode users and items of a batch, compute the softmax loss, validate on the full catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from twotower.data.data_loader import TrainBatch, TrainLoader
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, resolve, split_moment
from twotower.data.held_out import HeldOut
from twotower.errors import TrainingError
from twotower.evaluation.evaluator import evaluate
from twotower.evaluation.insights import seen_targets
from twotower.models.build import build_model
from twotower.models.neural_retriever import NeuralRetriever
from twotower.models.two_tower import TwoTower
from twotower.trainers.base_trainer import BaseTrainer
from twotower.trainers.grown_checkpoint import Start
from twotower.trainers.health_monitor import BEYOND_K, HealthMonitor
from twotower.trainers.new_item_popularity import calibrate_new_items
from twotower.trainers.run_files import read_rows
from twotower.trainers.schedule import Schedule
from twotower.trainers.warm_start import init_item_ids_from_als
from twotower.utils import distributed
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import Config
from twotower.utils.console import log
from twotower.utils.hardware import trim_heap
from twotower.utils.losses import softmax_loss


def validation_queries(dataset: Dataset, config: Config) -> HeldOut:
    """Return the validation queries of a training; none if the settings have no validation part.

    Raises
    ------
    TrainingError
        The settings require a validation part, and it has no query.
    """
    held_out = dataset.held_out("valid", max_queries=config.training.eval_queries, seed=config.seed)
    if dataset.manifest.config.prepare.split.has_valid and not len(held_out.queries):
        raise TrainingError(
            f"The validation part of {dataset.path} is empty. Early stopping needs at least one query. Prepare the data with a "
            "larger validation part, with more events per user, or without one (prepare.split.valid: 0)."
        )
    return held_out


def check_validation(dataset: Dataset, config: Config) -> bool:
    """Return True if there is a validation part, as `validation_queries` requires; say if many of its targets cannot be found."""
    held_out = validation_queries(dataset, config)
    if config.evaluation.exclude_seen and distributed.rank() == 0:
        for sentence in seen_targets(held_out.seen_targets, len(held_out.target_row), "validation"):
            log.info("%s", sentence)
    return len(held_out.queries) > 0


class TwoTowerTrainer(BaseTrainer):
    """Train a `TwoTower` on a prepared dataset.

    Parameters
    ----------
    dataset
        The dataset; its training part gives the examples, its validation part the queries of `validate`.
    config
        All settings.
    out
        Folder of the run.
    start
        The checkpoint that an update continues, with the events to train on; None: train from random weights.

    Raises
    ------
    TrainingError
        The settings require a validation part, and it has no query.
    """

    model: TwoTower
    trim_above_bytes: int | None = None
    """Process size in bytes above which freed memory is returned to the system; None: the C library keeps it."""

    def __init__(self, dataset: Dataset, config: Config, out: Path, start: Start | None = None) -> None:
        torch.manual_seed(config.seed)
        self.dataset, resolved, self.start = dataset, resolve(config, dataset), start
        self.store = open_store(dataset, "valid", config.model)
        self.loader = TrainLoader(
            dataset,
            self.store,
            config,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            replay=None if start is None else start.replay,
        )
        super().__init__(build_model(dataset, resolved, self.store), resolved, out, data=dataset.fingerprint)
        self.held_out = validation_queries(dataset, config)
        has_valid = dataset.manifest.config.prepare.split.has_valid
        self.health = HealthMonitor(self.model, dataset, self.held_out, config) if has_valid else None

    def begin(self) -> None:
        """Initialise the weights: item ids of a new run from iALS factors, an update from its checkpoint.

        A resumed run keeps its weights; the monitor reads the validations before it from `metrics.jsonl`.
        """
        if self.state.step == 0 and self.start is None:
            init_item_ids_from_als(self.model, self.dataset, self.config)
        elif self.state.step == 0 and self.start is not None:
            checkpoint = load_checkpoint(self.start.checkpoint)
            self.restore(checkpoint)
            self.state.earlier_steps = checkpoint["progress"]["earlier_steps"] + checkpoint["progress"]["step"]
        if self.health:
            self.health.restore(read_rows(self.out / "metrics.jsonl"))

    def batches(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        """Yield the batches of epoch `epoch` from number `start` on, each copied to the device."""
        return self.loader.iterate(epoch, start, device=self.device)

    def batches_per_epoch(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.loader.plan(0))

    def make_schedule(self, config: Config) -> Schedule:
        """Return the schedule of steps, learning rates and validations.

        An update uses the epochs and the learning rate of the section `updating`, and is validated once, at the end.
        """
        if self.start is None:
            return super().make_schedule(config)
        update, steps = config.updating, self.batches_per_epoch()
        settings = {"num_epochs": update.num_epochs, "learning_rate": update.learning_rate, "max_steps": None}
        one_validation = {"eval_every_epochs": float(update.num_epochs)}
        return Schedule.of(config.training.model_copy(update={**settings, **one_validation}), steps)

    def backward(self, batch: TrainBatch, scale: Tensor) -> tuple[Tensor, int]:
        """Compute the loss of a batch and add its gradients to the weights; see `BaseTrainer.backward`.

        A batch with several micro-batches is encoded twice (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
        Limited Setup", RepL4NLP 2021). The first pass, without gradients, gives all vectors and the gradient of the loss with
        respect to them. The second pass, with the same dropout, propagates that gradient to the weights, one micro-batch at a time.

        Parameters
        ----------
        batch
            The examples of this process, in one or more micro-batches.
        scale
            Scalar factor of the loss in the backward pass.

        Returns
        -------
        tuple[Tensor, int]
            Mean loss over all processes, a float64 scalar on the device; number of examples of the batch.
        """
        encoders = [
            *(partial(self.model.encode_users, part) for part in batch.users),
            *(partial(self.model.encode_items, part) for part in batch.items),
        ]
        encode_twice = len(encoders) > 2
        with torch.set_grad_enabled(not encode_twice):
            vectors = [self._encode(number, encode) for number, encode in enumerate(encoders)]
        leaves = [part.detach().requires_grad_() for part in vectors] if encode_twice else vectors
        users, items = torch.cat(leaves[: len(batch.users)]), torch.cat(leaves[len(batch.users) :])
        loss = softmax_loss(
            users,
            distributed.gather(items, batch.shares),
            target=batch.target,
            log_weight=batch.log_weight,
            masked=batch.masked,
            negatives=batch.negatives,
            temperature=self.model.temperature(),
            prior=batch.prior,
            weight=batch.weight,
            weight_sum=batch.weight_sum,
        )
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        if encode_twice:
            torch.clear_autocast_cache()  # it holds weights of the pass without gradients
            for number, (encode, leaf) in enumerate(zip(encoders, leaves, strict=True)):
                self._encode(number, encode).backward(leaf.grad)  # type: ignore[no-untyped-call]
        total = loss.detach().double()
        distributed.all_reduce_sum([total])
        return total, batch.examples

    def _encode(self, number: int, encode: Callable[[], Tensor]) -> Tensor:
        """Encode micro-batch `number` of the step; its dropout depends only on seed, step, process and number."""
        key = np.random.SeedSequence([self.config.seed, self.state.step, distributed.rank(), number])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        self._trim_heap()
        return encode()

    def _trim_heap(self) -> None:
        """Return freed memory to the system if the process is larger than `trim_above_bytes`."""
        if self.trim_above_bytes is not None:
            trim_heap(self.trim_above_bytes)

    def after_step(self) -> None:
        """Clamp the temperature to its range."""
        self.model.clamp_temperature()

    def validate(self) -> dict[str, float] | None:
        """Evaluate the model on the validation part, and log the health of the run. The weights do not change.

        Returns
        -------
        dict[str, float] or None
            Metrics over the whole catalogue on at most `training.eval_queries` queries, and the temperature. None without a
            validation part.

        Raises
        ------
        TrainingError
            The scores are not finite.
        """
        if not self.health:
            return None
        self._trim_heap()
        moment, exposure = split_moment(self.dataset, "valid"), self.config.model.new_item_exposure
        retriever = NeuralRetriever(self.model, self.store, n_item_rows=self.dataset.n_item_rows, time_s=moment)
        names = list(dict.fromkeys([self.settings.eval_metric, "NDCG@10", "Recall@20"]))
        try:
            calibrate_new_items(retriever, self.dataset, time_s=moment, exposure=exposure, seed=self.config.seed)
            evaluation = evaluate(retriever, self.held_out, self.dataset, self.config.evaluation, metrics=names, beyond_k=BEYOND_K)
        except ValueError as error:  # the last update made the weights infinite, after the last loss that was finite
            raise TrainingError(
                f"The model cannot be evaluated at step {self.state.step}: {error} Lower training.learning_rate."
            ) from error
        self._trim_heap()
        batch = self.loader.batch(self.loader.plan(self.state.epoch)[0], self.state.epoch, 0).to(self.device)
        progress, training_loss = self.state, self.losses.mean()
        self.log.add(
            self.health.check(retriever, evaluation, batch, step=progress.step, epoch=progress.epoch, training_loss=training_loss)
        )
        return {**{name: evaluation.mean(name) for name in names}, "temperature": float(self.model.temperature().detach())}
