"""Read a sample of rows of JSON lines, JSON arrays, JSON texts over several lines, or Python dicts as an Arrow table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from twotower.data.sources.python_values import python_value
from twotower.errors import DataError

SAMPLED_ROWS = 20_000
TRIED_LINES = 200
BETWEEN = re.compile(r"[ \t\r\n,]*")

JsonKind = Literal["JSON lines", "JSON array", "Python dicts", "JSON over several lines"]


def json_rows(text: str, path: Path, *, complete: bool) -> tuple[JsonKind, pa.Table] | None:
    """Return the kind of JSON and its rows, or None if the text is something else."""
    lines = [line for line in islice(text.splitlines(), SAMPLED_ROWS) if line.strip()]
    found = [row for line in lines if isinstance(row := _loads(line, json.loads), dict)]
    if len(found) * 2 > len(lines):
        return "JSON lines", _as_table(found)
    dicts = [row for line in lines[:TRIED_LINES] if isinstance(row := _loads(line, python_value), dict)]
    if len(dicts) * 2 > len(lines[:TRIED_LINES]):
        rest = (row for line in lines[TRIED_LINES:] if isinstance(row := _loads(line, python_value), dict))
        return "Python dicts", _as_table([*dicts, *rest])
    objects = [row for row in islice(_objects(text), SAMPLED_ROWS) if isinstance(row, dict)]
    if objects:
        return "JSON array" if text.lstrip().startswith("[") else "JSON over several lines", _as_table(objects)
    if complete and _loads(text, json.loads) is not None:
        raise DataError(f"{path} is JSON without objects. Expected an object for each row. Convert it to JSON lines.")
    return None


def _loads(text: str, load: Any) -> Any:
    try:
        return load(text.strip().rstrip(","))
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _objects(text: str) -> Iterator[Any]:
    """Yield the values of a JSON array, or of JSON texts one after another; a cut one ends them."""
    decoder, position = json.JSONDecoder(), len(text) - len(text.lstrip())
    position += text[position : position + 1] == "["
    while True:
        position = BETWEEN.match(text, position).end()  # type: ignore[union-attr]
        if position >= len(text) or text[position] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return
        yield value


def _as_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return JSON objects as columns: numbers, texts, lists of texts; anything deeper as JSON text."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({_as_text(name): _as_column([row.get(name) for row in rows]) for name in names})


def _as_column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {int, float} and all(value is None or abs(value) < 1 << 63 for value in values):
        return pa.array(values, pa.int64() if kinds <= {int} else pa.float64())
    if kinds <= {list, tuple, set}:
        return pa.array(
            [None if value is None else [_as_text(part) for part in _flat(value)] for value in values], pa.list_(pa.string())
        )
    return pa.array([None if value is None else _as_text(value) for value in values], pa.string())


def _flat(value: Any) -> Iterator[Any]:
    for part in value:
        if isinstance(part, list | tuple):
            yield from _flat(part)
        else:
            yield part


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
