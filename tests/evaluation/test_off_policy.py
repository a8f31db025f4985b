"""Test off-policy estimates against hand-worked cases and a small world whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.errors import DataError
from twotower.evaluation.off_policy import LoggedLists, estimate, predict_outcomes
from twotower.retrieval.exploration import explored, probabilities


def lists_of(
    propensity: list[float], target: list[float], reward: list[float], predicted: list[float], expected: list[float]
) -> LoggedLists:
    n = len(reward) // 2
    p, q, r, m = (np.array(values, np.float64) for values in (propensity, target, reward, predicted))
    return LoggedLists(np.arange(n + 1) * 2, p, q, r, m, np.full(n, 2.0), np.array(expected, np.float64), np.arange(n))


def test_a_hand_worked_log() -> None:
    found = estimate(lists_of([0.5, 1, 0.5, 1], [1, 0, 0, 1], [1, 1, 0, 1], [0.5, 0, 0, 0.25], [0.75, 0.75]))
    # list 1: weight 2 of a reward 1; list 2: weight 1 of a reward 1
    assert found.logged.value == 1.5 and found.ips.value == (2 + 1) / 2
    assert found.snips.value == pytest.approx(2 * (3 / 2) / (3 / 2))
    assert found.dr.value == pytest.approx((0.75 + 2 * 0.5 + 0.75 + 0.75) / 2)
    assert found.support == pytest.approx(3 / 4) and found.effective_lists == pytest.approx(9 / 5)


def test_a_log_without_shared_items_says_so() -> None:
    found = estimate(lists_of([1.0, 1, 1, 1], [0.0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [0.5, 0.5]))
    assert found.support == 0 and found.ips.value == 0 and found.dr.value == 0.5 and found.effective_lists == 0


def test_an_item_with_propensity_0_is_missing_in_ips_and_predicted_in_dr() -> None:
    found = estimate(lists_of([0.0, 1, 0.5, 1], [1, 0, 0, 1], [1, 1, 0, 1], [0.5, 0, 0, 0.25], [0.75, 0.75]))
    assert found.zero_propensity == 1 and found.logged.value == 1.5
    assert found.ips.value == (0 + 1) / 2 and found.snips.value == pytest.approx(2 * (1 / 2) / (1 / 2))
    assert found.dr.value == pytest.approx((0.75 + 0.75 + 0.75) / 2)
    assert found.support == pytest.approx(1 / 4)


def test_a_log_of_propensities_0_says_nothing() -> None:
    found = estimate(lists_of([0.0] * 4, [1, 0, 0, 1], [1, 1, 0, 1], [0.5, 0, 0, 0.25], [0.75, 0.75]))
    assert (found.zero_propensity, found.support, found.effective_lists) == (4, 0, 0)
    assert (found.ips.value, found.dr.value) == (0, 0.75) and np.isnan(found.snips.value)


@pytest.mark.parametrize("wrong", [-0.5, 1.0001, 2, np.nan, np.inf, -np.inf])
def test_a_propensity_that_is_no_probability_is_refused(wrong: float) -> None:
    with pytest.raises(DataError, match=f"item 1 of list 1 is {float(wrong)}. It must be a number from 0 to 1"):
        estimate(lists_of([0.5, 1, 0.5, wrong], [1, 0, 0, 0], [1, 1, 0, 1], [0.5, 0, 0, 0.25], [0.75, 0.75]))


def test_predictions_come_from_the_other_half() -> None:
    score, reward = np.repeat([0.0, 1.0], 50), np.repeat([0.0, 1.0], 50)
    fold = np.tile([0, 1], 50)
    low, high = predict_outcomes(score, reward, fold, np.array([0.0, 1.0]), np.array([0, 0]))
    assert low < 0.35 < 0.65 < high
    reward[fold == 0] = 1 - reward[fold == 0]
    again = predict_outcomes(score, reward, fold, np.array([0.0, 1.0]), np.array([0, 0]))
    assert again.tolist() == [low, high], "its own half does not count"


def test_intervals_hold_the_truth_of_a_small_world() -> None:
    world = np.random.default_rng(1)
    chosen = world.random((40, 12)) * 0.6
    order = np.argsort(-world.random((40, 12)), axis=1)
    best = np.argsort(-chosen, axis=1)[:, :3]
    truth = float(np.take_along_axis(chosen, best, 1).sum(axis=1).mean())
    held = dict.fromkeys(("ips", "snips", "dr"), 0)
    for trial in range(40):
        rng = np.random.default_rng(trial)
        users = rng.integers(0, 40, 300)
        logs = [explored(order[u, :3], np.zeros(3, np.float32), order[u, 3:], np.zeros(9, np.float32), 0.5, rng) for u in users]
        rows, chance = np.stack([one.rows for one in logs]), np.concatenate([one.propensity for one in logs])
        target = np.concatenate([np.isin(row, best[u]) for row, u in zip(rows, users, strict=True)]).astype(np.float64)
        reward = (rng.random(rows.shape) < np.take_along_axis(chosen[users], rows, 1)).astype(np.float64).ravel()
        fold = np.repeat(users % 2, 3)
        score = np.take_along_axis(chosen[users], rows, 1).ravel()
        wanted = np.take_along_axis(chosen[users], best[users], 1).ravel()
        predicted, own = predict_outcomes(score, reward, fold, score, fold), predict_outcomes(score, reward, fold, wanted, fold)
        log = LoggedLists(
            np.arange(301) * 3,
            chance,
            target,
            reward,
            predicted,
            np.full(300, 3.0),
            own.reshape(300, 3).sum(axis=1),
            np.arange(300),
        )
        found = estimate(log, resamples=200, seed=trial)
        for name in held:
            one = getattr(found, name)
            held[name] += one.low <= truth <= one.high
    assert min(held.values()) >= 33 and probabilities(3, 9, 0.5) == (0.5, pytest.approx(1 / 6)), held
