"""Provide the FAISS indexes: HNSW, IVF-PQ and scalar quantisation. Only this module uses FAISS.

FAISS is optional. Its C++ code trusts index files: read only files whose hashes a bundle has checked. The metric is always the
inner product, because vectors have one component that is not normalised. An index file is opened as a memory map: its codes, lists
and graph stay on disk, and searches read the pages that they need.
"""

from __future__ import annotations

import importlib
import warnings
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from twotower.errors import DataError
from twotower.schema import FIRST_ROW
from twotower.search.approximate import Approximate, balanced, portions
from twotower.utils.types import Float, Int, Mask

_FILE = "index.faiss"
_CENTROIDS = 256  # centroids of a product quantiser: one byte per code
_TRAINED_ON = 2**16  # vectors that train a quantiser
_PER_LIST = 39  # vectors that train the centroid of a list: the least that FAISS advises
_LANES = 16  # widths that are no multiple of this are compared without SIMD, six times slower


def faiss() -> Any:
    """Import and return FAISS.

    Raises
    ------
    DataError
        FAISS is not installed.
    """
    try:
        with warnings.catch_warnings():  # its SWIG types have no __module__: a warning in Python 3.12
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("faiss")
    except ImportError:
        raise DataError(
            'FAISS is not installed. This index needs it. Run `pip install "two-tower-rec[serve]"`, '
            "or use an exact or int8 index: `twotower tune-index BUNDLE --kinds exact,int8`."
        ) from None


class _Faiss(Approximate):
    def _candidates(self, queries: Float, fetch: int, effort: float, allow: Mask | None) -> Int:
        library, chosen = faiss(), {}
        if allow is not None:
            chosen["sel"] = library.IDSelectorBitmap(np.packbits(allow[FIRST_ROW:], bitorder="little"))
        _, found = self.structure.search(self._padded(queries), fetch, params=self._parameters(library, round(effort), chosen))
        return np.where(found >= 0, found + FIRST_ROW, -1).astype(np.int64)

    def _padded(self, queries: Float) -> Float:
        return _padded(queries, self.structure.d)

    @staticmethod
    def _parameters(library: Any, effort: int, chosen: dict[str, Any]) -> Any:  # noqa: ARG004
        return library.SearchParameters(**chosen)

    @property
    def nbytes(self) -> int:
        """See `Index`."""
        library = faiss()
        sizes: list[int] = []

        def count(part: bytes) -> int:
            sizes.append(len(part))
            return sizes[-1]

        library.write_index(self.structure, library.PyCallbackIOWriter(count))
        return sum(sizes)

    def save(self, folder: Path) -> None:
        """See `Index`."""
        super().save(folder)
        faiss().write_index(self.structure, str(folder / _FILE))

    @classmethod
    def load(cls, folder: Path, vectors: Tensor) -> Any:
        """See `Index`. The caller must have checked the hash of the file."""
        settings, library = cls._read(folder, vectors), faiss()
        try:
            structure = library.read_index(str(folder / _FILE), library.IO_FLAG_MMAP_IFC)
        except RuntimeError:
            structure = None
        if structure is None or structure.ntotal != len(vectors) - FIRST_ROW or structure.d < vectors.shape[1]:
            raise DataError(f"The index file {folder / _FILE} is damaged. Run `twotower tune-index` again.")
        return cls(vectors, structure, settings)


class HnswIndex(_Faiss):
    """HNSW: a graph of neighbours over 8-bit vectors (Malkov and Yashunin, 2018).

    Settings: "M" (neighbours of an item), "ef_construction" (candidates while building), "ef_search" (candidates while searching).
    """

    kind = "hnsw"
    DEFAULTS: ClassVar[dict[str, Any]] = {"M": 16, "ef_construction": 100, "ef_search": 200, "rescore_factor": 1.2}
    LOOKS_EVERYWHERE = False

    @classmethod
    def _structure(cls, vectors: Float, settings: dict[str, Any]) -> Any:
        library = faiss()
        kind, metric = library.ScalarQuantizer.QT_8bit, library.METRIC_INNER_PRODUCT
        index = library.IndexHNSWSQ(_width(vectors, _LANES), kind, int(settings["M"]), metric)
        index.hnsw.efConstruction = int(settings["ef_construction"])
        return _filled(index, vectors, settings["balance"])

    def _effort(self, fetch: int, share: float) -> float:
        # The search keeps the `ef_search` nearest items; only a share of them is allowed.
        return float(max(self.settings["ef_search"], fetch) / share)

    @staticmethod
    def _parameters(library: Any, effort: int, chosen: dict[str, Any]) -> Any:
        return library.SearchParametersHNSW(efSearch=effort, **chosen)


class IvfPqIndex(_Faiss):
    """IVF-PQ: inverted lists by nearest centroid, with product-quantised vectors (Jégou and others, 2011).

    Settings: "nlist" (lists; 0: 4 √n), "dsub" (vector components per byte), "nprobe" (lists searched).
    """

    kind = "ivf_pq"
    DEFAULTS: ClassVar[dict[str, Any]] = {"nlist": 0, "dsub": 2, "nprobe": 32, "rescore_factor": 4.0}
    LOOKS_EVERYWHERE = False

    @classmethod
    def _structure(cls, vectors: Float, settings: dict[str, Any]) -> Any:
        library, size = faiss(), len(vectors)
        if size < _CENTROIDS:
            raise DataError(f"An ivf_pq index of {size} items is not possible: it needs at least {_CENTROIDS}. Use an exact index.")
        settings["nlist"] = min(int(settings["nlist"]) or 4 * isqrt(size), size)
        width = int(settings["dsub"])
        padded = _width(vectors, width)
        coarse = library.IndexFlatIP(padded)
        index = library.IndexIVFPQ(coarse, padded, settings["nlist"], padded // width, 8, library.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # otherwise FAISS prints warnings
        return _filled(index, vectors, settings["balance"], _PER_LIST * settings["nlist"])

    def _effort(self, fetch: int, share: float) -> float:  # noqa: ARG002
        return float(min(self.settings["nprobe"] / max(share, 1e-9), self.settings["nlist"]))

    @staticmethod
    def _parameters(library: Any, effort: int, chosen: dict[str, Any]) -> Any:
        return library.SearchParametersIVF(nprobe=effort, **chosen)


class ScalarIndex(_Faiss):
    """Scores all items with scalar-quantised vectors of "bits" (8, 6 or 4) per component."""

    kind = "sq"
    DEFAULTS: ClassVar[dict[str, Any]] = {"bits": 8, "rescore_factor": 1.2}

    @classmethod
    def _structure(cls, vectors: Float, settings: dict[str, Any]) -> Any:
        library = faiss()
        if settings["bits"] not in (8, 6, 4):
            raise DataError(f"Setting bits of index sq is {settings['bits']}. It must be 8, 6 or 4.")
        kind = getattr(library.ScalarQuantizer, f"QT_{settings['bits']}bit")
        index = library.IndexScalarQuantizer(_width(vectors, _LANES), kind, library.METRIC_INNER_PRODUCT)
        return _filled(index, vectors, settings["balance"])


def _filled(index: Any, vectors: Float, balance: list[float], trained_on: int = 0) -> Any:
    """Train a FAISS index on some of the vectors, `trained_on` of them or more, and add all."""
    some = vectors[:: max(1, len(vectors) // max(trained_on, _TRAINED_ON))]
    index.train(np.ascontiguousarray(_padded(balanced(some, balance), index.d)))
    for _, part in portions(vectors, balance):
        index.add(_padded(part, index.d))
    return index


def _width(vectors: Float, multiple: int) -> int:
    """Return the number of components, rounded up to a multiple."""
    return int(-(-vectors.shape[1] // multiple) * multiple)


def _padded(vectors: Float, width: int) -> Float:
    return vectors if vectors.shape[1] == width else np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))
