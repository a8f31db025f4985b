"""Count what came of the lists of each version: lists shown, and outcomes, with 95 % intervals.

A list counts as shown once an impression or an outcome names it. Lists of one user are correlated, so the intervals are those of a
ratio of sums over users.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, inf, sqrt

import numpy as np

from twotower.serving.event_types import Event
from twotower.utils.types import Float64, Int, Json

Z_95 = 1.96
NAMES = ("value", "low", "high")


@dataclass(slots=True)
class _List:
    user: str
    types: Counter[str]


class Outcomes:
    """Events of lists, by version and list.

    Examples
    --------
    >>> outcomes = Outcomes()
    >>> outcomes.add(Event("1", "u", "i", 5, "impression", request_id="r", version="v"))
    >>> outcomes.add(Event("2", "u", "i", 6, "buy", request_id="r", version="v"))
    >>> outcomes.summary(lambda event_type: event_type == "buy")["v"].click_through.mean
    1.0
    """

    def __init__(self) -> None:
        self._lists: dict[str, dict[str, _List]] = {}

    def add(self, event: Event) -> None:
        """Count an event; those without a list change nothing."""
        if event.request_id is None or event.version is None or event.event_type is None:
            return
        lists = self._lists.setdefault(event.version, {})
        lists.setdefault(event.request_id, _List(event.user, Counter())).types[event.event_type] += 1

    def without_users(self, users: set[str]) -> Outcomes:
        """Return the same without the lists of some users."""
        other = Outcomes()
        other._lists = {
            version: {name: one for name, one in list(lists.items()) if one.user not in users}
            for version, lists in list(self._lists.items())
        }
        return other

    def summary(self, counts: Callable[[str], bool]) -> dict[str, VersionOutcomes]:
        """Return for each version its lists, users and rates.

        Parameters
        ----------
        counts
            Returns True for the event types that are outcomes, and False for impressions and dislikes.
        """
        return {version: _summary(list(lists.values()), counts) for version, lists in list(self._lists.items())}


@dataclass(frozen=True, slots=True)
class Rate:
    """A mean, and its standard error over users; None with fewer than two users."""

    mean: float
    error: float | None

    def as_json(self, least: float = 0.0, most: float = inf) -> Json:
        """Return the mean and its 95 % interval, within bounds."""
        wide = None if self.error is None else Z_95 * self.error
        low, high = (None, None) if wide is None else (max(self.mean - wide, least), min(self.mean + wide, most))
        return {name: None if value is None else round(value, 6) for name, value in zip(NAMES, (self.mean, low, high), strict=True)}


@dataclass(frozen=True, slots=True)
class VersionOutcomes:
    """What came of the lists of a version."""

    lists: int
    users: int
    click_through: Rate
    outcomes_per_list: Rate
    events: dict[str, int]

    def difference_to(self, other: VersionOutcomes) -> Json:
        """Return the click-through of another version minus that of this one; their users are different ones."""
        one, two = self.click_through, other.click_through
        error = None if one.error is None or two.error is None else hypot(one.error, two.error)
        return Rate(two.mean - one.mean, error).as_json(-1.0, 1.0)


def as_json(found: VersionOutcomes) -> Json:
    """Return outcomes as JSON values."""
    rates = {"click_through": found.click_through.as_json(most=1.0), "outcomes_per_list": found.outcomes_per_list.as_json()}
    return {"lists": found.lists, "users": found.users, **rates, "events": found.events}


def _summary(lists: list[_List], counts: Callable[[str], bool]) -> VersionOutcomes:
    numbers: dict[str, int] = {}
    user = {name: number for number, name in enumerate(dict.fromkeys(one.user for one in lists))}
    owner = np.array([user[one.user] for one in lists], np.int64)
    for one in lists:
        for name, number in one.types.items():
            numbers[name] = numbers.get(name, 0) + number
    total = np.array([sum(number for name, number in one.types.items() if counts(name)) for one in lists], np.float64)
    clicked = (total > 0).astype(np.float64)
    return VersionOutcomes(len(lists), len(user), rate(clicked, owner), rate(total, owner), dict(sorted(numbers.items())))


def rate(values: Float64, user: Int) -> Rate:
    """Return the mean of values [n]; `user` is the number of the user of each, from 0.

    Examples
    --------
    >>> rate(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1]))
    Rate(mean=0.5, error=0.5)
    """
    if not len(values):
        return Rate(0.0, None)
    mean = float(values.mean())
    residuals = np.bincount(user, values - mean)
    clusters = len(residuals)
    if clusters < 2:
        return Rate(mean, None)
    return Rate(mean, sqrt(float((residuals**2).sum()) * clusters / (clusters - 1)) / len(values))
