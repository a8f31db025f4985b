"""Turn frames and what the caller says of their columns into tables in memory and the settings that describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.sources.guess import DatasetGuess, guess_dataset
from twotower.data.sources.json_rows import SAMPLED_ROWS
from twotower.errors import DataError
from twotower.utils.columns import plain, whole_numbers
from twotower.utils.config import merged
from twotower.utils.frames import as_kind, as_table, check_column, column_names, head, kind_of, once_readable
from twotower.utils.ids import ID_TYPE

EVENTS, ITEMS, USERS = "events", "items", "users"
SECTIONS = {EVENTS: "interactions", ITEMS: "items", USERS: "users"}
"""Frames, and the sections of `data:` that describe them."""
KEYS = ("user_id", "item_id")


@dataclass(frozen=True)
class Described:
    """Tables in memory and the section `data:` that describes them."""

    tables: dict[str, pa.Table]
    data: dict[str, Any]


def describe_frames(frames: Mapping[str, Any], named: Mapping[str, str], given: Mapping[str, Any]) -> Described:
    """Return the tables and settings of the frames "events" and, if there are any, "items" and "users".

    Parameters
    ----------
    named
        Columns by role, see `guess_dataset`.
    given
        Settings of the section `data:` that override what is guessed.

    Raises
    ------
    DataError
        A frame is none or has no rows, a column is missing, or the columns of users and items are not clear.
    """
    roles = {SECTIONS[name]: given.get(SECTIONS[name]) or {} for name in frames}
    keys = {"user": roles["interactions"].get("user_id"), "item": roles["interactions"].get("item_id")}
    known = {**named_columns(keys), **named}
    found = guess({name: _sample(frame, name, known) for name, frame in frames.items()}, known)
    data = merged(found.to_config(), {**given, **{name: section for name, section in roles.items() if section}})
    return Described(tables_of(frames, data), data)


def tables_of(frames: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, pa.Table]:
    """Return the frames "events", "items" and "users" as the tables that the section `data:` describes.

    Raises
    ------
    DataError
        A column is missing, or the section describes no such table.
    """
    tables = {}
    for name, frame in frames.items():
        columns, section = column_names(frame, name), data.get(SECTIONS[name])
        if section is None:
            raise DataError(f"No column of {name} has the ids of events. It has {', '.join(columns[:8])}. Rename its id column.")
        ids = [section[key] for key in KEYS if key in section]
        for column in ids:
            check_column(column, columns, name)
        used = [value for value in section.values() if isinstance(value, str) and value in columns]
        alone = name == EVENTS and not any("from" in (data.get(other) or {}) for other in (ITEMS, USERS))
        table = as_table(frame, name, used if alone else None, required=ids)
        tables[name] = _whole_ids(table, ids, name)
    return tables


def guess(samples: Mapping[str, pa.Table], named: Mapping[str, str]) -> DatasetGuess:
    """Return the guess of what tables with the names "events", "items" and "users" hold."""
    main, *others = [name if name in samples else None for name in (EVENTS, ITEMS, USERS)]
    return guess_dataset(samples, interactions=main, items=others[0], users=others[1], **named)


def describe(events: Any, items: Any = None, users: Any = None, **named: str) -> Any:
    """Show what the columns of a table hold, as `Model.fit` would read them.

    Parameters
    ----------
    events, items, users
        Frames, as for `Model.fit`.
    **named
        Columns by role that you know, as for `Model.fit`: `user="customer"`.

    Returns
    -------
    frame
        A row per column, in the caller's kind of frame: "table" (if there are several), "column", "role", "kind", "missing" (a
        share), "distinct", "examples" and "reason".

    Raises
    ------
    DataError
        A value is no frame, or a named column does not exist.

    Examples
    --------
    >>> orders = pa.table({"customer": ["a", "b", "a"], "product": ["x", "x", "y"]})
    >>> describe(orders)["role"].to_pylist()
    ['user', 'item']
    """
    frames, named = named_frames(events, items, users), named_columns(named)
    samples = {name: _sample(frame, name, named) for name, frame in frames.items()}
    rows = []
    for table in guess(samples, named).tables:
        for one in table.columns:
            facts: dict[str, Any] = {"role": one.role, "kind": one.kind, "missing": one.missing, "distinct": one.distinct}
            about = {"examples": ", ".join(one.examples), "reason": one.reason}
            rows.append({"table": table.sample.name, "column": one.name, **facts, **about})
    roles = pa.Table.from_pylist(rows)
    return as_kind(roles if len(frames) > 1 else roles.drop_columns(["table"]), kind_of(events))


def named_frames(events: Any, items: Any, users: Any) -> dict[str, Any]:
    """Return the frames by name, without those that are None; a stream that can be read only once becomes a table."""
    given = {EVENTS: events, ITEMS: items, USERS: users}
    return {name: once_readable(frame, name) for name, frame in given.items() if frame is not None or name == EVENTS}


def _sample(frame: Any, name: str, named: Mapping[str, str]) -> pa.Table:
    """Return the first rows of a frame, as a table; the columns that were named must be readable."""
    first = head(frame, name, SAMPLED_ROWS)
    columns = column_names(first, name)
    sample = plain(as_table(first, name, required=[column for column in named.values() if column in columns]))
    if not sample.num_rows:
        raise DataError(f"{name} has no rows. Pass a frame with at least one.")
    return sample


def named_columns(roles: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns that are named, by role.

    Raises
    ------
    DataError
        A column is named by something else than a text or a number.
    """
    for role, column in roles.items():
        if column is not None and (isinstance(column, bool) or not isinstance(column, str | int)):
            raise DataError(f"{role} is a {type(column).__name__}. It must be the name of one column: {role}='customer'.")
    return {role: str(column) for role, column in roles.items() if column is not None}


def _whole_ids(table: pa.Table, keys: list[str], what: str) -> pa.Table:
    """Return the table with float columns of ids as integers. pandas converts integer columns with missing values to floats.

    Raises
    ------
    DataError
        A column has truth values, or numbers that are not whole: no ids that could be asked for.
    """
    for key in keys:
        column = table[key]
        if pa.types.is_boolean(column.type):
            raise DataError(f"The column {key!r} of {what} has truth values. An id is a text or an integer. Name another column.")
        if pa.types.is_duration(column.type) or pa.types.is_time(column.type):
            raise DataError(
                f"The column {key!r} of {what} has durations or times of day. An id is a text or an integer. Convert it."
            )
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            field = pa.field(key, pa.string(), metadata={ID_TYPE: "binary"})
            table = table.set_column(table.column_names.index(key), field, _decoded(column, key, what))
        if pa.types.is_decimal(column.type) and column.type.scale:
            column = column.cast(pa.float64())
        if pa.types.is_floating(column.type) and len(column) > column.null_count:
            if whole_numbers(column):
                whole = pc.if_else(pc.is_finite(column), column, None).cast(pa.int64())
                table = table.set_column(table.column_names.index(key), key, whole)
            elif pc.any(pc.is_finite(column)).as_py():
                raise DataError(
                    f"The column {key!r} of {what} has numbers that are not whole. An id is a text or an integer. Convert it."
                )
    return table


def _decoded(column: pa.ChunkedArray, key: str, what: str) -> pa.ChunkedArray:
    """Return a column of bytes as texts."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        raise DataError(
            f"The column {key!r} of {what} has bytes that are no text in UTF-8. An id is a text or an integer. Convert it to texts."
        ) from None
