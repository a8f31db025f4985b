"""Find what is wrong with the rows of an event store: a store may be damaged, or another program may have written to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twotower.errors import DataError
from twotower.serving.event_types import UNREADABLE, Event, LoggedAnswer, answer_from_json, is_text
from twotower.serving.limits import LAST_S
from twotower.utils.console import log


class DamagedRowError(DataError):
    """A row of an event store is damaged. The message names the row, and no address."""


def readable_answers(texts: Iterable[str | None]) -> list[LoggedAnswer]:
    """Return the answers of texts that `answer_as_json` wrote. Those that are missing or damaged are left out."""
    answers = list[LoggedAnswer]()
    for text in texts:
        try:
            answer = None if text is None else answer_from_json(text)
        except UNREADABLE:
            log.warning("left out an answer of the event store that cannot be read")
            continue
        if answer is not None and (fault := fault_of_answer(answer)):
            log.warning("left out an answer of the event store: it has %s", fault)
        elif answer is not None:
            answers.append(answer)
    return answers


def fault_of_event(event: Event) -> str | None:
    """Return what is wrong with an event; None if nothing is."""
    texts = {"user": event.user, "item_id": event.item_id}
    for name, value in {**texts, "event_type": event.event_type, "request_id": event.request_id}.items():
        if not is_text(value) and (value is not None or name in texts):
            return f"the {name} {quoted(value)}. It must be a text."
    if event.stars is not None and not _within(event.stars, 5):
        return f"the stars {quoted(event.stars)}. They must be a number from 0 to 5."
    return _fault_of_time(event.time_s)


def fault_of_answer(answer: LoggedAnswer) -> str | None:
    """Return what is wrong with an answer; None if nothing is."""
    if not is_text(answer.request_id):
        return f"the request_id {quoted(answer.request_id)}. It must be a text."
    if answer.user is not None and not is_text(answer.user):
        return f"the user {quoted(answer.user)}. It must be a text."
    if not isinstance(answer.items, list) or not all(map(is_text, answer.items)):
        return f"the items {quoted(answer.items)}. They must be a list of ids."
    if not is_text(answer.version):
        return f"the version {quoted(answer.version)}. It must be a text."
    if not is_text(answer.request) or not answer.request.startswith("{"):
        return f"the request {quoted(answer.request)}. It must be a JSON object."
    return _fault_of_time(answer.time_s) or _fault_of_propensity(answer.items, answer.propensity)


def _fault_of_time(time_s: object) -> str | None:
    if type(time_s) is int and 0 <= time_s <= LAST_S:
        return None
    return f"the time_s {quoted(time_s)}. It must be a whole number of seconds since 1970, up to {LAST_S}."


def _fault_of_propensity(items: Sequence[str], propensity: object) -> str | None:
    if not isinstance(propensity, list):
        return f"the propensity {quoted(propensity)}. It must be a list of numbers, one for each item."
    if len(propensity) != len(items):
        return f"{len(items)} items, but a list of propensities of length {len(propensity)}. Every item needs one."
    for item, value in zip(items, propensity, strict=True):
        if not _within(value, 1):
            return f"the propensity {quoted(value)} for the item {quoted(item)}. It must be a number from 0 to 1."
    return None


def _within(value: object, most: float) -> bool:
    """Return True for a number from 0 to `most`; False for booleans and NaN."""
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= most


def quoted(value: object) -> str:
    """Return a value for a message, of up to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
