"""Test every metric on small examples, and against trec_eval on random runs."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import ConfigError
from twotower.utils import metrics as m

TREC = {"Recall": "recall", "HitRate": "success", "NDCG": "ndcg_cut", "MAP": "map_cut", "Precision": "P"}
HITS = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
TARGETS = np.array([3, 1, 1])
BY_HAND = {
    "Recall@5": [2 / 3, 0, 1],
    "Recall@3": [1 / 3, 0, 1],
    "HitRate@1": [0, 0, 1],
    "HitRate@2": [1, 0, 1],
    "Precision@5": [0.4, 0, 0.2],
    "Precision@10": [0.2, 0, 0.1],
    "MRR@5": [0.5, 0, 1],
    "MRR@1": [0, 0, 1],
    "MAP@5": [(1 / 2 + 2 / 4) / 3, 0, 1],
    "NDCG@5": [(1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3) + 1 / log2(4)), 0, 1],
    "NDCG@2": [(1 / log2(3)) / (1 + 1 / log2(3)), 0, 1],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    np.testing.assert_allclose(m.compute(name, HITS, TARGETS), BY_HAND[name], atol=1e-15)


def test_every_metric_was_worked_by_hand() -> None:
    assert {name.partition("@")[0] for name in BY_HAND} == set(m.METRICS)


def random_run(seed: int, size: int, depth: int, n_item_rows: int) -> tuple[Any, Any, Any]:
    """Return lists without repeats, some cut short, with one to eight targets per query."""
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(np.arange(2, n_item_rows))[:depth] for _ in range(size)])
    for row, length in enumerate(rng.integers(1, depth + 1, size)):
        if rng.random() < 0.3:
            items[row, length:] = -1
    targets = [np.sort(rng.permutation(np.arange(2, n_item_rows))[: rng.integers(1, 9)]) for _ in range(size)]
    return items, np.append(0, np.cumsum([len(t) for t in targets])), np.concatenate(targets)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_against_trec_eval(seed: int, k: int) -> None:
    items, offsets, target = random_run(seed, 200, 20, 60)
    names = [str(q) for q in range(len(items))]
    truth = {q: {f"i{row}": 1 for row in target[offsets[b] : offsets[b + 1]]} for b, q in enumerate(names)}
    run = {q: {f"i{row}": float(-j) for j, row in enumerate(items[b]) if row >= 0} for b, q in enumerate(names)}
    theirs = pytrec_eval.RelevanceEvaluator(truth, {f"{measure}.{k}" for measure in TREC.values()}).evaluate(run)
    cut = {q: dict(list(scores.items())[:k]) for q, scores in run.items()}  # trec_eval has no reciprocal rank at k
    rank = pytrec_eval.RelevanceEvaluator(truth, {"recip_rank"}).evaluate(cut)
    hits = m.hit_matrix(items, offsets, target)
    assert 0 < hits.sum() < hits.size
    for name in m.METRICS:
        expected = [rank[q]["recip_rank"] if name == "MRR" else theirs[q][f"{TREC[name]}_{k}"] for q in names]
        np.testing.assert_allclose(m.compute(f"{name}@{k}", hits, np.diff(offsets)), expected, atol=1e-9, err_msg=name)


@given(st.integers(0, 2**32 - 1))
def test_a_hit_is_membership_in_the_querys_own_targets(seed: int) -> None:
    items, offsets, target = random_run(seed, 6, 8, 14)
    expected = [[row in set(target[offsets[b] : offsets[b + 1]].tolist()) for row in items[b].tolist()] for b in range(6)]
    np.testing.assert_array_equal(m.hit_matrix(items, offsets, target), expected)


def test_the_end_of_a_list_never_hits_even_next_to_the_last_row_of_another_query() -> None:
    assert not m.hit_matrix(np.array([[5], [-1]]), np.array([0, 1, 2]), np.array([4, 5]))[1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ndcg@10", "Did you mean 'NDCG'"),
        ("Recal@10", "Did you mean 'Recall'"),
        ("AUC@10", "Known: "),
        ("NDCG", "at least 1"),
        ("NDCG@0", "at least 1"),
        ("NDCG@1.5", "at least 1"),
    ],
)
def test_a_wrong_name_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        m.parse_metric(text)


def test_parse() -> None:
    assert m.parse_metric("NDCG@10") == ("NDCG", 10)


def test_coverage_and_gini() -> None:
    assert m.coverage(np.array([0, 3, 0, 1])) == 0.5
    assert m.gini(np.array([2, 2, 2, 2])) == 0
    assert m.gini(np.array([0, 0, 0, 8])) == m.gini(np.array([0, 1, 0, 0])) == pytest.approx(0.75)  # 1 - 1 / items
    assert m.gini(np.zeros(4, np.int64)) == 0
    exposure = np.random.default_rng(0).integers(0, 20, 50)
    pairs = np.abs(exposure[:, None] - exposure).mean()
    assert m.gini(exposure) == pytest.approx(pairs / 2 / exposure.mean())


def test_novelty_is_in_bits() -> None:
    popularity = np.array([3, 1, 0, 0])  # p = 4/8, 2/8, 1/8, 1/8
    assert m.novelty(np.array([1, 0, 0, 0]), popularity) == pytest.approx(1)
    assert m.novelty(np.array([1, 2, 1, 0]), popularity) == pytest.approx((1 + 2 * 2 + 3) / 4)


def test_popularity_lift() -> None:
    popularity = np.array([10, 2])
    assert m.popularity_lift(np.array([1, 0]), np.array([0, 5]), popularity) == pytest.approx(4)
    assert m.popularity_lift(np.array([3, 3]), np.array([1, 1]), popularity) == 0
    assert m.popularity_lift(np.array([3, 3]), np.array([0, 0]), popularity) == 0


def test_diversity_by_hand() -> None:
    offsets, category = np.array([0, 0, 0, 2, 4, 5, 5]), np.array([0, 1, 1, 2, 7])  # rows 2: {0 1}, 3: {1 2}, 4: {7}, 5: none
    lists = np.array([[2, 3, -1], [2, 3, 4], [2, 2, 5], [4, -1, -1], [5, 5, 5]])
    near = 1 - 1 / 3
    np.testing.assert_allclose(m.diversity(lists, offsets, category), [near, (near + 1 + 1) / 3, 0, np.nan, np.nan])


def test_lists_without_any_category_have_no_diversity() -> None:
    assert np.isnan(m.diversity(np.array([[2, 3]]), np.array([0, 0, 0, 0, 0, 1]), np.array([0]))).all()


def test_diversity_against_python_sets() -> None:
    rng = np.random.default_rng(3)
    sets = [set(), set(), *(set(rng.integers(0, 9, rng.integers(1, 6)).tolist()) for _ in range(40))]
    offsets = np.append(0, np.cumsum([len(s) for s in sets]))
    lists = np.stack([rng.permutation(np.arange(2, 42))[:6] for _ in range(30)])
    pairs = [(a, b) for a in range(6) for b in range(a)]
    expected = [np.mean([1 - len(sets[i[a]] & sets[i[b]]) / len(sets[i[a]] | sets[i[b]]) for a, b in pairs]) for i in lists]
    np.testing.assert_allclose(m.diversity(lists, offsets, np.array([c for s in sets for c in sorted(s)])), expected)
