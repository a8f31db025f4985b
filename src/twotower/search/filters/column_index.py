"""Index the columns of the catalogue once, so that the cost of a filter depends on the number of items that it finds.

Raw columns (pyarrow), locations and opening hours become indexes that return masks bool [n], one entry per item. Values are
inverted lists (value → items, sorted by value), locations are sorted by latitude, opening hours are bits by hour of the week.
Arrow is used only to build the indexes of values and hours, and to lower-case the texts of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.features.geo import EARTH_KM, points_km
from twotower.features.item_columns import is_list
from twotower.schema import HOURS_PER_WEEK
from twotower.search.filters.tree import Bound, Value
from twotower.utils.types import Float64, Mask

_HOUR_LINES = 2**16  # rows of opening hours unpacked at a time: 11 MB


class Column:
    """Inverted lists of one raw column of single values or lists.

    Attributes
    ----------
    type
        Name of the Arrow type.
    number, listed
        True for numbers (other values are compared as case-insensitive text); True for a column of lists.
    known
        bool [n]: False if the value is null or NaN.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        values, self.number, self.listed = comparable(column)
        self.type = str(column.type)
        self.known = np.asarray(values.is_valid().to_numpy(zero_copy_only=False), np.bool_)
        owner = pc.list_parent_indices(values).to_numpy() if self.listed else np.arange(len(values))
        flat = pc.list_flatten(values) if self.listed else values
        there = np.asarray(flat.is_valid().to_numpy(zero_copy_only=False), np.bool_)
        flat, owner = flat.filter(pa.array(there)), owner[there]
        self._codes: dict[str, int] = {}
        self._numbers = np.zeros(0)
        if self.number:
            self._numbers, code = np.unique(flat.to_numpy(zero_copy_only=False), return_inverse=True)
        else:
            texts = flat.dictionary_encode()
            self._codes = {text: number for number, text in enumerate(texts.dictionary.to_pylist())}
            code = texts.indices.to_numpy(zero_copy_only=False)
        size = len(self._numbers) if self.number else len(self._codes)
        self._items = owner[np.argsort(code, kind="stable")].astype(np.int32)
        self._from = np.concatenate([[0], np.cumsum(np.bincount(code, minlength=size))])

    def among(self, values: Sequence[Value]) -> Mask:
        """Return the items that have any of `values`. For a number column, all must be numbers."""
        found = np.zeros(len(self.known), np.bool_)
        if self.number:
            wanted = np.array([float(value) for value in values])
            code = np.searchsorted(self._numbers, wanted)
            inside = code < len(self._numbers)
            codes = code[inside][self._numbers[code[inside]] == wanted[inside]].tolist()
        else:
            lowered = pc.utf8_lower(pa.array([str(value) for value in values], pa.string())).to_pylist()  # like the column
            codes = [self._codes[text] for text in lowered if text in self._codes]
        for code in codes:
            found[self._items[self._from[code] : self._from[code + 1]]] = True
        return found

    def compare(self, bound: Bound, value: float) -> Mask:
        """Return the items whose number meets the bound. For number columns without lists."""
        at = int(np.searchsorted(self._numbers, value, "left" if bound in ("<", ">=") else "right"))
        below = bound in ("<", "<=")
        few = self._from[at] * 2 <= len(self._items)
        found = np.zeros(len(self.known), np.bool_) if few == below else self.known.copy()
        found[self._items[: self._from[at]] if few else self._items[self._from[at] :]] = few == below
        return found


def comparable(column: pa.ChunkedArray) -> tuple[pa.Array, bool, bool]:
    """Return a raw column as it is compared, whether it holds numbers, and whether it holds lists.

    Numbers are float64, all other values lower-case text. Unknown values, NaN included, are null; lists keep theirs.

    Raises
    ------
    pa.ArrowInvalid, pa.ArrowNotImplementedError
        Values of this type have no text.
    """
    values = column.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    listed = is_list(values.type)
    flat = pc.list_flatten(values) if listed else values
    if pa.types.is_dictionary(flat.type):
        flat = flat.cast(flat.type.value_type)
    number = bool(pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type))
    if number:
        flat = flat.cast(pa.float64(), safe=False)
        flat = pc.if_else(pc.is_nan(flat), None, flat)
    else:
        flat = pc.utf8_lower(flat.cast(pa.string()))
    if not listed:
        return flat, number, False
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, flat, mask=values.is_null()), number, True


class GeoIndex:
    """Index of the item locations.

    Parameters
    ----------
    locations
        float [n, 2]: latitude and longitude in degrees, both NaN where unknown.
    """

    def __init__(self, locations: Float64) -> None:
        self.known: Mask = np.asarray(np.isfinite(locations).all(axis=1), np.bool_)
        items = np.flatnonzero(self.known)
        self._items = items[np.argsort(locations[items, 0], kind="stable")]
        self._latitude = locations[self._items, 0]
        self._points = np.ascontiguousarray(points_km(locations[self._items]).T)  # [3, known]

    def within(self, centre: Sequence[float], km: float) -> Mask:
        """Return the items at most `km` from `centre` (latitude, longitude in degrees)."""
        found = np.zeros(len(self.known), np.bool_)
        if km >= np.pi * EARTH_KM:
            return found | self.known
        # A latitude band slightly wider than the radius, so that rounding loses no item; then the exact distance decides.
        reach = np.degrees(km / EARTH_KM) + 1e-3
        low, high = np.searchsorted(self._latitude, [centre[0] - reach, centre[0] + reach])
        here = points_km(np.array([centre], np.float64))[0]
        away = self._points[:, low:high] - here[:, None]
        chord = np.float32(2 * EARTH_KM * np.sin(km / (2 * EARTH_KM)))
        found[self._items[low:high][np.einsum("ij,ij->j", away, away) <= chord * chord]] = True
        return found


class Hours:
    """Index of opening hours, given as texts of 168 characters 0 and 1; hour 0 is Monday 00:00."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        values = column.combine_chunks()
        self.known = np.asarray(values.is_valid().to_numpy(zero_copy_only=False), np.bool_)
        self._bits = np.zeros((HOURS_PER_WEEK, -(-len(values) // 8)), np.uint8)
        for start in range(0, len(values), _HOUR_LINES):
            lines = pc.fill_null(values.slice(start, _HOUR_LINES).cast(pa.binary()), b"").to_pylist()
            open_ = np.array(lines, f"S{HOURS_PER_WEEK}").view(np.uint8).reshape(len(lines), HOURS_PER_WEEK) == ord("1")
            packed = np.packbits(open_.T, axis=1, bitorder="little")
            self._bits[:, start // 8 : start // 8 + packed.shape[1]] = packed

    def at(self, hour: int) -> Mask:
        """Return the items that are open at an hour of the week."""
        bits = np.unpackbits(self._bits[hour], count=len(self.known), bitorder="little")
        return np.asarray(bits, np.bool_)
