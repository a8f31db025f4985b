"""The tree of a filter: what its text and its JSON (`parser`) become, and what `item_filter` turns into a mask.

Nodes are frozen and compare by what they ask; where they were written (`at`) is kept for errors alone.
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
    """A part of a filter, for errors: `location` as in `RequestError`, and how it reads."""

    location: str | int
    shown: str

    def __str__(self) -> str:
        return (
            f"{self.shown!r} at character {self.location}"
            if isinstance(self.location, int)
            else self.location or "the whole filter"
        )


@dataclass(frozen=True, slots=True)
class And:
    """All parts hold; without any: always."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """A part holds; without any: never."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The part fails."""

    part: Node


@dataclass(frozen=True, slots=True)
class Among:
    """The column's value, or one of its list, is among `values`."""

    column: str
    values: tuple[Value, ...]
    at: Part = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Compared:
    """The column's number lies on this side of `value`."""

    column: str
    bound: Bound
    value: Value
    at: Part = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Within:
    """No farther than `km` from `near` (latitude, longitude in degrees), or from home when that is None."""

    km: float
    near: tuple[float, float] | None
    at: Part = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Open:
    """Open at an hour of the week (0: Monday 00:00), or now when that is None."""

    hour: int | None
    at: Part = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Seen:
    """In the history of whoever asks."""


Node = And | Or | Not | Among | Compared | Within | Open | Seen


def join(kind: type[And] | type[Or], parts: Sequence[Node]) -> Node:
    """`parts` as one node of this kind: those of the same kind melt into it, and a single one stands alone."""
    flat: list[Node] = []
    for part in parts:
        flat += part.parts if isinstance(part, And | Or) and type(part) is kind else (part,)
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


def walk(tree: Node) -> Iterator[tuple[Node, int]]:
    """All nodes with their depth."""
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        yield node, depth
        waiting += [(part, depth + 1) for part in (node.parts if isinstance(node, And | Or) else ())]
        waiting += [(node.part, depth + 1)] if isinstance(node, Not) else []


def check_location(location: Sequence[float], at: Part | None = None) -> tuple[float, float]:
    """Return `location`, latitude and longitude in degrees, as it is.

    Raises
    ------
    RequestError
        They are out of range or not finite.
    """
    latitude, longitude = (float(value) for value in location)
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise RequestError(
            f"A place is a latitude from -90 to 90 and a longitude from -180 to 180. Got {latitude}, {longitude}{_in(at)}.",
            location=None if at is None else at.location,
        )
    return latitude, longitude


def hour_of_week(text: str, at: Part | None = None) -> int:
    """ "Fri 19:30" → 115: hours since Monday 00:00, rounded down.

    Raises
    ------
    RequestError
        It is not a weekday, whole or its first three letters, and a time from 0 to 23:59 with or without minutes.
    """
    found = CLOCK.fullmatch(text.strip().lower())
    days = [number for number, day in enumerate(DAYS) if found and found[1] in (day, day[:3])]
    if not found or not days:
        raise RequestError(
            f'A time must look like "Fri 19:30". Got {text[:MAX_QUOTED_CHARS]!r}{_in(at)}.',
            location=None if at is None else at.location,
        )
    return days[0] * 24 + int(found[2])


def _in(at: Part | None) -> str:
    return "" if at is None else f" in {at}"
