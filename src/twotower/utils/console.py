"""Show the progress of a command on stderr: progress bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Called with (label, done, total); a total of 0 means that it is unknown."""

log = logging.getLogger("twotower")
_console = Console(stderr=True)


def speaks() -> bool:
    """Return True if this process shows messages: only the first of the processes that `torchrun` starts."""
    return os.environ.get("RANK", "0") == "0"


def setup_logging(*, quiet: bool = False) -> None:
    """Send the log lines of the package to stderr; with `quiet`, warnings only."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():  # stderr of a notebook kernel also reports to be a terminal
        handler = RichHandler(console=_console, show_path=False, show_level=False, omit_repeated_times=False)
    log.handlers = [handler]
    log.setLevel(logging.INFO if speaks() and not quiet else logging.WARNING)
    log.propagate = False


def silent(label: str, done: int, total: int) -> None:
    """Ignore a progress report."""


@contextmanager
def progress() -> Iterator[Report]:
    """Yield `report(label, done, total)`: one bar per label on a terminal, nothing elsewhere."""
    if not (sys.stderr.isatty() and speaks()):
        yield silent
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=_console, transient=True) as bar:

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total or None)
            bar.update(tasks[label], completed=done, total=total or None)

        yield report
