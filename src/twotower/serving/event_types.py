"""Define the entries of an event store, and the interface of event stores.

For every store: when `append` returns, the events are on disk; an event is stored once, even if it is sent again; `since` returns
entries in the order of their acceptance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twotower.bundle.changed_items import ItemChange
from twotower.errors import BusyError
from twotower.utils.console import log

PAGE = 10_000  # entries read at once
ANSWERS_PAGE = 1000  # answers read at once
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # raised by `answer_from_json`


@dataclass(frozen=True, slots=True)
class Event:
    """An accepted event.

    Attributes
    ----------
    event_id
        Id chosen by the client. Events of one user with the same id are the same event.
    time_s
        Time in seconds since 1970.
    event_type
        An event type of the bundle; None: its first one. Never None if `request_id` is set.
    request_id
        Id of the answer that the event belongs to, as an impression or an outcome; None: no answer.
    position
        Position of the item in the list of the answer, from 1.
    version
        Bundle version that computed the list.

    Examples
    --------
    >>> Event("e-1", "C0001", "P0001", 1_700_000_000).once is None
    True
    >>> Event("e-2", "C0001", "P0001", 1_700_000_000, "click", request_id="r-1").once
    '["r-1", "P0001", "click"]'
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
        """Return the key under which an event of a list counts once: its list, item and type. None without a list."""
        return None if self.request_id is None else json.dumps([self.request_id, self.item_id, self.event_type])


@dataclass(frozen=True, slots=True)
class Forgotten:
    """An entry that records that a user was forgotten. All earlier entries of the user have been deleted.

    Attributes
    ----------
    digest
        SHA-256 of the user id; see `digest_of`.
    """

    digest: str


@dataclass(frozen=True, slots=True)
class LoggedAnswer:
    """A logged answer, to which impressions and outcomes refer by `request_id`.

    Attributes
    ----------
    time_s
        Time of the answer in seconds since 1970.
    version
        Bundle version that computed the list.
    items
        Item ids in the order of the list.
    propensity
        For each item, the probability that the list contains it.
    request
        Body of the request, without the user, as JSON text: as objects it takes several times the memory.
    """

    request_id: str
    time_s: int
    version: str
    user: str | None
    items: list[str]
    propensity: list[float]
    request: str


Entry = tuple[str, Event | Forgotten | None]
"""Position and content of an entry; the content is None if the entry cannot be read."""


class PositionLost(Exception):
    """Raised if the entry at a position no longer exists, because the store was emptied or replaced by an older copy."""


class StoreDamaged(BusyError):
    """Raised if the file of a store cannot be read, and no other process keeps it from being read; `cause` says why."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"Cannot read the event file: {cause}. Check the disk.")
        self.cause = cause


class StoreInUse(BusyError):
    """Raised if another process has to finish its work in the store first. The store itself works."""


class EventStore(Protocol):
    """Interface of event stores. One thread at a time may use a store."""

    @property
    def follow_s(self) -> float | None:
        """Return the interval in seconds for reading events of other servers; None if only one server uses the store."""
        ...

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Store the new ones among `events`. They are on disk when the call returns.

        Returns
        -------
        list[bool]
            For each event, True if it is new and False if it was stored before.

        Raises
        ------
        BusyError
            The store does not respond or cannot write. Some events may have been stored. The call can be repeated.
        """
        ...

    def since(self, position: str) -> list[Entry]:
        """Return up to `PAGE` entries after `position`, in the order of their acceptance. "" is the beginning of the store.

        Raises
        ------
        PositionLost
            The entry at `position` no longer exists. Read again from the beginning.
        BusyError
            The store does not respond.
        """
        ...

    def log_answers(self, answers: Sequence[LoggedAnswer]) -> list[bool]:
        """Store answers. If an id is stored already, the first answer is kept.

        Stored answers survive a killed process, but a power failure may lose the last ones.

        Returns
        -------
        list[bool]
            For each answer, True if it is the first with its id.
        """
        ...

    def answers_of(self, request_ids: Sequence[str]) -> list[LoggedAnswer]:
        """Return the logged answers with these ids, in any order. Unknown ids are ignored."""
        ...

    def answers(self, position: str) -> tuple[str, list[LoggedAnswer]]:
        """Return the next position, and up to `ANSWERS_PAGE` answers after `position`. "" is the beginning of the store."""
        ...

    def forget(self, user: str) -> int:
        """Delete all events and answers of a user, and append a `Forgotten` entry. Return the number of deleted events.

        Raises
        ------
        StoreInUse
            Another process forgets a user. The call can be repeated after the time in the message.
        BusyError
            The store does not respond. The call can be repeated.
        """
        ...

    def change_items(self, changes: Mapping[str, ItemChange], reset: Sequence[str]) -> int:
        """Store changes of items, on top of earlier ones, and delete all changes of the items in `reset`.

        Returns
        -------
        int
            Number of times that items have been changed.

        Raises
        ------
        BusyError
            The store does not respond. The call can be repeated.
        """
        ...

    def item_changes(self, known: int) -> tuple[int, dict[str, ItemChange]] | None:
        """Return how often items have been changed, and all changes by item; None if it was `known` times.

        Raises
        ------
        BusyError
            The store does not respond.
        """
        ...

    def expire(self, events_before_s: int | None, answers_before_s: int | None) -> int:
        """Delete events and answers before these times in seconds; None deletes nothing. Return the number of deleted events.

        The ids of deleted events are free again.
        """
        ...

    def tidy(self) -> bool:
        """Remove what `forget` could not remove at once. Call it after `forget`, and again while it returns False.

        It does not wait, and it logs errors instead of raising them.
        """
        ...

    def backup(self, path: Path) -> None:
        """Write a copy of the whole store to the file `path`. Servers can use the store meanwhile."""
        ...

    def close(self) -> None:
        """Close the store."""
        ...


REMOVED = ""
"""In place of a column: the item is removed."""


def item_values(changes: Mapping[str, ItemChange]) -> list[tuple[str, str, str]]:
    """Return changes of items as (item id, column, JSON), as stores keep them.

    Examples
    --------
    >>> item_values({"a": ItemChange({"price": 3}), "b": ItemChange({}, removed=True)})
    [('a', 'price', '3'), ('a', '', 'null'), ('b', '', 'true')]
    """
    found = []
    for item_id, change in changes.items():
        found += [(item_id, column, _compact(value)) for column, value in change.columns.items()]
        found.append((item_id, REMOVED, _compact(change.removed)))  # also None, which takes back an earlier removal
    return found


def item_changes_of(values: Iterable[tuple[str, str, str]]) -> dict[str, ItemChange]:
    """Return the changes of items that `item_values` gave. Those that cannot be read are left out.

    Examples
    --------
    >>> item_changes_of(item_values({"a": ItemChange({"price": 3})})) == {"a": ItemChange({"price": 3})}
    True
    """
    columns: dict[str, dict[str, Any]] = {}
    for item_id, column, value in values:
        try:
            read = json.loads(value)
        except (ValueError, TypeError, RecursionError):
            log.warning("left out a change of the item %r in the event store: its column %r cannot be read", item_id, column)
        else:
            columns.setdefault(item_id, {})[column] = read
    return {item_id: ItemChange(own, removed=own.pop(REMOVED, None)) for item_id, own in sorted(columns.items())}


def digest_of(user: str) -> str:
    """Return the SHA-256 of a user id, 64 hexadecimal digits. A `Forgotten` entry stores it instead of the id.

    Examples
    --------
    >>> digest_of("C0001")[:16]
    'a1d8410fbe469cf4'
    """
    return hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()


def event_from_json(text: Any) -> Event | None:
    """Return the event that a store wrote as JSON; None if it cannot be read. Further fields are ignored.

    Examples
    --------
    >>> event_from_json('{"event_id": "a", "user": "u", "item_id": "b", "time_s": 5, "more": 1}').item_id
    'b'
    >>> event_from_json("{}") is None
    True
    """
    try:
        found = json.loads(text)
        event = Event(**{name: found[name] for name in Event.__slots__ if name in found})
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    texts = (event.event_id, event.user, event.item_id)
    right = all(is_text(text) for text in texts) and type(event.time_s) is int and event.time_s >= 0
    right &= all(text is None or is_text(text) for text in (event.event_type, event.request_id, event.version))
    right &= isinstance(event.stars, int | float | None) and type(event.stars) is not bool
    return event if right and (event.position is None or type(event.position) is int) else None


def is_text(value: object) -> bool:
    """Return True for a text that can be written as UTF-8.

    Examples
    --------
    >>> is_text("Zoë"), is_text("\\udcff"), is_text(b"u")
    (True, False, False)
    """
    if not isinstance(value, str):
        return False
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def answer_as_json(answer: LoggedAnswer) -> str:
    """Return an answer as compact JSON text, as stores keep it.

    Examples
    --------
    >>> answer = LoggedAnswer("r-1", 1_700_000_000, "391d870b9d51", None, ["P0001"], [1.0], '{"k":1}')
    >>> answer_as_json(answer)[-19:]
    ',"request":{"k":1}}'
    >>> answer_from_json(answer_as_json(answer)) == answer
    True
    """
    fields = {name: getattr(answer, name) for name in LoggedAnswer.__slots__ if name != "request"}
    return f'{_compact(fields)[:-1]},"request":{answer.request}}}'


def answer_from_json(text: str) -> LoggedAnswer:
    """Return the answer that `answer_as_json` wrote. Further fields are ignored."""
    fields: dict[str, Any] = json.loads(text)
    fields["request"] = _compact(fields["request"])
    return LoggedAnswer(**{name: fields[name] for name in LoggedAnswer.__slots__})


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
