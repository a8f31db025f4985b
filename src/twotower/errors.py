"""Define the errors of the package as one hierarchy.

    TwoTowerError            base of all: one line on stderr, exit code 2
    ├── ConfigError          a setting is unknown, of the wrong type, or contradicts another
    ├── DataError            a file, folder, column or row is missing or invalid
    ├── TrainingError        training cannot start or continue (empty data, non-finite loss, missing checkpoint)
    ├── RequestError         a request for recommendations cannot be answered (unknown id, malformed filter)
    ├── BusyError            a server cannot answer now (queue full, or its event store does not respond)
    ├── ResponseError        a server refused a request of a client
    ├── UnreachableError     a server does not respond to a client
    ├── NotFittedError       a `Model` is asked for what its fit makes; also an AttributeError
    └── MissingExtraError    an optional part of the package is not installed; also an ImportError

A message is one line: first what is wrong and the value, then what is allowed, then what to do. Any other exception is a defect
of the package: traceback, exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


def one_line(text: str) -> str:
    r"""Return a text as one line that a terminal shows as it is: spaces for line breaks, escapes for control characters.

    Examples
    --------
    >>> one_line("a\nb \x1b[2J")
    'a b \\x1b[2J'
    """
    return escaped(" ".join(text.split()))


def escaped(line: str) -> str:
    """Return a line with escapes for control characters; see `one_line`."""
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def clause(error: object) -> str:
    """Return the text of an error without a full stop at its end, so that a sentence can go on after it.

    Examples
    --------
    >>> f"Cannot connect: {clause(OSError('Connection refused.'))}. Try again."
    'Cannot connect: Connection refused. Try again.'
    """
    return str(error).rstrip(". \n")


class TwoTowerError(Exception):
    """Base class of every error that the caller can fix. Its message is one line; see `one_line`."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(TwoTowerError):
    """A setting is unknown, of the wrong type or range, or contradicts another one."""


class DataError(TwoTowerError):
    """A file, folder, column or row is missing or invalid."""


class TrainingError(TwoTowerError):
    """Training cannot start or continue."""


class RequestError(TwoTowerError):
    """A request for recommendations cannot be answered.

    Attributes
    ----------
    location
        Position of the fault: a character of a text (from 1), a path in JSON such as "and[1].within.km" ("": the root), or None.
    """

    def __init__(self, message: str, *, location: str | int | None = None) -> None:
        super().__init__(message)
        self.location = location


class BusyError(TwoTowerError):
    """A server cannot answer now; the same request may succeed later."""


class ResponseError(TwoTowerError):
    """A server refused a request of a client.

    Attributes
    ----------
    status
        HTTP status.
    code
        Kind of the error, such as "invalid" or "busy"; "refused" if the response is not that of a `twotower serve`.
    location
        Part of the request that is wrong; None if the server does not say.
    request_id
        Id of the request in the log of the server; None if unknown.
    """

    def __init__(
        self, message: str, *, status: int, code: str, location: str | int | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.location, self.request_id = status, code, location, request_id


class UnreachableError(TwoTowerError):
    """A server does not respond to a client; all attempts failed."""


class NotFittedError(TwoTowerError, AttributeError):
    """A `Model` is not fitted yet, so it has no report, no vectors and no answers."""


class MissingExtraError(TwoTowerError, ImportError):
    """An optional part of the package is not installed."""


def require(extra: str, *modules: str) -> None:
    """Check that the modules of an extra are installed, without importing them.

    Raises
    ------
    MissingExtraError
        A module is not installed; the message has the pip command.
    """
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise MissingExtraError(
            f"Not installed: {', '.join(missing)}. This needs the extra {extra!r}. Run: pip install 'two-tower-rec[{extra}]'"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or the list of known names if none is close.

    Examples
    --------
    >>> nearest("ndgc", ["ndcg", "recall"])
    " Did you mean 'ndcg'?"
    >>> nearest("x", ["ndcg", "recall"])
    ' Known: ndcg, recall.'
    >>> nearest("NDGC", ["ndcg", "recall"])
    " Did you mean 'ndcg'?"
    >>> nearest("x", [])
    ' Known: none.'
    """
    names = sorted(known)
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f" Did you mean {folded[close[0]]!r}?" if close else f" Known: {', '.join(names) or 'none'}."
