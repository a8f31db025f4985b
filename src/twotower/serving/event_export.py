"""Write the accepted events, or the logged answers, of a store as Parquet, while servers go on.

The events have the columns that `twotower update` reads: `user_id`, `item_id`, `time` (seconds), `event_type`, `stars`, `position`
and `request`. The file appears at once, complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.errors import DataError, RequestError, clause
from twotower.serving.event_types import Event, EventStore, LoggedAnswer
from twotower.serving.stored_rows import every_answer, every_event, reading
from twotower.utils.atomic_files import atomic_file

MARK = b"twotower"  # key of the Parquet metadata; the value says what a file holds
EVENTS, ANSWERS = b"events", b"answers"
ANSWERS_A_GROUP = 5000
EVENT_SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "time": pa.int64(),
        "event_type": pa.string(),
        "stars": pa.float64(),
        "position": pa.int64(),
        "request": pa.string(),
    },
    {MARK: EVENTS},
)
ANSWER_SCHEMA = pa.schema(
    {
        "request_id": pa.string(),
        "time_s": pa.int64(),
        "version": pa.string(),
        "user_id": pa.string(),
        "items": pa.list_(pa.string()),
        "propensity": pa.list_(pa.float64()),
        "request": pa.string(),
    },
    {MARK: ANSWERS},
)


def since_of(text: str | None) -> int:
    """Return the time that a text names, in seconds; 0 without one.

    Raises
    ------
    RequestError
        It is no time, or it has not come yet.

    Examples
    --------
    >>> since_of("1970-01-02"), since_of("1970-01-01T00:01:00Z"), since_of("86400"), since_of(None)
    (86400, 60, 86400, 0)
    """
    if text is None:
        return 0
    try:
        moment = None if text.isdigit() else datetime.fromisoformat(text.strip())
        seconds = int(text) if moment is None else int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise RequestError(
            f"since is {text[:40]!r}. Expected a day or a time in UTC, such as 2026-11-01 or 2026-11-01T15:00, or seconds."
        ) from None
    if not 0 <= seconds <= time.time():
        raise RequestError(f"since is {text[:40]!r}, which is not between 1970 and now. Give a time that has passed.")
    return seconds


def export_events(url: str, out: Path, since_s: int = 0, *, answers: bool = False) -> int:
    """Write the events of a store from a time on to `out`, and return their number; with `answers`, the logged answers.

    Raises
    ------
    DataError
        The store or the file cannot be opened, or a row of the store is damaged. Then `out` stays as it was.
    """
    try:
        with reading(url) as store, atomic_file(out) as beside:
            schema, count = ANSWER_SCHEMA if answers else EVENT_SCHEMA, 0
            with pq.ParquetWriter(beside, schema, compression="zstd") as writer:
                for table in _answers(store, since_s) if answers else _events(store, since_s):
                    writer.write_table(table)
                    count += len(table)
        return count
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else clause(error)
        raise DataError(f"Cannot write {out}: {reason}. Choose a writable path with enough space.") from None


def event_table(events: list[Event]) -> pa.Table:
    """Return events in the columns of an export."""
    columns = [
        [event.user for event in events],
        [event.item_id for event in events],
        [event.time_s for event in events],
        [event.event_type for event in events],
        [event.stars for event in events],
        [event.position for event in events],
        [event.request_id for event in events],
    ]
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, EVENT_SCHEMA, strict=True)], schema=EVENT_SCHEMA
    )


def answer_table(answers: list[LoggedAnswer]) -> pa.Table:
    """Return answers in the columns of an export."""
    rows = [
        {
            "request_id": one.request_id,
            "time_s": one.time_s,
            "version": one.version,
            "user_id": one.user,
            "items": one.items,
            "propensity": one.propensity,
            "request": one.request,
        }
        for one in answers
    ]
    return pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA)


def kind_of(path: Path) -> bytes | None:
    """Return `EVENTS` or `ANSWERS` if a file is such an export; else None."""
    try:
        return (pq.read_schema(path).metadata or {}).get(MARK)
    except (OSError, pa.ArrowInvalid):
        return None


def _events(store: EventStore, since_s: int) -> Iterator[pa.Table]:
    for page in every_event(store):
        yield event_table([event for event in page if event.time_s >= since_s])


def _answers(store: EventStore, since_s: int) -> Iterator[pa.Table]:
    rows: list[LoggedAnswer] = []
    for answer in every_answer(store):
        if answer.time_s >= since_s:
            rows.append(answer)
        if len(rows) == ANSWERS_A_GROUP:
            yield answer_table(rows)
            rows = []
    if rows:
        yield answer_table(rows)
