"""Draw the lists that a simulated town shows to its users, and what the users choose from them.

A list holds up to `LIST_SIZE` distinct open items near one of the user's two locations, drawn by popularity × nearness: the logging
policy knows no taste. The user chooses an item j of the list, or none, with probability proportional to

    category × taste × price × novelty  (× `again` if it was visited before)        of an item, as in `town`
    `LEAVE`                                                                          of none

So choices follow the true preferences, and an item that was shown and not chosen says something of the user.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twotower.data.simulator.town import HOUR_S, START_S, Truth, hour_of_week
from twotower.data.simulator.visits import Sampler, Visits
from twotower.schema import DAY_S
from twotower.utils.types import Float64, Int, Mask

LIST_SIZE = 10
TRIES = 30  # draws of a list: closed items and repeats are left out
LEAVE = 10.0


@dataclass(frozen=True, slots=True)
class Lists:
    """`L` shown lists.

    Attributes
    ----------
    user, time_s
        int64 [L].
    item
        int64 [L, LIST_SIZE]: items by position, -1 after the end of a list.
    chosen
        int64 [L]: column of the chosen item, -1 for none.
    """

    user: Int
    time_s: Int
    item: Int
    chosen: Int


def draw_lists(truth: Truth, visits: Visits, rng: np.random.Generator) -> Lists:
    """Return one list for each visit, shown between an hour and three days before it."""
    user = visits.user.astype(np.int64)
    time_s = np.maximum(visits.time_s - rng.integers(HOUR_S, 3 * DAY_S, len(user)), START_S)
    item = _shown(truth, user, time_s, rng)
    row = np.repeat(np.arange(len(user)), LIST_SIZE)
    flat = np.maximum(item, 0).ravel()
    weight = np.exp(_attraction(truth, user[row], flat, time_s[row]))
    weight *= np.where(_visited(visits, user[row], flat, time_s[row]), truth.tastes.again, 1.0)
    upto = np.cumsum(weight.reshape(item.shape) * (item >= 0), axis=1)
    chosen = (rng.random(len(user))[:, None] * (upto[:, -1:] + LEAVE) >= upto).sum(axis=1)
    return Lists(user, time_s, item, np.where(chosen < LIST_SIZE, chosen, -1))


def _shown(truth: Truth, user: Int, time_s: Int, rng: np.random.Generator) -> Int:
    """Return the items of the lists, by the logging policy."""
    tables, anchor = Sampler(truth, rng), truth.tastes.anchor
    place = truth.user_place[user, (rng.random(len(user)) < anchor / (1 + anchor)).astype(np.int64)]
    first, last = tables.bounds[place, 0][:, None], tables.bounds[place, -1][:, None]
    low, high = tables.cumulative[first], tables.cumulative[last]
    point = low + rng.random((len(user), TRIES)) * (high - low)
    item = tables.items[np.clip(np.searchsorted(tables.cumulative, point, side="right") - 1, first, last - 1)].astype(np.int64)
    open_ = (truth.item_open_s[item] <= time_s[:, None]) & (time_s[:, None] < truth.item_close_s[item])
    order = np.argsort(item, axis=1, kind="stable")
    by_item = np.take_along_axis(item, order, axis=1)
    repeat = np.zeros(item.shape, np.bool_)
    np.put_along_axis(repeat, order, np.c_[np.zeros(len(user), np.bool_), by_item[:, 1:] == by_item[:, :-1]], axis=1)
    item = np.where(open_ & ~repeat, item, -1)
    return np.take_along_axis(item, np.argsort(item < 0, axis=1, kind="stable"), axis=1)[:, :LIST_SIZE]


def _attraction(truth: Truth, user: Int, item: Int, time_s: Int) -> Float64:
    """Return the logarithm of category × taste × price × novelty of pairs, float64 [n]."""
    tastes = truth.tastes
    latent, favour = truth.drifted(user, time_s)
    category = truth.item_category[item]
    wanted = 1 + (favour * (truth.user_favourite[user] == category[:, None])).sum(axis=1)
    wanted = wanted * truth.rhythm[category, hour_of_week(time_s)]
    taste = np.einsum("nd,nd->n", latent, truth.item_latent[item])
    gap = truth.price_gap(truth.item_price[item], truth.user_budget[user])
    age = np.maximum(time_s - truth.item_open_s[item], 0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(wanted) + taste - tastes.price * gap - tastes.hype * (1 - np.exp(-age / tastes.hype_s)))


def _visited(visits: Visits, user: Int, item: Int, time_s: Int) -> Mask:
    """Return whether each user has visited an item before a time."""
    n_items = int(max(visits.item.max(initial=0), item.max(initial=0))) + 1
    key = visits.user.astype(np.int64) * n_items + visits.item
    pair, first = np.unique(key, return_index=True)  # visits are sorted by user and time: the first of a pair is the earliest
    wanted = user * n_items + item
    at = np.minimum(np.searchsorted(pair, wanted), len(pair) - 1)
    return np.asarray((pair[at] == wanted) & (visits.time_s[first[at]] < time_s))
