"""Search vectors that are in Milvus, under filters that become its expressions.

Milvus proposes candidates, and the vectors of this process score them exactly. Every candidate is checked against the mask of the
filter, so what an expression cannot say is left out here. Then more candidates are asked for, and at last the vectors of this
process are scanned. So `k` items are returned whenever `k` items are allowed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from twotower.errors import DataError
from twotower.retriever import Recommendations
from twotower.schema import FIRST_ROW
from twotower.search.approximate import balanced
from twotower.search.filters.item_filter import ResolvedFilter
from twotower.search.filters.milvus_expression import MAX_ROWS, StoredColumns, rows_expression
from twotower.search.index import ExactIndex, Index, joined
from twotower.search.milvus_store import LIMIT, MilvusStore
from twotower.search.topk import Ragged
from twotower.utils.types import Float, Int, Mask

EXTRA = 8  # candidates beyond k, among them ties
WIDEN = 8  # times as many candidates, if too few of them were allowed
EF, MAX_EF = 512, 32_768  # default and largest width of the search
TOGETHER = 32  # queries that share a deadline


class MilvusIndex(Index):
    """Vectors of one collection of Milvus; `vectors` are the same ones in this process.

    Parameters
    ----------
    collection
        Name of the collection, which never changes: a new version has another one.
    columns
        The columns that the collection stores.
    balance
        Factors of the last components in the collection; see `Approximate`.
    ef
        Width of the search in the graph (HNSW); at least the number of items makes it exact.
    """

    kind = "milvus"
    reads_filters: ClassVar[bool] = True

    def __init__(
        self, vectors: Tensor, store: MilvusStore, collection: str, columns: StoredColumns, *, balance: list[float], ef: int
    ) -> None:
        super().__init__(vectors.detach().float().cpu().contiguous(), {"ef": ef, "balance": balance})
        self.store, self.collection, self._columns = store, collection, columns
        self.exact = ExactIndex(self.vectors)
        self._moved = np.zeros(0, np.int64)
        self._filters: Sequence[ResolvedFilter | None] = ()

    @classmethod
    def build(cls, vectors: Tensor, **settings: Any) -> Index:  # noqa: ARG003
        """See `Index`; `twotower publish` writes the collection."""
        raise DataError("An index of Milvus is not built here. Write it with `twotower publish`.")

    @classmethod
    def load(cls, folder: Path, vectors: Tensor) -> Index:  # noqa: ARG003
        """See `Index`; a bundle does not hold it."""
        raise DataError(f"{folder} cannot hold an index of Milvus. Use `twotower serve --index`.")

    def with_vectors(self, vectors: Tensor, moved: Int) -> MilvusIndex:
        """See `Index`."""
        other = copy(self)
        other.vectors = vectors.detach().float().cpu().contiguous()
        other.exact, other._moved = ExactIndex(other.vectors), moved
        return other

    def with_filters(self, filters: Sequence[ResolvedFilter | None]) -> MilvusIndex:
        """See `Index`."""
        other = copy(self)
        other._filters = filters
        return other

    @property
    def nbytes(self) -> int:
        """See `Index`: the vectors that Milvus holds."""
        return self.vectors.numel() * 4

    @property
    def problem(self) -> str | None:
        """See `Index`."""
        return self.store.problem

    def search(
        self, queries: Tensor | Float, k: int, *, exclude: Ragged | None = None, allow: Mask | None = None
    ) -> Recommendations:
        """See `Index`.

        Raises
        ------
        BusyError
            Milvus does not respond.
        """
        given = queries.detach().float().cpu().numpy() if isinstance(queries, Tensor) else queries
        given = np.ascontiguousarray(given, np.float32)
        parts = [range(start, min(start + TOGETHER, len(given))) for start in range(0, len(given), TOGETHER)]
        return joined([self._part(given, part, k, exclude, allow) for part in parts], k)

    def _part(self, given: Float, queries: range, k: int, exclude: Ragged | None, allow: Mask | None) -> Recommendations:
        """Search some of the queries, which have a deadline together."""
        deadline = time.monotonic() + self.store.search_s
        wanted = [_Wanted(self, b, k, exclude, allow) for b in queries]
        rows: dict[int, Int] = {one.b: np.zeros(0, np.int64) for one in wanted}
        waiting = [one for one in wanted if one.count]
        while waiting:
            self._ask(given, waiting, rows, deadline)
            waiting = [one for one in waiting if len(rows[one.b]) < one.count and one.widen()]
        return joined([self._ranked(given, one, rows[one.b], k) for one in wanted], k)

    def _ask(self, given: Float, waiting: list[_Wanted], rows: dict[int, Int], deadline: float) -> None:
        """Ask for candidates, together where the expressions are the same."""
        asked = balanced(given, [1 / one for one in self.settings["balance"]])
        groups = defaultdict(list)
        for one in waiting:
            groups[one.expression].append(one)
        for expression, members in groups.items():
            limit = max(one.fetch for one in members)
            share = min(one.share for one in members)  # the search keeps the `ef` nearest items; only a share of them is allowed
            ef = int(min(max(self.settings["ef"], limit) / share, MAX_EF))
            vectors = asked[[one.b for one in members]].tolist()
            found = self.store.search(self.collection, vectors, limit, expression, ef, deadline)
            for one, hits in zip(members, found, strict=True):
                rows[one.b] = one.kept(np.union1d(np.array(hits, np.int64), self._moved))

    def _ranked(self, given: Float, one: _Wanted, rows: Int, k: int) -> Recommendations:
        if len(rows) < one.count:
            return self.exact.search(given[one.b : one.b + 1], k, exclude=one.exclude, allow=one.allow)
        return self.exact.among(given[one.b], rows, k)

    def expression(self, b: int, allow: Mask | None) -> str:
        """Return the expression of query `b`: the allowed rows themselves if they, or the others, are few; else its filter."""
        if allow is None:
            return ""
        allowed = np.flatnonzero(allow[FIRST_ROW:]) + FIRST_ROW
        if len(allowed) <= MAX_ROWS:
            return rows_expression(allowed.tolist()) or ""
        if len(allow) - FIRST_ROW - len(allowed) <= MAX_ROWS:
            return rows_expression((np.flatnonzero(~allow[FIRST_ROW:]) + FIRST_ROW).tolist(), holds=False) or ""
        filter_ = self._filters[b] if b < len(self._filters) else None
        return "" if filter_ is None else self._columns.expression(filter_)


class _Wanted:
    """What one query of a search wants.

    Attributes
    ----------
    count
        Number of items that the list can have.
    share
        Share of the items that are allowed.
    fetch
        Number of candidates to ask for.
    """

    def __init__(self, index: MilvusIndex, b: int, k: int, exclude: Ragged | None, allow: Mask | None) -> None:
        self.b, self.allow = b, allow[b] if allow is not None and allow.ndim == 2 else allow
        left_out = np.zeros(0, np.int64) if exclude is None else np.unique(exclude[1][exclude[0][b] : exclude[0][b + 1]])
        self._left_out = left_out[left_out >= FIRST_ROW]
        self.exclude = None if exclude is None else (np.array([0, len(self._left_out)]), self._left_out)
        total = len(index.vectors) - FIRST_ROW if self.allow is None else int(np.count_nonzero(self.allow[FIRST_ROW:]))
        banned = len(self._left_out) if self.allow is None else int(np.count_nonzero(self.allow[self._left_out]))
        self.count = max(min(k, total - banned), 0)
        self.share = max(total, 1) / max(len(index.vectors) - FIRST_ROW, 1)
        self.fetch = min(k + EXTRA + len(self._left_out), LIMIT)
        self.expression = index.expression(b, self.allow) if self.count else ""

    def kept(self, rows: Int) -> Int:
        """Return the candidates that are allowed, ascending."""
        rows = rows[rows >= FIRST_ROW]
        rows = rows if self.allow is None else rows[self.allow[rows]]
        return rows[~np.isin(rows, self._left_out)]

    def widen(self) -> bool:
        """Ask for more candidates next time. Return False if that was the largest number."""
        if self.fetch >= LIMIT:
            return False
        self.fetch = min(WIDEN * self.fetch, LIMIT)
        return True
