"""Turn training events into examples: two objectives over the same histories.

- "any_event": an example is one event of a user, predicted from the user's other training events, in any order.
- "next_event": a batch holds windows of histories of similar length under a token budget, and every position is an example.

An objective reads only training events. Its random choices depend only on the generator it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from twotower.data.train_events import TrainEvents
from twotower.features.batches import UserBatch
from twotower.features.feature_store import FeatureStore, last_tokens
from twotower.utils.config import Config
from twotower.utils.ragged import changes, ragged_arange
from twotower.utils.registry import Registry
from twotower.utils.types import Float, Int, Mask

REQUEST_DEGREES = 0.01  # standard deviation of the offset of a training request from its target: about 1 km


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples of (a part of) one batch.

    Attributes
    ----------
    users
        Input of the user tower, one query per example.
    event
        int64 [B]: position of each target among the events of this process.
    user_row
        int64 [B]: user row of each example.
    """

    users: UserBatch
    event: Int
    user_row: Int


class Objective(Protocol):
    """Interface of a training objective, which turns training events into examples.

    A batch consists of members, int64 [M]. A member is an event or a window of a history, depending on the objective.

    Parameters
    ----------
    events
        Training events, sorted by user and time.
    store
        Features of users and items.
    config
        All settings.

    Attributes
    ----------
    causal
        True if attention must be causal, because a position in the middle of a history can be a query.
    targets
        int64: positions of the training events that are targets. Each is a target once per epoch.
    idle
        A member of this process. It is used with weight 0 if the process has no member in a batch.
    """

    causal: ClassVar[bool]
    targets: Int
    idle: int

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None: ...

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Return the members of each batch of an epoch, in random order. In an update, `events.replay` selects the members."""
        ...

    def size(self, members: Int) -> int:
        """Return the cost of encoding the members, in examples or in tokens including padding."""
        ...

    def target_events(self, members: Int) -> Int:
        """Return the positions of the targets of these members among all training events, int64 [B], one per example."""
        ...

    def owner(self, members: Int) -> Int:
        """Return the rank of the process that holds the history of each member, int64 [M]."""
        ...

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """Return the examples of members of this process, in the order of `target_events`."""
        ...


class AnyEventObjective:
    """Predict any one event of a user from the other training events. Members are positions of positive training events."""

    causal: ClassVar[bool] = False

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None:
        self.events, self.store = events, store
        self.batch_size = config.training.batch_size
        self.history_dropout = config.model.user_tower.history_dropout
        self.drop_same_item = config.evaluation.exclude_seen
        self.targets, self.idle = np.flatnonzero(events.positive), int(events.first)

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Return random batches of nearly equal size, with at least `training.batch_size` events if there are that many."""
        replay, events = self.events.replay, self.events
        order = rng.permutation(replay.chosen(self.targets, events.fresh[self.targets], rng) if replay else self.targets)
        return np.array_split(order, max(len(order) // self.batch_size, 1))

    def size(self, members: Int) -> int:
        """Return the number of examples."""
        return len(members)

    def target_events(self, members: Int) -> Int:
        """Return the members, which are the targets."""
        return members

    def owner(self, members: Int) -> Int:
        """Return the rank of the process that holds each event."""
        return self.events.owner(members)

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """Return examples whose histories lack the target; a random share `history_dropout` of the other events is hidden."""
        history, event = self.events.history, members - self.events.first
        user = self.events.user_row[event]
        own = user - self.events.first_user
        start, length = history.offsets[own], history.offsets[own + 1] - history.offsets[own]
        example, token = ragged_arange(start, length)
        keep = token != event[example]
        if self.drop_same_item:
            # Seen items are never recommended in this case, so the history must not contain the target's item.
            keep &= history.item_row[token] != history.item_row[event][example]
        keep &= rng.random(len(token), dtype=np.float32) >= self.history_dropout
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
    """Predict each event from the events strictly before it. Members are windows of histories."""

    causal: ClassVar[bool] = True

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None:
        self.events, self.store = events, store
        self.token_budget = config.training.batch_size
        offsets, most = events.offsets, store.max_history
        step = max(most // 2, 1)
        length = np.diff(offsets)
        # A window has up to `most` visible events and one more, which is only a target. Targets are in the second half of a
        # window, so that they have a history before them; in the first window of a user, all events can be targets.
        windows = np.where(length > most + 1, 1 + -(-(length - most - 1) // step), np.minimum(length, 1))
        user, index = ragged_arange(np.zeros_like(windows), windows)
        self.start = offsets[user] + index * step
        self.stop = np.minimum(self.start + most + 1, offsets[user + 1])
        self.first_target = np.where(index > 0, self.start + most + 1 - step, self.start)
        self.user, self.idle = user, int(np.searchsorted(self.start, events.first))
        self.visible = _visible(events)
        is_target = events.positive
        if config.evaluation.exclude_seen:
            # Seen items are never recommended in this case, so only the first event of each (user, item) is a target.
            item, _, _ = events.targets(np.arange(offsets[-1]))
            pair = np.repeat(np.arange(len(length)), length) * (item.max(initial=0) + 1) + item
            first = np.zeros(len(pair), np.bool_)
            first[np.unique(pair, return_index=True)[1]] = True
            is_target = is_target & first
        self.is_target, self.targets = is_target, np.flatnonzero(is_target)

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Return batches of windows of similar length within the token budget, in random order."""
        length = self.stop - self.start
        replay = self.events.replay
        order = rng.permutation(replay.chosen(np.arange(len(length)), self._is_fresh(), rng) if replay else len(length))
        order = order[np.argsort(length[order], kind="stable")]
        ordered, batches, begin = np.maximum(length[order], 1), [], 0
        while begin < len(order):
            # Lengths ascend, so the last window sets the padding. Take as many windows as fit the budget, at least one.
            ahead = ordered[begin : begin + self.token_budget // ordered[begin] + 1]
            size = max(int((ahead * np.arange(1, len(ahead) + 1) <= self.token_budget).sum()), 1)
            batches.append(order[begin : begin + size])
            begin += size
        return [batches[i] for i in rng.permutation(len(batches)) if self._is_target(batches[i]).any()]

    def size(self, members: Int) -> int:
        """Return the number of tokens, padded to the longest window."""
        return len(members) * int((self.stop - self.start)[members].max(initial=1))

    def target_events(self, members: Int) -> Int:
        """Return the positions of all targets in the windows."""
        window = last_tokens(self.start[members], self.stop[members], self.store.max_history + 1)
        return np.asarray(window[self._is_target(members)])

    def owner(self, members: Int) -> Int:
        """Return the rank of the process that holds each window."""
        return self.events.owner(self.start[members])

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """Return the examples of windows, one per target. All examples of a window share its tokens."""
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

    def _is_fresh(self) -> Mask:
        """Return bool [windows]: True for windows with a new target."""
        new = np.concatenate([[0], np.cumsum(self.events.fresh & self.is_target)])
        return np.asarray(new[self.stop] > new[self.first_target])

    def _is_target(self, members: Int) -> Mask:
        """Return bool [M, W]: True for the tokens of each window that are targets."""
        window = last_tokens(self.start[members], self.stop[members], self.store.max_history + 1)
        event = np.maximum(window, 0)
        return np.asarray((window >= self.first_target[members][:, None]) & self.is_target[event])


def request_locations(store: FeatureStore, target_row: Int, rng: np.random.Generator) -> Float | None:
    """Return simulated locations of training requests, or None if the store does not use request locations.

    A random half of them is within a few km of the target, so that the model learns to prefer items near the request. The other
    half is unknown, so that the model also works without a location.

    Parameters
    ----------
    target_row
        int64 [Q]: item row of the target of each query.

    Returns
    -------
    Float or None
        float32 [Q, 2]: latitude and longitude in degrees; NaN if unknown.
    """
    if not store.use_location:
        return None
    near = store.location[target_row] + rng.normal(scale=REQUEST_DEGREES, size=(len(target_row), 2))
    return np.where(rng.random(len(target_row))[:, None] < 0.5, near, np.nan).astype(np.float32)


OBJECTIVES: Registry[type[Objective]] = Registry("objective", {"any_event": AnyEventObjective, "next_event": NextEventObjective})
"""The training objectives by name; `training.objective` chooses one."""


def _pack(token: Int, example: Int, size: int, most: int) -> Int:
    """Return the last `most` tokens of each of `size` examples, int64 [size, H], padded with -1. `example` is sorted."""
    count = np.bincount(example, minlength=size)
    stop = np.cumsum(count)
    position = last_tokens(stop - count, stop, most)
    return np.where(position >= 0, token[np.maximum(position, 0)] if len(token) else -1, -1)


def _visible(events: TrainEvents) -> Int:
    """Return, for each event of this process, the number of training events of its user strictly before it in time."""
    history = events.history
    first = np.maximum.accumulate(np.where(changes(history.time_s, events.user_row), np.arange(len(events.user_row)), 0))
    return np.asarray(first - history.offsets[events.user_row - events.first_user])
