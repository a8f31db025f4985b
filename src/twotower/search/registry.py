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
"""The kinds of index by name. `register_index` adds one.

Examples
--------
>>> sorted(INDEXES)
['exact', 'hnsw', 'int8', 'ivfpq', 'sq']
"""


def load_index(folder: Path, vectors: Tensor) -> Index:
    """Load the index of any kind that `Index.save` wrote to `folder`.

    Parameters
    ----------
    folder
        Folder of the index.
    vectors
        float32 [n_item_rows, D]: the vectors that the index was built from.

    Raises
    ------
    DataError
        The folder has no index, or the index is damaged, has an unknown kind or other vectors, or needs FAISS, which is not
        installed.

    Examples
    --------
    >>> import tempfile, torch
    >>> vectors = torch.eye(4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ExactIndex.build(vectors).save(Path(folder) / "index")
    ...     load_index(Path(folder) / "index", vectors).kind
    'exact'
    """
    kind = read_about(folder)["kind"]
    if kind not in INDEXES:
        raise DataError(f"Unknown index {kind!r} in {folder}.{nearest(kind, INDEXES)}")
    return INDEXES[kind].load(folder, vectors)


def renew_index(folder: Path, vectors: Tensor) -> None:
    """Rebuild the index in `folder` from new vectors, with the same kind and settings. Without an index, do nothing.

    Parameters
    ----------
    folder
        Folder of the index; its files are replaced.
    vectors
        float32 [n_item_rows, D]: the new vectors.

    Raises
    ------
    DataError
        The description of the index cannot be read.
    """
    if folder.is_dir():
        about = read_about(folder)
        index = INDEXES[about["kind"]].build(vectors, **about["settings"])
        shutil.rmtree(folder)
        index.save(folder)
