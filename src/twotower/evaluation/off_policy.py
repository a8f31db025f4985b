"""Estimate what another model would get, from the log of lists that a server has shown.

The value of a model is the mean number of outcomes of its lists. With the probability p with which a logged list has an item, the
probability q with which a list of the other model has it, and the outcome r of the item, the estimators are

    IPS     mean over lists of Σ (q / p) r                                 Horvitz and Thompson (1952)
    SNIPS   mean number of items of a list · Σ (q / p) r / Σ q / p         Swaminathan and Joachims (2015)
    DR      mean over lists of Σ q m + Σ (q / p) (r − m)                   Dudík, Langford and Li (2011)

with a model m of the outcomes. They assume that the outcome of an item depends on the item and the request alone, not on its place
and its neighbours, and that every item of the other model's lists can be shown (p > 0). `Estimates.support` says how far the second
holds. Where p = 0, q / p counts as 0. The intervals are those of a bootstrap over users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twotower.errors import DataError
from twotower.evaluation.bootstrap import resample
from twotower.utils.documents import Interval
from twotower.utils.types import Float64, Int

RESAMPLES = 1000
BINS = 10  # of the model of outcomes
PRIOR_SHOWS = 20.0  # with which the mean outcome counts in a bin


@dataclass(frozen=True, slots=True)
class LoggedLists:
    """Lists of a log.

    Attributes
    ----------
    offsets
        int64 [n + 1]: list i has the items offsets[i]:offsets[i + 1].
    propensity, target, reward
        float64 [t]: probability with which the logged list and a list of the other model have the item; its outcome.
    predicted
        float64 [t]: outcome of the item by a model of outcomes.
    slots, expected
        float64 [n]: sum of the probabilities of all items in the lists of the other model, and of their predicted outcomes.
    user
        int64 [n]: number of the user.
    """

    offsets: Int
    propensity: Float64
    target: Float64
    reward: Float64
    predicted: Float64
    slots: Float64
    expected: Float64
    user: Int


@dataclass(frozen=True, slots=True)
class Estimates:
    """Outcomes per list with 95 % intervals.

    Attributes
    ----------
    logged
        What the logged lists got.
    support
        Share of the items of the other model's lists that the log could show. Below 1, IPS is too low.
    effective_lists
        Number of lists of the other model that would give intervals of this width.
    zero_propensity
        Number of logged items with propensity 0. They are missing in IPS and SNIPS, and DR has their prediction alone.
    """

    logged: Interval
    ips: Interval
    snips: Interval
    dr: Interval
    support: float
    effective_lists: float
    zero_propensity: int = 0


def estimate(lists: LoggedLists, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimates:
    """Return the estimates of one log.

    Raises
    ------
    DataError
        A propensity is not a number from 0 to 1.

    Examples
    --------
    >>> one = np.ones(4)
    >>> same = LoggedLists(np.arange(5), one, one, np.array([0.0, 1, 1, 0]), 0 * one, one, 0 * one, np.arange(4))
    >>> estimate(same).ips.value, estimate(same).support
    (0.5, 1.0)
    """
    of_list = np.repeat(np.arange(len(lists.offsets) - 1), np.diff(lists.offsets))
    wrong = np.flatnonzero(~((lists.propensity >= 0) & (lists.propensity <= 1)))  # NaN is wrong, too
    if len(wrong):
        at, number = int(wrong[0]), int(of_list[wrong[0]])
        raise DataError(
            f"The propensity of item {at - int(lists.offsets[number])} of list {number} is {lists.propensity[at]}. "
            "It must be a number from 0 to 1."
        )
    shown = lists.propensity > 0
    weight = np.divide(lists.target, lists.propensity, out=np.zeros(len(shown)), where=shown)

    def summed(values: Float64) -> Float64:
        return np.bincount(of_list, values, len(lists.slots)).astype(np.float64)

    total, weights = summed(weight * lists.reward), summed(weight)
    dr = lists.expected + summed(weight * (lists.reward - lists.predicted))
    table = np.stack([summed(lists.reward), total, dr, weights, lists.slots], axis=1)
    draws = np.concatenate([table.mean(axis=0)[None], resample(table, lists.user, resamples, seed)])
    ratio = draws[:, 4] * draws[:, 1] / np.where(draws[:, 3] > 0, draws[:, 3], np.nan)
    logged, ips, snips, doubly = (_interval(column) for column in (draws[:, 0], draws[:, 1], ratio, draws[:, 2]))
    support = float(weights.mean() / lists.slots.mean()) if lists.slots.any() else 0.0
    squares = float((weights**2).sum())
    effective = float(weights.sum()) ** 2 / squares if squares else 0.0
    return Estimates(logged, ips, snips, doubly, round(support, 6), round(effective, 1), int((~shown).sum()))


def _interval(draws: Float64) -> Interval:
    """Return the first number with the percentiles of the others."""
    value, rest = float(draws[0]), draws[1:][np.isfinite(draws[1:])]
    low, high = np.percentile(rest, [2.5, 97.5]) if len(rest) else (np.nan, np.nan)
    return Interval(value=round(value, 6), low=round(float(low), 6), high=round(float(high), 6))


def predict_outcomes(score: Float64, reward: Float64, fold: Int, wanted: Float64, wanted_fold: Int) -> Float64:
    """Return predicted outcomes by the scores of items: means of ten bins, of the other fold, so that no list predicts itself.

    Parameters
    ----------
    score, reward, fold
        [t]: of shown items; `fold` is 0 or 1.
    wanted, wanted_fold
        [m]: scores to predict for, and their folds.

    Examples
    --------
    >>> score, reward = np.array([0.0, 0, 1, 1]), np.array([0.0, 0, 1, 1])
    >>> bool(np.diff(predict_outcomes(score, reward, np.array([0, 1, 0, 1]), np.array([0.0, 1]), np.array([0, 0])))[0] > 0)
    True
    """
    found = np.zeros(len(wanted))
    if not len(score):
        return found
    edges = np.unique(np.quantile(score, np.linspace(0, 1, BINS + 1)[1:-1]))
    for number in (0, 1):
        mine, other = wanted_fold == number, fold != number
        mean = float(reward[other].mean()) if other.any() else 0.0
        at = np.searchsorted(edges, score[other])
        shows = np.bincount(at, minlength=len(edges) + 1)
        sums = np.bincount(at, reward[other], len(edges) + 1)
        found[mine] = ((sums + PRIOR_SHOWS * mean) / (shows + PRIOR_SHOWS))[np.searchsorted(edges, wanted[mine])]
    return found
