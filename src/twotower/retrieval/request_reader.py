"""Check requests and convert them for the model: ids to rows, histories to `Queries`.

Invalid input raises a `RequestError` that names the wrong part. An unknown user is not an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.data.dataset import Dataset
from twotower.errors import RequestError, nearest
from twotower.retrieval.request import HistoryEvent, Request
from twotower.retriever import Queries
from twotower.schema import DAY_S, FIRST_ROW, ITEM_ID, TIMES_END_S, UNKNOWN, USER_ID
from twotower.search.filters.item_filter import check_location
from twotower.utils.ids import Id, id_text
from twotower.utils.ragged import lengths_to_offsets
from twotower.utils.types import Array, Int

WEEK_S = 7 * DAY_S
MAX_STARS = 5


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """One checked request, with ids as rows.

    Attributes
    ----------
    user_row
        Row of the user; UNKNOWN for an unknown user.
    history
        One query with the events of the user and the request before the time of the request.
    """

    request: Request
    user_row: int
    near: tuple[float, float] | None
    history: Queries

    @property
    def known(self) -> bool:
        """Return True if the user is in the bundle."""
        return self.user_row != UNKNOWN

    @property
    def can_personalize(self) -> bool:
        """Return True if the user is known or has a history."""
        return self.known or len(self.history.item_row) > 0


class UnknownItemError(RequestError):
    """An event of the history has an item that is not in the catalogue.

    Attributes
    ----------
    number
        Position of the event in the history of the request, from 0.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Ids:
    """Maps external ids to rows. It takes 16 bytes per id; a dictionary takes about 200."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column.combine_chunks()
        hashes = np.fromiter((hash(text) for chunk in column.chunks for text in chunk.to_pylist()), np.int64, len(column))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def row(self, id: Id) -> int:
        """Return the row of an id, UNKNOWN for an unknown id."""
        text = id if isinstance(id, str) else id_text(id)
        at = int(np.searchsorted(self._hashes, hash(text)))
        while at < len(self._hashes) and self._hashes[at] == hash(text):
            if self._column[int(self._order[at])].as_py() == text:
                return int(self._order[at]) + FIRST_ROW
            at += 1
        return UNKNOWN


class Reader:
    """Checks and converts requests for one dataset.

    Parameters
    ----------
    moment_s
        Time of a request without its own, in seconds, unless its history has later events.
    """

    def __init__(self, dataset: Dataset, moment_s: int) -> None:
        self.dataset, self.moment_s = dataset, moment_s
        self.items, self.users = Ids(dataset.items[ITEM_ID]), Ids(dataset.users[USER_ID])
        self._codes = {name: code for code, name in enumerate(dataset.event_types, 1)}
        self._prepare = dataset.manifest.config.prepare

    def at(self, moment_s: int) -> Reader:
        """Return a reader with another time of requests without their own."""
        other = copy(self)
        other.moment_s = moment_s
        return other

    def read(self, request: Request) -> ParsedRequest:
        """Check a request.

        Raises
        ------
        RequestError
            An item or event type is unknown, or a number, time or location is out of range.
        """
        _check(request)
        near = None if request.near is None else check_location(request.near)
        user_row = UNKNOWN if request.user is None else self.users.row(request.user)
        known = [event.time_s for event in request.history if event.time_s is not None and self.is_history(event)]
        moment = request.time_s if request.time_s is not None else max([self.moment_s, *(time_s + 1 for time_s in known)])
        return ParsedRequest(request, user_row, near, self._history(user_row, request, moment, near))

    def _history(self, user_row: int, request: Request, moment: int, near: tuple[float, float] | None) -> Queries:
        """Return a query with the user's events of the bundle and then those of the request, all before the time of the request."""
        events = self.dataset.events
        start, stop = events.offsets[user_row : user_row + 2].tolist()
        own = slice(start, start + int(np.searchsorted(events.time_s[start:stop], moment)))
        one: dict[str, Array] = {"time_s": np.array([moment]), "user_row": np.array([user_row])}
        one["location"] = np.array([near or (np.nan, np.nan)], np.float32)
        if not request.history:  # of most requests
            return Queries(
                offsets=np.array([0, own.stop - start]),
                item_row=events.item_row[own],
                event_time_s=events.time_s[own],
                event_type=events.event_type[own],
                stars=events.stars[own],
                disliked=self.dataset.disliked(one["user_row"], np.array([_until(request)])),
                **one,
            )
        every = np.array([self._row(number, event) for number, event in enumerate(request.history)], np.int64)
        codes = np.array([self._code(event) for event in request.history], np.int64)
        kept = np.array([at for at, event in enumerate(request.history) if self.is_history(event)], np.int64)
        own_events = [request.history[at] for at in kept.tolist()]
        time_s = _times(own_events, moment, int(events.time_s[own.stop - 1]) if own.stop > start else 0)
        stars = np.array([np.nan if event.stars is None else event.stars for event in own_events], np.float32)
        order = np.argsort(time_s, kind="stable")
        order = order[time_s[order] < moment]
        item_row = np.concatenate([events.item_row[own], every[kept][order]])
        return Queries(
            offsets=np.array([0, len(item_row)]),
            item_row=item_row,
            event_time_s=np.concatenate([events.time_s[own], time_s[order]]),
            event_type=np.concatenate([events.event_type[own], codes[kept][order]]),
            stars=np.concatenate([events.stars[own], stars[order]]),
            disliked=self._disliked(user_row, request, every),
            **one,
        )

    def _disliked(self, user_row: int, request: Request, rows: Int) -> tuple[Int, Int] | None:
        """Return the items that the user dislikes, before the time of the request if it has one; None without any."""
        until = _until(request)
        named = [at for at, event in enumerate(request.history) if self.is_negative(event) and (event.time_s or 0) < until]
        stored = self.dataset.disliked(np.array([user_row]), np.array([until]))
        if not named:
            return stored
        both = np.concatenate([stored[1] if stored else rows[:0], rows[named]])
        return np.array([0, len(both)]), both

    def is_history(self, event: HistoryEvent) -> bool:
        """Return True if an event is part of the history, and not an explicit negative or an impression."""
        return self._prepare.is_history(self._type(event), event.stars)

    def is_negative(self, event: HistoryEvent) -> bool:
        """Return True if an event is an explicit negative, whose item is not recommended."""
        return self._prepare.is_negative(self._type(event), event.stars)

    def _type(self, event: HistoryEvent) -> str | None:
        return next(iter(self._codes), None) if event.event_type is None else event.event_type

    @property
    def event_types(self) -> list[str]:
        """Return the event types that requests may name: those of histories, then those of explicit negatives and impressions."""
        return [*self._codes, *(name for name in self._prepare.negative_types if name not in self._codes)]

    def item(self, item_id: Id) -> int:
        """Return the row of an item. Raise `RequestError` for an unknown id."""
        row = self.items.row(item_id)
        if row == UNKNOWN:
            raise RequestError(f"Unknown item {str(item_id)[:80]!r}. Use ids of the catalogue.")
        return row

    def _row(self, number: int, event: HistoryEvent) -> int:
        try:
            return self.item(event.item_id)
        except RequestError as error:
            raise UnknownItemError(number, str(error)) from None

    def _code(self, event: HistoryEvent) -> int:
        if event.event_type is None:
            return 1
        if event.event_type not in self.event_types:
            raise RequestError(f"Unknown event type {str(event.event_type)[:80]!r}.{nearest(event.event_type, self.event_types)}")
        return self._codes.get(event.event_type, 0)


def _until(request: Request) -> int:
    """Return the time in seconds before which the items that the user dislikes count."""
    return TIMES_END_S if request.time_s is None else request.time_s


def to_queries(requests: Sequence[ParsedRequest]) -> Queries:
    """Return many requests as one batch of queries."""
    parts = [one.history for one in requests]
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    names = ("item_row", "event_time_s", "event_type", "stars", "time_s", "user_row", "location")
    lengths = np.array([len(part.item_row) for part in parts], np.int64)
    disliked = None
    if any(part.disliked for part in parts):
        each = [part.disliked[1] if part.disliked else part.item_row[:0] for part in parts]
        disliked = lengths_to_offsets(np.array([len(rows) for rows in each])), np.concatenate(each)
    return Queries(offsets=lengths_to_offsets(lengths), disliked=disliked, **{name: joined(name) for name in names})


def _times(own_events: Sequence[HistoryEvent], moment: int, earliest: int) -> Int:
    """Return the time of each event in seconds.

    An event without a time is placed one week before the next event (the last: before the time of the request), but never before
    the events that precede it.
    """
    known = np.array([earliest if event.time_s is None else event.time_s for event in own_events], np.int64)
    before = np.maximum.accumulate(np.maximum(known, earliest)).tolist()
    times, later = [], moment
    for event, least in zip(reversed(own_events), reversed(before), strict=True):
        later = max(later - WEEK_S, least) if event.time_s is None else event.time_s
        times.append(later)
    return np.array(times[::-1], np.int64)


def check_k(k: Any) -> None:
    """Raise `RequestError` unless `k` is an integer, at least 1."""
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
        raise RequestError(f"k is {_short(k)}. It must be an integer, at least 1.")


def check_flag(name: str, value: Any) -> None:
    """Raise `RequestError` unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{name} is {_short(value)}. It must be True or False.")


def check_filter(filter: Any) -> None:
    """Raise `RequestError` for a condition of another library, which has no truth value: a Series, an expression."""
    if filter is not None and not isinstance(filter, str | Mapping | list | int | float):  # the parser knows JSON
        raise RequestError(
            f"The filter is {_short(filter)}. It must be a text such as 'price <= 20', or an object such as "
            '{"price": {"max": 20}}.'
        )


def _short(value: Any) -> str:
    if isinstance(value, str | int | float | None):
        return repr(value)[:40]
    return f"a {type(value).__name__}"


def _check(request: Request) -> None:
    """Raise `RequestError` for numbers out of range."""
    check_k(request.k)
    if not (isinstance(request.skip, Integral) and request.skip >= 0):
        raise RequestError(f"skip is {str(request.skip)[:40]}. It must be an integer, at least 0.")
    if request.skip and request.diversity:
        raise RequestError("A list with diversity has no further part: it depends on its length. Ask for more items at once.")
    check_filter(request.filter)
    for name, value, least in (("diversity", request.diversity, 0), ("popularity_bias", request.popularity_bias, -1)):
        if not (isinstance(value, Real) and least <= value <= 1):
            raise RequestError(f"{name} is {_short(value)}. It must be a number from {least} to 1.")
    if not (isinstance(request.explore, Real) and 0 <= request.explore <= 1):
        raise RequestError(f"explore is {_short(request.explore)}. It must be a number from 0 to 1.")
    for name, flag in (("exclude_seen", request.exclude_seen), ("explain", request.explain)):
        check_flag(name, flag)
    for time_s in chain([request.time_s], (event.time_s for event in request.history)):
        if time_s is not None and not 0 <= time_s < TIMES_END_S:
            raise RequestError(f"Got time {str(time_s)[:40]}. It must be in seconds since 1970, from 0 to {TIMES_END_S - 1}.")
    for event in request.history:
        if event.stars is not None and not 0 <= event.stars <= MAX_STARS:
            raise RequestError(f"Got {event.stars} stars. Stars must be from 0 to {MAX_STARS}.")
