"""Refresh the items of a bundle with events that it does not contain.

State, popularity and recent event count of an item are functions of events. A `Refresher` takes new events, and returns the bundle
with these events, as of the time just after the last one:

    refresher = Refresher(load_bundle(path))
    refresher.add(users, item_ids, time_s, event_types, stars)
    bundle = refresher.bundle_at(now_s)

The time of the item vectors depends on the events, not on a clock. So servers with the same events return the same lists, and
without new events nothing changes. Weights, tokens and static features are not recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch

from twotower.bundle.bundle import Bundle
from twotower.bundle.item_arrays import RECENT_DAYS, recent_event_count
from twotower.data.dataset_features import (
    can_refresh,
    decayed_counts,
    half_lives,
    popularity_columns,
    weighted_counts,
)
from twotower.features.feature_store import FeatureStore
from twotower.models.neural_retriever import item_blocks, item_columns
from twotower.schema import DAY_S, UNKNOWN
from twotower.utils.ragged import changes, lower_bound, ragged_arange
from twotower.utils.types import Array, Float, Float64, Int, Mask

MAX_MOVED = 1000  # items with new events that an approximate index scores for every request


@dataclass(frozen=True, slots=True)
class RefreshCounts:
    """Counts of the new events by their effect.

    Attributes
    ----------
    counted
        Events that changed their items.
    in_bundle
        Events that the bundle contains already, or that its setting `prepare.duplicates` leaves out.
    unknown_item
        Events of items that are not in the bundle.
    future
        Events after the clock. They count once their time has come.
    negative
        Explicit negatives and impressions, which change no item.
    """

    counted: int = 0
    in_bundle: int = 0
    unknown_item: int = 0
    future: int = 0
    negative: int = 0


@dataclass(frozen=True, slots=True)
class _Events:
    """New events of known items, in the order in which they came; arrays [n]."""

    user: Int
    item_row: Int
    time_s: Int
    stars: Array
    weight: Array

    def __len__(self) -> int:
        return len(self.item_row)

    def take(self, chosen: Int | Mask) -> _Events:
        return _Events(*(getattr(self, name)[chosen] for name in self.__slots__))


class Refresher:
    """Collects new events and returns the bundle with refreshed items.

    Parameters
    ----------
    bundle
        The bundle as it was loaded.

    Attributes
    ----------
    counts
        Counts of the events at the last call of `bundle_at`.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.dataset = bundle.dataset
        self.counts = RefreshCounts()
        self._last, self._moment_s, self._dynamics = bundle, bundle.moment_s, bundle.store.dynamics
        self._timed = can_refresh(self.dataset)
        self._keeps_repeats = self.dataset.manifest.config.prepare.duplicates == "keep"
        self._base = weighted_counts(self.dataset, bundle.moment_s if self._timed else None)
        self._first_s = self.dataset.first_event_s
        self._users: dict[str, int] = {}
        self._events = _joined([])
        self._unknown, self._stored, self._negative, self._horizon = 0, 0, 0, 0
        self._served: tuple[int, int] | None = (bundle.moment_s, 0)
        self._state: Array | None = None

    def emptied(self) -> Refresher:
        """Return a refresher of the same bundle without new events; its first call of `bundle_at` returns a bundle."""
        other = copy(self)
        other._users, other._events, other._served = {}, _joined([]), None
        other._unknown, other._stored, other._negative = 0, 0, 0
        return other

    def add(
        self,
        users: Sequence[str],
        item_ids: Sequence[str],
        time_s: Sequence[int],
        event_types: Sequence[str | None],
        stars: Sequence[float | None],
    ) -> None:
        """Add events, in the order in which they were accepted.

        Those of unknown items, those of the bundle, explicit negatives and impressions are only counted.
        """
        row = self.dataset.item_rows(list(item_ids))
        negative = self._negatives(event_types, stars)
        known = (row != UNKNOWN) & ~negative
        user, time = self._user_codes(users), np.asarray(time_s, np.int64)
        stored = known.copy()
        stored[known] = self._in_bundle(user[known], row[known], time[known])
        rated = np.array([np.nan if one is None else one for one in stars], np.float32)
        every = _Events(user, row, time, rated, self._weights(event_types, rated))
        self._negative += int(negative.sum())
        self._unknown += int((~known & ~negative).sum())
        self._stored += int(stored.sum())
        self._events = _joined([self._events, every.take(known & ~stored)])

    def bundle_at(self, now_s: int) -> Bundle | None:
        """Return the bundle with its items refreshed; None if nothing has changed since the last call.

        Parameters
        ----------
        now_s
            Current time, in seconds. Later events do not count yet. If the clock goes back, nothing changes.
        """
        self._horizon = max(self._horizon, now_s)
        due = self._events.take(self._events.time_s <= self._horizon)
        chosen = due if self._keeps_repeats else due.take(_first_of_pairs(due))
        repeated, future = len(due) - len(chosen), len(self._events) - len(due)
        self.counts = RefreshCounts(len(chosen), self._stored + repeated, self._unknown, future, self._negative)
        moment = max(self._moment_s, int(chosen.time_s.max(initial=0)) + 1) if self.dataset.has_time else self._moment_s
        if self._served == (moment, len(due)):
            return None
        state, bundle = self._refreshed(chosen, moment)
        self._last, self._state, self._served = bundle, state, (moment, len(due))
        return bundle

    def _refreshed(self, events: _Events, moment: int) -> tuple[Array | None, Bundle]:
        """Return the state of the items at a time, after the events, and the bundle."""
        last, dataset = self._last, self.dataset
        dynamics = self._dynamics and self._dynamics.with_events(events.item_row, events.time_s, events.stars)
        first_s = self._first_s.copy()
        np.minimum.at(first_s, events.item_row, events.time_s)
        columns = popularity_columns(dataset, self._counts(events, moment), first_s, moment)
        store = last.store.with_popularity(columns, dynamics)
        late = events.time_s >= moment - RECENT_DAYS * DAY_S if dataset.has_time else np.ones(len(events), np.bool_)
        recent = recent_event_count(dataset, moment) + np.bincount(events.item_row[late], minlength=dataset.n_item_rows)
        new = np.bincount(events.item_row, minlength=1)
        moved = np.argsort(-new, kind="stable")[: min(MAX_MOVED, np.count_nonzero(new))]  # new events change an item most
        state, vectors = self._vectors(store, moment)
        arrays = replace(last.arrays, vectors=vectors, recent_event_count=recent)
        built = last.built and last.built.with_vectors(torch.from_numpy(vectors), moved)
        return state, replace(last, store=store, arrays=arrays, built=built, as_of_s=moment)

    def _counts(self, events: _Events, moment: int) -> Float64:
        """Return the decayed counts of all events. The counts of the bundle decay by one factor per half-life."""
        passed_days = (moment - self._moment_s) / DAY_S if self._timed else 0.0
        base = self._base * np.array([0.5 ** (passed_days / days) if days else 1.0 for days in half_lives(self.dataset)])
        positive = events.take(events.weight > 0)
        age_s = moment - positive.time_s if self._timed else np.zeros(len(positive), np.int64)
        counts: Float64 = base + decayed_counts(self.dataset, positive.item_row, positive.weight, age_s)
        return counts

    def _vectors(self, store: FeatureStore, moment: int) -> tuple[Array | None, Float]:
        """Return the state and the vectors of all items; only items whose state has changed pass the tower."""
        rows, width = np.arange(self.dataset.n_item_rows), self._last.vectors.shape[1]
        model, vectors = self._last.model, self._last.arrays.vectors.copy()
        state, changed = None, rows[:0]
        if store.dynamics is not None:
            state = store.dynamics.state(rows, np.full(len(rows), moment, np.int64))
            changed = rows if self._state is None else np.flatnonzero((state != self._state).any(axis=1))
        with torch.inference_mode():
            done = 0
            for batch in item_blocks(model, store, changed, moment):
                block = model.encode_items(batch).float().numpy()
                vectors[changed[done : done + len(block)], :width] = block
                done += len(block)
            vectors[:, width:] = item_columns(model, store).float().numpy()
        return state, vectors

    def _user_codes(self, users: Sequence[str]) -> Int:
        """Return the row of each user, or for an unknown user a number from `n_user_rows`."""
        row = self.dataset.user_rows(list(users))
        for at in np.flatnonzero(row == UNKNOWN).tolist():
            row[at] = self.dataset.n_user_rows + self._users.setdefault(users[at], len(self._users))
        return row

    def _negatives(self, event_types: Sequence[str | None], stars: Sequence[float | None]) -> Mask:
        """Return which events are explicit negatives or impressions."""
        prepare, first = self.dataset.manifest.config.prepare, next(iter(self.dataset.event_types), None)
        found = [not prepare.is_history(name or first, value) for name, value in zip(event_types, stars, strict=True)]
        return np.array(found, np.bool_)

    def _weights(self, event_types: Sequence[str | None], stars: Array) -> Array:
        """Return the weight of each event in the popularity as `prepare` would: 0 where it is not positive."""
        prepare, first = self.dataset.manifest.config.prepare, self.dataset.event_types[:1]
        names = [(first[0] if first else None) if one is None else one for one in event_types]
        weight = np.array([prepare.event_weights.get(name or "", 1.0) for name in names], np.float32)
        least = prepare.positive_min_stars
        return weight if least is None else np.where(np.isnan(stars) | (stars >= least), weight, 0).astype(np.float32)

    def _in_bundle(self, user: Int, item_row: Int, time_s: Int) -> Mask:
        """Return a mask of the events (user, item, second) that the bundle contains; without repeats, of the pairs (user, item)."""
        events = self.dataset.events
        known = user < self.dataset.n_user_rows
        start, stop = events.offsets[np.where(known, user, 0)], events.offsets[np.where(known, user, -1) + 1]
        if self._keeps_repeats:
            start, stop = lower_bound(events.time_s, start, stop, time_s), lower_bound(events.time_s, start, stop, time_s + 1)
        owner, at = ragged_arange(start, stop - start)
        return np.bincount(owner[events.item_row[at] == item_row[owner]], minlength=len(user)) > 0


def _first_of_pairs(events: _Events) -> Int:
    """Return the first event of each user and item."""
    order = np.lexsort((events.time_s, events.item_row, events.user))
    return np.sort(order[changes(events.user[order], events.item_row[order])])


def _joined(parts: Sequence[_Events]) -> _Events:
    none = np.zeros(0, np.int64)
    every = [_Events(none, none, none, np.zeros(0, np.float32), np.zeros(0, np.float32)), *parts]
    return _Events(*(np.concatenate([getattr(part, name) for part in every]) for name in _Events.__slots__))
