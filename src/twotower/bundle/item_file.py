"""A file of new items → rows of the catalogue's own columns and types.

Enters: JSON lines, CSV or Parquet. Leaves: a table with the schema of the catalogue. Promise: a column the catalogue lacks, a value
that is none of its type, a repeated or missing id is one `DataError` that names file, line and column.
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

from twotower.errors import DataError, nearest
from twotower.features.item_columns import is_list
from twotower.schema import HOURS_PER_WEEK, ITEM_ID, FeatureSpec

FORMS = (".jsonl", ".csv", ".parquet")
DEGREES = (90.0, 180.0)


def read_items(file: Path, schema: pa.Schema, specs: Sequence[FeatureSpec]) -> pa.Table:
    """Read `file` as items of a catalogue of this schema; columns it lacks are null.

    Lists in a CSV file are JSON lists, or values between commas.

    Raises
    ------
    DataError
        The file cannot be read, or a row cannot be an item.
    """
    if not file.is_file() or file.suffix.lower() not in FORMS:
        raise DataError(f"New items come in a file {', '.join(FORMS)}. Got {file}. Check the path, or convert the file.")
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    limits = {name: limit for spec in specs if spec.kind == "geo" for name, limit in zip(spec.columns, DEGREES, strict=True)}
    hours = {spec.columns[0] for spec in specs if spec.kind == "hours"}
    for number, row in _rows(file):
        try:
            values = _typed(row, schema, limits, hours)
        except (ValueError, TypeError) as error:
            raise DataError(f"A row must be an item of the catalogue. {file}, row {number}: {error}.") from None
        if values[ITEM_ID] in seen:
            raise DataError(f"An item comes once. {file}, row {number} repeats {values[ITEM_ID]!r} of row {seen[values[ITEM_ID]]}.")
        seen[values[ITEM_ID]] = number
        rows.append(values)
    if not rows:
        raise DataError(f"A file of new items must hold some. {file} holds none.")
    return pa.Table.from_pylist(rows, schema)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by their number, from 1."""
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
        raise DataError(f"New items must be readable. {file}: {' '.join(str(error).split())[:200]}. Mend the file.") from None


def _typed(row: Any, schema: pa.Schema, limits: dict[str, float], hours: set[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("it is no object with columns")
    for name in row:
        if name not in schema.names:
            raise ValueError(f"the catalogue has no column {str(name)[:60]!r}.{nearest(str(name), schema.names)}")
    values = {field.name: _value(row.get(field.name), field) for field in schema}
    if not values[ITEM_ID]:
        raise ValueError(f"{ITEM_ID} is missing")
    for name, limit in limits.items():
        if values[name] is not None and not abs(values[name]) <= limit:
            raise ValueError(f"{name} must be from -{limit:.0f} to {limit:.0f}, not {values[name]}")
    for name in hours:
        if values[name] is not None and (len(values[name]) != HOURS_PER_WEEK or set(values[name]) - {"0", "1"}):
            raise ValueError(f"{name} must be {HOURS_PER_WEEK} characters of 0 and 1")
    return values


def _value(value: Any, field: pa.Field) -> Any:
    """A value of the type of its column; ValueError where it cannot be."""
    if value is None:
        return None
    kind = field.type
    if is_list(kind):
        values = _listed(value) if isinstance(value, str) else value
        if not isinstance(values, list):
            raise ValueError(f"{field.name} must be a list, not {str(value)[:60]!r}")
        return [_value(part, pa.field(field.name, kind.value_type)) for part in values if part is not None]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _number(value, field)
    if not pa.types.is_string(kind) or isinstance(value, (list, dict)):
        raise ValueError(f"{field.name} must be of type {kind}, not {str(value)[:60]!r}")
    return str(value)


def _listed(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("[") else [part.strip() for part in text.split(",") if part.strip()]


def _number(value: Any, field: pa.Field) -> float | int:
    whole = pa.types.is_integer(field.type)
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (whole and not (number == int(number) and abs(number) < 2**53)):
        raise ValueError(f"{field.name} must be a number ({field.type}), not {str(value)[:60]!r}")
    return int(number) if whole else number
