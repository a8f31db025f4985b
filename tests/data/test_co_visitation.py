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


@pytest.mark.parametrize("times", [10, 10_000])
def test_transitions_count_pairs_in_order_on_each_side(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """With few distinct times, many events of a user have the same one."""
    rng = np.random.default_rng(2)
    user = np.sort(rng.integers(2, 40, 500))
    item = rng.integers(2, 60, 500)
    time_s = np.concatenate([np.sort(rng.integers(times, size=size)) for size in np.unique(user, return_counts=True)[1]])
    monkeypatch.setattr(co_visitation, "BLOCK", 7)
    monkeypatch.setattr(co_visitation, "LAGS", 4)
    lists = co_visitation.transitions(user, item, time_s, n_user_rows=41, n_item_rows=61, most=5)
    histories = {u: list(zip(item[user == u].tolist(), time_s[user == u].tolist(), strict=True)) for u in set(user.tolist())}
    people = {i: sum(i in dict(events) for events in histories.values()) for i in range(61)}
    follows = np.zeros((61, 61))
    for events in histories.values():
        moments = sorted({time for _, time in events})
        for (one, (a, before)), (two, (b, after)) in combinations(enumerate(events), 2):
            lag = moments.index(after) - moments.index(before)
            if a != b and two - one <= 4 and lag:
                follows[a, b] += 1 / np.sqrt(people[a] * people[b]) / lag
    for weights, rows, values in ((follows, lists.after, lists.after_weight), (follows.T, lists.before, lists.before_weight)):
        weights = weights.round(12)
        for row in range(61):
            best = [other for other in np.lexsort((np.arange(61), -weights[row])) if weights[row, other] > 0][:5]
            assert rows[row].tolist() == best + [0] * (5 - len(best))
            np.testing.assert_allclose(values[row], [*weights[row, best], *[0.0] * (5 - len(best))], rtol=1e-6)


def test_transitions_of_a_dataset_are_of_training_alone(dataset: Dataset) -> None:
    events, found = dataset.events, dataset.transitions
    assert found is not None
    kept = events.positive & (events.split == TRAIN)
    sizes = {"n_user_rows": dataset.n_user_rows, "n_item_rows": dataset.n_item_rows, "most": found.after.shape[1]}
    again = co_visitation.transitions(events.user_row[kept], events.item_row[kept], events.time_s[kept], **sizes)
    for name in ("after", "after_weight", "before", "before_weight"):
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))
    assert max(found.after.max(), found.before.max()) < dataset.n_train_item_rows


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
