"""Show the progress of a command on stderr: progress bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Called with (label, done, total); a total of 0 means that it is unknown."""

log = logging.getLogger("twotower")
_console = Console(stderr=True)


def is_first_process() -> bool:
    """Return True if this process shows messages: only the first of the processes that `torchrun` starts."""
    return os.environ.get("RANK", "0") == "0"


def setup_logging(*, quiet: bool = False) -> None:
    """Send the log lines of the package to stderr; with `quiet`, warnings only."""
    handler: logging.Handler = _Stderr()
    if sys.stderr.isatty():  # stderr of a notebook kernel also reports to be a terminal
        handler = RichHandler(console=_console, show_path=False, show_level=False, omit_repeated_times=False)
    log.handlers = [handler]
    log.setLevel(logging.INFO if is_first_process() and not quiet else logging.WARNING)
    log.propagate = False


class _Stderr(logging.StreamHandler[Any]):
    """Write to the stderr of the moment: notebooks and tests replace it."""

    @property
    def stream(self) -> Any:
        """Return stderr."""
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


def silent(label: str, done: int, total: int) -> None:
    """Ignore a progress report."""


class Bar:
    """One progress bar for several stages, in a terminal and in a notebook alike.

    While the context is open, `progress` reports to this bar.
    """

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets, a notebook gets the bar of a terminal
            from tqdm.auto import tqdm
        self._bar: Any = tqdm(total=None, disable=not is_first_process(), dynamic_ncols=True)
        self._label = ""

    def __enter__(self) -> Bar:
        _bars.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _bars.remove(self)
        self._bar.close()

    def report(self, label: str, done: int, total: int) -> None:
        """Show a stage: its name, what is done, and of how much (0: unknown). A stage may begin again, with another total."""
        if label != self._label or done < self._bar.n:
            self._label = label
            self._bar.set_description(label, refresh=False)
            self._bar.reset(total=total or None)
        self._bar.total = total or None
        self._bar.update(done - self._bar.n)

    def figures(self, figures: Mapping[str, float]) -> None:
        """Show figures beside the bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})


_bars: list[Bar] = []


@contextmanager
def progress() -> Iterator[Report]:
    """Yield `report(label, done, total)`: to the open `Bar`, else one bar per label on a terminal, nothing elsewhere."""
    if _bars:
        yield _bars[-1].report
        return
    if not (sys.stderr.isatty() and is_first_process()):
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
