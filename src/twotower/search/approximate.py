"""Provide the base class of approximate indexes, and the int8 index.

A subclass proposes more candidates than requested, and the original vectors give their exact scores. The search itself applies the
filter. If few items are allowed, an exact scan of them is cheaper than a search. The break-even point (`exact_scan_below`) is
measured when the index is built.

The exact scan is also used in two other cases: the search returns too few candidates, or the filter is anti-correlated with the
query, so the approximate search missed candidates. The second case is detected with a sample of all items: far more of them score
above the worst item found than a filter independent of the query would explain.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from twotower.errors import DataError, nearest
from twotower.retriever import Recommendations
from twotower.schema import FIRST_ROW
from twotower.search.index import BLOCK, BLOCK_BYTES, GATHER_BELOW, ExactIndex, Index, joined, part_of
from twotower.search.topk import Ragged, top_k
from twotower.utils.array_files import open_arrays, write_arrays
from twotower.utils.types import Float, Int, Mask

_SAMPLE = 4096  # sampled items that estimate the rank of a score
_PROBES = 32  # searches that measure the break-even
_PROBE_K = 100
_EVERY = 10  # each measured scan reads every tenth item
LEAST_FACTOR = 1e-9  # of "balance"
_PORTION = 2**16  # vectors that a structure receives at a time
_SPREAD = 4096  # int8 vectors converted to floats at a time: they stay in the CPU cache

_SHARED: dict[str, Any] = {"exact_scan_below": 0, "balance": []}


class Approximate(Index):
    """Base class of indexes that propose candidates and score them exactly.

    Parameters
    ----------
    structure
        Search structure that a subclass built.
    settings
        In addition to those of the subclass: "rescore_factor" (candidates scored exactly, as a multiple of k), "ef_search" or
        "nprobe" (search width, if the kind has one), "exact_scan_below" (allowed items that an exact scan reads in the time of one
        search), and "balance" (factors of the last components of the vectors in the structure). Queries are divided by the factors,
        so that a component with a small weight in queries does not dominate the distance between items.
    """

    DEFAULTS: ClassVar[dict[str, Any]]
    LOOKS_EVERYWHERE: ClassVar[bool] = True

    def __init__(self, vectors: Tensor, structure: Any, settings: dict[str, Any]) -> None:
        super().__init__(vectors.detach().float().cpu().contiguous(), settings)
        self.structure, self.exact = structure, ExactIndex(self.vectors)
        self._moved = np.zeros(0, np.int64)  # candidates of every query, besides those of the structure
        rows = np.linspace(FIRST_ROW, len(vectors) - 1, min(_SAMPLE, len(vectors)), dtype=np.int64)
        self._sample = self.vectors.numpy()[rows]

    @classmethod
    def build(cls, vectors: Tensor, **settings: Any) -> Index:
        """See `Index`. "exact_scan_below" is measured if it is not given."""
        chosen = cls.DEFAULTS | _SHARED | settings
        for name, value in settings.items():
            if name not in cls.DEFAULTS and name not in _SHARED:
                raise DataError(f"Unknown setting {name!r} of index {cls.kind}.{nearest(name, [*cls.DEFAULTS, *_SHARED])}")
            if name == "balance":
                if not isinstance(value, list) or not all(type(one) in (int, float) and one >= LEAST_FACTOR for one in value):
                    raise DataError(
                        f"Index setting {name} is {value!r}. It must be a list of numbers of at least {LEAST_FACTOR:g}."
                    )
                continue
            least = 0 if name == "exact_scan_below" else 1
            if type(value) not in (int, float) or not value >= least:
                raise DataError(f"Index setting {name} is {value!r}. It must be a number, at least {least:g}.")
        plain = vectors.detach().float().cpu().contiguous()
        index = cls(plain, cls._structure(plain.numpy()[FIRST_ROW:], chosen), chosen)
        return index if "exact_scan_below" in settings else index.with_break_even()

    def changed(self, **settings: Any) -> Approximate:
        """Return an index with the same structure and other search settings, e.g. `rescore_factor`, `exact_scan_below`."""
        return type(self)(self.vectors, self.structure, self.settings | settings)

    def with_vectors(self, vectors: Tensor, moved: Int) -> Approximate:
        """See `Index`."""
        other = type(self)(vectors, self.structure, self.settings)
        other._moved = moved
        return other

    def with_break_even(self) -> Approximate:
        """Return the same index with "exact_scan_below" measured again."""
        return self.changed(exact_scan_below=self._break_even())

    def search(
        self, queries: Tensor | Float, k: int, *, exclude: Ragged | None = None, allow: Mask | None = None
    ) -> Recommendations:
        """See `Index`."""
        given = queries.detach().float().cpu().numpy() if isinstance(queries, Tensor) else queries
        given = np.ascontiguousarray(given, np.float32)
        step = 1 if allow is not None and allow.ndim == 2 else max(1, min(BLOCK, BLOCK_BYTES // (4 * len(self.vectors))))
        found = []
        for start in range(0, len(given), step):
            stop = min(start + step, len(given))
            allowed = allow[start] if allow is not None and allow.ndim == 2 else allow
            found.append(self._portion(given[start:stop], k, part_of(exclude, start, stop), allowed))
        return joined(found, k)

    def _portion(self, queries: Float, k: int, exclude: Ragged | None, allow: Mask | None) -> Recommendations:
        total = max(len(self.vectors) - FIRST_ROW, 1)
        allowed = total if allow is None else int(np.count_nonzero(allow[FIRST_ROW:]))
        longest = 0 if exclude is None else int(np.diff(exclude[0]).max(initial=0))
        fetch = int(k * self.settings["rescore_factor"]) + 8 + longest
        effort = self._effort(fetch, max(allowed, 1) / total)
        if allowed <= fetch or self._scan_is_cheaper(allowed, effort, filtered=allow is not None):
            return self.exact.search(queries, k, exclude=exclude, allow=allow)
        found, moved = [], self._moved if allow is None else self._moved[allow[self._moved]]
        for b, rows in enumerate(
            self._candidates(balanced(queries, [1 / one for one in self.settings["balance"]]), fetch, effort, allow)
        ):
            whole, rows = bool((rows >= FIRST_ROW).all()), np.union1d(rows[rows >= FIRST_ROW], moved)
            banned = part_of(exclude, b, b + 1)
            rows = rows if banned is None or not len(banned[1]) else rows[~np.isin(rows, banned[1])]
            best = self.exact.among(queries[b], rows, k) if whole and len(rows) >= k else None
            if best is None or (allow is not None and self._lost(queries[b], best, total / allowed)):
                best = self.exact.search(queries[b : b + 1], k, exclude=banned, allow=allow)
            found.append(best)
        return joined(found, k)

    def _scan_is_cheaper(self, allowed: int, effort: float, *, filtered: bool) -> bool:
        """Return True if the exact scan of `allowed` items is faster than a search of this effort."""
        if self.LOOKS_EVERYWHERE and not filtered:
            return False  # these indexes also save memory
        read = min(allowed, GATHER_BELOW * len(self.vectors))  # beyond that, all vectors are read in order at the same cost
        return bool(read <= self.settings["exact_scan_below"] * effort / self._effort(0, 1.0))

    def _lost(self, query: Float, found: Recommendations, rarity: float) -> bool:
        """Return True if the search missed candidates: the worst result ranks much lower than with a random filter.

        `rarity` is the number of all items per allowed item.
        """
        if self.LOOKS_EVERYWHERE:
            return False
        above = np.count_nonzero(self._sample @ query > found.scores[0, -1])
        expected = found.items.shape[1] * rarity * len(self._sample) / len(self.vectors)
        return bool(above > 2 * expected + 3)

    def _effort(self, fetch: int, share: float) -> float:  # noqa: ARG002 - constant if every item is scored
        """Return the search width that keeps the recall for `fetch` candidates and a filter that allows `share` of the items.

        The unit is that of "ef_search" or "nprobe".
        """
        return 1.0

    @classmethod
    @abstractmethod
    def _structure(cls, vectors: Float, settings: dict[str, Any]) -> Any:
        """Build the structure over vectors float32 [n, D] of rows 2, 3, …, see `portions`; may complete `settings`."""

    @abstractmethod
    def _candidates(self, queries: Float, fetch: int, effort: float, allow: Mask | None) -> Int:
        """Return item rows int64 [B, fetch] of allowed candidates, padded with -1."""

    def _break_even(self) -> int:
        """Measure the number of items that an exact scan reads and scores in the time of one search."""
        total, always = len(self.vectors), self.changed(exact_scan_below=0)
        searches, scans = [], []
        with one_thread():
            for number, row in enumerate(np.linspace(FIRST_ROW, total - 1, _PROBES).astype(np.int64)):
                probe = self.vectors.numpy()[row]
                some = np.arange(
                    FIRST_ROW + number % _EVERY, total, _EVERY
                )  # different items each time, so that they are not in the CPU cache
                searches.append(_seconds(partial(always.search, probe[None], _PROBE_K)))
                scans.append(_seconds(partial(self.exact.among, probe, some, _PROBE_K)) / max(len(some), 1))
        return int(np.median(searches) / np.median(scans))


class Int8Index(Approximate):
    """Scores all items with 8-bit vectors: a quarter of the memory. Needs only NumPy and PyTorch."""

    kind = "int8"
    DEFAULTS: ClassVar[dict[str, Any]] = {"rescore_factor": 1.5}

    @classmethod
    def _structure(cls, vectors: Float, settings: dict[str, Any]) -> Any:
        codes, scale = np.empty(vectors.shape, np.int8), np.empty(len(vectors), np.float32)
        for start, part in portions(vectors, settings["balance"]):
            largest = np.maximum(np.abs(part).max(axis=1, initial=0.0), 1e-30) / 127
            codes[start : start + len(part)] = np.rint(part / largest[:, None])
            scale[start : start + len(part)] = largest
        return {"codes": codes, "scale": scale}

    def _candidates(self, queries: Float, fetch: int, effort: float, allow: Mask | None) -> Int:  # noqa: ARG002
        codes, scale, users = torch.from_numpy(self.structure["codes"]), self.structure["scale"], torch.from_numpy(queries)
        scores = np.full((len(queries), len(self.vectors)), -np.inf, np.float32)
        for start in range(0, len(codes), _SPREAD):
            product = torch.matmul(codes[start : start + _SPREAD].float(), users.T).numpy()  # [_SPREAD, B]
            scores[:, FIRST_ROW + start : FIRST_ROW + start + len(product)] = (product * scale[start : start + _SPREAD, None]).T
        return top_k(scores, fetch, allow=allow).items

    @property
    def nbytes(self) -> int:
        """See `Index`."""
        return int(self.structure["codes"].nbytes + self.structure["scale"].nbytes)

    def save(self, folder: Path) -> None:
        """See `Index`."""
        super().save(folder)
        write_arrays(folder / "codes.safetensors", self.structure)

    @classmethod
    def load(cls, folder: Path, vectors: Tensor) -> Int8Index:
        """See `Index`."""
        settings = cls._read(folder, vectors)
        try:
            structure = open_arrays(folder / "codes.safetensors", writable=True)
            fits = structure["codes"].shape == (len(vectors) - FIRST_ROW, vectors.shape[1]) and structure["codes"].dtype == np.int8
            fits = fits and structure["scale"].shape == (len(vectors) - FIRST_ROW,)
        except (DataError, KeyError):
            fits = False
        if not fits:
            raise DataError(f"The index file {folder}/codes.safetensors is damaged. Run `twotower tune-index` again.")
        return cls(vectors, structure, settings)


def balanced(vectors: Float, factors: list[float]) -> Float:
    """Return the vectors with their last components multiplied by `factors`."""
    if not factors:
        return vectors
    changed: Float = vectors.copy()
    changed[:, -len(factors) :] *= np.array(factors, np.float32)
    return changed


def portions(vectors: Float, factors: list[float]) -> Iterator[tuple[int, Float]]:
    """Yield the vectors, balanced by `factors`, in blocks, each with the number of its first vector.

    Vectors may be a memory map that is larger than the memory, so no structure copies all of them.
    """
    for start in range(0, len(vectors), _PORTION):
        yield start, balanced(vectors[start : start + _PORTION], factors)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
