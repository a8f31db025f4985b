"""Turn frames and what the caller says of their columns into tables in memory and the settings that describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import DataError
from twotower.utils.frames import as_table, check_column, column_names, whole_numbers

EVENTS, ITEMS, USERS = "events", "items", "users"
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
        Columns by role: "user", "item", "time", "rating", "event_type", "text", "name".
    given
        Settings of the section `data:` that override what is found.

    Raises
    ------
    DataError
        A frame is none or has no rows, a column is missing, or the columns of users and items are not clear.
    """
    data: dict[str, Any] = {"source": "tables", "interactions": _events(named)}
    if ITEMS in frames:
        data["items"] = {"path": ITEMS, "item_id": named.get("item", "item_id"), **({"name": named["name"]} if "name" in named else {})}
    if USERS in frames:
        data["users"] = {"path": USERS, "user_id": named.get("user", "user_id")}
    data = merged(data, given)
    tables = {}
    for name, frame in frames.items():
        section = data["interactions" if name == EVENTS else name]
        keys = [section[key] for key in KEYS if key in section]
        columns = column_names(frame, name)
        for key in keys:
            check_column(key, columns, name)
        used = [value for value in section.values() if isinstance(value, str) and value in columns]
        table = as_table(frame, name, used if name == EVENTS else None, required=keys)
        if not table.num_rows:
            raise DataError(f"{name} has no rows. Pass a frame with at least one.")
        tables[name] = _whole_ids(table, keys)
    return Described(tables, data)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with those of `over` in place of equal ones.

    Examples
    --------
    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    found = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = merged(found[name], value) if both else value
    return found


def _events(named: Mapping[str, str]) -> dict[str, Any]:
    settings = {"user": "user_id", "item": "item_id", "time": "time", "rating": "stars", "event_type": "event_type", "text": "text"}
    return {"path": EVENTS, **{setting: named[role] for role, setting in settings.items() if role in named}}


def _whole_ids(table: pa.Table, keys: list[str]) -> pa.Table:
    """Return the table with ids as integers where they are whole numbers in a column of floats, as pandas makes of missing ones."""
    for key in keys:
        column = table[key]
        if pa.types.is_floating(column.type) and whole_numbers(column):
            whole = pc.if_else(pc.is_finite(column), column, None).cast(pa.int64())
            table = table.set_column(table.column_names.index(key), key, whole)
    return table
