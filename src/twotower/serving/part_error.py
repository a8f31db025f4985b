"""Name the part of a request in which an error is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from twotower.errors import RequestError
from twotower.retrieval.request_reader import UnknownItemError


class PartError(RequestError):
    """An error in one part of a request.

    Attributes
    ----------
    location
        Path to the part in the JSON of the request. For a filter given as text, a colon and the character position follow.
    """

    def __init__(self, part: str, error: RequestError) -> None:
        super().__init__(str(error))
        inner = getattr(error, "location", None)
        if isinstance(error, UnknownItemError):
            inner = _path("history", error.number, "item_id")
        elif not isinstance(error, PartError) and inner is not None:  # an error in a filter
            inner = f"filter:{inner}" if isinstance(inner, int) else _path(*filter(None, ("filter", inner)))
        self.location = _path(*filter(None, (part, inner)))


def unknown(kind: str, name: str) -> RequestError:
    """Return the error for an unknown id; `kind` is "item" or "user"."""
    return RequestError(f"Unknown {kind} {name[:80]!r}. Search for valid ids with GET /v1/{kind}s?q=TEXT.")


def _path(*steps: str | int) -> str:
    return ".".join(str(step) for step in steps)


@contextmanager
def part(*path: str | int) -> Iterator[None]:
    """Turn a `RequestError` of the block into a `PartError` with this path."""
    try:
        yield
    except RequestError as error:
        raise PartError(_path(*path), error) from None
