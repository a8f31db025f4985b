"""Dataset → training batches: seeded, resumable at any step, no work per row in Python.

Enters: an opened `Dataset` and the settings. Leaves: `TrainBatch`, whose content is a pure function of (seed, epoch, step).

Two views of the same events (`training.view`):

- "set": an example is one event of a user, predicted from the user's other training events, whatever their order.
- "causal": a batch holds whole windows of histories, of similar length under a token budget, and every position is an example.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.batches import ItemBatch, Layout, UserBatch
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.features import FeatureStore, last_tokens
from twotower.losses import LOSSES, other_positives
from twotower.schema import FIRST_ROW, SPLITS, TRAIN
from twotower.state import History, ItemDynamics

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """`Q` examples and the `C` distinct items they are contrasted with; see `losses.softmax_loss` for the last four."""

    users: UserBatch
    items: ItemBatch
    target: Tensor
    log_weight: Tensor
    masked: tuple[Tensor, Tensor]
    weight: Tensor

    def to(self, device: torch.device | str) -> TrainBatch:
        """Copy to a device."""
        first, second = self.masked
        moved = {name: getattr(self, name).to(device) for name in ("users", "items", "target", "log_weight", "weight")}
        return replace(self, **moved, masked=(first.to(device), second.to(device)))


@dataclass(frozen=True, slots=True)
class Examples:
    """What a view chose for one batch: the user side, and of each example the target's position among the training events."""

    users: UserBatch
    event: Int
    user_row: Int


class TrainEvents:
    """The training events alone, by user: all that a view may look at.

    Attributes
    ----------
    history
        Ragged events of every user row, with their prefix sums.
    user_row, positive, weight
        [E]: of each event; `positive` marks those that may be targets.
    positive_offsets, positive_items
        Distinct positive items of every user row, ragged.
    """

    def __init__(self, dataset: Dataset, place: NDArray[np.float32]) -> None:
        events = dataset.events
        kept = np.flatnonzero(events.split == TRAIN)
        self.user_row = events.user_row[kept]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(self.user_row, minlength=dataset.n_users))]).astype(np.int64)
        self.history = History(
            offsets, events.item_row[kept], events.time_s[kept], events.event_type[kept], events.stars[kept], place
        )
        self.weight = events.weight[kept]
        self.positive = events.positive[kept] & (self.weight > 0)
        pairs = np.unique(self.user_row[self.positive] * dataset.n_items + self.history.item_row[self.positive])
        owners = np.bincount(pairs // dataset.n_items, minlength=dataset.n_users)
        self.positive_offsets = np.concatenate([[0], np.cumsum(owners)]).astype(np.int64)
        self.positive_items = pairs % dataset.n_items
        self.cut_s = int(self.history.time_s.max(initial=0)) + 1


class View(Protocol):
    """How training events become examples."""

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Members of each batch of an epoch."""
        ...

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """Build one batch."""
        ...

    def item_moments(
        self, examples: Examples, rows: Int, target: Int, rng: np.random.Generator
    ) -> tuple[Int, NDArray[np.float32] | None]:
        """The moment at which each candidate's state is taken, and the stars of a visit to take out of it."""
        ...


class SetView:
    """Predict any one event from the others. Members are positions of positive training events."""

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None:
        self.events, self.store = events, store
        self.batch_size = config.training.batch_size
        self.hidden = config.model.user_tower.history_dropout
        self.drop_same_item = config.evaluation.exclude_seen
        self.targets = np.flatnonzero(events.positive)

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Random batches of equal size; a remainder too small to contrast within joins the batch before."""
        order = rng.permutation(self.targets)
        return np.array_split(order, max(len(order) // self.batch_size, 1))

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """Histories without the target, a share of the rest hidden at random."""
        history, user = self.events.history, self.events.user_row[members]
        start, length = history.offsets[user], history.offsets[user + 1] - history.offsets[user]
        example = np.repeat(np.arange(len(members)), length)
        token = np.arange(len(example)) - np.repeat(np.cumsum(length) - length, length) + np.repeat(start, length)
        keep = token != members[example]
        if self.drop_same_item:
            # A visited item is never recommended then: showing it would teach the opposite.
            keep &= history.item_row[token] != history.item_row[members][example]
        keep &= rng.random(len(token), dtype=np.float32) >= self.hidden
        tokens = _pack(token[keep], example[keep], len(members), self.store.max_history)
        row = np.arange(len(members))
        users = self.store.user_batch(
            history,
            tokens,
            at_row=row,
            at_pos=(tokens >= 0).sum(axis=1),
            state=history.state_without(user, members),
            time_s=history.time_s[members],
            user_row=user,
        )
        return Examples(users, members, user)

    def item_moments(
        self,
        examples: Examples,
        rows: Int,
        target: Int,
        rng: np.random.Generator,  # noqa: ARG002 - one signature
    ) -> tuple[Int, NDArray[np.float32] | None]:
        """States at the end of the training period; a target's without the visit that is to be predicted."""
        without = np.full(len(rows), np.inf, np.float32)
        without[target] = self.events.history.stars[examples.event]
        return np.full(len(rows), self.events.cut_s, np.int64), without


class CausalView:
    """Every position predicts from what came strictly before. Members are windows of histories."""

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None:
        self.events, self.store = events, store
        self.token_budget = config.training.batch_size
        offsets, most = events.history.offsets, store.max_history
        step = max(most // 2, 1)
        length = np.diff(offsets)
        # A window shows up to `most` events and asks for those of its second half: all but a user's first few have context.
        windows = np.where(length > most, 1 + -(-(length - most) // step), np.minimum(length, 1))
        user = np.repeat(np.arange(len(length)), windows)
        index = np.arange(len(user)) - np.repeat(np.cumsum(windows) - windows, windows)
        self.start = offsets[user] + index * step
        self.stop = np.minimum(self.start + most, offsets[user + 1])
        self.ask_from = np.where(index > 0, self.start + most - step, self.start)
        self.user = user
        self.visible = _visible(events)

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Windows of similar length together, as many as the token budget holds; batches in random order."""
        length = self.stop - self.start
        order = rng.permutation(len(length))
        order = order[np.argsort(length[order], kind="stable")]
        batches, begin = [], 0
        while begin < len(order):
            size = 1
            # Lengths ascend: the last window decides the padded width.
            while begin + size < len(order) and (size + 1) * length[order[begin + size]] <= self.token_budget:
                size += 1
            batches.append(order[begin : begin + size])
            begin += size
        return [batches[i] for i in rng.permutation(len(batches)) if self._asked(batches[i]).any()]

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:  # noqa: ARG002 - one signature
        """Whole windows; one example per positive event."""
        history = self.events.history
        start, stop = self.start[members], self.stop[members]
        tokens = last_tokens(start, stop, self.store.max_history)
        asked = self._asked(members)
        row, column = np.nonzero(asked)
        event = tokens[row, column]
        user = self.user[members][row]
        seen = self.visible[event]  # training events of the user strictly before
        users = self.store.user_batch(
            history,
            tokens,
            at_row=row,
            at_pos=np.clip(history.offsets[user] + seen - start[row], 0, None),
            state=history.state(user, seen),
            time_s=history.time_s[event],
            user_row=user,
        )
        return Examples(users, event, user)

    def item_moments(
        self, examples: Examples, rows: Int, target: Int, rng: np.random.Generator
    ) -> tuple[Int, NDArray[np.float32] | None]:
        """A target's state just before its event; another candidate's before a random event of the batch."""
        moments = self.events.history.time_s[examples.event]
        time_s = rng.choice(moments, len(rows))
        time_s[target] = moments
        return time_s, None

    def _asked(self, members: Int) -> NDArray[np.bool_]:
        tokens = last_tokens(self.start[members], self.stop[members], self.store.max_history)
        at = np.maximum(tokens, 0)
        return np.asarray((tokens >= self.ask_from[members][:, None]) & self.events.positive[at])


VIEWS: dict[str, type[SetView] | type[CausalView]] = {"set": SetView, "causal": CausalView}


class TrainLoader:
    """Batches of a view with their candidates; iterate from any (epoch, step).

    Raises
    ------
    TrainingError
        The training part holds no positive event.
    """

    def __init__(self, dataset: Dataset, store: FeatureStore, config: Config) -> None:
        self.seed, self.n_items = config.seed, dataset.n_items
        self.count = dataset.item_train_count
        self.draws_per_example = config.training.negatives_per_positive
        self.propose = LOSSES[config.training.loss]
        self.store = store
        self.events = TrainEvents(dataset, store.place)
        if not self.events.positive.any():
            raise TrainingError(
                f"Training needs positive events. {dataset.path} has none in its training part. Check prepare's settings."
            )
        self.view: View = VIEWS[config.training.view](self.events, store, config)

    def plan(self, epoch: int) -> list[Int]:
        """Members of every batch of an epoch."""
        return self.view.plan(np.random.default_rng([self.seed, 1, epoch]))

    def batch(self, members: Int, epoch: int, step: int) -> TrainBatch:
        """Build one batch; the same arguments give the same batch."""
        rng = np.random.default_rng([self.seed, 2, epoch, step])
        examples = self.view.examples(members, rng)
        target_row = self.events.history.item_row[examples.event]
        draws = self.draws_per_example * len(target_row)
        candidates = self.propose(target_row, self.count, draws, rng)
        time_s, without = self.view.item_moments(examples, candidates.row, candidates.target, rng)
        masked = other_positives(
            examples.user_row, target_row, candidates.row, self.events.positive_offsets, self.events.positive_items, self.n_items
        )
        return TrainBatch(
            users=examples.users,
            items=self.store.items(candidates.row, time_s, without_stars=without),
            target=torch.from_numpy(candidates.target),
            log_weight=torch.from_numpy(candidates.log_weight),
            masked=(torch.from_numpy(masked[0]), torch.from_numpy(masked[1])),
            weight=torch.from_numpy(self.events.weight[examples.event]),
        )

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


def open_store(dataset: Dataset, split: str, *, max_history: int, use_place: bool = False) -> FeatureStore:
    """Features as known when `split` begins: the state of the items comes from earlier splits alone.

    Parameters
    ----------
    split
        "valid" (what training itself may know), "test", or "future" (everything: for serving).
    """
    dynamics = None
    if dataset.has_time:
        visits = dataset.visits
        kept = visits.split < SPLITS.get(split, max(SPLITS.values()) + 1)
        dynamics = ItemDynamics(visits.item_row[kept], visits.time_s[kept], visits.stars[kept])
    cells = [np.array(dataset.encoders.vocabularies.get(f"item.location.{scale}", ()), np.int64) for scale in range(2)]
    return FeatureStore(
        dataset.item_features,
        dataset.user_features,
        dynamics=dynamics,
        n_trained_items=dataset.n_train_items,
        n_trained_users=dataset.n_train_users,
        cells=(cells[0], cells[1]) if len(cells[0]) else None,
        max_history=max_history,
        use_place=use_place,
    )


def layout(dataset: Dataset, store: FeatureStore) -> Layout:
    """Sizes that the dataset gives to the model."""
    sizes = {name: len(values) for name, values in dataset.encoders.vocabularies.items()}
    return Layout(
        items=dataset.n_train_items + FIRST_ROW,
        users=dataset.n_train_users + FIRST_ROW,
        event_types=len(dataset.event_types),
        item_fields=store.item_fields(dataset.specs, sizes),
        user_fields=store.user_fields(dataset.specs, sizes),
    )


def split_moment(dataset: Dataset, split: str) -> int:
    """Seconds: the moment at which the index for `split` is made (its cut; without one, just after all that is known)."""
    cuts = dataset.manifest.get("cuts_s") or {}
    if split in cuts:
        return int(cuts[split])
    known = dataset.visits.time_s[dataset.visits.split < SPLITS.get(split, max(SPLITS.values()) + 1)]
    return int(known.max(initial=0)) + 1


def _pack(token: Int, example: Int, size: int, most: int) -> Int:
    """Ragged tokens, sorted by example → the last `most` of each as int64 [size, H], -1 after the end."""
    count = np.bincount(example, minlength=size)
    stop = np.cumsum(count)
    at = last_tokens(stop - count, stop, most)
    return np.where(at >= 0, token[np.maximum(at, 0)] if len(token) else -1, -1)


def _visible(events: TrainEvents) -> Int:
    """int64 [E]: training events of the same user strictly before each event in time."""
    history = events.history
    changed = np.ones(len(history.time_s), np.bool_)
    changed[1:] = (history.time_s[1:] != history.time_s[:-1]) | (events.user_row[1:] != events.user_row[:-1])
    first = np.maximum.accumulate(np.where(changed, np.arange(len(changed)), 0))
    return first - history.offsets[events.user_row]
