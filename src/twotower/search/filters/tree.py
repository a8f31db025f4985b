"""Define the tree of a filter. `parser` builds it from text or JSON, and `item_filter` turns it into a mask.

Nodes are immutable and compare by meaning. Their position in the filter (`at`) is used only in error messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from twotower.errors import RequestError

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
CLOCK = re.compile(r"([a-z]+)\s+([01]?[0-9]|2[0-3])(:[0-5][0-9])?")
MAX_QUOTED_CHARS = 80  # characters of a filter that an error quotes

Value = str | int | float
Bound = Literal["<", "<=", ">", ">="]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a filter, for error messages: `location` as in `RequestError`, and its text."""

    location: str | int
    quoted: str

    def __str__(self) -> str:
        return (
            f"{self.quoted!r} at character {self.location}"
            if isinstance(self.location, int)
            else self.location or "the whole filter"
        )


@dataclass(frozen=True, slots=True)
class And:
    """True if all parts are true; true without parts."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """True if any part is true; false without parts."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """True if the part is false."""

    part: Node


@dataclass(frozen=True, slots=True)
class Among:
    """True if the value of the column, or one value of its list, is among `values`."""

    column: str
    values: tuple[Value, ...]
    at: Part = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Compared:
    """True if the number in the column meets the bound `value`."""

    column: str
    bound: Bound
    value: Value
    at: Part = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Within:
    """True for items at most `km` from `near` (latitude, longitude in degrees); None: from the home location."""

    km: float
    near: tuple[float, float] | None
    at: Part = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Open:
    """True for items open at an hour of the week (0: Monday 00:00); None: now."""

    hour: int | None
    at: Part = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Seen:
    """True for items of the user's history."""


Node = And | Or | Not | Among | Compared | Within | Open | Seen


def join(kind: type[And] | type[Or], parts: Sequence[Node]) -> Node:
    """Return `parts` as one node of this kind. Parts of the same kind are flattened; a single part is returned as it is."""
    flat: list[Node] = []
    for part in parts:
        flat += part.parts if isinstance(part, And | Or) and type(part) is kind else (part,)
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


def walk(tree: Node) -> Iterator[tuple[Node, int]]:
    """Yield all nodes with their depth."""
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        yield node, depth
        waiting += [(part, depth + 1) for part in (node.parts if isinstance(node, And | Or) else ())]
        waiting += [(node.part, depth + 1)] if isinstance(node, Not) else []


def check_location(location: Sequence[float], at: Part | None = None) -> tuple[float, float]:
    """Check `location`, latitude and longitude in degrees, and return it.

    Raises
    ------
    RequestError
        A coordinate is out of range or not finite.
    """
    try:
        latitude, longitude = (float(value) for value in location)
    except (TypeError, ValueError):
        quoted = " ".join(repr(location).split())[:60]
        raise RequestError(
            f"Got location {quoted}{_in(at)}. A location is latitude and longitude in degrees, such as (42.36, -71.06).",
            location=None if at is None else at.location,
        ) from None
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise RequestError(
            f"Got location {latitude}, {longitude}{_in(at)}. Latitude must be from -90 to 90, longitude from -180 to 180.",
            location=None if at is None else at.location,
        )
    return latitude, longitude


def hour_of_week(text: str, at: Part | None = None) -> int:
    """Return the hours since Monday 00:00, rounded down: "Fri 19:30" → 115.

    Raises
    ------
    RequestError
        The text is not a weekday (in full or its first three letters) and a time from 0 to 23:59 (with or without minutes).
    """
    found = CLOCK.fullmatch(text.strip().lower())
    days = [number for number, day in enumerate(DAYS) if found and found[1] in (day, day[:3])]
    if not found or not days:
        raise RequestError(
            f'Cannot read time {text[:MAX_QUOTED_CHARS]!r}{_in(at)}. Write it like "Fri 19:30".',
            location=None if at is None else at.location,
        )
    return days[0] * 24 + int(found[2])


def _in(at: Part | None) -> str:
    return "" if at is None else f" in {at}"
