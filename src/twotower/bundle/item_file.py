"""Read items, of a file (JSON lines, CSV or Parquet) or of a request, with the columns and types of the catalogue.

An unknown column, a value of the wrong type, or a repeated or missing id raises a `DataError` that names the file and the row.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.errors import DataError, clause, nearest
from twotower.features.item_columns import is_list
from twotower.schema import HOURS_PER_WEEK, ITEM_ID, FeatureSpec

FORMS = (".jsonl", ".csv", ".parquet")
DEGREES = (90.0, 180.0)


def read_items(file: Path, schema: pa.Schema, specs: Sequence[FeatureSpec]) -> pa.Table:
    """Read `file` as items of a catalogue with this schema. Missing columns are null.

    Lists in a CSV file are JSON lists or comma-separated values.

    Raises
    ------
    DataError
        The file cannot be read, or a row cannot be an item.
    """
    if not file.is_file() or file.suffix.lower() not in FORMS:
        raise DataError(f"Cannot read new items from {file}. Expected an existing file that ends with {', '.join(FORMS)}.")
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    read = ItemReader(schema, specs)
    for number, row in _rows(file):
        try:
            values = read(row)
        except (ValueError, TypeError) as error:
            raise DataError(f"Invalid item in {file}, row {number}: {clause(error)}.") from None
        if values[ITEM_ID] in seen:
            raise DataError(
                f"{file}, row {number} repeats item {values[ITEM_ID]!r} of row {seen[values[ITEM_ID]]}. Keep one of the two rows."
            )
        seen[values[ITEM_ID]] = number
        rows.append(values)
    if not rows:
        raise DataError(f"{file} contains no items. Add at least one row.")
    return pa.Table.from_pylist(rows, schema)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows with their number, from 1."""
    try:
        if file.suffix.lower() == ".parquet":
            yield from enumerate(pq.read_table(file).to_pylist(), 1)
        elif file.suffix.lower() == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as source:
                for number, cells in enumerate(csv.DictReader(source, strict=True), 1):
                    yield number, {name: value or None for name, value in cells.items()}
        else:
            with file.open(encoding="utf-8") as source:
                for number, line in enumerate(source, 1):
                    if line.strip():
                        yield number, json.loads(line)
    except (ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"Cannot read {file}: {' '.join(str(error).split())[:200]}. Correct the file.") from None


class ItemReader:
    """Reads an object with columns as an item of a catalogue. Missing columns are null.

    Examples
    --------
    >>> read = ItemReader(pa.schema([("item_id", pa.string()), ("price", pa.int64())]), [])
    >>> read({"item_id": "a", "price": "3"})
    {'item_id': 'a', 'price': 3}
    """

    def __init__(self, schema: pa.Schema, specs: Sequence[FeatureSpec]) -> None:
        self.schema = schema
        self._limits = {
            name: limit for spec in specs if spec.kind == "geo" for name, limit in zip(spec.columns, DEGREES, strict=True)
        }
        self._hours = {spec.columns[0] for spec in specs if spec.kind == "hours"}

    def __call__(self, row: Any) -> dict[str, Any]:
        """Return the values of all columns. Raise a ValueError that says why the row cannot be an item."""
        if not isinstance(row, dict):
            raise ValueError("the row is not an object with columns")
        for name in row:
            if name not in self.schema.names:
                raise ValueError(f"the catalogue has no column {str(name)[:60]!r}.{nearest(str(name), self.schema.names)}")
        values = {field.name: _value(row.get(field.name), field) for field in self.schema}
        if not values[ITEM_ID]:
            raise ValueError(f"{ITEM_ID} is missing")
        for name, limit in self._limits.items():
            if values[name] is not None and not abs(values[name]) <= limit:
                raise ValueError(f"{name} is {values[name]}; it must be from -{limit:.0f} to {limit:.0f}")
        for name in self._hours:
            if values[name] is not None and (len(values[name]) != HOURS_PER_WEEK or set(values[name]) - {"0", "1"}):
                raise ValueError(f"{name} must be {HOURS_PER_WEEK} characters of 0 and 1")
        return values


def _value(value: Any, field: pa.Field) -> Any:
    """Return the value with the type of its column. Raise ValueError if it cannot be converted."""
    if value is None:
        return None
    kind = field.type
    if is_list(kind):
        try:
            values = _listed(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, list):
            raise ValueError(f"{field.name} is {str(value)[:60]!r}; it must be a list")
        return [_value(part, pa.field(field.name, kind.value_type)) for part in values if part is not None]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _number(value, field)
    if not pa.types.is_string(kind) or isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{field.name} is {str(value)[:60]!r}; it must be of type {kind}")
    return str(value)


def _listed(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("[") else [part.strip() for part in text.split(",") if part.strip()]


def _number(value: Any, field: pa.Field) -> float | int:
    whole = pa.types.is_integer(field.type)
    try:
        plain = value.isascii() and "_" not in value if isinstance(value, str) else isinstance(value, (int, float))
        number = float(value) if plain and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (whole and not (number == int(number) and abs(number) < 2**53)):
        raise ValueError(f"{field.name} is {str(value)[:60]!r}; it must be a number ({field.type})")
    return int(number) if whole else number
