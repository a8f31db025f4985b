"""Read the log of a server for estimates."""

from __future__ import annotations

from twotower.serving.event_types import Event, LoggedAnswer
from twotower.serving.stored_rows import every_answer, every_event, reading


def read_log(url: str) -> tuple[list[Event], list[LoggedAnswer]]:
    """Return the events and the answers of a store.

    Raises
    ------
    DataError
        The store cannot be opened, or a row is not valid. The message names the row.
    BusyError
        The store does not respond.
    """
    with reading(url) as store:
        events = [event for page in every_event(store) for event in page]
        return events, list(every_answer(store))
