"""Two-tower retrieval: from raw files to recommendations that were judged on the whole catalogue.

import twotower
recommender = twotower.load("runs/town/bundle")
recommender.recommend(history=["b_17", "b_230"], k=10)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twotower.retrieval.recommender import Recommender

    __version__: str

__all__ = ["__version__", "load"]

# Large pages for large tensors on Linux; PyTorch reads it once. Random rows of a long table then miss less (benchmarks/tables.py).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def load(bundle: str | Path) -> Recommender:
    """Open a bundle that answers; see `Recommender`.

    Raises
    ------
    DataError
        There is none, or it is not as it was written.
    """
    from twotower.retrieval.recommender import Recommender  # PyTorch loads with it: `import twotower` stays light

    return Recommender.load(bundle)


if not TYPE_CHECKING:

    def __getattr__(name):
        """Look `__version__` up when it is asked for: reading the installed version takes longer than `import twotower`."""
        if name != "__version__":
            raise AttributeError(f"module 'twotower' has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("two-tower-rec")
        except PackageNotFoundError:  # a source folder that is not installed
            return "unknown"
