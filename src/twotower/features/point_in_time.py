"""Compute point-in-time features of items and users: only events strictly before a time count.

Bisection and prefix sums over sorted events give the state of any row at any time. Events at that time or later have no effect.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from twotower.features.encoders import ELITE_BASE_YEAR
from twotower.schema import DAY_S
from twotower.utils.types import Array, Float, Int

MEAN_STARS = 3.75  # a round number near Yelp's mean; it only centres the feature
RECENT_DAYS = 30
ITEM_STATE_WIDTH = 5
USER_STATE_WIDTH = 7
AGE_STEP = 2.0**-17
"""Resolution of the logarithmic age of an item in a refreshed index (7.6e-6). The rounding changes an age by less than 0.002 %."""
_TIME_BITS = 36  # seconds since 1970 up to the year 4147; leaves 27 bits for item rows


@dataclass(frozen=True, slots=True)
class HistoryState:
    """Summary of user histories at `Q` times, kept as sums so that single events can be subtracted. Arrays are [Q].

    `location` is the sum of latitudes and longitudes [Q, 2] of the `location_n` events whose item has coordinates. Times are in
    seconds; 0 means none.
    """

    count: Int
    stars_sum: Array
    stars_n: Int
    location: Array
    location_n: Int
    first_s: Int
    last_s: Int


class History:
    """Ragged histories with prefix sums. The state of a user after any number of events takes constant time.

    Parameters
    ----------
    offsets, item_row, time_s, event_type, stars
        As in `Queries`: [S + 1] and [T].
    location
        float [n_item_rows, 2]: latitude and longitude of every item in degrees, NaN if unknown.
    """

    def __init__(self, offsets: Int, item_row: Int, time_s: Int, event_type: Int, stars: Array, location: Array) -> None:
        self.offsets, self.item_row, self.time_s, self.event_type, self.stars = offsets, item_row, time_s, event_type, stars
        self._rated = np.isfinite(stars)
        self._item_location = location[item_row].astype(np.float64) if len(location) else np.full((len(item_row), 2), np.nan)
        self._located = np.isfinite(self._item_location).all(axis=1)
        self._stars_sum = _prefix(np.where(self._rated, stars, 0.0))
        self._stars_n = _prefix(self._rated)
        self._location_sum = _prefix(np.where(self._located[:, None], self._item_location, 0.0))
        self._location_n = _prefix(self._located)

    def state(self, row: Int, pos: Int) -> HistoryState:
        """Return the state after the first `pos` events of history `row`; both int64 [Q]."""
        a = self.offsets[row]
        b = a + pos
        some = pos > 0
        time_s = self.time_s if len(self.time_s) else np.zeros(1, np.int64)
        return HistoryState(
            count=pos,
            stars_sum=self._stars_sum[b] - self._stars_sum[a],
            stars_n=self._stars_n[b] - self._stars_n[a],
            location=self._location_sum[b] - self._location_sum[a],
            location_n=self._location_n[b] - self._location_n[a],
            first_s=np.where(some, time_s[np.minimum(a, len(time_s) - 1)], 0),
            last_s=np.where(some, time_s[b - 1], 0),
        )

    def state_without(self, row: Int, event: Int) -> HistoryState:
        """Return the state after all events of history `row` except the one at position `event` of the flat arrays; both int64 [Q].

        `last_s` is the time of the event just before the one that is left out.
        """
        a, b = self.offsets[row], self.offsets[row + 1]
        whole = self.state(row, b - a)
        own_stars = np.where(self._rated[event], self.stars[event], 0.0)
        own_location = np.where(self._located[event][:, None], self._item_location[event], 0.0)
        second = np.where(b - a > 1, self.time_s[np.minimum(a + 1, len(self.time_s) - 1)], 0)
        return replace(
            whole,
            count=whole.count - 1,
            stars_sum=whole.stars_sum - own_stars,
            stars_n=whole.stars_n - self._rated[event],
            location=whole.location - own_location,
            location_n=whole.location_n - self._located[event],
            first_s=np.where(event == a, second, self.time_s[a]),
            last_s=np.where(event > a, self.time_s[np.maximum(event - 1, 0)], 0),
        )


class ItemDynamics:
    """Item states at any time, computed from the events strictly before it.

    Parameters
    ----------
    item_row, time_s, stars
        Events [V], sorted by (item_row, time_s); stars NaN if not given.
    """

    def __init__(self, item_row: Int, time_s: Int, stars: Array) -> None:
        self._parts: tuple[_SortedEvents, ...] = (_SortedEvents(item_row, time_s, stars),)
        self._age_step = 0.0

    def with_events(self, item_row: Int, time_s: Int, stars: Array) -> ItemDynamics:
        """Return the states after further events [n], in any order. The first events are shared, not copied.

        Ages are rounded to multiples of `AGE_STEP`. Without rounding, the vectors of all items would change with every second.
        """
        order = np.lexsort((time_s, item_row))
        other = copy(self)
        other._parts = (*self._parts, _SortedEvents(item_row[order], time_s[order], stars[order]))
        other._age_step = AGE_STEP
        return other

    def exact(self) -> ItemDynamics:
        """Return the same states without rounded ages."""
        other = copy(self)
        other._age_step = 0.0
        return other

    def state(self, row: Int, time_s: Int) -> Float:
        """Return features float32 [n, 5] of items `row` just before `time_s` (both int64 [n], seconds).

        Columns: log number of events; mean stars (shrunk towards 3.75, weight 5); log number of events of the last 30 days; log
        age in days since the first event; 1 if there is no event, else 0.
        """
        found = [part.before(row, time_s) for part in self._parts]
        count, recent_n, stars_sum, stars_n = (np.sum([part[i] for part in found], axis=0) for i in range(4))
        opened = np.min([part[4] for part in found], axis=0)
        age = np.log1p(np.where(count > 0, np.maximum(time_s - opened, 0) / DAY_S, 0.0)) / 5
        if self._age_step:
            age = np.round(age / self._age_step) * self._age_step
        mean = (stars_sum - MEAN_STARS * stars_n) / (stars_n + 5.0)
        columns = [np.log1p(count) / 3, mean, np.log1p(recent_n) / 2, age, count == 0]
        return np.stack(columns, axis=1).astype(np.float32)


class _SortedEvents:
    """Events sorted by (item_row, time_s) with prefix sums."""

    def __init__(self, item_row: Int, time_s: Int, stars: Array) -> None:
        self._key = (item_row.astype(np.int64) << _TIME_BITS) + time_s
        self._time_s = time_s
        rated = np.isfinite(stars)
        self._stars_sum = _prefix(np.where(rated, stars, 0.0))
        self._stars_n = _prefix(rated)

    def before(self, row: Int, time_s: Int) -> tuple[Array, Array, Array, Array, Array]:
        """Return counts, recent counts, sums of stars, numbers of stars and times of the first event, just before a time.

        Recent events are those of the last 30 days. An item without an event has the largest time as its first.
        """
        base = row.astype(np.int64) << _TIME_BITS
        first = np.searchsorted(self._key, base)
        last = np.searchsorted(self._key, base + np.maximum(time_s, 0))
        recent = np.searchsorted(self._key, base + np.maximum(time_s - RECENT_DAYS * DAY_S, 0))
        opened = np.full(len(row), 1 << _TIME_BITS, np.int64)
        some = last > first
        opened[some] = self._time_s[first[some]]
        stars_sum, stars_n = self._stars_sum[last] - self._stars_sum[first], self._stars_n[last] - self._stars_n[first]
        return last - first, last - np.maximum(recent, first), stars_sum, stars_n, opened


def user_state(state: HistoryState, time_s: Int, since_s: Int, elite: Int, timed: bool) -> Float:
    """Return features float32 [Q, 7] of users at `time_s`.

    Columns: log number of events; mean stars; log days since the first event, since the last event and since sign-up; log number
    of elite years so far; 1 if there is no history, else 0. Without times, the durations and elite years are 0.
    """
    count = state.count
    columns = [np.log1p(count) / 3, (state.stars_sum - MEAN_STARS * state.stars_n) / (state.stars_n + 1.0)]
    zero = np.zeros(len(count))
    if timed:
        active_days = np.where(count > 0, np.maximum(time_s - state.first_s, 0) / DAY_S, 0.0)
        idle_days = np.where((count > 0) & (state.last_s > 0), np.maximum(time_s - state.last_s, 0) / DAY_S, 0.0)
        account_days = np.where(since_s > 0, np.maximum(time_s - since_s, 0) / DAY_S, 0.0)
        columns += [np.log1p(active_days) / 5, np.log1p(idle_days) / 5, np.log1p(account_days) / 5]
        columns.append(np.log1p(_years_before(elite, time_s)))
    else:
        columns += [zero] * 4
    columns.append(count == 0)
    return np.stack(columns, axis=1).astype(np.float32)


def _years_before(bits: Int, time_s: Int) -> Int:
    """Return the number of years marked in `bits` that ended before the year of `time_s`."""
    year = time_s.astype("datetime64[s]").astype("datetime64[Y]").astype(np.int64) + 1970
    earlier = (np.int64(1) << np.clip(year - ELITE_BASE_YEAR, 0, 62)) - 1
    past = np.ascontiguousarray(bits & earlier)
    years: Int = np.unpackbits(past.view(np.uint8).reshape(len(past), 8), axis=1).sum(axis=1).astype(np.int64)
    return years


def _prefix(values: Array) -> Array:
    """Return the sums before each position: [T, …] → [T + 1, …]."""
    dtype = np.int64 if values.dtype == np.bool_ else np.float64  # float32 sums of millions of stars are inexact
    sums = np.zeros((len(values) + 1, *values.shape[1:]), dtype)
    np.cumsum(values, axis=0, dtype=dtype, out=sums[1:])
    return sums
