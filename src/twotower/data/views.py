"""How training events become examples: two objectives over the same histories.

- "any_event": an example is one event of a user, predicted from the user's other training events, whatever their order.
- "next_event": a batch holds whole windows of histories, of similar length under a token budget, and every position is an example.

Promise: an objective looks at training events alone, and what it draws depends on the generator it is given, and on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.features.batches import UserBatch
from twotower.features.feature_store import FeatureStore, last_tokens
from twotower.features.point_in_time import History
from twotower.schema import TRAIN
from twotower.utils.config import Config
from twotower.utils.ragged import changes, lengths_to_offsets, ragged_arange
from twotower.utils.registry import Registry
from twotower.utils.types import Int

REQUEST_DEGREES = 0.01  # standard deviation of a training request's distance from its target: about 1 km


@dataclass(frozen=True, slots=True)
class Examples:
    """What an objective chose for one batch: the user side, and of each example the target's position among this process's
    events."""

    users: UserBatch
    event: Int
    user_row: Int


class TrainEvents:
    """The training events alone, by user: all that an objective may look at.

    Every process knows which events are asked for; the histories it reads are those of its own run of users, which in the files are
    one slice.

    Parameters
    ----------
    rank, world_size
        Which of how many processes this is.

    Attributes
    ----------
    offsets, positive
        int64 [n_users + 1], bool [E]: where each user's events lie among all training events, and which may be targets.
    shares
        int64 [world + 1]: the events of process r are shares[r]:shares[r + 1], as many as the others' as whole users allow.
    first_user, first
        Where this process's users, and their events, begin.
    history
        Ragged events of its users, with their prefix sums.
    user_row, weight
        Of each of these events.
    positive_offsets, positive_items
        Distinct positive items of each of its users, ragged.

    Raises
    ------
    TrainingError
        There are more processes than users with training events.
    """

    def __init__(self, dataset: Dataset, location: NDArray[np.float32], *, rank: int = 0, world_size: int = 1) -> None:
        self._all = events = dataset.events
        self._kept = np.flatnonzero(events.split == TRAIN)
        self.positive = events.positive[self._kept] & (events.weight[self._kept] > 0)
        self.offsets = np.searchsorted(self._kept, events.offsets)
        users = user_shares(self.offsets, world_size)
        self.shares = self.offsets[users]
        self.first_user, self.first = users[rank], self.shares[rank]
        offsets = self.offsets[users[rank] : users[rank + 1] + 1] - self.first
        own = self._kept[self.first : self.shares[rank + 1]]
        self.history = History(
            offsets, events.item_row[own], events.time_s[own], events.event_type[own], events.stars[own], location
        )
        self.weight = events.weight[own]
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        self.user_row = row + self.first_user
        positive = self.positive[self.first : self.shares[rank + 1]]
        pairs = np.unique(row[positive] * dataset.n_items + self.history.item_row[positive])
        self.positive_offsets = lengths_to_offsets(np.bincount(pairs // dataset.n_items, minlength=len(offsets) - 1))
        self.positive_items = pairs % dataset.n_items

    def targets(self, event: Int) -> tuple[Int, Int, NDArray[np.float32]]:
        """Item, moment and weight of training events, by their position among those of all users; read from the files."""
        at = self._kept[event]
        return self._all.item_row[at], self._all.time_s[at], self._all.weight[at]

    def owner(self, event: Int) -> Int:
        """The process that has each training event of all users."""
        return np.asarray(np.searchsorted(self.shares, event, side="right") - 1)


def user_shares(offsets: Int, world_size: int) -> Int:
    """Users int64 [world + 1] at which the runs of the processes begin, given where each user's events lie: about as many events
    each, and at least one user who has any."""
    active = np.flatnonzero(np.diff(offsets))
    if world_size > max(len(active), 1):
        raise TrainingError(
            f"Each process of a run reads the histories of its own users. There are {len(active):,} users with training events and "
            f"{world_size:,} processes. Start fewer."
        )
    each = np.arange(world_size)
    cut = np.searchsorted(offsets[active], offsets[-1] * each / world_size)
    cut = np.minimum(np.maximum.accumulate(cut - each) + each, len(active) - world_size + each)  # nobody without users
    return np.array([0, *active[cut[1:]], len(offsets) - 1])


class Objective(Protocol):
    """How training events become examples.

    Attributes
    ----------
    causal
        Whether a moment may be in the middle of the history it reads, so that attention must not look ahead.
    targets
        Positions of the training events that are asked for, once in an epoch each.
    idle
        A member of this process, whatever it asks for.
    """

    causal: ClassVar[bool]
    targets: Int
    idle: int

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None: ...

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Members of each batch of an epoch."""
        ...

    def size(self, members: Int) -> int:
        """What encoding them takes: examples, or tokens with their padding."""
        ...

    def target_events(self, members: Int) -> Int:
        """Positions of the training events that these members ask for, an example each."""
        ...

    def owner(self, members: Int) -> Int:
        """The process that has the history of each."""
        ...

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """Build (a part of) one batch of this process's members; its examples are those of `target_events`, in that order."""
        ...


class AnyEventObjective:
    """Predict any one event from the others. Members are positions of positive training events."""

    causal: ClassVar[bool] = False

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None:
        self.events, self.store = events, store
        self.batch_size = config.training.batch_size
        self.hidden = config.model.user_tower.history_dropout
        self.drop_same_item = config.evaluation.exclude_seen
        self.targets, self.idle = np.flatnonzero(events.positive), int(events.first)

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Random batches of equal size; a remainder too small to contrast within joins the batch before."""
        order = rng.permutation(self.targets)
        return np.array_split(order, max(len(order) // self.batch_size, 1))

    def size(self, members: Int) -> int:
        """Examples."""
        return len(members)

    def target_events(self, members: Int) -> Int:
        """The members themselves."""
        return members

    def owner(self, members: Int) -> Int:
        """Who has the event."""
        return self.events.owner(members)

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """Histories without the target, a share of the rest hidden at random."""
        history, event = self.events.history, members - self.events.first
        user = self.events.user_row[event]
        own = user - self.events.first_user
        start, length = history.offsets[own], history.offsets[own + 1] - history.offsets[own]
        example, token = ragged_arange(start, length)
        keep = token != event[example]
        if self.drop_same_item:
            # A visited item is never recommended then: showing it would teach the opposite.
            keep &= history.item_row[token] != history.item_row[event][example]
        keep &= rng.random(len(token), dtype=np.float32) >= self.hidden
        tokens = _pack(token[keep], example[keep], len(event), self.store.max_history)
        row = np.arange(len(event))
        users = self.store.user_batch(
            history,
            tokens,
            at_row=row,
            at_pos=(tokens >= 0).sum(axis=1),
            state=history.state_without(own, event),
            time_s=history.time_s[event],
            user_row=user,
            request_location=request_locations(self.store, history.item_row[event], rng),
        )
        return Examples(users, event, user)


class NextEventObjective:
    """Every position predicts from what came strictly before. Members are windows of histories."""

    causal: ClassVar[bool] = True

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None:
        self.events, self.store = events, store
        self.token_budget = config.training.batch_size
        offsets, most = events.offsets, store.max_history
        step = max(most // 2, 1)
        length = np.diff(offsets)
        # A window holds the `most` events a moment may see and one more, which is only asked for. It asks for those of its second
        # half: all but a user's first few have context.
        windows = np.where(length > most + 1, 1 + -(-(length - most - 1) // step), np.minimum(length, 1))
        user, index = ragged_arange(np.zeros_like(windows), windows)
        self.start = offsets[user] + index * step
        self.stop = np.minimum(self.start + most + 1, offsets[user + 1])
        self.ask_from = np.where(index > 0, self.start + most + 1 - step, self.start)
        self.user, self.idle = user, int(np.searchsorted(self.start, events.first))
        self.visible = _visible(events)
        is_target = events.positive
        if config.evaluation.exclude_seen:
            # A visited item is never recommended then: asking for it again would teach the opposite.
            item, _, _ = events.targets(np.arange(offsets[-1]))
            pair = np.repeat(np.arange(len(length)), length) * (item.max(initial=0) + 1) + item
            first = np.zeros(len(pair), np.bool_)
            first[np.unique(pair, return_index=True)[1]] = True
            is_target = is_target & first
        self.is_target, self.targets = is_target, np.flatnonzero(is_target)

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Windows of similar length together, as many as the token budget holds; batches in random order."""
        length = self.stop - self.start
        order = rng.permutation(len(length))
        order = order[np.argsort(length[order], kind="stable")]
        ordered, batches, begin = np.maximum(length[order], 1), [], 0
        while begin < len(order):
            # Lengths ascend, so a batch is padded to its last window: the most windows whose padded tokens fit, at least one.
            ahead = ordered[begin : begin + self.token_budget // ordered[begin] + 1]
            size = max(int((ahead * np.arange(1, len(ahead) + 1) <= self.token_budget).sum()), 1)
            batches.append(order[begin : begin + size])
            begin += size
        return [batches[i] for i in rng.permutation(len(batches)) if self._is_target(batches[i]).any()]

    def size(self, members: Int) -> int:
        """Tokens, padded to the longest window."""
        return len(members) * int((self.stop - self.start)[members].max(initial=1))

    def target_events(self, members: Int) -> Int:
        """Every position of the windows that is asked for."""
        window = last_tokens(self.start[members], self.stop[members], self.store.max_history + 1)
        return np.asarray(window[self._is_target(members)])

    def owner(self, members: Int) -> Int:
        """Who has the window."""
        return self.events.owner(self.start[members])

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """Whole windows; one example per positive event."""
        history = self.events.history
        start, stop = self.start[members] - self.events.first, self.stop[members] - self.events.first
        window = last_tokens(start, stop, self.store.max_history + 1)
        row, column = np.nonzero(self._is_target(members))
        event = window[row, column]
        user = self.user[members][row]
        own = user - self.events.first_user
        seen = self.visible[event]  # training events of the user strictly before
        users = self.store.user_batch(
            history,
            window[:, : self.store.max_history],
            at_row=row,
            at_pos=np.clip(history.offsets[own] + seen - start[row], 0, None),
            state=history.state(own, seen),
            time_s=history.time_s[event],
            user_row=user,
            request_location=request_locations(self.store, history.item_row[event], rng),
        )
        return Examples(users, event, user)

    def _is_target(self, members: Int) -> NDArray[np.bool_]:
        window = last_tokens(self.start[members], self.stop[members], self.store.max_history + 1)
        at = np.maximum(window, 0)
        return np.asarray((window >= self.ask_from[members][:, None]) & self.is_target[at])


def request_locations(store: FeatureStore, target_row: Int, rng: np.random.Generator) -> NDArray[np.float32] | None:
    """Places [Q, 2] that training requests come from: for a random half within a few km of the target, for the others unknown.

    People ask from near where they go, so a model that reads the place learns to prefer what is around it; the other half keeps it
    able to answer without. None when the store does not read places.
    """
    if not store.use_location:
        return None
    near = store.location[target_row] + rng.normal(scale=REQUEST_DEGREES, size=(len(target_row), 2))
    return np.where(rng.random(len(target_row))[:, None] < 0.5, near, np.nan).astype(np.float32)


OBJECTIVES: Registry[type[Objective]] = Registry("objective", {"any_event": AnyEventObjective, "next_event": NextEventObjective})


def _pack(token: Int, example: Int, size: int, most: int) -> Int:
    """Ragged tokens, sorted by example → the last `most` of each as int64 [size, H], -1 after the end."""
    count = np.bincount(example, minlength=size)
    stop = np.cumsum(count)
    at = last_tokens(stop - count, stop, most)
    return np.where(at >= 0, token[np.maximum(at, 0)] if len(token) else -1, -1)


def _visible(events: TrainEvents) -> Int:
    """int64: training events of the same user strictly before each of this process's events in time."""
    history = events.history
    first = np.maximum.accumulate(np.where(changes(history.time_s, events.user_row), np.arange(len(events.user_row)), 0))
    return np.asarray(first - history.offsets[events.user_row - events.first_user])
