"""Define what an event store holds, and the interface of event stores.

For every store: when `append` returns, the events are on disk; an event is stored once, even if it is sent again; `since` returns
all entries in the order in which they were accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from twotower.utils.types import Json

PAGE = 10_000  # entries read at once
ANSWERS_PAGE = 1000  # answers read at once


@dataclass(frozen=True, slots=True)
class Event:
    """An accepted event.

    Attributes
    ----------
    event_id
        Chosen by the client; events of one user with the same id are the same event.
    time_s
        Seconds since 1970.
    event_type
        One of the bundle's event types; None: the first. Never None for an event of a list.
    request_id
        The answer whose list it is about: an impression, or an outcome. Of one list, an item has each event type once.
    position
        Position of the item in the list, from 1.
    version
        The bundle version that made the list.
    """

    event_id: str
    user: str
    item_id: str
    time_s: int
    event_type: str | None = None
    stars: float | None = None
    request_id: str | None = None
    position: int | None = None
    version: str | None = None

    @property
    def once(self) -> str | None:
        """Return a text that is the same for all events of a list with the same item and type; None without a list."""
        return None if self.request_id is None else json.dumps([self.request_id, self.item_id, self.event_type])


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Says that a user was forgotten. The entries of the user before it no longer exist.

    Attributes
    ----------
    digest
        `digest_of` the user id.
    """

    digest: str


@dataclass(frozen=True, slots=True)
class LoggedAnswer:
    """An answer that was logged, so that impressions and outcomes can name it.

    Attributes
    ----------
    items, propensity
        The list, and for each item the probability with which the server shows it in its place.
    request
        The body of the request, without its user.
    """

    request_id: str
    time_s: int
    version: str
    user: str | None
    items: list[str]
    propensity: list[float]
    request: Json


Entry = tuple[str, Event | Forgotten | None]
"""The position of an entry and its content; None for an entry that cannot be read."""


class PositionLost(Exception):
    """The entry at a position no longer exists: the store has been emptied, or replaced by a copy that lacks it."""


class EventStore(Protocol):
    """Interface of event stores. Used by one thread at a time.

    Attributes
    ----------
    follow_s
        Interval in seconds for reading the events that other servers accepted; None if the store serves one server only.
    """

    @property
    def follow_s(self) -> float | None: ...

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Store the events that are new. Return for each event whether it was new. On return they are on disk.

        Raises
        ------
        BusyError
            The store does not respond or cannot write. Some events may be stored; sending all again is safe.
        """
        ...

    def since(self, position: str) -> list[Entry]:
        """Return up to `PAGE` entries after `position` ("" is the beginning), in order.

        Raises
        ------
        PositionLost
            The entry at `position` no longer exists. Read again from the beginning.
        BusyError
            The store does not respond.
        """
        ...

    def log_answers(self, answers: Sequence[LoggedAnswer]) -> None:
        """Store answers. They survive a killed process; a power failure may lose the last ones. The first of an id is kept."""
        ...

    def answers_of(self, request_ids: Sequence[str]) -> list[LoggedAnswer]:
        """Return the logged answers with these ids, in any order; unknown ids are left out."""
        ...

    def answers(self, position: str) -> tuple[str, list[LoggedAnswer]]:
        """Return the next position, and up to `ANSWERS_PAGE` answers after `position` ("" is the beginning)."""
        ...

    def forget(self, user: str) -> int:
        """Delete everything about a user, and note in a last entry that it is forgotten. Return the number of deleted events.

        Raises
        ------
        BusyError
            The store does not respond. Calling it again is safe.
        """
        ...

    def expire(self, events_before_s: int | None, answers_before_s: int | None) -> int:
        """Delete events and answers before these times; None: none. Return the number of deleted events."""
        ...

    def backup(self, path: Path) -> None:
        """Write a copy of the whole store to the file `path`, while servers go on."""
        ...

    def close(self) -> None:
        """Close the store."""
        ...


def every_event(store: EventStore) -> Iterator[list[Event]]:
    """Yield all events of a store, in pages."""
    position = ""
    while page := store.since(position):
        yield [entry for _, entry in page if isinstance(entry, Event)]
        position = page[-1][0]


def every_answer(store: EventStore) -> Iterator[LoggedAnswer]:
    """Yield all logged answers of a store."""
    position, page = store.answers("")
    while page:
        yield from page
        position, page = store.answers(position)


def digest_of(user: str) -> str:
    """Return the SHA-256 of a user id: it tells other processes who was forgotten, without the id."""
    return hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()


def answer_as_json(answer: LoggedAnswer) -> str:
    """Return an answer as it is stored."""
    return json.dumps(asdict(answer), ensure_ascii=False, separators=(",", ":"))


def answer_from_json(text: str) -> LoggedAnswer:
    """Return a stored answer."""
    found: dict[str, Any] = json.loads(text)
    return LoggedAnswer(**{name: found[name] for name in LoggedAnswer.__slots__})
