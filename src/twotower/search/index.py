"""Define the index interface, a search for the items with the largest inner product with a query, and the exact index.

For every index: scores are exact inner products; ties go to the lower row; the rows PAD and UNKNOWN are never returned. Excluded
items and items that are not allowed are left out before the top-k selection, so `k` items are returned if `k` exist. An approximate
index may miss some of the best items; the exact index does not.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from twotower.errors import DataError
from twotower.retriever import Recommendations
from twotower.schema import FIRST_ROW
from twotower.search.filters.item_filter import ResolvedFilter
from twotower.search.topk import Ragged, top_k, top_k_among
from twotower.utils.types import Float, Int, Mask

BLOCK = 256  # queries scored at once
BLOCK_BYTES = 2**28  # bytes of scores at once
COLUMN_SCAN_MAX_QUERIES = 32
"""On a CPU, up to this many queries read the vectors column by column: half the time of reading rows."""
COLUMN_SCAN_MAX_BYTES = 2**30  # larger vectors are read by row, because columns are a copy in memory
GATHER_BELOW = 0.4  # below this share of allowed items, gathering their vectors is faster than reading all
GATHER_BELOW_SHARED = 0.1  # the same for several queries, which share the reading of all vectors
_GATHER = 2048  # vectors gathered at a time: they stay in the CPU cache
_FILE = "index.json"


class Index(ABC):
    """Vectors float32 [n_item_rows, D] of all item rows, with an optional structure for faster search.

    Attributes
    ----------
    kind
        Name of the class in `INDEXES`.
    settings
        Build and search settings.
    reads_filters
        True if the index reads the filters themselves (`with_filters`), and not only the masks that are made from them.
    """

    kind: ClassVar[str]
    reads_filters: ClassVar[bool] = False

    def __init__(self, vectors: Tensor, settings: dict[str, Any]) -> None:
        self.vectors, self.settings = vectors, settings

    @classmethod
    @abstractmethod
    def build(cls, vectors: Tensor, **settings: Any) -> Index:
        """Build an index over the vectors.

        Raises
        ------
        DataError
            A setting is unknown or out of range, or there are too few vectors for this kind.
        """

    @abstractmethod
    def search(
        self, queries: Tensor | Float, k: int, *, exclude: Ragged | None = None, allow: Mask | None = None
    ) -> Recommendations:
        """Return the `k` items with the largest inner product with each query float32 [B, D].

        Parameters
        ----------
        exclude
            Ragged item rows (offsets [B + 1], rows [T]) to exclude per query.
        allow
            bool [n_item_rows] or [B, n_item_rows]: False excludes an item.
        """

    @abstractmethod
    def with_vectors(self, vectors: Tensor, moved: Int) -> Index:
        """Return an index over changed vectors of the same items.

        An approximate index keeps its structure: its candidates are those of the vectors that it was built from and `moved`. Their
        scores are those of the new vectors.

        Parameters
        ----------
        moved
            int64 [m]: rows of the items whose vectors have changed most.
        """

    def with_filters(self, filters: Sequence[ResolvedFilter | None]) -> Index:  # noqa: ARG002
        """Return the index for searches of queries with these filters, whose masks are passed as `allow`."""
        return self

    @property
    def problem(self) -> str | None:
        """Return why the index cannot be searched now; None if it can."""
        return None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes that a search scans. An approximate index also reads the vectors of its candidates."""

    def save(self, folder: Path) -> None:
        """Write the settings and the structure, without the vectors, to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        shape = list(self.vectors.shape)
        (folder / _FILE).write_text(json.dumps({"kind": self.kind, "settings": self.settings, "shape": shape}, indent=1))

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, vectors: Tensor) -> Index:
        """Read the index that `save` wrote; `vectors` must be those it was built from.

        Raises
        ------
        DataError
            The folder has no index of this kind, or one of other vectors.
        """

    @classmethod
    def _read(cls, folder: Path, vectors: Tensor) -> dict[str, Any]:
        found = read_about(folder)
        if found["kind"] != cls.kind or found["shape"] != list(vectors.shape):
            raise DataError(
                f"The index in {folder} does not match the vectors: it is {found['kind']} of shape {found['shape']}, "
                f"expected {cls.kind} of shape {list(vectors.shape)}. Run `twotower tune-index` again."
            )
        settings: dict[str, Any] = found["settings"]
        return settings


class ExactIndex(Index):
    """Scores all items, in bounded memory. A single query with a narrow filter scores only the allowed items."""

    kind = "exact"

    def __init__(self, vectors: Tensor) -> None:
        super().__init__(vectors, {})
        plain = vectors.device.type == "cpu" and vectors.dtype == torch.float32
        self._matrix: Float | None = vectors.detach().numpy() if plain else None

    @cached_property
    def _columns(self) -> Float:
        """Return a transposed copy of the vectors, float32 [D, n_item_rows]. It is made only for searches of few queries."""
        assert self._matrix is not None
        return np.ascontiguousarray(self._matrix.T)

    @classmethod
    def build(cls, vectors: Tensor, **settings: Any) -> ExactIndex:
        """See `Index`; there are no settings."""
        if settings:
            raise DataError(f"Unknown settings of an exact index: {', '.join(settings)}. It has no settings.")
        return cls(vectors)

    def with_vectors(self, vectors: Tensor, moved: Int) -> ExactIndex:  # noqa: ARG002
        """See `Index`."""
        return ExactIndex(vectors)

    def search(
        self, queries: Tensor | Float, k: int, *, exclude: Ragged | None = None, allow: Mask | None = None
    ) -> Recommendations:
        """See `Index`."""
        given = (queries if isinstance(queries, Tensor) else torch.from_numpy(queries)).to(self.vectors.device)
        share = 1.0 if allow is None else np.count_nonzero(allow) / max(allow.size, 1)
        plain = self._matrix is not None
        alone = plain and share < (GATHER_BELOW if len(given) == 1 else GATHER_BELOW_SHARED)
        step = 1 if alone else max(1, min(BLOCK, BLOCK_BYTES // (4 * max(len(self.vectors), 1))))
        found, scratch = [], None
        for start in range(0, len(given), step):
            stop = min(start + step, len(given))
            allowed = allow[start:stop] if allow is not None and allow.ndim == 2 else allow
            excluded = part_of(exclude, start, stop)
            if alone:
                assert allowed is not None
                found.append(self._one(given[start].float().numpy(), k, excluded, allowed.reshape(-1)))
            else:
                part = given[start:stop].detach()
                if plain and len(part) <= COLUMN_SCAN_MAX_QUERIES and self.nbytes <= COLUMN_SCAN_MAX_BYTES:
                    scores = _in_eights(part.float().numpy()) @ self._columns
                    scores = scores[: len(part)]
                else:
                    with torch.inference_mode():
                        if scratch is None:  # allocated once: a new matrix costs as much as the top-k selection
                            scratch = self.vectors.new_empty(len(part), len(self.vectors))
                        product = torch.mm(part, self.vectors.T, out=scratch[: len(part)]).float()
                        if not plain:  # on a GPU the scores stay there
                            found.append(top_k(product, k, exclude=excluded, allow=allowed))
                            continue
                        scores = product.numpy()
                found.append(top_k(scores, k, exclude=excluded, allow=allowed))
        return joined(found, k)

    def _one(self, query: Float, k: int, exclude: Ragged | None, allow: Mask) -> Recommendations:
        """Search one query among the allowed items."""
        kept = allow.copy()
        kept[:FIRST_ROW] = False
        if exclude is not None:
            kept[exclude[1]] = False
        return self.among(query, np.flatnonzero(kept), k)

    def among(self, query: Float, rows: Int, k: int) -> Recommendations:
        """Return the `k` best of the candidates `rows` int64 [C], ascending, for one query float32 [D]. CPU only."""
        assert self._matrix is not None
        scores = np.empty(len(rows), np.float32)
        buffer = np.empty((min(_GATHER, len(rows)), self._matrix.shape[1]), np.float32)
        for start in range(0, len(rows), _GATHER):
            part = rows[start : start + _GATHER]
            # mode="clip" writes to `out` without a buffer; all rows are valid.
            np.matmul(
                np.take(self._matrix, part, axis=0, out=buffer[: len(part)], mode="clip"),
                query,
                out=scores[start : start + _GATHER],
            )
        return top_k_among(scores, rows, k)

    @property
    def nbytes(self) -> int:
        """See `Index`."""
        return self.vectors.numel() * self.vectors.element_size()

    @classmethod
    def load(cls, folder: Path, vectors: Tensor) -> ExactIndex:
        """See `Index`."""
        cls._read(folder, vectors)
        return cls(vectors)


def _in_eights(queries: Float) -> Float:
    """Return several queries padded with zeros to a multiple of 8: OpenBLAS multiplies 8 rows faster than 6."""
    rows = -(-len(queries) // 8) * 8 if len(queries) > 1 else len(queries)
    return np.concatenate([queries, np.zeros((rows - len(queries), queries.shape[1]), np.float32)])


def read_about(folder: Path) -> dict[str, Any]:
    """Return "kind", "settings" and "shape" of the index in `folder`.

    Raises
    ------
    DataError
        The folder has no index.
    """
    try:
        found = json.loads((folder / _FILE).read_text())
        return {"kind": str(found["kind"]), "settings": dict(found["settings"]), "shape": list(found["shape"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder} is not an index: it has no valid {_FILE}. Run `twotower tune-index`.") from None


def joined(parts: Sequence[Recommendations], k: int) -> Recommendations:
    """Return the lists of several parts of a batch as one."""
    if not parts:
        return Recommendations(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
    items: list[Int] = [part.items for part in parts]
    return Recommendations(np.concatenate(items), np.concatenate([part.scores for part in parts]))


def part_of(ragged: Ragged | None, start: int, stop: int) -> Ragged | None:
    """Return the ragged rows of the queries from `start` to `stop`."""
    if ragged is None:
        return None
    offsets, rows = ragged[0][start : stop + 1], ragged[1]
    return offsets - offsets[0], rows[offsets[0] : offsets[-1]]
