"""Every error a user can cause, in one tree.

    TwoTowerError            base of all: one line on stderr, exit code 2
    ├── ConfigError          a setting is unknown, of the wrong type, or contradicts another
    ├── DataError            a file, folder, column or row is not what was promised
    ├── TrainingError        training cannot start or go on (empty data, non-finite loss, missing checkpoint)
    ├── RequestError         a request for recommendations cannot be answered (unknown id, malformed filter)
    ├── BusyError            a server cannot answer now (too much waits, or its store of events does not answer)
    └── MissingExtraError    an optional part of the package is not installed; also an ImportError

A message is sentences: what must hold; what was found, and where; what to do. Anything that is not a `TwoTowerError`
is a defect of the package: traceback, exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class TwoTowerError(Exception):
    """Base of every error that the caller can mend: one line, whatever stands in what is quoted."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(TwoTowerError):
    """A setting is unknown, of the wrong type or range, or contradicts another one."""


class DataError(TwoTowerError):
    """A file, folder, column or row is not what was promised."""


class TrainingError(TwoTowerError):
    """Training cannot start or go on."""


class RequestError(TwoTowerError):
    """A request for recommendations cannot be answered.

    Attributes
    ----------
    location
        The part at fault: a character of a text (from 1), a path into JSON such as "and[1].within.km" ("" is all of it), or None.
    """

    def __init__(self, message: str, *, location: str | int | None = None) -> None:
        super().__init__(message)
        self.location = location


class BusyError(TwoTowerError):
    """A server cannot answer now; the same request may be answered later."""


class MissingExtraError(TwoTowerError, ImportError):
    """An optional part of the package is not installed."""


def require(extra: str, *modules: str) -> None:
    """Check that the modules of an extra are installed, without importing them.

    Raises
    ------
    MissingExtraError
        Some are not; the message has the pip command.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"Not installed: {', '.join(missing)}. This needs the extra {extra!r}. Run: pip install 'two-tower-rec[{extra}]'"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or the list of known names when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names)}."
