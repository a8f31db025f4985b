"""Find the columns of the items table with coordinates, categories and opening hours, under any name.

A feature may use another column than the one for display and filters, such as attribute ids next to category names. With
`learned`, functions choose the column of the feature; models and baselines may use only that one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.schema import HOURS_PER_WEEK, FeatureSpec, Kind
from twotower.utils.types import Float64

COORDINATES = ("latitude", "longitude")


def location_columns(items: pa.Table, specs: Sequence[FeatureSpec], *, learned: bool = False) -> tuple[str, str] | None:
    """Return the columns of the first "geo" feature, else (unless `learned`) "latitude" and "longitude", else None."""
    for columns in _columns(specs, "geo").values():
        return columns[0], columns[1]
    return None if learned or not all(_is_number(items, name) for name in COORDINATES) else COORDINATES


def locations(items: pa.Table, columns: tuple[str, str] | None) -> Float64:
    """Return float64 [n, 2]: latitude and longitude in degrees; both NaN if either is unknown."""
    found = np.full((len(items), 2), np.nan)
    for axis, name in enumerate(columns or ()):
        found[:, axis] = pc.fill_null(items[name].cast(pa.float64()), float("nan")).to_numpy()
    found[~np.isfinite(found).all(axis=1)] = np.nan
    return found


def category_column(items: pa.Table, specs: Sequence[FeatureSpec], *, learned: bool = False) -> str | None:
    """Return the column of categories (a list of strings, or a string), or None.

    Order of preference: column "categories"; column of the multi-valued feature "categories"; column "category"; columns of the
    other multi-valued features. With `learned` the first two are swapped.
    """
    multi = {name: columns[0] for name, columns in _columns(specs, "multi").items()}
    own = ["categories", multi.get("categories")]
    order = [*(reversed(own) if learned else own), "category", *multi.values()]
    return next((name for name in order if name and name in items.column_names and _is_text(items[name].type)), None)


def hours_column(items: pa.Table, specs: Sequence[FeatureSpec]) -> str | None:
    """Return the column of opening hours: that of the first "hours" feature, else "hours" if it holds 168 characters, else None."""
    for columns in _columns(specs, "hours").values():
        return columns[0]
    if "hours" not in items.column_names or not pa.types.is_string(items["hours"].type):
        return None
    lengths = pc.unique(pc.utf8_length(items["hours"])).to_pylist()
    return "hours" if {length for length in lengths if length is not None} == {HOURS_PER_WEEK} else None


def as_lists(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as lists: a value becomes a list of one element, null an empty list.

    Examples
    --------
    >>> as_lists(pa.chunked_array([["a", None]])).to_pylist()
    [['a'], []]
    """
    if is_list(column.type):
        return column.combine_chunks()
    strings = column.combine_chunks().cast(pa.string())
    offsets = np.append(0, np.cumsum(strings.is_valid().to_numpy(zero_copy_only=False)))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), strings.drop_null())


def is_list(kind: pa.DataType) -> bool:
    """Return True if a column of this type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _columns(specs: Sequence[FeatureSpec], kind: Kind) -> dict[str, tuple[str, ...]]:
    return {spec.name: spec.columns for spec in specs if spec.side == "item" and spec.kind == kind}


def _is_text(kind: pa.DataType) -> bool:
    return is_list(kind) or bool(pa.types.is_string(kind))


def _is_number(items: pa.Table, name: str) -> bool:
    if name not in items.column_names:
        return False
    kind = items[name].type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
