"""Draw the visits of a simulated town from the true preferences.

Each visit is drawn from exactly the probabilities of `Truth.scores`; time and memory do not grow with items × users.

The method is rejection sampling. Proposals from popularity × nearness × category come from cumulative tables, one row per
neighbourhood. They are accepted with the rest of the product, which is bounded. `Sampler.choose` handles repeated visits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twotower.data.simulator.town import HOUR_S, START_S, WEEK_S, WEEKS, Truth, hour_of_week
from twotower.schema import HOURS_PER_WEEK
from twotower.utils.types import Array, Float, Int, Mask


@dataclass(frozen=True, slots=True)
class Visits:
    """Events sorted by (user, time): user and item int32 rows, time_s int64 (distinct within a user), stars int8 1-5."""

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time_s: Int
    stars: NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Proposals for `n` visits: cumulative mass and table interval of each part [parts, n], taste, its bound, and budget."""

    user: Int
    time_s: Int
    mass: Array
    first: Int
    last: Int
    latent: Float
    bound: Float
    budget: Float


class Sampler:
    """Draws visits from a `Truth`; see the module. The tables take items × neighbourhoods of the same town × 12 bytes."""

    def __init__(self, truth: Truth, rng: np.random.Generator) -> None:
        self.truth, self.rng = truth, rng
        n_places, n_categories = len(truth.place_town), len(truth.rhythm)
        pop = np.exp(truth.item_log_pop.astype(np.float64))
        sorted_items = np.lexsort((truth.item_category, truth.item_town))
        town = truth.item_town[sorted_items]
        bounds, listed, pieces, start = [], [], [], 0
        for place in range(n_places + 1):  # the last row covers all towns
            if place < n_places:
                here = sorted_items[slice(*np.searchsorted(town, [truth.place_town[place], truth.place_town[place] + 1]))]
                near = np.exp(-np.linalg.norm(truth.place_xy[place] - truth.item_xy[here], axis=1) / truth.tastes.decay_km)
            else:
                here, near = np.argsort(truth.item_category, kind="stable"), 1.0
            bounds.append(start + np.searchsorted(truth.item_category[here], np.arange(n_categories + 1)))
            listed.append(here.astype(np.int32))
            pieces.append(pop[here] * near)
            start += len(here)
        self.bounds, self.items = np.array(bounds, np.int32), np.concatenate(listed)
        self.cumulative = np.concatenate([[0.0], np.cumsum(np.concatenate(pieces))])
        changes = np.any(truth.rhythm[1:] != truth.rhythm[:-1], axis=1)
        self.edges = np.r_[0, np.flatnonzero(changes) + 1, n_categories]  # runs of categories with the same rhythm

    def choose(self, user: Int, time_s: Int) -> Int:
        """Return the items of visits sorted by (user, time).

        All visits are first drawn as if nothing had been visited. A draw that repeats an earlier item of its user is redrawn,
        except with probability `again`. Earlier items stay fixed, so that all users advance together. Only a habit whose
        item has closed may still change, and later visits of that user wait for it.
        """
        t, n = self.truth.tastes, len(user)
        start = np.maximum.accumulate(np.where(np.r_[True, user[1:] != user[:-1]], np.arange(n), 0))
        k = np.arange(n) - start
        habit = (self.rng.random(n) < self.truth.user_habit[user]) & (k > 0)
        lag = 1 + np.log1p(-self.rng.random(n) * (1 - t.habit_decay**k)) // np.log(t.habit_decay)
        target = np.where(habit, np.arange(n) - np.clip(lag.astype(np.int64), 1, np.maximum(k, 1)), -1)
        depth = np.zeros(n, np.int64)
        while not np.array_equal(deeper := np.where(habit, depth[target] + 1, 0), depth):
            depth = deeper
        plan, rows = self._plan(user, time_s), np.arange(n)
        fresh, spared, item = np.zeros(n, np.int64), np.zeros(n, bool), np.zeros(n, np.int64)
        again = rows
        while len(again):
            fresh[again], spared[again] = self._fresh(plan, again), self.rng.random(len(again)) < t.again
            rows = rows[np.isin(user[rows], user[again])]
            item[rows] = fresh[rows]
            closed = self._resolve_habits(item, target, depth, time_s, rows)
            chosen = closed | (depth[rows] == 0)
            again = _repeats(rows, user[rows], item[rows], chosen & ~spared[rows], closed)
        return item

    def _resolve_habits(self, item: Int, target: Int, depth: Int, time_s: Int, rows: Int) -> Mask:
        """Set the items of habitual visits among `rows` in place; return a mask of rows whose habitual item has closed."""
        closed = np.zeros(len(rows), bool)
        for level in range(1, int(depth[rows].max(initial=0)) + 1):
            at = np.flatnonzero(depth[rows] == level)
            row = rows[at]
            old = item[target[row]]
            closed[at] = time_s[row] >= self.truth.item_close_s[old]
            item[row] = np.where(closed[at], item[row], old)
        return closed

    def _plan(self, user: Int, time_s: Int) -> _Plan:
        """Return proposals: (home, second location, everywhere) × (categories of each rhythm, 4 favourites)."""
        truth, tastes = self.truth, self.truth.tastes
        latent, favour = truth.drifted(user, time_s)
        favourite, hour = truth.user_favourite[user].T, hour_of_week(time_s)
        place = np.stack([*truth.user_place[user].T, np.full(len(user), len(truth.place_town))])
        low = np.concatenate([np.repeat(self.edges[:-1, None], len(user), 1), favourite])
        high = np.concatenate([np.repeat(self.edges[1:, None], len(user), 1), favourite + 1])
        rhythm = truth.rhythm[low, hour]
        rhythm[len(self.edges) - 1 :] *= favour.T
        first, last = self.bounds[place[:, None], low], self.bounds[place[:, None], high]  # [3, parts, n]
        mass = (self.cumulative[last] - self.cumulative[first]) * rhythm * np.array([1, tastes.anchor, tastes.far])[:, None, None]
        flat = (-1, len(user))
        mass, first, last = np.cumsum(mass.reshape(flat), 0, dtype=np.float32), first.reshape(flat), last.reshape(flat)
        return _Plan(
            user, time_s, mass, first, last, latent, np.linalg.norm(truth.user_latent[user, 0], axis=1), truth.user_budget[user]
        )

    def _fresh(self, plan: _Plan, rows: Int) -> Int:
        """Return items drawn by step 2, without `again`, for the given visits (rejection sampling)."""
        out, pending = np.zeros(len(rows), np.int64), np.arange(len(rows))
        while len(pending):
            at = np.repeat(pending, np.clip(20_000 // len(pending), 1, 32))  # several tries each when few are left
            item = self._propose(plan, rows[at])
            open_now = np.flatnonzero(
                (plan.time_s[rows[at]] >= self.truth.item_open_s[item]) & (plan.time_s[rows[at]] < self.truth.item_close_s[item])
            )
            ok = open_now[self.rng.random(len(open_now)) < self._acceptance(plan, rows[at[open_now]], item[open_now])]
            ok = ok[np.diff(at[ok], prepend=-1) > 0]  # the first try that succeeds
            out[at[ok]] = item[ok]
            pending = np.setdiff1d(pending, at[ok], assume_unique=True)
        return out

    def _propose(self, plan: _Plan, row: Int) -> Int:
        mass = np.take(plan.mass, row, axis=1)
        point, part = self.rng.random(len(row), np.float32) * mass[-1], np.zeros(len(row), np.int8)
        for level in mass[:-1]:  # five times faster than one large comparison
            part += level <= point
        first, last = plan.first[part, row], plan.last[part, row]
        low, high = self.cumulative[first], self.cumulative[last]
        entry = np.clip(
            np.searchsorted(self.cumulative, low + self.rng.random(len(row)) * (high - low), side="right") - 1, first, last - 1
        )
        return np.asarray(self.items[entry], np.int64)

    def _acceptance(self, plan: _Plan, row: Int, item: Int) -> Array:
        truth, tastes = self.truth, self.truth.tastes
        taste = np.einsum("nd,nd->n", plan.latent[row], truth.item_latent[item]) - plan.bound[row]
        age = 1 - np.exp((truth.item_open_s[item] - plan.time_s[row]) / tastes.hype_s)
        gap = truth.price_gap(truth.item_price[item], plan.budget[row])
        return np.asarray(np.exp(taste - tastes.price * gap - tastes.hype * age))


def draw_visits(truth: Truth, events: int, rng: np.random.Generator, chunk: int = 100_000) -> Iterator[Visits]:
    """Yield `events` visits in pieces of whole users, about `chunk` visits each; every user has at least one."""
    sampler = Sampler(truth, rng)
    n_users = len(truth.user_id)
    week = np.clip((truth.user_join_s - START_S) // WEEK_S + 1, 0, WEEKS - 1)
    weeks = np.minimum(WEEKS - week, 2 + rng.exponential(150, n_users).astype(np.int64))
    rate = np.minimum(rng.lognormal(0, 1.0, n_users), 6) * weeks
    counts = 1 + rng.multinomial(events - n_users, rate / rate.sum())
    demand = np.cumsum(np.bincount(truth.item_category, np.exp(truth.item_log_pop), len(truth.rhythm)) @ truth.rhythm)
    edges = np.searchsorted(np.cumsum(counts), np.arange(chunk, events + chunk, chunk), side="left") + 1
    a = 0
    for b in np.unique(np.minimum(edges, n_users)):
        user = np.repeat(np.arange(a, b), counts[a:b])
        n = len(user)
        hour = np.minimum(np.searchsorted(demand, rng.random(n) * demand[-1], side="right"), HOURS_PER_WEEK - 1)
        when = (
            START_S
            + (week[user] + (rng.random(n) * weeks[user]).astype(np.int64)) * WEEK_S
            + hour * HOUR_S
            + rng.integers(0, HOUR_S, n)
        )
        when = _distinct_times(user, when)
        item = sampler.choose(user, when)
        yield Visits(user.astype(np.int32), item.astype(np.int32), when, _stars(truth, user, item, when, rng))
        a = b


def _stars(truth: Truth, user: Int, item: Int, time_s: Int, rng: np.random.Generator) -> NDArray[np.int8]:
    match = np.einsum("nd,nd->n", truth.drifted(user, time_s)[0], truth.item_latent[item])
    mood = (user * 2_654_435_761 % 1_009) / 1_009 - 0.5  # strictness of a user, equal in every piece
    stars = 3.6 + 0.6 * truth.item_quality[item] + 0.35 * match + 1.2 * mood + 1.1 * rng.standard_normal(len(user))
    return np.asarray(np.clip(np.rint(stars), 1, 5), np.int8)


def _distinct_times(user: Int, time_s: Int) -> Int:
    """Return times sorted within users, with equal ones shifted by a second."""
    base = user * (1 << 34)
    key = np.sort(base + time_s)
    n = np.arange(len(key))
    return np.maximum.accumulate(key - n) + n - base


def _repeats(rows: Int, user: Int, item: Int, free: Mask, closed: Mask) -> Int:
    """Return the `rows` (by user, time) to redraw: free ones that repeat an item, up to the first undecided habit."""
    order = np.lexsort((rows, item, user))
    same = (user[order][1:] == user[order][:-1]) & (item[order][1:] == item[order][:-1])
    bad = np.zeros(len(rows), bool)
    bad[order[1:]] = same
    bad &= free
    start = np.flatnonzero(np.r_[True, user[1:] != user[:-1]]) if len(rows) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[start, len(rows)])

    def before(flag: Mask) -> Int:  # number of earlier rows of the same user with the flag
        count: Int = np.cumsum(flag) - flag
        return np.asarray(count - np.repeat(count[start], lengths))

    undecided = closed & ((before(bad) > 0) | bad)
    return np.asarray(rows[bad & (before(undecided) == 0)])
