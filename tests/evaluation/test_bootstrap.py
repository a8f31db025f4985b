"""Test the paired bootstrap: percentiles by hand, users drawn with all their queries, and the same draws for every column."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.evaluation import bootstrap
from twotower.evaluation.bootstrap import intervals, resample
from twotower.utils.documents import Interval


def test_an_interval_has_95_percent_of_the_draws() -> None:
    draws = np.random.default_rng(0).permutation(1001.0 * np.arange(1001))[:, None] / 1001
    assert intervals(["x"], np.array([7.0]), draws) == {"x": Interval(value=7.0, low=25.0, high=975.0)}


def test_every_column_has_its_own_interval_to_six_decimals() -> None:
    draws = np.stack([np.full(10, 0.12345678), np.linspace(-1, 1, 10)], axis=1)
    found = intervals(["one", "other"], np.array([1 / 3, -2 / 3]), draws)
    assert found["one"] == Interval(value=0.333333, low=0.123457, high=0.123457)
    assert found["other"] == Interval(value=-0.666667, low=-0.95, high=0.95)
    with pytest.raises(ValueError):
        intervals(["one"], np.zeros(2), draws)


def test_users_are_drawn_with_all_their_queries() -> None:
    """Check that resampling two users gives only the means of (0, 0), (0, 1) and (1, 1)."""
    values = np.array([1.0, 5.0, 2.0, 3.0])
    user = np.array([9, 4, 9, 9])  # user 4: 5 from one query; user 9: 6 from three
    found = resample(values[:, None], user, resamples=400, seed=1)[:, 0]
    expected = [2.0, 11 / 4, 5.0]
    nearest = np.abs(found[:, None] - expected)
    assert nearest.min(axis=1).max() < 1e-12
    share = (nearest < 1e-9).mean(axis=0)
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.08)


def test_of_a_single_user_the_queries_are_drawn() -> None:
    values = np.array([0.0, 1.0])[:, None]
    found = resample(values, np.array([7, 7]), resamples=400, seed=1)
    assert set(found[:, 0]) == {0.0, 0.5, 1.0}


def test_all_columns_share_the_draws() -> None:
    one = np.random.default_rng(2).random(50)
    found = resample(np.stack([one, 3 * one + 1], axis=1), np.arange(50), resamples=20, seed=3)
    assert found.shape == (20, 2) and found.dtype == np.float64
    np.testing.assert_allclose(found[:, 1], 3 * found[:, 0] + 1)
    assert len(np.unique(found[:, 0])) == 20


def test_the_spread_is_that_of_a_mean() -> None:
    values = np.random.default_rng(4).normal(size=400)
    draws = resample(values[:, None], np.arange(400), resamples=3000, seed=5)[:, 0]
    assert draws.mean() == pytest.approx(values.mean(), abs=0.004)
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.05)


@pytest.mark.parametrize("at_once", [1, 25, 70])
def test_memory_is_bounded_without_a_change(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Ten users: one resample at a time, two or seven, and the last part may be shorter."""
    rng = np.random.default_rng(6)
    table, user = rng.random((30, 2)), rng.integers(0, 10, 30)
    whole = resample(table, user, resamples=15, seed=7)
    assert whole.shape == (15, 2)
    sizes: list[int] = []
    count = np.bincount

    def counted(drawn: np.ndarray, minlength: int) -> np.ndarray:
        sizes.append(len(drawn))
        return count(drawn, minlength=minlength)

    monkeypatch.setattr(bootstrap, "_WEIGHTS_AT_ONCE", at_once)
    monkeypatch.setattr(np, "bincount", counted)
    np.testing.assert_allclose(resample(table, user, resamples=15, seed=7), whole, rtol=1e-12)
    assert max(sizes) <= max(at_once, 10) and sum(sizes) == 150


def test_other_seeds_draw_others() -> None:
    table, user = np.arange(20.0)[:, None], np.arange(20)
    assert (resample(table, user, 5, seed=1) == resample(table, user, 5, seed=1)).all()
    assert (resample(table, user, 5, seed=1) != resample(table, user, 5, seed=2)).any()
