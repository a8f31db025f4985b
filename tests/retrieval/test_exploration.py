"""Test exploration: the probability that is logged is the one with which an item is shown."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from twotower.errors import RequestError
from twotower.retrieval.exploration import MIN_EVENTS, POOL, explored, pool_of, probabilities, uncertain_items
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Request
from twotower.schema import FIRST_ROW


@pytest.mark.parametrize(("k", "size", "share"), [(4, 9, 0.3), (4, 2, 0.5), (3, 0, 0.5), (5, 5, 1.0), (1, 3, 0.2)])
def test_items_are_shown_as_often_as_their_propensity_says(k: int, size: int, share: float) -> None:
    rng, trials = np.random.default_rng(0), 20_000
    rows, pool = np.arange(k), np.arange(100, 100 + size)
    shown: Counter[int] = Counter()
    for _ in range(trials):
        one = explored(rows, np.zeros(k, np.float32), pool, np.ones(size, np.float32), share, rng)
        assert len(set(one.rows.tolist())) == k, "no item twice"
        shown.update(one.rows.tolist())
    kept, drawn = probabilities(k, size, share)
    for row in (*rows.tolist(), *pool.tolist()):
        chance = drawn if row >= 100 else kept
        assert shown[row] / trials == pytest.approx(chance, abs=4 * np.sqrt(0.25 / trials)), row
    assert kept * k + drawn * size == pytest.approx(k), "the positions of a list are all given"


def test_a_pool_has_no_item_of_the_list_and_no_item_twice() -> None:
    near, few = np.arange(5, 60), np.arange(3, 90, 2)
    rows, scores = pool_of(np.arange(10), [(near, near.astype(np.float32)), (few, few.astype(np.float32))])
    assert rows[:POOL].tolist() == list(range(10, 10 + POOL)) and rows[POOL:].tolist() == list(range(35, 35 + 2 * POOL, 2))
    assert (rows == scores).all()


def test_uncertain_items_have_few_events(recommender: Recommender) -> None:
    counts, few = np.diff(recommender.dataset.item_events.offsets), uncertain_items(recommender.dataset)
    assert few[FIRST_ROW:].mean() >= 0.1 and not few[:FIRST_ROW].any()
    assert counts[few].max() <= max(counts[~few][FIRST_ROW:].min(), MIN_EVENTS - 1)


def test_a_recommender_explores_among_allowed_items_and_logs_what_it_did(recommender: Recommender) -> None:
    known = [str(user) for user in recommender.dataset.user_ids[FIRST_ROW : FIRST_ROW + 3]]
    shown: Counter[str] = Counter()
    logged: dict[str, float] = {}
    plain = recommender.answer([Request(user=known[0], k=6)])[0]
    assert plain.propensity == (1.0,) * 6
    for _ in range(300):
        for answer in recommender.answer([Request(user=known[0], k=6, explore=0.5), Request(k=6, explore=0.5)])[:1]:
            assert len({item.item_id for item in answer.items}) == 6
            for item, chance in zip(answer.items, answer.propensity, strict=True):
                shown[str(item.item_id)] += 1
                assert logged.setdefault(str(item.item_id), chance) == chance, "one item has one propensity"
    ours = {str(item.item_id) for item in plain.items}
    assert {chance for item, chance in logged.items() if item in ours} == {0.5} and len(logged) > 30
    for item, chance in logged.items():
        assert shown[item] / 300 == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / 300))


def test_exploration_obeys_filter_and_history_and_leaves_further_parts_alone(recommender: Recommender) -> None:
    user = str(recommender.dataset.user_ids[FIRST_ROW])
    inside = Request(user=user, k=5, filter="within(3)", near=(29.0, -118.0), explore=1.0)
    allowed = {
        item.item_id for item in recommender.answer([Request(user=user, k=200, filter="within(3)", near=(29.0, -118.0))])[0].items
    }
    for _ in range(20):
        assert {item.item_id for item in recommender.answer([inside])[0].items} <= allowed
    later = [Request(user=user, k=5, skip=5, explore=share) for share in (0.0, 1.0)]
    first, second = recommender.answer(later)
    assert [item.item_id for item in first.items] == [item.item_id for item in second.items]
    assert set(second.propensity) == {1.0}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "much"])
def test_a_share_that_is_none_is_refused(recommender: Recommender, share: float) -> None:
    with pytest.raises(RequestError, match="explore is"):
        recommender.answer([Request(k=1, explore=share)])
