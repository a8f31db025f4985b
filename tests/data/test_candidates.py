"""Test the candidates of a batch: log weights by hand, and other positives against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.data.candidates import LOSSES, Pool, full_softmax, infonce, other_positives, sampled_softmax

COUNT = np.array([0, 0, 6, 0, 3, 1, 2])  # of 12 targets in an epoch; row 3 is never one
TRAINED = [2, 4, 5, 6]


def test_the_pool_is_counted_once() -> None:
    pool = Pool.of(COUNT)
    assert pool.trained.tolist() == TRAINED and pool.total == 12 and pool.count is COUNT


def test_infonce_expects_the_other_positives_and_the_draws() -> None:
    """q = (Q - 1) · popularity + draws / N: an example's own positive is no chance of a negative."""
    target = np.array([4, 2, 2, 6])
    for draws in (0, 1, 9):
        found = infonce(target, Pool.of(COUNT), draws, np.random.default_rng(3))
        drawn = np.random.default_rng(3).choice(TRAINED, draws)
        times = {row: target.tolist().count(row) + drawn.tolist().count(row) for row in TRAINED}
        rows = [row for row in TRAINED if times[row]]
        assert found.row.tolist() == rows and found.row[found.target].tolist() == target.tolist()
        expected = [np.log(times[row] / (3 * COUNT[row] / 12 + draws / 4)) for row in rows]
        np.testing.assert_allclose(found.log_weight, expected, rtol=1e-6)
        assert found.log_weight.dtype == np.float32


def test_a_single_example_has_no_negatives_in_its_batch() -> None:
    """Its positive is never drawn, so the weight of that term, which the loss leaves out, is infinite; no warning is given."""
    found = infonce(np.array([4]), Pool.of(COUNT), 0, np.random.default_rng(0))
    assert found.row.tolist() == [4] and found.log_weight.tolist() == [np.inf]


def test_sampled_softmax_expects_the_draws_alone() -> None:
    target = np.array([5, 2, 5])
    found = sampled_softmax(target, Pool.of(COUNT), 6, np.random.default_rng(1))
    drawn = np.random.default_rng(1).choice(TRAINED, 6).tolist()
    rows = sorted({*drawn, 5, 2})
    assert found.row.tolist() == rows and found.row[found.target].tolist() == target.tolist()
    with np.errstate(divide="ignore"):
        expected = np.log([drawn.count(row) / (6 / 4) for row in rows])
    np.testing.assert_allclose(found.log_weight, expected, rtol=1e-6)
    assert found.log_weight.dtype == np.float32


def test_only_positives_that_were_not_drawn_are_left_out_of_the_negatives() -> None:
    found = sampled_softmax(np.array([5, 5]), Pool.of(COUNT), 1, np.random.default_rng(0))
    assert np.isneginf(found.log_weight).sum() == len(found.row) - 1


def test_full_softmax_has_every_trained_item_once() -> None:
    found = full_softmax(np.array([6, 2]), Pool.of(COUNT), 100, np.random.default_rng(0))
    assert found.row.tolist() == TRAINED and found.target.tolist() == [3, 0]
    assert found.log_weight.tolist() == [0.0] * 4 and found.log_weight.dtype == np.float32


def test_the_names_of_the_losses() -> None:
    assert dict(LOSSES) == {"infonce": infonce, "sampled_softmax": sampled_softmax, "full_softmax": full_softmax}


rows = st.sets(st.integers(2, 12), min_size=1, max_size=8).map(sorted)


@given(st.lists(st.sets(st.integers(2, 12), max_size=6).map(sorted), min_size=1, max_size=5), rows, st.integers(0, 2**32 - 1))
def test_other_positives_are_those_of_brute_force(users: list[list[int]], candidates: list[int], seed: int) -> None:
    """Candidates that lie below, between and above the positives, users without positives, and targets of any kind."""
    rng = np.random.default_rng(seed)
    asked, target = rng.integers(0, len(users), 7), rng.choice(candidates, 7)
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in users])]).astype(np.int64)
    flat = np.array([item for items in users for item in items], np.int64)
    example, column = other_positives(asked, target, np.array(candidates), offsets, flat)
    expected = {
        (example, column)
        for example, (user, own) in enumerate(zip(asked, target, strict=True))
        for column, row in enumerate(candidates)
        if row in users[user] and row != own
    }
    assert set(zip(example.tolist(), column.tolist(), strict=True)) == expected and len(example) == len(expected)
    assert (np.diff(example) >= 0).all(), "the loss cuts its blocks by them"


@pytest.mark.parametrize("name", LOSSES)
def test_targets_point_at_the_items_of_the_examples(name: str) -> None:
    target = np.array([6, 2, 4, 4])
    found = LOSSES[name](target, Pool.of(COUNT), 3, np.random.default_rng(0))
    assert found.row[found.target].tolist() == target.tolist() and (np.diff(found.row) > 0).all()
