"""Bring Arrow columns to types that every engine knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from twotower.errors import DataError
from twotower.utils.console import log
from twotower.utils.ids import ID_TYPE, UUIDS


def plain(table: pa.Table) -> pa.Table:
    """Return a table with column types that every engine knows: no dictionaries, views, zones or lists of fixed length."""
    columns = {
        name: column.cast(kind) if (kind := _plain(column.type)) != column.type else column for name, column in _items(table)
    }
    return pa.table(columns)


def simple_columns(table: pa.Table, what: str, required: Sequence[str]) -> pa.Table:
    """Return a table with UUIDs as text and without columns that hold several values or types of another library.

    Such a column is an error if it is required or the only one; otherwise a warning names it.
    """
    types = pa.types
    for name, column in _items(table):
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        if str(kind) == "extension<arrow.uuid>":
            texts = pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
            field = pa.field(name, pa.string(), metadata={ID_TYPE: UUIDS})
            table = table.set_column(table.column_names.index(name), field, texts)
        elif types.is_struct(kind) or types.is_map(kind) or types.is_union(kind) or isinstance(kind, pa.BaseExtensionType):
            message = f"The column {name!r} of {what} has the type {str(kind)[:60]}, which has no single values. Convert it."
            if name in required or table.num_columns == 1:
                raise DataError(message)
            log.warning("%s The column is left out.", message)
            table = table.drop_columns([name])
    return table


def whole_numbers(values: pa.ChunkedArray) -> bool:
    """Return True if a column of numbers has whole numbers alone; NaN and null aside, as in ids that pandas turned into floats."""
    numbers = values.drop_null().to_numpy()
    numbers = numbers[np.isfinite(numbers)]
    return bool(len(numbers)) and bool((numbers == np.floor(numbers)).all())


def _items(table: pa.Table) -> list[tuple[str, pa.ChunkedArray]]:
    return [(name, table.column(number)) for number, name in enumerate(table.column_names)]


def _plain(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_timestamp(kind):
        return pa.timestamp("us") if kind.tz is not None or kind.unit == "ns" else kind
    if types.is_null(kind) or types.is_string_view(kind) or types.is_large_string(kind):
        return pa.string()
    if types.is_float16(kind):
        return pa.float32()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind
