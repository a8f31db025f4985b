"""Choose the best index for a bundle by measurement on its own vectors and users, and write it into the bundle.

Each setting is measured: recall against the exact search, median milliseconds of a single query on one thread, and bytes. The
bundle is then replaced by a new revision with the cheapest index that reaches the requested recall.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twotower.bundle.bundle import INDEX, Bundle, load_bundle
from twotower.bundle.sealed_folder import atomic_replace, read_manifest, write_manifest
from twotower.errors import DataError, RequestError, nearest
from twotower.schema import FIRST_ROW
from twotower.search.approximate import LEAST_FACTOR, Approximate, one_thread
from twotower.search.index import ExactIndex, Index
from twotower.search.registry import INDEXES
from twotower.search.reranking import POPULARITY_SCALE
from twotower.utils.manifests import IndexRecord
from twotower.utils.types import Float

USERS = 500  # users whose histories are the queries for the recall
TIMED = 100  # queries for the latency, searched one by one
WARMING = 5
ALIKE = 1.1  # among indexes up to this factor slower than the fastest, the smallest is chosen
MIN_ITEMS = {"hnsw": 1000, "ivf_pq": 10_000}  # with fewer items a graph or inverted lists save no work

Setting = dict[str, Any]
SWEEPS: dict[str, list[tuple[Setting, list[Setting]]]] = {
    "exact": [({}, [{}])],
    "int8": [({}, [{"rescore_factor": rescore_factor} for rescore_factor in (1.1, 1.5, 2.0, 4.0)])],
    "sq": [
        ({"bits": bits}, [{"rescore_factor": rescore_factor} for rescore_factor in (1.1, 1.5, 2.0, 4.0, 8.0)]) for bits in (8, 4)
    ],
    "hnsw": [({"M": m}, [{"ef_search": ef} for ef in (100, 200, 400, 800, 1600)]) for m in (16, 32)],
    "ivf_pq": [({}, [{"nprobe": nprobe} for nprobe in (8, 16, 32, 64, 128, 256, 512, 1024)])],
}
"""For each kind, pairs of build settings and search settings, cheapest first."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Result of one setting: recall at `k`, median milliseconds of a single query on one thread, bytes scanned."""

    kind: str
    settings: Setting
    recall: float
    p50_ms: float
    bytes: int


def tune_index(
    path: Path,
    *,
    recall: float = 0.99,
    k: int = 100,
    kinds: Sequence[str] = (),
    seed: int = 0,
    tell: Callable[[Measured], None] | None = None,
) -> tuple[Measured, list[Measured]]:
    """Measure all settings, choose one and write its index into the bundle at `path`. Return the choice and all rows.

    Each row is also passed to `tell` as soon as it is measured.

    Raises
    ------
    DataError
        The bundle cannot be read or has changed meanwhile, no index reaches the recall, or FAISS is needed but not installed.
    RequestError
        A kind is unknown, or a number is out of range.
    """
    for kind in kinds:
        if kind not in INDEXES:
            raise RequestError(f"Unknown index {kind!r}.{nearest(kind, INDEXES)}")
    if not (0 < recall <= 1 and k >= 1):
        raise RequestError(f"Got recall {recall} and k {k}. The recall must be above 0 and at most 1, k at least 1.")
    bundle = load_bundle(path)
    vectors = torch.from_numpy(bundle.arrays.vectors)
    queries = sample_queries(bundle, seed)
    rows: list[Measured] = []
    good: dict[int, Index] = {}  # by position in `rows`
    columns = bundle.model.priors.width
    for row, index in _sweep(vectors, queries, columns, min(k, max(len(vectors) - FIRST_ROW, 1)), recall, kinds or tuple(INDEXES)):
        rows.append(row)
        if tell is not None:
            tell(row)
        if row.recall >= recall:
            good[len(rows) - 1] = index
    best = choose(rows, recall)
    if best is None:
        raise DataError(f"No index of {', '.join(kinds)} reaches a recall of {recall}. Use the kind exact or a lower recall.")
    _write(bundle, best, good[next(i for i in good if rows[i] is best)], k, len(queries))
    return best, rows


def choose(rows: Sequence[Measured], recall: float) -> Measured | None:
    """Return the smallest index among those that reach the recall and are about as fast as the fastest; None without one."""
    good = [row for row in rows if row.recall >= recall]
    fastest = min((row.p50_ms for row in good), default=0.0)
    return min((row for row in good if row.p50_ms <= ALIKE * fastest), key=lambda row: row.bytes, default=None)


def _sweep(
    vectors: torch.Tensor, queries: Float, columns: int, k: int, recall: float, kinds: Sequence[str]
) -> Iterator[tuple[Measured, Index]]:
    """Measure every kind, each with its settings up to the first that reaches the recall.

    `columns` is the number of components after the vector of the tower; the largest weight in a query balances each of them.
    """
    balance = balance_of(queries, columns)
    truth = ExactIndex(vectors).search(queries, k).items
    for kind in kinds:
        if len(vectors) - FIRST_ROW < MIN_ITEMS.get(kind, 0):
            continue
        for built, searched in SWEEPS.get(kind, [({}, [{}])]):
            index = INDEXES[kind].build(
                vectors, **built, **({"balance": balance} if issubclass(INDEXES[kind], Approximate) else {})
            )
            size = index.nbytes
            for setting in searched:
                # Measure the index itself, never an exact scan instead.
                tried = index.changed(**setting, exact_scan_below=0) if isinstance(index, Approximate) else index
                found = tried.search(queries, k).items
                share = float(np.mean([np.isin(b[b >= 0], a).mean() for a, b in zip(found, truth, strict=True) if (b >= 0).any()]))
                p50_ms = round(_p50_ms(tried, queries[:TIMED], k), 4)
                kept = tried.with_break_even() if isinstance(tried, Approximate) else tried
                row = Measured(kind, kept.settings, round(share, 5), p50_ms, size)
                yield row, kept
                if row.recall >= recall:
                    break


def balance_of(queries: Float, columns: int) -> list[float]:
    """Return a factor for each of the last `columns` components: the largest weight that it has in a query.

    Item vectors are multiplied by the factors, and queries are divided by them. The inner products stay, and the norms of the items
    become similar, which graphs of neighbours need.
    """
    largest = np.abs(queries[:, -columns:]).max(axis=0).astype(np.float64)
    largest[0] += POPULARITY_SCALE
    return np.maximum(largest, LEAST_FACTOR).tolist()  # type: ignore[no-any-return]


def sample_queries(bundle: Bundle, seed: int) -> Float:
    """Return vectors of random users with a history, with popularity bias 0. Without any, use the first user row."""
    lengths = np.diff(bundle.dataset.events.offsets)
    known = np.flatnonzero(lengths > 0)
    known = known if len(known) else np.array([1])
    chosen = np.sort(np.random.default_rng(seed).choice(known, min(USERS, len(known)), replace=False))
    queries = bundle.dataset.histories(chosen, np.full(len(chosen), bundle.moment_s))
    return bundle.query_vectors(queries, np.zeros(len(chosen), np.float32)).numpy()


def _p50_ms(index: Index, queries: Float, k: int) -> float:
    taken = []
    with one_thread():
        for query in [*queries[:WARMING], *queries]:
            began = time.perf_counter()
            index.search(query[None], k)
            taken.append(time.perf_counter() - began)
    return float(1000 * np.median(taken[WARMING:] or taken))


def _write(bundle: Bundle, row: Measured, index: Index, k: int, users: int) -> None:
    """Replace the bundle by one with this index."""
    with atomic_replace(bundle.path) as folder:
        shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / INDEX, ignore_errors=True)
        index.save(folder / INDEX)
        record = IndexRecord(**asdict(row), k=k, users=users)
        write_manifest(folder, bundle.manifest.model_copy(update={"index": record}))
        if read_manifest(bundle.path).get("seal") != bundle.manifest.seal:
            raise DataError(f"{bundle.path} was changed by another process meanwhile. Nothing was written. Run the command again.")
