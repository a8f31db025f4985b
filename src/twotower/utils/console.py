"""What a person sees while a command runs: progress bars on a terminal, log lines in a pipe, both on stderr."""

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
"""Called with (what is going on, done, total); a total of 0 means that nobody knows."""

log = logging.getLogger("twotower")
_console = Console(stderr=True)


def speaks() -> bool:
    """Whether this process tells people anything: of those that `torchrun` starts, the first alone."""
    return os.environ.get("RANK", "0") == "0"


def setup_logging(*, quiet: bool = False) -> None:
    """Send the package's log lines to stderr, once."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():  # a notebook's kernel calls its pipe a terminal
        handler = RichHandler(console=_console, show_path=False, show_level=False, omit_repeated_times=False)
    log.handlers = [handler]
    log.setLevel(logging.INFO if speaks() and not quiet else logging.WARNING)
    log.propagate = False


def silent(label: str, done: int, total: int) -> None:
    """Report to nobody."""


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
