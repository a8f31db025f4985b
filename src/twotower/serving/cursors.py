"""Let clients go on with a long list where the last part ended.

A cursor names the version of the bundle, the request and the position. To clients it is a text without meaning. Within a version,
the parts of a list have neither gaps nor repetitions, unless events change or the items are refreshed in between.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import to_json

from twotower.errors import RequestError

MAX_DEPTH = 10_000  # items of a list that can be reached
MAX_CURSOR_CHARS = 100
Cursor = Annotated[
    str | None, Field(max_length=MAX_CURSOR_CHARS, description="`next` of the last response, to go on where its list ended.")
]
Next = Annotated[str | None, Field(description="Cursor of the further items; null: there are none.")]


def write(version: str, request: Any, position: int) -> str:
    """Return the cursor of a position in the list of a request (any JSON values).

    Examples
    --------
    >>> read(write("a1b2", {"q": "x"}, 20), "a1b2", {"q": "x"})
    20
    """
    return base64.urlsafe_b64encode(f"{version}.{_digest(request)}.{position}".encode()).decode().rstrip("=")


def read(cursor: str | None, version: str, request: Any) -> int:
    """Return the position of a cursor; 0 without one.

    Raises
    ------
    RequestError
        The cursor is not valid, or belongs to another version or request.
    """
    if cursor is None:
        return 0
    parts = _parts(cursor)
    if parts is None:
        raise RequestError("The cursor is not valid. Send `next` of the last response unchanged.")
    if parts[0] != version:
        text = f"The cursor belongs to version {parts[0]}; {version} is served now. Begin again without a cursor."
        raise RequestError(text)
    if parts[1] != _digest(request):
        raise RequestError("The cursor belongs to another request. Change nothing but `k` or `limit`.")
    return parts[2]


def depth(cursor: str | None) -> int:
    """Return the position that a cursor claims, whatever it belongs to; 0 if it is not valid."""
    parts = None if cursor is None else _parts(cursor)
    return 0 if parts is None else parts[2]


def following(version: str, request: Any, position: int, found: int, wanted: int) -> str | None:
    """Return the cursor after a part of `found` items; None if the list has ended, or may not be longer."""
    after = position + found
    return write(version, request, after) if found == wanted and after < MAX_DEPTH else None


def _parts(cursor: str) -> tuple[str, str, int] | None:
    try:
        version, digest, position = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode().split(".")
        at = int(position) if position.isascii() and position.isdigit() else -1
    except (ValueError, binascii.Error):
        return None
    return (version, digest, at) if 0 <= at < MAX_DEPTH else None


def _digest(request: Any) -> str:
    return hashlib.blake2b(to_json(request), digest_size=6).hexdigest()
