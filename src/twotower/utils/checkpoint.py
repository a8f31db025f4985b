"""Save and load checkpoints: one file with everything that a resumed run needs, written atomically."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from twotower.errors import TrainingError
from twotower.schema import FORMAT_VERSION
from twotower.utils.atomic_files import atomic_file


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path` atomically.

    Raises
    ------
    TrainingError
        The file cannot be written, for example because the disk is full; an older checkpoint at `path` is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as beside, beside.open("wb") as file:
            torch.save({"format": FORMAT_VERSION, **state}, file)
    except (OSError, RuntimeError) as error:
        # When closing fails, PyTorch's writer raises an error of its own; the cause is its context.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise TrainingError(
            f"Cannot write the checkpoint {path}: {cause.strerror}. The previous checkpoint is intact. Free some space."
        ) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint, without executing code from the file (`weights_only`).

    Raises
    ------
    TrainingError
        The file is missing, damaged, or of another format version.
    """
    if not path.is_file():
        raise TrainingError(f"No checkpoint at {path}. Train first (without --resume), or check the path.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError):
        raise TrainingError(f"The checkpoint {path} is damaged. Use the other one of last.pt and best.pt.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise TrainingError(f"The checkpoint {path} has another format, expected {FORMAT_VERSION}. Train again.")
    return dict(state)
