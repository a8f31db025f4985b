"""Make an example of a filter from the columns of a catalogue."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SAMPLE_ITEMS, MAX_CHARS = 20_000, 30
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FLAGS = ("is_open",)


def example_filter(items: pa.Table, category: str | None, without: Collection[str | None]) -> str:
    """Return a filter that compares a text and a number, as far as the catalogue has columns of them.

    Parameters
    ----------
    items
        Raw columns.
    category
        Column of the categories, or None.
    without
        Columns that are not shown: ids, names, hours, coordinates.

    Examples
    --------
    >>> example_filter(pa.table({"brand": ["Uji", "Uji", "Yame", "Uji"], "price": [5, 20, 30, 20]}), None, ())
    'brand == "Uji" and price <= 20'
    """
    sample = items.slice(0, SAMPLE_ITEMS)
    names = [name for name in sample.column_names if name not in without and name not in FLAGS and NAME.fullmatch(name)]
    texts = ((name, _common_text(sample[name])) for name in sorted(names, key=lambda name: name != category))
    numbers = ((name, _middle_number(sample[name])) for name in sorted(names, key=lambda name: name != "price"))
    text = next((f'{"category" if name == category else name} == "{value}"' for name, value in texts if value), None)
    number = next((f"{name} <= {value:g}" for name, value in numbers if value is not None), None)
    return " and ".join(part for part in (text, number) if part)


def _common_text(column: pa.ChunkedArray) -> str | None:
    """Return the most common text of a column that repeats few texts; None for other columns."""
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else column
    if not (pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type)):
        return None
    counted = flat.drop_null().value_counts().to_pylist()
    short = [one for one in counted if 0 < len(one["values"]) <= MAX_CHARS and not {'"', "\\", "\n"} & set(one["values"])]
    best = max(short, key=lambda one: (one["counts"], one["values"]), default=None)
    return str(best["values"]) if best and best["counts"] > 1 and len(counted) <= len(flat) / 2 else None


def _middle_number(column: pa.ChunkedArray) -> float | None:
    """Return a round number near the middle of a column of numbers with several values; None for other columns."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return None
    values = column.drop_null().to_numpy()
    values = values[np.isfinite(values)]
    return float(f"{np.median(values):.2g}") if len(np.unique(values)) > 1 else None
