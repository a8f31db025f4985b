"""List all index kinds by name, and load and rebuild indexes."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from twotower.errors import DataError, nearest
from twotower.search.approximate import Int8Index
from twotower.search.faiss_indexes import HnswIndex, IvfPqIndex, ScalarIndex
from twotower.search.index import ExactIndex, Index, read_about
from twotower.utils.registry import Registry

INDEXES: Registry[type[Index]] = Registry(
    "index", {kind.kind: kind for kind in (ExactIndex, Int8Index, ScalarIndex, HnswIndex, IvfPqIndex)}
)


def load_index(folder: Path, vectors: Tensor) -> Index:
    """Load the index that `Index.save` wrote to `folder`, of any kind; `vectors` must be those it was built from.

    Raises
    ------
    DataError
        The folder has no index, its kind is unknown, it is damaged, has other vectors, or needs FAISS, which is not installed.
    """
    kind = read_about(folder)["kind"]
    if kind not in INDEXES:
        raise DataError(f"Unknown index {kind!r} in {folder}.{nearest(kind, INDEXES)}")
    return INDEXES[kind].load(folder, vectors)


def renew_index(folder: Path, vectors: Tensor) -> None:
    """Rebuild the index in `folder`, if there is one, with the same settings for new vectors."""
    if folder.is_dir():
        about = read_about(folder)
        index = INDEXES[about["kind"]].build(vectors, **about["settings"])
        shutil.rmtree(folder)
        index.save(folder)
