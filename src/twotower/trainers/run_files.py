"""Read the training log of a run, compare settings and report disk errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twotower.errors import TrainingError
from twotower.utils import distributed
from twotower.utils.atomic_files import atomic_file

CHANGEABLE_ON_RESUME = {
    "training": (
        "memory_budget_gb",
        "micro_batch_size",
        "gradient_checkpointing",
        "checkpoint_every_s",
        "log_every",
        "loader_processes",
        "max_hours",
        "recipe",
    ),
    "evaluation": ("baselines", "tune_baselines", "bootstrap_resamples", "max_ease_items"),
}
"""Settings that may change on resume: they affect computation, logging and evaluation, not what is learned."""


@contextmanager
def disk_errors_as_training_errors(path: Path) -> Iterator[None]:
    """Raise a `TrainingError` with one line for an `OSError`, such as a full disk."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot write {path}: {error.strerror}. The last checkpoint is intact. Free disk space, then use --resume."
        ) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; [] without a file. Incomplete lines of a killed run are skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class RunLog:
    """The `metrics.jsonl` of a run; only the first process writes it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def start(self, step: int) -> None:
        """Drop rows after the step that the run starts from, so that no step is logged twice."""
        if distributed.rank() > 0:
            return
        rows = read_rows(self.path) if step else []
        with disk_errors_as_training_errors(self.path), atomic_file(self.path) as beside:  # atomic: a run killed here keeps its log
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        if distributed.rank() > 0:
            return
        with disk_errors_as_training_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def config_diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """Return the settings that differ, as text; empty if none do.

    Examples
    --------
    >>> config_diff({"training": {"num_epochs": 4}}, {"training": {"num_epochs": 8}})
    'training.num_epochs was 4, is 8'
    """
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = config_diff(a, b, f"{prefix}{name}.")
            found += [inner] if inner else []
        elif a != b:
            found.append(f"{prefix}{name} was {a!r}, is {b!r}")
    return "; ".join(found)
