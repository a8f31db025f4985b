"""Test co-visited items on small examples and against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from twotower.data import co_visitation
from twotower.data.dataset import Dataset
from twotower.schema import FIRST_ROW, NEIGHBOURS, TRAIN


def test_neighbours_are_those_of_the_same_users_weighted_by_how_few_items_these_know(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(2, 40, 500))
    item = rng.integers(2, 60, 500)
    monkeypatch.setattr(co_visitation, "BLOCK", 7)
    near = co_visitation.co_visited(user, item, n_user_rows=41, n_item_rows=61, most=5)
    visited = {u: sorted(set(item[user == u].tolist())) for u in set(user.tolist())}
    people = {i: sum(i in items for items in visited.values()) for i in range(61)}
    likeness = np.zeros((61, 61))
    for items in visited.values():
        for a, b in combinations(items, 2):
            likeness[a, b] += 1 / len(items) / np.sqrt(people[a] * people[b])
    likeness = (likeness + likeness.T).round(12)
    for row in range(61):
        best = [other for other in np.lexsort((np.arange(61), -likeness[row])) if likeness[row, other] > 0][:5]
        assert near[row].tolist() == best + [0] * (5 - len(best))


def test_where_order_counts_events_near_each_other_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    user = np.sort(rng.integers(2, 40, 500))
    item = rng.integers(2, 60, 500)
    monkeypatch.setattr(co_visitation, "BLOCK", 7)
    monkeypatch.setattr(co_visitation, "LAGS", 4)
    near = co_visitation.co_visited(user, item, n_user_rows=41, n_item_rows=61, most=5, ordered=True)
    histories = {u: item[user == u].tolist() for u in set(user.tolist())}
    people = {i: sum(i in items for items in histories.values()) for i in range(61)}
    likeness = np.zeros((61, 61))
    for items in histories.values():
        for (one, a), (two, b) in combinations(enumerate(items), 2):
            if a != b and two - one <= 4:
                likeness[a, b] += 1 / len(set(items)) / np.sqrt(people[a] * people[b]) / (two - one)
    likeness = (likeness + likeness.T).round(12)
    for row in range(61):
        best = [other for other in np.lexsort((np.arange(61), -likeness[row])) if likeness[row, other] > 0][:5]
        assert near[row].tolist() == best + [0] * (5 - len(best))


def test_only_a_users_latest_events_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co_visitation, "MAX_USER_EVENTS", 2)
    near = co_visitation.co_visited(np.array([2, 2, 2]), np.array([2, 3, 4]), n_user_rows=3, n_item_rows=5, most=3)
    assert near.tolist() == [[0] * 3, [0] * 3, [0] * 3, [4, 0, 0], [3, 0, 0]]
    ordered = co_visitation.co_visited(np.array([2, 2, 2]), np.array([2, 3, 4]), n_user_rows=3, n_item_rows=5, most=3, ordered=True)
    assert ordered.tolist() == near.tolist()


def test_a_dataset_holds_them_of_training_alone(dataset: Dataset) -> None:
    events, near = dataset.events, dataset.item_features[NEIGHBOURS]
    kept = events.positive & (events.split == TRAIN)
    sizes = {"n_user_rows": dataset.n_user_rows, "n_item_rows": dataset.n_item_rows, "most": near.shape[1], "ordered": True}
    np.testing.assert_array_equal(near, co_visitation.co_visited(events.user_row[kept], events.item_row[kept], **sizes))
    known = dataset.n_train_item_rows
    assert near.max() < known and not near[known:].any() and (near[FIRST_ROW:known, 0] > 0).mean() > 0.9
