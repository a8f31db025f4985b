"""Checkpoints: everything a resumed run needs, in one file, written whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from twotower.errors import TrainingError
from twotower.schema import FORMAT_VERSION
from twotower.utils.atomic_files import atomic_file


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`, atomically: beside it first, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as beside, beside.open("wb") as file:
            torch.save({"format": FORMAT_VERSION, **state}, file)
    except (OSError, RuntimeError) as error:
        # PyTorch's writer, closing what it could not write, hides the reason behind an error of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise TrainingError(
            f"A checkpoint must fit on the disk. {path}: {cause.strerror}. The one before is untouched; free some space."
        ) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; runs no code from the file (`weights_only`).

    Raises
    ------
    TrainingError
        There is none, it cannot be read, or its format is another.
    """
    if not path.is_file():
        raise TrainingError(f"A checkpoint must be there. Found none at {path}. Train first (without --resume), or check the path.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError):
        raise TrainingError(
            f"The checkpoint must be readable. {path} is damaged. Use the other one of last.pt and best.pt."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise TrainingError(f"The checkpoint must have format {FORMAT_VERSION}. {path} has another. Train again.")
    return dict(state)
