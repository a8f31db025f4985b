"""Read the events and answers of a store for exports, updates and estimates, and refuse rows that are damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from twotower.errors import BusyError, DataError
from twotower.serving.event_store import open_store
from twotower.serving.event_types import ANSWERS_PAGE, UNREADABLE, Event, EventStore, LoggedAnswer, PositionLost, StoreDamaged
from twotower.serving.redis_store import without_password
from twotower.serving.row_faults import DamagedRowError, fault_of_answer, fault_of_event, quoted
from twotower.utils.console import log

REPAIR = "Delete it from the log, or use a backup of the store."


@contextmanager
def reading(url: str) -> Iterator[EventStore]:
    """Open a store to read it, while servers go on using it.

    Raises
    ------
    DataError
        The store cannot be opened, or is damaged.
    BusyError
        The store does not respond, or it changed while it was read.
    """
    store = open_store(url, reading=True)
    try:
        yield store
    except StoreDamaged as error:
        raise DataError(f"The log {url} is damaged: {error.cause}. Name the store of a server, or a backup of it.") from None
    except PositionLost:
        name = url if url.startswith("sqlite:") else without_password(url)
        raise BusyError(f"Events of {name} were deleted while it was read. Run the command again.") from None
    finally:
        store.close()


def every_event(store: EventStore) -> Iterator[list[Event]]:
    """Yield all events of a store, in lists. Entries of a later version, and those that are not events, are counted in the log.

    Raises
    ------
    DamagedRowError
        An event has a value of another type. The message names the event.
    """
    position, skipped = "", 0
    while page := store.since(position):
        events = [entry for _, entry in page if isinstance(entry, Event)]
        skipped += sum(entry is None for _, entry in page)
        for event in events:
            if fault := fault_of_event(event):
                raise DamagedRowError(f"The event {quoted(event.event_id)} of the log has {fault} {REPAIR}")
        yield events
        position = page[-1][0]
    if skipped:
        log.warning("skipped %d entries of the event store: of a later version, or not readable", skipped)


def every_answer(store: EventStore) -> Iterator[LoggedAnswer]:
    """Yield all logged answers of a store.

    Raises
    ------
    DamagedRowError
        An answer cannot be read, or has a wrong value. The message names the answer.
    """
    position = ""
    while True:
        try:
            position, page = store.answers(position)
        except UNREADABLE:
            raise _unreadable(store, int(position or 0)) from None
        if not page:
            return
        for answer in page:
            if fault := fault_of_answer(answer):
                raise DamagedRowError(f"The answer {quoted(answer.request_id)} of the log has {fault} {REPAIR}")
            yield answer


def _unreadable(store: EventStore, fails: int) -> DamagedRowError:
    """Return the error of an answer that cannot be read. Reading answers fails after the position `fails`.

    If reading fails after a position, but not after the next one, then the answer at the next one is damaged.
    """
    step, reason = ANSWERS_PAGE, _reason(store, fails) or ""
    works = fails + step
    while found := _reason(store, works):
        fails, reason, step = works, found, 2 * step
        works += step
    while works - fails > 1:
        middle = (fails + works) // 2
        if found := _reason(store, middle):
            fails, reason = middle, found
        else:
            works = middle
    return DamagedRowError(f"The answer at position {works} of the log cannot be read: {reason}. {REPAIR}")


def _reason(store: EventStore, position: int) -> str | None:
    """Return why the answers after a position cannot be read; None if they can."""
    try:
        store.answers(str(position))
    except json.JSONDecodeError as error:
        return f"it is not JSON ({error.msg})"
    except KeyError as error:
        return f"it has no field {error}"
    except UNREADABLE:
        return "it is not a JSON object with the fields of an answer"
    return None
