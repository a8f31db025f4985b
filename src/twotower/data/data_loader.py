"""Build training batches from a dataset: seeded, resumable at any step, without Python work per row.

The content of a `TrainBatch` is a pure function of (seed, epoch, step).
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from twotower.data.candidates import LOSSES, Candidates, Pool, other_positives
from twotower.data.dataset import Dataset
from twotower.data.explicit_negatives import ExplicitNegatives
from twotower.data.train_events import Replay, TrainEvents
from twotower.data.views import OBJECTIVES, Objective
from twotower.errors import ConfigError, TrainingError, TwoTowerError
from twotower.features.batches import ItemBatch, UserBatch, on_device, packed, unpacked
from twotower.features.feature_store import FeatureStore
from twotower.utils.config import Config
from twotower.utils.hardware import compute_on_one_core
from twotower.utils.losses import Masked, Negatives
from twotower.utils.types import Float, Float64, Int


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The share of one process in a batch: `Q` examples, and a part of the `C` distinct candidates of all examples.

    Attributes
    ----------
    users, items
        Micro-batches; every process has the same number of them.
    shares
        Number of candidates that each process encodes, by rank.
    target, log_weight, prior, masked, negatives, weight
        As in `losses.softmax_loss`, for the examples of this process and all candidates.
    weight_sum
        Scalar: sum of the weights of the examples of all processes.
    examples
        Number of examples of the whole batch.
    """

    users: tuple[UserBatch, ...]
    items: tuple[ItemBatch, ...]
    shares: tuple[int, ...]
    target: Tensor
    log_weight: Tensor
    prior: Tensor
    masked: Masked
    negatives: Negatives | None
    weight: Tensor
    weight_sum: Tensor
    examples: int

    def to(self, device: torch.device | str) -> TrainBatch:
        """Copy to a device; see `on_device`."""
        return on_device(self, device)


Copied = tuple[Tensor, torch.cuda.Event]
"""The block of a batch on the device, and the event that marks the end of the copy."""
Started = tuple[TrainBatch, Copied | None]
"""A batch whose copy has started."""


class DeviceCopies:
    """Copies batches to a device while it computes on the previous batch.

    On a GPU a batch is copied as one block of pinned memory on a separate stream: neither the thread that builds batches nor the
    one that trains waits, and some forty tensors need one driver call. On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, batch: TrainBatch) -> tuple[TrainBatch, Copied | None]:
        """Start to copy a batch; called by the thread that builds the batches."""
        return (batch.to(self.device), None) if self.stream is None else self.start_packed(*packed(batch, pin_memory=True))

    def start_packed(self, block: Tensor, slots: TrainBatch) -> tuple[TrainBatch, Copied | None]:
        """Start to copy a batch of `packed`."""
        if self.stream is None:
            return unpacked(block.to(self.device), slots), None
        with torch.cuda.stream(self.stream):
            there = block.pin_memory().to(self.device, non_blocking=True)  # a pinned block is not pinned again
            return unpacked(there, slots), (there, self.stream.record_event())

    def finish(self, batch: TrainBatch, copied: Copied | None) -> TrainBatch:
        """Return the batch for the current stream; the stream waits for the copy, this thread does not."""
        if copied is not None:
            block, done = copied
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            block.record_stream(stream)
        return batch


class TrainLoader:
    """Builds the batches of an objective with their candidates, starting at any (epoch, step).

    All processes draw the same batches and candidates, and each builds the examples of its own users. So batches do not depend on
    the number of processes, and each process reads only its own histories.

    Parameters
    ----------
    rank, world_size
        Number of this process, and number of processes.
    replay
        Of an update: the events to train on; None: all.

    Raises
    ------
    TrainingError
        The training part has no target for the objective, or fewer users than processes.
    ConfigError
        `training.loader_processes` is set on another system than Linux.
    """

    def __init__(
        self,
        dataset: Dataset,
        store: FeatureStore,
        config: Config,
        *,
        rank: int = 0,
        world_size: int = 1,
        replay: Replay | None = None,
    ) -> None:
        self.seed = config.seed
        self.rank, self.world_size, self.micro = rank, world_size, config.training.micro_batch_size
        self.draws_per_example, self.processes = config.training.negatives_per_positive, config.training.loader_processes
        if self.processes and sys.platform != "linux":
            raise ConfigError(f"training.loader_processes is {self.processes}. It needs Linux. Set it to 0.")
        self.loss = config.training.loss
        self.propose = LOSSES[self.loss]
        self.store = store
        self.prior = np.float32(config.model.popularity_prior) * store.log_popularity[:, 0]
        self.events = TrainEvents(dataset, store.location, rank=rank, world_size=world_size, replay=replay)
        self.objective: Objective = OBJECTIVES[config.training.objective](self.events, store, config)
        if not len(self.objective.targets):
            raise TrainingError(
                f"The training part of {dataset.path} has no positive events to train on. Check the counts in its manifest.json."
            )
        target_row, _, _ = self.events.targets(self.objective.targets)
        self.negatives = ExplicitNegatives.of(dataset, self.events, config.training.negative_weight or 0.0)
        self.pool = Pool.of(np.bincount(target_row, self._uses(replay), dataset.n_item_rows))

    def _uses(self, replay: Replay | None) -> Float64 | None:
        """Return how often an epoch uses each target, in the mean; None: each once."""
        if replay is None:
            return None
        fresh = self.events.fresh[self.objective.targets]
        drawn = np.concatenate([self.objective.target_events(members) for members in self.plan(0)])
        old = int((~self.events.fresh[drawn]).sum()) / max(int((~fresh).sum()), 1)
        return np.where(fresh, 1.0, max(old, 1e-9))  # never 0: an item may be drawn as a negative

    def plan(self, epoch: int) -> list[Int]:
        """Return the members of every batch of an epoch."""
        return self.objective.plan(np.random.default_rng([self.seed, 1, epoch]))

    def batch(self, members: Int, epoch: int, step: int) -> TrainBatch:
        """Build one batch; the same arguments give the same batch."""
        rng = np.random.default_rng([self.seed, 2, epoch, step])
        target_event = self.objective.target_events(members)
        target_row, moments, weights = self.events.targets(target_event)
        candidates = self.propose(target_row, self.pool, self.draws_per_example * len(target_event), rng)
        if not isinstance(candidates, Candidates):
            raise ConfigError(
                f"The loss {self.loss!r} gives a {type(candidates).__name__}. Expected Candidates. Correct the function."
            )
        if self.negatives:
            candidates = candidates.with_items(self.negatives.before(target_event, self.events).item_row)
        # State of a target: just before its event. State of another candidate: just before a random event of the batch.
        time_s = rng.choice(moments, len(candidates.row))
        time_s[candidates.target] = moments.max(initial=0)
        np.minimum.at(time_s, candidates.target, moments)  # the earliest of several events of one item, so that none sees itself
        users, event, weight = self._users(members, np.random.default_rng([self.seed, 3, epoch, step, self.rank]))
        row, owner = self.events.history.item_row[event], self.events.user_row[event]
        target = np.minimum(np.searchsorted(candidates.row, row), len(candidates.row) - 1)  # arbitrary for examples of weight 0
        own = owner - self.events.first_user
        masked = other_positives(own, row, candidates.row, self.events.positive_offsets, self.events.positive_items)
        shares = [len(part) for part in np.array_split(candidates.row, self.world_size)]
        return TrainBatch(
            users=users,
            items=self._items(candidates.row, time_s, shares),
            shares=tuple(shares),
            target=torch.from_numpy(target),
            log_weight=torch.from_numpy(candidates.log_weight),
            prior=torch.from_numpy(self.prior[candidates.row]),
            masked=Masked.of(*masked, len(target)),
            negatives=self._negatives(event, candidates),
            weight=torch.from_numpy(weight),
            weight_sum=torch.tensor(weights.sum(dtype=np.float64)),
            examples=len(target_event),
        )

    def _negatives(self, event: Int, candidates: Candidates) -> Negatives | None:
        """Return the explicit negatives of examples of this process, given the positions of their targets."""
        if not self.negatives:
            return None
        found = self.negatives.before(event + self.events.first, self.events)
        column = np.minimum(np.searchsorted(candidates.row, found.item_row), len(candidates.row) - 1)
        found, column = found.take(known := candidates.row[column] == found.item_row), column[known]  # not of weight 0's examples
        with np.errstate(divide="ignore"):
            log_weight = np.log(np.exp(candidates.log_weight[column]) + found.weight).astype(np.float32)
        return Negatives.of(found.example, column, log_weight, len(event))

    def _users(self, members: Int, rng: np.random.Generator) -> tuple[tuple[UserBatch, ...], Int, Float]:
        """Return micro-batches of the members of this process, and the event and weight of each example."""
        owner = self.objective.owner(members)
        shares = [members[owner == rank] for rank in range(self.world_size)]
        built = []
        for part in np.array_split(shares[self.rank], max(self._parts(len(share), self.objective.size(share)) for share in shares)):
            # Every process needs an example, or the others would wait: a process without members uses one with weight 0.
            examples = self.objective.examples(part if len(part) else np.array([self.objective.idle]), rng)
            built.append((examples.users, examples.event, self.events.weight[examples.event] * (len(part) > 0)))
        users, event, weight = zip(*built, strict=True)
        return users, np.concatenate(event), np.concatenate(weight).astype(np.float32)

    def _items(self, row: Int, time_s: Int, shares: list[int]) -> tuple[ItemBatch, ...]:
        """Return micro-batches of the candidates that this process encodes."""
        start = sum(shares[: self.rank])
        share = np.arange(start, start + shares[self.rank])
        parts = np.array_split(share, self._parts(max(shares), max(shares)))  # the same number in every process
        return tuple(self.store.items(row[part], time_s[part]) for part in parts)

    def _parts(self, members: int, size: int) -> int:
        """Return the number of micro-batches for `members` members of total `size` (examples, tokens or items)."""
        return 1 if self.micro is None else min(-(-size // self.micro), max(members, 1))

    def iterate(self, epoch: int, start: int = 0, *, ahead: int = 2, device: torch.device | str = "cpu") -> Iterator[TrainBatch]:
        """Yield the batches of an epoch from step `start`, on `device`.

        A thread prepares up to `ahead` of them in advance. With `training.loader_processes`, processes build them, each `ahead` in
        advance, and the thread copies them.
        """
        copies = DeviceCopies(torch.device(device))
        started = self._in_processes(epoch, start, ahead, copies) if self.processes else self._in_thread(epoch, start, copies)
        ready: queue.Queue[Started | BaseException | None] = queue.Queue(ahead)
        stopped = threading.Event()

        def put(thing: Started | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(thing, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            compute_on_one_core()
            try:
                with closing(started):
                    for batch in started:
                        put(batch)
                        if stopped.is_set():
                            return
                put(None)
            except BaseException as error:  # passed to the consumer, which raises it
                put(error)

        thread = threading.Thread(target=work, daemon=True, name="twotower-loader")
        thread.start()
        try:
            while (thing := ready.get()) is not None:
                if isinstance(thing, BaseException):
                    raise thing
                yield copies.finish(*thing)
        finally:
            stopped.set()
            thread.join()

    def _in_thread(self, epoch: int, start: int, copies: DeviceCopies) -> Generator[Started]:
        plan = self.plan(epoch)
        for step in range(start, len(plan)):
            yield copies.start(self.batch(plan[step], epoch, step))

    def _in_processes(self, epoch: int, start: int, ahead: int, copies: DeviceCopies) -> Generator[Started]:
        blocks = _Blocks(self, epoch)
        workers = DataLoader(
            blocks,
            batch_size=None,
            sampler=range(start, len(blocks.plan)),
            num_workers=self.processes,
            prefetch_factor=ahead,
            collate_fn=_as_it_is,
            multiprocessing_context="fork",  # the data are not copied; the workers never use the device
        )
        for block in workers:
            if isinstance(block, TwoTowerError):
                raise block
            yield copies.start_packed(*block)


class _Blocks(TorchDataset[Any]):
    """The batches of an epoch as blocks of bytes, which the workers of a `DataLoader` build."""

    def __init__(self, loader: TrainLoader, epoch: int) -> None:
        self.loader, self.epoch, self.plan = loader, epoch, loader.plan(epoch)

    def __getitem__(self, step: int) -> tuple[Tensor, TrainBatch] | TwoTowerError:
        try:
            return packed(self.loader.batch(self.plan[step], self.epoch, step))
        except TwoTowerError as error:  # returned: the loader would wrap what is raised in a traceback
            return error


def _as_it_is(block: Any) -> Any:
    return block
