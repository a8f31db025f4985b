"""Test the contract of every index of `INDEXES`, and the recall of approximate ones against brute force."""

from __future__ import annotations

import sys
import tracemalloc
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import DataError
from twotower.retriever import Recommendations
from twotower.search import approximate, faiss_indexes
from twotower.search import index as exact_index
from twotower.search.approximate import Approximate
from twotower.search.index import ExactIndex, Index
from twotower.search.registry import INDEXES, load_index
from twotower.search.topk import top_k
from twotower.utils.types import Array, Mask

N, D, K = 2_500, 17, 20
SETTINGS: dict[str, dict[str, Any]] = {
    "hnsw": {"M": 24, "ef_construction": 150, "ef_search": 250, "rescore_factor": 1.5},
    "ivf_pq": {"nlist": 50, "nprobe": 25, "rescore_factor": 8},
    "int8": {"rescore_factor": 1.5},
    "sq": {"rescore_factor": 1.5},
}


def clustered(seed: int, size: int) -> Array:
    """Return unit vectors around 40 centres, the same for every seed, with a last component that is not normalised."""
    centres = np.random.default_rng(0).standard_normal((40, D - 1))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 40, size)] + 0.8 * rng.standard_normal((size, D - 1))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.concatenate([vectors, 0.3 * rng.standard_normal((size, 1))], axis=1).astype(np.float32)


@cache
def catalogue(whole: bool) -> torch.Tensor:
    """Return item vectors. With `whole`, they are small integers, whose inner products are exact in any order of summation."""
    vectors = clustered(1, N)
    return torch.from_numpy(np.rint(vectors * 12) if whole else vectors)


@cache
def built(kind: str, whole: bool, exact_scan_below: int = 0) -> Index:
    """Build an index; with exact_scan_below = 0 an approximate one never prefers the exact scan."""
    more = {} if kind == "exact" else {**SETTINGS[kind], "exact_scan_below": exact_scan_below}
    return INDEXES[kind].build(catalogue(whole), **more)


def brute_force(queries: Array, k: int, exclude: Any, allow: Mask | None, whole: bool) -> Recommendations:
    """Compute all inner products, mask them and sort them fully."""
    scores = queries @ catalogue(whole).numpy().T
    scores[:, :2] = -np.inf
    if allow is not None:
        scores[~np.broadcast_to(allow, scores.shape)] = -np.inf
    if exclude is not None:
        for b in range(len(queries)):
            scores[b, exclude[1][exclude[0][b] : exclude[0][b + 1]]] = -np.inf
    items = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores, items, 1)
    return Recommendations(np.where(values > -np.inf, items, -1), values)


def ragged(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    offsets = np.append(0, np.cumsum(rng.integers(0, 12, size)))
    return offsets, rng.integers(0, N, offsets[-1])


def recall(found: Recommendations, truth: Recommendations) -> float:
    return float(np.mean([np.isin(b[b >= 0], a).mean() for a, b in zip(found.items, truth.items, strict=True) if (b >= 0).any()]))


def check_lists(found: Recommendations, truth: Recommendations, queries: Array, allow: Mask | None, exclude: Any) -> None:
    """Check that all available items are returned in order with exact scores, without excluded items."""
    np.testing.assert_array_equal(found.items >= 0, truth.items >= 0)
    for b, (rows, scores) in enumerate(zip(found.items, found.scores, strict=True)):
        kept = rows[rows >= 0]
        assert len(set(kept)) == len(kept) and not (rows[len(kept) :] >= 0).any() and (kept >= 2).all()
        assert allow is None or np.broadcast_to(allow, (len(queries), N))[b][kept].all()
        assert exclude is None or not np.isin(kept, exclude[1][exclude[0][b] : exclude[0][b + 1]]).any()
        np.testing.assert_allclose(scores[: len(kept)], catalogue(False).numpy()[kept] @ queries[b], atol=1e-5)
        assert (np.diff(scores[: len(kept)]) <= 0).all() and (scores[len(kept) :] == -np.inf).all()


SHARES = [0.0, 0.0005, 0.004, 0.02, 0.1, 0.5, 0.95, 1.0]


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("per_query", [False, True])
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from(SHARES), k=st.sampled_from([1, 10, 100, N + 5]))
@settings(max_examples=12)
def test_the_exact_index_is_brute_force(size: int, per_query: bool, seed: int, share: float, k: int) -> None:
    rng = np.random.default_rng(seed)
    queries = rng.integers(-9, 9, (size, D)).astype(np.float32)
    allow = rng.random((size, N) if per_query else N) < share if share < 1 else None
    exclude = ragged(rng, size) if rng.random() < 0.7 else None
    truth = brute_force(queries, k, exclude, allow, True)
    for given_as in (queries, torch.from_numpy(queries)):
        found = built("exact", True).search(given_as, k, exclude=exclude, allow=allow)
        np.testing.assert_array_equal(
            found.items, truth.items[:, :k] if k <= N else np.pad(truth.items, ((0, 0), (0, k - N)), constant_values=-1)
        )
        assert found.items.shape == found.scores.shape == (size, k)


@pytest.mark.parametrize("kind", INDEXES)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from(SHARES), size=st.sampled_from([1, 4]), per_query=st.booleans())
@settings(max_examples=15)
def test_k_come_back_when_k_exist(kind: str, seed: int, share: float, size: int, per_query: bool) -> None:
    rng = np.random.default_rng(seed)
    queries = clustered(seed, size)
    allow = rng.random((size, N) if per_query else N) < share if share < 1 else None
    exclude = ragged(rng, size) if rng.random() < 0.7 else None
    found = built(kind, False).search(queries, K, exclude=exclude, allow=allow)
    check_lists(found, brute_force(queries, K, exclude, allow, False), queries, allow, exclude)


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("share", SHARES[1:])
def test_recall_under_any_filter(kind: str, share: float) -> None:
    """Measure the recall with settings tuned without filter and without the exact scan."""
    rng = np.random.default_rng(round(share * 1e4))
    queries = clustered(5, 60)
    allow = rng.random(N) < share if share < 1 else None
    found = built(kind, False).search(queries, K, allow=allow)
    assert recall(found, brute_force(queries, K, None, allow, False)) >= 0.99


@pytest.mark.parametrize("kind", INDEXES)
def test_recall_under_filters_that_go_against_the_query(kind: str) -> None:
    """Test filters whose items are far from the query or near to it."""
    queries = clustered(6, 40)
    scores = queries @ catalogue(False).numpy().T
    worst = [scores < np.quantile(scores, share, axis=1)[:, None] for share in (0.02, 0.3, 0.5, 0.7, 0.9)]
    for allow in (*worst, scores > np.quantile(scores, 0.9, axis=1)[:, None]):
        found = built(kind, False).search(queries, K, allow=allow)
        truth = brute_force(queries, K, None, allow, False)
        check_lists(found, truth, queries, allow, None)
        assert recall(found, truth) >= 0.99


@pytest.mark.parametrize("kind", INDEXES)
def test_a_saved_index_returns_the_same_results(kind: str, tmp_path: Path) -> None:
    index, queries = built(kind, False, 300), clustered(7, 8)
    index.save(tmp_path / "index")
    again = load_index(tmp_path / "index", catalogue(False))
    assert type(again) is type(index) and again.settings == index.settings
    np.testing.assert_array_equal(again.search(queries, K).items, index.search(queries, K).items)
    assert {file.suffix for file in (tmp_path / "index").iterdir()} <= {".json", ".safetensors", ".faiss"}
    assert index.nbytes > 0
    with pytest.raises(DataError, match="does not match the vectors"):
        load_index(tmp_path / "index", catalogue(False)[:-1])
    for file in (tmp_path / "index").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="Run `twotower tune-index`"):
            load_index(tmp_path / "index", catalogue(False))
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", INDEXES)
def test_settings_are_checked(kind: str) -> None:
    for wrong in ({"depth": 3}, {"rescore_factor": 0}, {"rescore_factor": "2"}):
        with pytest.raises(DataError, match="setting"):
            INDEXES[kind].build(catalogue(False), **wrong)


@pytest.mark.parametrize("kind", [kind for kind in INDEXES if kind != "exact"])
def test_where_an_exact_scan_is_cheaper_is_measured(kind: str) -> None:
    index = INDEXES[kind].build(catalogue(False), **SETTINGS[kind])
    assert index.settings["exact_scan_below"] > 0


def test_the_exact_scan_answers_what_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that candidates are proposed only above `exact_scan_below` allowed items."""
    index, query = built("int8", False, 500), clustered(8, 1)
    assert isinstance(index, Approximate)
    asked = []
    monkeypatch.setattr(index, "_candidates", lambda *given: asked.append(given) or np.full((1, 50), -1))
    few, many = np.arange(N) < 502, np.arange(N) < 504
    index.search(query, K, allow=few)
    assert not asked
    found = index.search(query, K, allow=many)
    assert len(asked) == 1
    np.testing.assert_array_equal(found.items, brute_force(query, K, None, many, False).items)  # nothing proposed: scanned


def test_the_library_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DataError, match="pip install"):
        INDEXES["hnsw"].build(catalogue(False))
    assert INDEXES["int8"].build(catalogue(False)).search(clustered(1, 1), 3).items.shape == (1, 3)


def test_scores_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that at most BLOCK_BYTES of scores are in memory for any catalogue size."""
    queries, sizes = clustered(9, 50), []
    kept = top_k
    monkeypatch.setattr(exact_index, "BLOCK_BYTES", 4 * N * 6)
    monkeypatch.setattr(exact_index, "top_k", lambda scores, *a, **b: sizes.append(scores.nbytes) or kept(scores, *a, **b))
    found = ExactIndex(catalogue(False)).search(queries, K)
    assert max(sizes) <= 4 * N * 6 and len(sizes) == 9
    assert recall(found, brute_force(queries, K, None, None, False)) == 1


def test_no_queries_and_an_empty_catalogue() -> None:
    for kind in INDEXES:
        assert built(kind, False).search(np.zeros((0, D), np.float32), 3).items.shape == (0, 3)
    assert (ExactIndex(torch.zeros(2, 4)).search(np.ones((1, 4), np.float32), 3).items == -1).all()


@pytest.mark.parametrize("kind", [kind for kind in INDEXES if kind != "exact"])
def test_no_build_copies_all_vectors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure what NumPy allocates: vectors may be a memory map that is larger than the memory."""
    vectors = np.random.default_rng(2).standard_normal((6_000, 64), np.float32)
    chosen = {**INDEXES[kind].DEFAULTS, **SETTINGS[kind], "balance": [0.5]}  # type: ignore[attr-defined]
    monkeypatch.setattr(approximate, "_PORTION", 500)
    monkeypatch.setattr(faiss_indexes, "_TRAINED_ON", 500)
    tracemalloc.start()
    try:
        INDEXES[kind]._structure(vectors, chosen)  # type: ignore[attr-defined]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.75 * vectors.nbytes


def test_portions_are_all_vectors_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_PORTION", 700)
    vectors = catalogue(False).numpy()
    starts, parts = zip(*approximate.portions(vectors, [2.0]), strict=True)
    assert starts == (0, 700, 1400, 2100)
    np.testing.assert_array_equal(np.concatenate(parts), vectors * np.array([1.0] * (D - 1) + [2.0], np.float32))


def test_more_lists_are_trained_on_more_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_indexes, "_TRAINED_ON", 300)
    trained, added = [], []
    index = SimpleNamespace(d=D, train=trained.append, add=added.append)
    vectors = catalogue(False).numpy()
    for wanted, found in ((0, 313), (1_000, 1_250), (10_000, N)):
        faiss_indexes._filled(index, vectors, [], wanted)
        assert len(trained.pop()) == found and sum(map(len, added)) == N
        added.clear()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", [kind for kind in INDEXES if kind != "exact"])
def test_an_opened_index_stays_on_disk(kind: str, tmp_path: Path) -> None:
    index = built(kind, False)
    index.save(tmp_path / "index")
    (file,) = {*(tmp_path / "index").iterdir()} - {tmp_path / "index" / "index.json"}
    again = load_index(tmp_path / "index", catalogue(False))
    assert str(file) in Path("/proc/self/maps").read_text()
    assert again.nbytes == index.nbytes
    if kind != "int8":
        assert index.nbytes == file.stat().st_size
    del again
    assert str(file) not in Path("/proc/self/maps").read_text()


def test_large_vectors_are_searched_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_index, "COLUMN_SCAN_MAX_BYTES", 4 * N * D - 1)
    index, queries = ExactIndex(catalogue(True)), np.random.default_rng(3).integers(-9, 9, (3, D)).astype(np.float32)
    allow = np.arange(N) % 4 > 0
    for mask in (None, allow):
        found = index.search(queries, K, allow=mask)
        np.testing.assert_array_equal(found.items, brute_force(queries, K, None, mask, True).items)
    assert "_columns" not in vars(index)
    monkeypatch.setattr(exact_index, "COLUMN_SCAN_MAX_BYTES", 4 * N * D)
    index.search(queries, K)
    assert "_columns" in vars(index)
