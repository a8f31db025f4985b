"""Read the log of a server for estimates, and refuse rows that are damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from twotower.errors import BusyError, DataError
from twotower.serving.event_store import open_store
from twotower.serving.event_types import ANSWERS_PAGE, Event, EventStore, LoggedAnswer, every_event
from twotower.serving.limits import LAST_S

REPAIR = "Delete it from the log, or use a backup of the store."
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_SQLITE = re.compile(r"Cannot read the event file: (.*)\. Check the disk\.")


def read_log(url: str) -> tuple[list[Event], list[LoggedAnswer]]:
    """Return the events and the answers of a store.

    Raises
    ------
    DataError
        The store cannot be opened, or a row is not valid. The message names the row.
    BusyError
        The store does not respond.
    """
    store = open_store(url, reading=True)
    try:
        events = [event for page in every_event(store) for event in page]
        answers = _answers(store)
    except BusyError as error:
        found = _SQLITE.fullmatch(str(error))
        if found is None or "locked" in found[1]:
            raise
        raise DataError(f"The log {url} is damaged: {found[1]}. Name the store of a server, or a backup of it.") from None
    finally:
        store.close()
    for event in events:
        if fault := _fault_of_event(event):
            raise DataError(f"The event {_quoted(event.event_id)} of the log has {fault} {REPAIR}")
    for answer in answers:
        if fault := _fault_of_answer(answer):
            raise DataError(f"The answer {_quoted(answer.request_id)} of the log has {fault} {REPAIR}")
    return events, answers


def _answers(store: EventStore) -> list[LoggedAnswer]:
    answers: list[LoggedAnswer] = []
    position = ""
    while True:
        try:
            position, page = store.answers(position)
        except UNREADABLE:
            raise _unreadable(store, int(position or 0)) from None
        if not page:
            return answers
        answers += page


def _unreadable(store: EventStore, fails: int) -> DataError:
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
    return DataError(f"The answer at position {works} of the log cannot be read: {reason}. {REPAIR}")


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


def _fault_of_event(event: Event) -> str | None:
    """Return what is wrong with an event; None if nothing is."""
    texts = {"user": event.user, "item_id": event.item_id}
    for name, value in {**texts, "event_type": event.event_type, "request_id": event.request_id}.items():
        if not isinstance(value, str) and (value is not None or name in texts):
            return f"the {name} {_quoted(value)}. It must be a text."
    if event.stars is not None and not _within(event.stars, 5):
        return f"the stars {_quoted(event.stars)}. They must be a number from 0 to 5."
    return _fault_of_time(event.time_s)


def _fault_of_answer(answer: LoggedAnswer) -> str | None:
    """Return what is wrong with an answer; None if nothing is."""
    if not isinstance(answer.request_id, str):
        return f"the request_id {_quoted(answer.request_id)}. It must be a text."
    if not isinstance(answer.user, str | None):
        return f"the user {_quoted(answer.user)}. It must be a text."
    if not isinstance(answer.items, list) or not all(isinstance(item, str) for item in answer.items):
        return f"the items {_quoted(answer.items)}. They must be a list of ids."
    if not answer.request.startswith("{"):
        return f"the request {_quoted(answer.request)}. It must be a JSON object."
    return _fault_of_time(answer.time_s) or _fault_of_propensity(answer.items, answer.propensity)


def _fault_of_time(time_s: object) -> str | None:
    if type(time_s) is int and 0 <= time_s <= LAST_S:
        return None
    return f"the time_s {_quoted(time_s)}. It must be a whole number of seconds since 1970, up to {LAST_S}."


def _fault_of_propensity(items: Sequence[str], propensity: object) -> str | None:
    if not isinstance(propensity, list):
        return f"the propensity {_quoted(propensity)}. It must be a list of numbers, one for each item."
    if len(propensity) != len(items):
        return f"{len(items)} items, but a list of propensities of length {len(propensity)}. Every item needs one."
    for item, value in zip(items, propensity, strict=True):
        if not _within(value, 1):
            return f"the propensity {_quoted(value)} for the item {_quoted(item)}. It must be a number from 0 to 1."
    return None


def _within(value: object, most: float) -> bool:
    """Return True for a number from 0 to `most`; False for booleans and NaN."""
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= most


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
