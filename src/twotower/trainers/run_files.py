"""What a run writes beside its checkpoints, and how it is read back: rows of figures, and settings side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twotower.errors import TrainingError

CHANGEABLE_ON_RESUME = {
    "training": (
        "memory_budget_gb",
        "micro_batch_size",
        "gradient_checkpointing",
        "checkpoint_every_s",
        "log_every",
        "stop_frac",
        "recipe",
    ),
    "evaluation": ("baselines", "tune_baselines", "baseline_settings", "bootstrap_resamples", "max_ease_items"),
}
"""Settings that a resumed run may have anew: they say how it is computed, told and judged, not what is learned."""


@contextmanager
def disk_errors_as_training_errors(path: Path) -> Iterator[None]:
    """A disk that takes no more is told of in one line."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"The figures of a run must fit on the disk. {path}: {error.strerror}. The last checkpoint stands; free some space."
        ) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; none when there is no file, and a line that a killed run left half-written is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def config_diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """Which settings differ, in words; empty when none do."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = config_diff(a, b, f"{prefix}{name}.")
            found += [inner] if inner else []
        elif a != b:
            found.append(f"{prefix}{name} was {a!r}, is {b!r}")
    return "; ".join(found)
