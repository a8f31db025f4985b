"""Test top-k against a full sort."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower.search import topk
from twotower.search.topk import top_k, top_k_among


def brute_force(scores: Any, k: int, exclude: Any = None, allow: Any = None) -> tuple[Any, Any]:
    """Compute top-k with Python's stable sort, row by row."""
    items, values = np.full((len(scores), k), -1), np.full((len(scores), k), -np.inf, np.float32)
    for b, row in enumerate(scores):
        banned = {0, 1} | (set(exclude[1][exclude[0][b] : exclude[0][b + 1]].tolist()) if exclude else set())
        fine = np.broadcast_to(True if allow is None else allow[b] if allow.ndim == 2 else allow, row.shape)
        rows = [i for i in range(len(row)) if i not in banned and fine[i] and row[i] > -np.inf]
        best = sorted(rows, key=lambda i: -row[i])[:k]
        items[b, : len(best)], values[b, : len(best)] = best, row[best]
    return items, values


WAYS = [0, topk._NUMPY_MAX_ROWS]
"""Few queries are processed one by one, many as one matrix. Here also a few are a matrix."""


def check(scores: Any, k: int, **masks: Any) -> None:
    items, values = brute_force(scores, k, **masks)
    for most in WAYS:
        with mock.patch.object(topk, "_NUMPY_MAX_ROWS", most):
            found = top_k(scores.copy(), k, **masks)
        np.testing.assert_array_equal(found.items, items)
        np.testing.assert_array_equal(found.scores, values)
        assert found.items.dtype == np.int64 and found.scores.dtype == np.float32


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, 120), st.integers(1, 130), st.sampled_from([1, 2, 5, 10_000]))
def test_it_is_a_full_sort_whatever_the_ties_and_masks(seed: int, size: int, width: int, k: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.integers(-levels, levels, (size, width)) / 3).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = rng.choice([-np.inf, np.inf, 0.0, -0.0, 1e-40, -1e-40])
    offsets = np.append(0, np.cumsum(rng.integers(0, 6, size)))
    exclude = (offsets, rng.integers(0, width, offsets[-1]))
    for allow in (None, rng.random(width) < 0.7, rng.random((size, width)) < 0.3):
        check(scores, k, exclude=exclude, allow=allow)
    check(scores, k)


@pytest.mark.parametrize(("width", "k"), [(5_000, 3), (5_003, 18), (20_035, 20), (4_096, 4)])
def test_blocks_of_full_registers_keep_ties_and_tails(width: int, k: int) -> None:
    """Use scores with few distinct values, so that the best are spread over the full catalogue."""
    rng = np.random.default_rng(width)
    scores = rng.integers(-400, 400, (3, width)).astype(np.float32)
    scores[0, -3:] = 400
    check(scores, k, exclude=(np.array([0, 2, 2, 3]), np.array([width - 1, 5, 7])))


def test_all_scores_equal_gives_the_lowest_rows() -> None:
    found = top_k(np.zeros((3, 5_000), np.float32), 7)
    assert (found.items == np.arange(2, 9)).all()


def test_minus_zero_ties_with_zero() -> None:
    assert top_k(np.array([[0, 0, -0.0, 0.0, -0.0]], np.float32), 3).items.tolist() == [[2, 3, 4]]


def test_parts_of_the_batch_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_CANDIDATES", 1_000)  # a few rows at a time
    check(np.random.default_rng(0).integers(0, 50, (40, 900)).astype(np.float32), 10)


def test_lists_longer_than_the_catalogue_end_in_minus_one() -> None:
    found = top_k(np.array([[9, 9, 1, 2]], np.float32), 4)
    assert found.items.tolist() == [[3, 2, -1, -1]] and found.scores.tolist() == [[2, 1, -np.inf, -np.inf]]


def test_no_query_and_nothing_allowed() -> None:
    assert top_k(np.zeros((0, 50), np.float32), 3).items.shape == (0, 3)
    assert (top_k(np.zeros((2, 50), np.float32), 3, allow=np.zeros(50, bool)).items == -1).all()


def test_a_tensor_a_view_and_a_read_only_array_give_the_same_result() -> None:
    scores = np.random.default_rng(1).random((4, 300), np.float32)
    expected = top_k(scores.copy(), 5).items
    fixed = scores.copy()
    fixed.flags.writeable = False
    for given_as in (
        torch.from_numpy(scores.copy()),
        fixed,
        np.asfortranarray(scores),
        scores.astype(np.float64),
        np.tile(scores, 2)[:, :300],
    ):
        np.testing.assert_array_equal(top_k(given_as, 5).items, expected)
    assert (fixed[:, :2] > 0).all(), "a read-only array must stay as it is"


@pytest.mark.parametrize("most", WAYS)
def test_the_ends_of_all_ways(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Check the edge cases: no query, no allowed item, and fewer items than requested."""
    monkeypatch.setattr(topk, "_NUMPY_MAX_ROWS", most)
    assert top_k(np.zeros((0, 50), np.float32), 3).items.shape == (0, 3)
    for width in (1, 2, 3, 40):
        for allow in (None, np.zeros(width, bool)):
            check(np.ones((2, width), np.float32), 4, allow=allow)


def test_the_best_of_one_query_s_candidates() -> None:
    rows = np.array([3, 7, 8, 20])
    found = top_k_among(np.array([0.5, 2.0, -np.inf, 2.0], np.float32), rows, 3)
    assert found.items.tolist() == [[7, 20, 3]] and found.scores.tolist() == [[2.0, 2.0, 0.5]]
    nothing = top_k_among(np.zeros(0, np.float32), rows[:0], 2)
    assert nothing.items.tolist() == [[-1, -1]] and nothing.scores.tolist() == [[-np.inf, -np.inf]]
    low = top_k_among(np.array([1.0, 3.0], np.float32), np.array([0, 1]), 5)
    assert low.items.tolist() == [[1, 0, -1, -1, -1]], "the rows are the caller's: none is reserved"


def test_keys_order_as_scores_and_then_as_rows() -> None:
    """A GPU sorts by these integers."""
    scores = torch.tensor([[0.0, -0.0, 1.5, -1.5, 1e-45, -1e-45, np.inf, -np.inf, 1.5, 3e38, -3e38]])
    keys = topk._keys(scores)[0].tolist()
    expected = sorted(range(scores.shape[1]), key=lambda i: (-float(scores[0, i]), i))
    assert sorted(range(len(keys)), key=lambda i: -keys[i]) == expected and len(set(keys)) == len(keys)


@pytest.mark.parametrize("most", WAYS)
@pytest.mark.parametrize("column", [5, 299])
def test_a_nan_is_refused(monkeypatch: pytest.MonkeyPatch, column: int, most: int) -> None:
    monkeypatch.setattr(topk, "_NUMPY_MAX_ROWS", most)
    scores = np.zeros((2, 300), np.float32)
    scores[1, column] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        top_k(scores, 3)
    with pytest.raises(ValueError, match="must be at least 1"):
        top_k(scores, 0)
