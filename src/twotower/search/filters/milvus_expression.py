"""Store the columns of a catalogue in Milvus, and write filters as Milvus expressions.

An expression matches at least the items that the filter matches. What Milvus cannot say (opening hours by time zone, columns that
are not stored, distances beside their bounding box) is left out, and the caller checks the items that come back.

Texts are stored in lower case and numbers as float64, as `column_index` compares them. Comparisons say `is not null`, so that an
unknown value makes a comparison neither true nor false.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.features.geo import EARTH_KM
from twotower.schema import HOURS_PER_WEEK, ITEM_ID
from twotower.search.filters.column_index import comparable
from twotower.search.filters.item_filter import ItemFilter, ResolvedFilter
from twotower.search.filters.tree import Among, And, Compared, Node, Not, Open, Or, Seen, Value, Within
from twotower.utils.types import Int

ROW = "item_row"
LATITUDE, LONGITUDE, HOURS = "at_latitude", "at_longitude", "at_hours"
NOTHING = f"{ROW} < 0"
MAX_COLUMNS = 40  # a collection of Milvus has at most 64 fields
MAX_TEXT_BYTES, MAX_LIST = 4096, 1024  # of values that are stored; Milvus's limits are 65,535 and 4,096
MAX_ROWS = 1000  # item rows that an expression lists
MARGIN_DEGREES = 1e-3  # the box of a radius is a little larger, so that rounding loses no item
_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}


@dataclass(frozen=True, slots=True)
class StoredColumn:
    """A column of the catalogue in Milvus.

    Attributes
    ----------
    name
        Name of the field.
    number, listed
        True for numbers; True for a column of lists.
    values
        One value or list for each item, null where unknown.
    """

    name: str
    number: bool
    listed: bool
    values: pa.Array


class StoredColumns:
    """The columns of a catalogue that Milvus stores for filters, and the expressions of filters over them.

    Parameters
    ----------
    catalogue
        The filter of the catalogue; it says which columns hold locations and opening hours.

    Attributes
    ----------
    columns
        Stored columns by the name in the catalogue.
    """

    def __init__(self, catalogue: ItemFilter) -> None:
        self.columns: dict[str, StoredColumn] = {}
        self._items, self._locations = catalogue.items, catalogue.locations
        self.located = bool(np.isfinite(catalogue.locations).all(axis=1).any())
        self.hours = catalogue.hours if catalogue.hours and not catalogue.zoned else None
        for name in catalogue.items.column_names:
            if name not in (ITEM_ID, catalogue.hours) and len(self.columns) < MAX_COLUMNS:
                stored = _stored(f"f_{_identifier(name, len(self.columns))}", catalogue.items[name])
                if stored is not None:
                    self.columns[name] = stored

    def add_fields(self, schema: Any) -> None:
        """Add the fields of the columns to a schema of Milvus."""
        from pymilvus import DataType

        if self.located:
            for name in (LATITUDE, LONGITUDE):
                schema.add_field(name, DataType.DOUBLE, nullable=True)
        if self.hours is not None:
            schema.add_field(HOURS, DataType.ARRAY, element_type=DataType.INT16, max_capacity=HOURS_PER_WEEK, nullable=True)
        for column in self.columns.values():
            kind = DataType.DOUBLE if column.number else DataType.VARCHAR
            flat = pc.list_flatten(column.values) if column.listed else column.values
            more = {} if column.number else {"max_length": longest_text(flat)}
            if column.listed:
                longest = pc.max(pc.list_value_length(column.values)).as_py() or 0
                more |= {"element_type": kind, "max_capacity": max(longest, 1)}
            schema.add_field(column.name, DataType.ARRAY if column.listed else kind, nullable=True, **more)

    def fields(self, at: Int) -> dict[str, list[Any]]:
        """Return the values of the fields for items at these positions."""
        values: dict[str, list[Any]] = {}
        if self.located:
            values |= {name: nan_to_null(self._locations[at, side]) for side, name in enumerate((LATITUDE, LONGITUDE))}
        if self.hours is not None:
            open_ = self._items[self.hours].take(pa.array(at)).to_pylist()
            values[HOURS] = [None if one is None else [hour for hour, sign in enumerate(one) if sign == "1"] for one in open_]
        for column in self.columns.values():
            found = column.values.take(pa.array(at)).to_pylist()
            values[column.name] = [
                [one for one in each if one is not None] if column.listed and each is not None else each for each in found
            ]
        return values

    def expression(self, filter_: ResolvedFilter) -> str:
        """Return an expression that matches at least the items of a filter; "" matches all items."""
        return self._certain(filter_.tree, True, filter_.seen) or ""

    def _certain(self, node: Node, holds: bool, seen: Int | None) -> str | None:
        """Return the expression of the items that match, or with `holds` False of those that do not; None: it cannot be said."""
        if isinstance(node, Not):
            return self._certain(node.part, not holds, seen)
        if isinstance(node, And | Or):
            parts = [self._certain(part, holds, seen) for part in node.parts]
            known = [part for part in parts if part is not None]
            if isinstance(node, And) is holds:
                return f"({' and '.join(known)})" if known else None
            return None if len(known) < len(parts) else f"({' or '.join(known)})" if known else NOTHING
        if isinstance(node, Seen):
            return rows_expression([] if seen is None else seen.tolist(), holds)
        if isinstance(node, Within):
            return self._within(node) if self.located and holds else None
        if isinstance(node, Open):
            if self.hours is None or node.hour is None:
                return None
            said = f"array_contains({HOURS}, {node.hour})"
            return said if holds else f"({HOURS} is not null and not {said})"
        column = self.columns.get(node.column)
        return None if column is None else _comparison(column, node, holds)

    def _within(self, node: Within) -> str | None:
        """Return the bounding box of a circle."""
        if node.near is None:
            return None
        latitude, longitude = node.near
        high = float(np.degrees(node.km / EARTH_KM)) + MARGIN_DEGREES
        parts = [f"{LATITUDE} >= {latitude - high!r}", f"{LATITUDE} <= {latitude + high!r}"]
        widest = np.cos(np.radians(min(abs(latitude) + high, 90.0)))
        wide = 360.0 if widest <= 0 else float(high / max(widest, 1e-9))
        if longitude - wide >= -180 and longitude + wide <= 180:  # else it crosses the 180th meridian, or holds a pole
            parts += [f"{LONGITUDE} >= {longitude - wide!r}", f"{LONGITUDE} <= {longitude + wide!r}"]
        return f"({' and '.join(parts)})"


def rows_expression(rows: Sequence[int], holds: bool = True) -> str | None:
    """Return the expression of the items with these rows, or of all others; None if there are too many rows."""
    if not rows:
        return NOTHING if holds else None
    if len(rows) > MAX_ROWS:
        return None
    return f"{ROW} {'in' if holds else 'not in'} [{', '.join(map(str, rows))}]"


def _comparison(column: StoredColumn, node: Among | Compared, holds: bool) -> str | None:
    name = column.name
    if isinstance(node, Compared):
        bound = node.bound if holds else _OPPOSITE[node.bound]
        return f"{name} {bound} {_literal(float(node.value))}"
    literals = _literals(column, node.values)
    if literals is None:
        return None
    if not literals:
        return NOTHING if holds else f"{name} is not null"
    listed = f"[{', '.join(literals)}]"
    if column.listed:
        said = f"array_contains_any({name}, {listed})"
        return said if holds else f"({name} is not null and not {said})"
    return f"{name} in {listed}" if holds else f"({name} is not null and {name} not in {listed})"


def _literals(column: StoredColumn, values: Sequence[Value]) -> list[str] | None:
    """Return values as literals; None if one has characters that not every version of Milvus reads alike."""
    if column.number:
        return [_literal(float(value)) for value in values]
    texts = pc.utf8_lower(pa.array([str(value) for value in values], pa.string())).to_pylist()
    if any(re.search(r'[\x00-\x1f\x7f"\'\\%]', text) for text in texts):
        return None
    return [f'"{text}"' for text in texts]


def _literal(number: float) -> str:
    """Return a float64 as a literal that is a float and no integer: Milvus refuses integers that float64 cannot hold."""
    return repr(number)


def _identifier(name: str, number: int) -> str:
    """Return a name for a field: letters, digits and underscores, unique by its number."""
    return f"{number}_{re.sub('[^A-Za-z0-9]+', '_', name).strip('_')[:40]}".rstrip("_")


def _stored(name: str, column: pa.ChunkedArray) -> StoredColumn | None:
    """Return a column as it is stored; None for types that filters cannot compare and for very long values."""
    try:
        values, number, listed = comparable(column)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    flat = pc.list_flatten(values) if listed else values
    if not number and (pc.max(pc.binary_length(flat)).as_py() or 0) > MAX_TEXT_BYTES:
        return None
    if listed and (pc.max(pc.list_value_length(values)).as_py() or 0) > MAX_LIST:
        return None
    return StoredColumn(name, number, listed, values)


def longest_text(texts: pa.Array | pa.ChunkedArray) -> int:
    """Return the length of the longest text in bytes, at least 1."""
    return max(pc.max(pc.binary_length(texts)).as_py() or 0, 1)


def nan_to_null(values: Any) -> list[float | None]:
    """Return numbers with None for NaN."""
    return [None if value != value else value for value in np.asarray(values, np.float64).tolist()]
