"""Test the ranking of the items of a history against a ranking of the whole catalogue."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower.features.transitions import LAST, TRANSITIONS, Transitions
from twotower.models.history_terms import REPEATS, bonuses_of, merge_bonuses, recent_sum
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW
from twotower.search.index import ExactIndex

ITEMS, WIDTH = 30, 4
HISTORIES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=12), min_size=1, max_size=6)


def drawn_lists(seed: int, most: int = 3) -> Transitions:
    """Return lists of the items after and before each item but the last three, which are new."""
    draw = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        rows, weights = np.zeros((ITEMS - 3, most), np.int32), np.zeros((ITEMS - 3, most), np.float32)
        for item in range(FIRST_ROW, ITEMS - 3):
            size = draw.integers(0, most + 1)
            rows[item, :size] = draw.choice(np.arange(FIRST_ROW, ITEMS - 3), size, replace=False)
            weights[item, :size] = -np.sort(-draw.random(size) - 0.01)
        sides += [rows, weights]
    return Transitions(*sides)


def order_features(history: list[int], lists: Transitions) -> np.ndarray:
    """Return the four features of every item, event by event."""
    found = np.zeros((ITEMS, TRANSITIONS))
    sides = ((lists.after, lists.after_weight), (lists.before, lists.before_weight))
    for side, (rows, weights) in enumerate(sides):
        total = np.zeros(ITEMS)
        for distance, item in enumerate(history[::-1][:LAST], start=1):
            if FIRST_ROW <= item < len(rows):
                for other, weight in zip(rows[item], weights[item], strict=True):
                    total[other] += weight / distance
        listed = np.flatnonzero(total)
        found[listed, 2 * side], found[listed, 2 * side + 1] = 1.0, np.log(total[listed])
    return found


def bonus(history: list[int], weights: list[float], popularity: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the bonus of every repeat in nats, event by event."""
    found = np.zeros(ITEMS)
    real = [item for item in history if item >= FIRST_ROW]
    for item in set(real):
        counted = [1.0, np.log(real.count(item)), np.log(1 + history[::-1].index(item)), np.log(1 + len(real) - len(set(real)))]
        found[item] = np.dot(weights, [*counted, popularity[item], scores[item]])
    return found


@given(
    HISTORIES,
    st.integers(1, ITEMS + 5),
    st.integers(0, 2**31),
    st.sampled_from(["none", "shared", "each"]),
    st.lists(st.floats(-20, 20), min_size=REPEATS + TRANSITIONS, max_size=REPEATS + TRANSITIONS),
    st.booleans(),
    st.booleans(),
)
def test_merged_lists_are_those_of_a_full_ranking(
    histories: list[list[int]], k: int, seed: int, masks: str, weights: list[float], ordered: bool, disliked: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    items, vectors = (torch.randn(size, WIDTH, generator=generator) for size in (ITEMS, len(histories)))
    draw = np.random.default_rng(seed)
    again = draw.random(len(histories)) < 0.7
    shape = {"none": None, "shared": (ITEMS,), "each": (len(histories), ITEMS)}[masks]
    allow = None if shape is None else draw.random(shape) < 0.6
    queries = Queries.of(histories, time_s=1_700_000_000)
    hated = draw.integers(FIRST_ROW, ITEMS, size=(len(histories), 2))
    if disliked:
        queries = replace(queries, disliked=(np.arange(len(histories) + 1) * 2, hated.ravel()))
    lists = drawn_lists(seed) if ordered else None
    bonuses = bonuses_of(queries, again, lists)
    pairs = list(zip(bonuses.query.tolist(), bonuses.item_row.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    best = ExactIndex(items).search(vectors, k, exclude=bonuses.beside(queries.left_out(again)), allow=allow)
    if allow is not None:
        bonuses = bonuses.take(allow[bonuses.item_row] if allow.ndim == 1 else allow[bonuses.query, bonuses.item_row])
    found = merge_bonuses(best, bonuses, vectors, items, torch.tensor(weights), 0.5, popularity=2)
    assert found.items.shape == found.scores.shape == (len(histories), k)
    for b, history in enumerate(histories):
        scores = (items @ vectors[b]).double().numpy()
        order = order_features(history, lists) @ weights[REPEATS:] if lists is not None else 0
        if again[b]:
            scores += 0.5 * bonus(history, weights[:REPEATS], items[:, 2].double().numpy(), scores / 0.5)
        scores += 0.5 * order
        if not again[b]:
            scores[history] = -np.inf
            scores[hated[b] if disliked else []] = -np.inf
        scores[:FIRST_ROW] = -np.inf
        if allow is not None:
            scores[~(allow if allow.ndim == 1 else allow[b])] = -np.inf
        ranked = [row for row in np.argsort(-scores, kind="stable") if np.isfinite(scores[row])][:k]
        assert (found.items[b] >= 0).sum() == len(ranked)
        np.testing.assert_allclose(found.scores[b, : len(ranked)], scores[ranked], rtol=1e-4, atol=1e-3)
        assert set(found.items[b, : len(ranked)].tolist()) <= set(np.flatnonzero(np.isfinite(scores)).tolist())
        assert len(set(found.items[b, : len(ranked)].tolist())) == len(ranked)
        assert (found.items[b, len(ranked) :] == -1).all() and np.isneginf(found.scores[b, len(ranked) :]).all()


def test_without_weights_the_list_is_the_plain_one() -> None:
    items, vectors = torch.randn(ITEMS, WIDTH), torch.randn(2, WIDTH)
    queries = Queries.of([[5, 6, 5], [29]], time_s=1_700_000_000)
    index = ExactIndex(items)
    best = index.search(vectors, 9, exclude=(queries.offsets, queries.item_row))
    found = merge_bonuses(
        best, bonuses_of(queries, np.array([True, True])), vectors, items, torch.zeros(REPEATS + TRANSITIONS), 0.1, popularity=0
    )
    assert found.items.tolist() == index.search(vectors, 9).items.tolist()


def test_a_history_of_reserved_rows_or_none_has_no_repeats() -> None:
    queries = Queries.of([[], [0, 1], [4]], time_s=1_700_000_000)
    assert bonuses_of(queries, np.array([True, True, False])).item_row.tolist() == []
    assert bonuses_of(queries, np.array([True, True, True])).query.tolist() == [2]


def test_ties_go_to_the_lower_row() -> None:
    items, vectors = torch.ones(ITEMS, WIDTH), torch.ones(1, WIDTH)
    queries = Queries.of([[7, 3]], time_s=1_700_000_000)
    best = ExactIndex(items).search(vectors, 6, exclude=(queries.offsets, queries.item_row))
    found = merge_bonuses(
        best, bonuses_of(queries, np.array([True])), vectors, items, torch.zeros(REPEATS + TRANSITIONS), 0.1, popularity=0
    )
    assert found.items[0].tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("seed", range(3))
def test_features_count_events_and_those_since(seed: int) -> None:
    draw = np.random.default_rng(seed)
    histories = [draw.integers(FIRST_ROW, 9, size=draw.integers(0, 40)).tolist() for _ in range(20)]
    found = bonuses_of(Queries.of(histories, time_s=1_700_000_000), np.ones(20, np.bool_))
    popularity, score = draw.normal(size=(2, ITEMS))
    for column, weights in enumerate(np.eye(REPEATS).tolist()):
        told = np.zeros((20, ITEMS))
        told[found.query, found.item_row] = found.features(popularity[found.item_row], score[found.item_row])[:, column]
        np.testing.assert_allclose(told, [bonus(history, weights, popularity, score) for history in histories])


@pytest.mark.parametrize("seed", range(3))
def test_features_of_transitions_add_the_weights_over_the_last_items(seed: int) -> None:
    draw, lists = np.random.default_rng(seed), drawn_lists(seed)
    histories = [draw.integers(0, ITEMS, size=draw.integers(0, 40)).tolist() for _ in range(20)]
    query, item_row, features = lists.near(Queries.of(histories, time_s=1_700_000_000))
    told = np.zeros((20, ITEMS, TRANSITIONS))
    told[query, item_row] = features
    np.testing.assert_allclose(told, [order_features(history, lists) for history in histories], atol=1e-6)
    assert len(query) == sum(order_features(history, lists).any(axis=1).sum() for history in histories)


def test_the_last_items_count_half_as_much_with_every_step_back() -> None:
    items = torch.randn(ITEMS, WIDTH)
    histories = [[5, 6, 5], [], [0, 1, 7], list(range(2, 22))]
    found = recent_sum(Queries.of(histories, time_s=1_700_000_000), items)
    for row, history in zip(found, histories, strict=True):
        wanted = torch.zeros(WIDTH)
        for back, item in enumerate(history[::-1][:LAST]):
            wanted = wanted + (0.5**back * items[item] if item >= FIRST_ROW else 0)
        torch.testing.assert_close(row, wanted)
