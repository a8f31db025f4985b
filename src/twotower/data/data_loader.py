"""Dataset → training batches: seeded, resumable at any step, no work per row in Python.

Enters: an opened `Dataset` and the settings. Leaves: `TrainBatch`, whose content is a pure function of (seed, epoch, step).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.batches import ItemBatch, Layout, UserBatch
from twotower.config import Config, ModelConfig
from twotower.data.dataset import Dataset
from twotower.data.views import VIEWS, TrainEvents, View
from twotower.errors import ConfigError, TrainingError, nearest
from twotower.features import FeatureStore
from twotower.losses import LOSSES, Pool, other_positives
from twotower.schema import FIRST_ROW, SPLITS, TRAIN, WITHHELD
from twotower.state import ItemDynamics

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """This process's share of a batch: its `Q` examples, and its share of the `C` distinct items that all are contrasted with.

    Attributes
    ----------
    users, items
        In micro-batches; every process has the same number of them.
    shares
        How many candidates each process encodes, by rank.
    target, log_weight, prior, masked, weight
        See `losses.softmax_loss`; over this process's examples, and over the candidates of all.
    weight_sum
        Scalar: over the examples of all processes.
    examples
        In the whole batch.
    """

    users: tuple[UserBatch, ...]
    items: tuple[ItemBatch, ...]
    shares: tuple[int, ...]
    target: Tensor
    log_weight: Tensor
    prior: Tensor
    masked: tuple[Tensor, Tensor]
    weight: Tensor
    weight_sum: Tensor
    examples: int

    def to(self, device: torch.device | str) -> TrainBatch:
        """Copy to a device."""
        first, second = self.masked
        moved = {name: getattr(self, name).to(device) for name in ("target", "log_weight", "prior", "weight", "weight_sum")}
        users, items = tuple(part.to(device) for part in self.users), tuple(part.to(device) for part in self.items)
        return replace(self, **moved, users=users, items=items, masked=(first.to(device), second.to(device)))


class TrainLoader:
    """Batches of a view with their candidates; iterate from any (epoch, step).

    Several processes draw the same batches and candidates, and each builds its own share, the examples of its own users: so what a
    batch is does not depend on how many there are, and each reads its own part of the histories.

    Parameters
    ----------
    rank, world
        Which of how many processes this is.

    Raises
    ------
    TrainingError
        The training part holds no event that the view asks for, or fewer users than there are processes.
    """

    def __init__(self, dataset: Dataset, store: FeatureStore, config: Config, *, rank: int = 0, world: int = 1) -> None:
        self.seed = config.seed
        self.rank, self.world, self.micro = rank, world, config.training.micro_batch
        self.draws_per_example = config.training.negatives_per_positive
        self.propose = LOSSES[config.training.loss]
        self.store = store
        self.prior = np.float32(config.model.popularity_prior) * store.log_popularity
        self.events = TrainEvents(dataset, store.place, rank=rank, world=world)
        self.view: View = VIEWS[config.training.view](self.events, store, config)
        if not len(self.view.targets):
            raise TrainingError(
                f"Training needs positive events to ask for. {dataset.path} has none in its training part. Check what prepare kept."
            )
        asked, _, _ = self.events.asked(self.view.targets)
        self.pool = Pool.of(np.bincount(asked, minlength=dataset.n_items))

    def plan(self, epoch: int) -> list[Int]:
        """Members of every batch of an epoch."""
        return self.view.plan(np.random.default_rng([self.seed, 1, epoch]))

    def batch(self, members: Int, epoch: int, step: int) -> TrainBatch:
        """Build one batch; the same arguments give the same batch."""
        rng = np.random.default_rng([self.seed, 2, epoch, step])
        asked = self.view.asked_events(members)
        target_row, moments, weights = self.events.asked(asked)
        candidates = self.propose(target_row, self.pool, self.draws_per_example * len(asked), rng)
        # A target's state is that just before its event; another candidate's, that before a random event of the batch.
        time_s = rng.choice(moments, len(candidates.row))
        time_s[candidates.target] = moments.max(initial=0)
        np.minimum.at(time_s, candidates.target, moments)  # of several events of one item the earliest: none sees itself
        users, event, weight = self._users(members, np.random.default_rng([self.seed, 3, epoch, step, self.rank]))
        row, owner = self.events.history.item_row[event], self.events.user_row[event]
        target = np.minimum(np.searchsorted(candidates.row, row), len(candidates.row) - 1)  # one that counts for nothing has any
        own = owner - self.events.first_user
        masked = other_positives(own, row, candidates.row, self.events.positive_offsets, self.events.positive_items)
        shares = [len(part) for part in np.array_split(candidates.row, self.world)]
        return TrainBatch(
            users=users,
            items=self._items(candidates.row, time_s, shares),
            shares=tuple(shares),
            target=torch.from_numpy(target),
            log_weight=torch.from_numpy(candidates.log_weight),
            prior=torch.from_numpy(self.prior[candidates.row]),
            masked=(torch.from_numpy(masked[0]), torch.from_numpy(masked[1])),
            weight=torch.from_numpy(weight),
            weight_sum=torch.tensor(weights.sum(dtype=np.float64)),
            examples=len(asked),
        )

    def _users(self, members: Int, rng: np.random.Generator) -> tuple[tuple[UserBatch, ...], Int, NDArray[np.float32]]:
        """Micro-batches of this process's members, and the event and the weight of each of their examples."""
        owner = self.view.owner(members)
        shares = [members[owner == rank] for rank in range(self.world)]
        built = []
        for part in np.array_split(shares[self.rank], max(self._parts(len(share), self.view.size(share)) for share in shares)):
            # Nobody may be without work, or the others would wait: who has no member takes one that counts for nothing.
            examples = self.view.examples(part if len(part) else np.array([self.view.idle]), rng)
            built.append((examples.users, examples.event, self.events.weight[examples.event] * (len(part) > 0)))
        users, event, weight = zip(*built, strict=True)
        return users, np.concatenate(event), np.concatenate(weight).astype(np.float32)

    def _items(self, row: Int, time_s: Int, shares: list[int]) -> tuple[ItemBatch, ...]:
        """Micro-batches of this process's share of the candidates."""
        start = sum(shares[: self.rank])
        share = np.arange(start, start + shares[self.rank])
        parts = np.array_split(share, self._parts(max(shares), max(shares)))  # as many in every process
        return tuple(self.store.items(row[part], time_s[part]) for part in parts)

    def _parts(self, members: int, size: int) -> int:
        """How many micro-batches a share of `members` is, of `size` examples, tokens or items."""
        return 1 if self.micro is None else min(-(-size // self.micro), max(members, 1))

    def iterate(self, epoch: int, start: int = 0, *, ahead: int = 2) -> Iterator[TrainBatch]:
        """Batches of an epoch from step `start`, built by one thread up to `ahead` steps early."""
        plan = self.plan(epoch)
        ready: queue.Queue[TrainBatch | BaseException | None] = queue.Queue(ahead)
        stopped = threading.Event()

        def put(thing: TrainBatch | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(thing, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for step in range(start, len(plan)):
                    if stopped.is_set():
                        return
                    put(self.batch(plan[step], epoch, step))
                put(None)
            except BaseException as error:  # handed to the reader, which raises it
                put(error)

        thread = threading.Thread(target=work, daemon=True, name="twotower-loader")
        thread.start()
        try:
            while (thing := ready.get()) is not None:
                if isinstance(thing, BaseException):
                    raise thing
                yield thing
        finally:
            stopped.set()
            thread.join()


def open_store(dataset: Dataset, split: str, model: ModelConfig) -> FeatureStore:
    """Features as known when `split` begins: the state of the items comes from earlier splits alone.

    Parameters
    ----------
    split
        "valid" (what training itself may know), "test", or "future" (everything: for serving).
    """
    dynamics = None
    if dataset.has_time:
        visits = dataset.visits
        kept = visits.split < SPLITS.get(split, WITHHELD + 1)
        dynamics = ItemDynamics(visits.item_row[kept], visits.time_s[kept], visits.stars[kept])
    geo = next((spec.name for spec in dataset.specs if spec.side == "item" and spec.kind == "geo"), "")
    cells = [np.array(dataset.encoders.vocabularies.get(f"item.{geo}.{scale}", ()), np.int64) for scale in range(2)]
    return FeatureStore(
        dataset.item_features,
        dataset.user_features,
        dynamics=dynamics,
        n_trained_items=dataset.n_train_items,
        n_trained_users=dataset.n_train_users,
        geo=geo,
        cells=(cells[0], cells[1]) if len(cells[0]) else None,
        max_history=model.user_tower.max_history,
        use_place=model.request_place,
        log_popularity=log_popularity(dataset),
    )


def log_popularity(dataset: Dataset) -> NDArray[np.float32]:
    """float32 [n_items]: log((1 + n) / (1 + mean n)) in nats, n being the positive training events of an item, by their weight, and
    the mean that of the items that training knows. NaN for all others, which nobody has counted; see `TwoTower.popularity`. 0 for
    the reserved rows."""
    events = dataset.events
    counted = events.positive & (events.split == TRAIN)
    count = np.bincount(events.item_row[counted], events.weight[counted], dataset.n_items)
    row = np.arange(dataset.n_items)
    known = (row >= FIRST_ROW) & (row < FIRST_ROW + dataset.n_train_items)
    if not known.any():
        return np.zeros(dataset.n_items, np.float32)
    logs = np.log1p(count) - np.log1p(count[known].mean())
    return np.where(known, logs, np.where(row < FIRST_ROW, 0.0, np.nan)).astype(np.float32)


def layout(dataset: Dataset, store: FeatureStore, model: ModelConfig) -> Layout:
    """Sizes that the dataset gives to the model, and the fields that the settings leave it.

    Raises
    ------
    ConfigError
        `model.exclude_fields` names a field that there is none of; the nearest name is in the message.
    """
    sizes = {name: len(values) for name, values in dataset.encoders.vocabularies.items()}
    fields = {"item": store.item_fields(dataset.specs, sizes), "user": store.user_fields(dataset.specs, sizes)}
    known = [f"{side}.{spec.name}" for side, specs in fields.items() for spec in specs]
    for name in model.exclude_fields:
        if name not in known:
            raise ConfigError(f"model.exclude_fields must name fields of the towers. Got {name!r}.{nearest(name, known)}")
    kept = {
        side: tuple(spec for spec in specs if f"{side}.{spec.name}" not in model.exclude_fields) for side, specs in fields.items()
    }
    return Layout(
        items=dataset.n_train_items + FIRST_ROW,
        users=dataset.n_train_users + FIRST_ROW,
        event_types=len(dataset.event_types),
        item_fields=kept["item"],
        user_fields=kept["user"],
        ordered=dataset.ordered,
        timed=dataset.has_time,
        events=dataset.n_train_events,
    )


def split_moment(dataset: Dataset, split: str) -> int:
    """Seconds: the moment at which the index for `split` is made (its cut; without one, just after all that is known)."""
    cuts = dataset.manifest.get("cuts_s") or {}
    if split in cuts:
        return int(cuts[split])
    known = dataset.visits.time_s[dataset.visits.split < SPLITS.get(split, WITHHELD + 1)]
    return int(known.max(initial=0)) + 1
