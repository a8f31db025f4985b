"""A small filter language over item columns, compiled to one bool per item; applied before top-k, so that k come back when k exist.

    category == "Mexican" and price <= 2
    city in ["Tampa", "Largo"] and not category == "Bars"
    within(27.95, -82.46, 5)          within 5 km of a point (latitude, longitude in degrees)
    within(5)                         within 5 km of where the user usually goes
    open_at("Fri 19:30")              open at that hour of the week

Python's own grammar is the parser (`ast.parse`); only the forms above pass, and nothing is ever executed. A comparison with a
list column (categories) asks whether the list holds the value. What is not known of an item (no price, no place) makes a comparison
neither true nor false: the item passes neither `price <= 2` nor `price != 2` nor `not price <= 2`.

Where an item is, its categories and its hours are the columns that `catalogue` finds, whatever they are called.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from twotower.catalogue import category_column, hours_column, is_list, place_columns, places
from twotower.encoders import EARTH_KM, points_km
from twotower.errors import RequestError, nearest
from twotower.retriever import Mask
from twotower.schema import FIRST_ROW, FeatureSpec

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
CLOCK = re.compile(r"([a-z]+)\s+([01]?[0-9]|2[0-3])(:[0-5][0-9])?")
ALIASES = {"attribute": "attributes", "id": "item_id"}
MOST_SHOWN = 80  # characters of a filter that an error quotes
Truth = tuple[Mask, Mask]
"""Which items certainly pass, and which certainly fail; both False: unknown."""
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def distances_km(places: NDArray[Any], place: Sequence[float]) -> NDArray[np.float32]:
    """Great-circle distances float32 [n] in km from `place` (latitude, longitude) to `places` [n, 2]; NaN where unknown."""
    here = points_km(np.array([place], np.float64))[0].astype(np.float64)
    chord = np.linalg.norm(points_km(places).astype(np.float64) - here, axis=1)
    # Chord to arc; matters beyond some 300 km only.
    arc = 2 * EARTH_KM * np.arcsin(np.clip(chord / (2 * EARTH_KM), 0, 1))
    return np.where(np.isfinite(places).all(axis=1), arc, np.nan).astype(np.float32)


def mutual_km(places: NDArray[Any]) -> NDArray[np.float32]:
    """Great-circle distances float32 [n, n] in km between `places` [n, 2], all known."""
    points = points_km(places).astype(np.float64)
    chord = np.linalg.norm(points[:, None] - points[None], axis=2)
    arc: NDArray[np.float32] = (2 * EARTH_KM * np.arcsin(np.clip(chord / (2 * EARTH_KM), 0, 1))).astype(np.float32)
    return arc


class ItemFilter:
    """Compiles filter texts for one catalogue.

    Parameters
    ----------
    items
        Raw item columns (pyarrow), one line per item from row 2 on.
    specs
        The features of the dataset: they say which columns hold places, categories and hours.

    Attributes
    ----------
    places
        float64 [len(items), 2]: latitude and longitude in degrees, NaN where unknown.
    category
        The column of the categories, or None.
    """

    def __init__(self, items: pa.Table, specs: Sequence[FeatureSpec] = ()) -> None:
        self.items = items
        self.places = places(items, place_columns(items, specs))
        self.category, self._hours = category_column(items, specs), hours_column(items, specs)
        self._aliases = ALIASES | ({"category": self.category, "categories": self.category} if self.category else {})

    def compile(self, text: str, *, home: Sequence[float] | None = None) -> Mask:
        """Return bool [n_items] over all rows (the two reserved ones False): which items pass.

        Parameters
        ----------
        home
            Latitude and longitude that `within(km)` refers to.

        Raises
        ------
        RequestError
            The text is not of the language; the message points at the part.
        """
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise RequestError(
                f'A filter must read like `category == "Mexican" and within(5)`. Cannot read {text!r}: {error}.'
            ) from None
        try:
            mask, _ = self._visit(tree.body, home)
        except RecursionError:
            raise RequestError("A filter must not be nested deeper than a few hundred levels.") from None
        return np.concatenate([np.zeros(FIRST_ROW, np.bool_), mask])

    def _visit(self, node: ast.expr, home: Sequence[float] | None) -> Truth:
        if isinstance(node, ast.BoolOp):
            parts = np.array([self._visit(value, home) for value in node.values])  # [parts, 2, items]
            every, some = np.logical_and.reduce(parts), np.logical_or.reduce(parts)
            return (every[0], some[1]) if isinstance(node.op, ast.And) else (some[0], every[1])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            true, false = self._visit(node.operand, home)
            return false, true
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.left, ast.Name):
            return self._compare(node.left.id, node.ops[0], _literal(node.comparators[0]), node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, [_literal(value) for value in node.args], home)
        raise RequestError(f"A filter is made of comparisons, within(…), open_at(…), and, or, not. Found {_part(node)}.")

    def _compare(self, name: str, op: ast.cmpop, value: Any, node: ast.expr) -> Truth:
        column = name if name in self.items.column_names else self._aliases.get(name, name)
        if column not in self.items.column_names:
            known_names = [*self.items.column_names, *(["category"] if self.category else [])]
            raise RequestError(f"Unknown column {name!r} in {_part(node)}.{nearest(name, known_names)}")
        values = self.items[column].combine_chunks()
        wanted = value if isinstance(value, list) else [value]
        number = _is_number(values.type.value_type if is_list(values.type) else values.type)
        if number and any(isinstance(part, str) for part in wanted):
            raise RequestError(f"This comparison needs numbers, without quotes: {_part(node)}; column {name!r} is {values.type}.")
        known = _known(values)
        if isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)):
            found = _is_in(values, wanted)
            return _truth(~found if isinstance(op, (ast.NotEq, ast.NotIn)) else found, known)
        if type(op) in _COMPARE and not isinstance(value, list) and _is_number(values.type):
            numbers = pc.fill_null(values.cast(pa.float64()), float("nan")).to_numpy(zero_copy_only=False)
            return _truth(np.asarray(_COMPARE[type(op)](numbers, value), np.bool_), known)
        raise RequestError(f"This comparison needs a number on both sides: {_part(node)}; column {name!r} is {values.type}.")

    def _call(self, name: str, values: list[Any], home: Sequence[float] | None) -> Truth:
        if name == "within" and len(values) in (1, 3) and all(isinstance(value, (int, float)) for value in values):
            *place, radius_km = values
            return self._within(check_place(place) if place else home, radius_km)
        if name == "open_at" and len(values) == 1 and isinstance(values[0], str):
            return self._open_at(hour_of_week(values[0]))
        raise RequestError(
            f'A filter knows within(km), within(latitude, longitude, km) and open_at("Fri 19:30"). Got {name} with {values}.'
        )

    def _within(self, centre: Sequence[float] | None, radius_km: float) -> Truth:
        known = ~np.isnan(self.places[:, 0])
        if not known.any():
            raise RequestError("within needs items with places. This catalogue has none. Leave it out.")
        if radius_km < 0:
            raise RequestError(f"within needs a distance in km, 0 or more. Got {radius_km}.")
        if centre is None:
            raise RequestError(
                "within(km) needs a history with places. This one has none. Give the point: within(latitude, longitude, km)."
            )
        return _truth(np.asarray(distances_km(self.places, centre) <= radius_km), known)

    def _open_at(self, hour: int) -> Truth:
        if self._hours is None:
            raise RequestError("open_at needs opening hours. This catalogue has none.")
        hours = self.items[self._hours].combine_chunks()
        bit = pc.utf8_slice_codeunits(hours, hour, hour + 1)
        return _truth(np.asarray(pc.fill_null(pc.equal(bit, "1"), False).to_numpy(zero_copy_only=False)), _known(hours))


def check_place(place: Sequence[float]) -> tuple[float, float]:
    """Return `place`, latitude and longitude in degrees, as it is.

    Raises
    ------
    RequestError
        They are out of range or not finite.
    """
    latitude, longitude = (float(value) for value in place)
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise RequestError(f"A place is a latitude from -90 to 90 and a longitude from -180 to 180. Got {latitude}, {longitude}.")
    return latitude, longitude


def hour_of_week(text: str) -> int:
    """ "Fri 19:30" → 115: hours since Monday 00:00, rounded down.

    Raises
    ------
    RequestError
        It is not a weekday, whole or its first three letters, and a time from 0 to 23:59 with or without minutes.
    """
    found = CLOCK.fullmatch(text.strip().lower())
    days = [number for number, day in enumerate(DAYS) if found and found[1] in (day, day[:3])]
    if not found or not days:
        raise RequestError(f'A time must look like "Fri 19:30". Got {text!r}.')
    return days[0] * 24 + int(found[2])


def _part(node: ast.expr) -> str:
    """How an error names a part of the text."""
    try:
        part = ast.unparse(node)
    except ValueError:
        part = "a number of thousands of digits"
    return f"{part[:MOST_SHOWN]!r} at character {node.col_offset + 1}"


def _literal(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
        listed = list(value) if isinstance(value, (list, tuple, set)) else [value]
        if all(isinstance(part, str) or (type(part) in (int, float) and math.isfinite(part)) for part in listed):
            return listed if isinstance(value, (list, tuple, set)) else value
    except (ValueError, TypeError, MemoryError, RecursionError, OverflowError):
        pass
    raise RequestError(f"A value must be a text in quotes, a number or a list of them. Found {_part(node)}.")


def _truth(holds: Mask, known: Mask) -> Truth:
    return holds & known, ~holds & known


def _known(values: pa.Array) -> Mask:
    unknown = pc.is_null(values, nan_is_null=True)
    return ~np.asarray(unknown.to_numpy(zero_copy_only=False), np.bool_)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_in(values: pa.Array, wanted: list[Any]) -> Mask:
    """Whether each value, or any value of each list, is one of `wanted`; text compares without case."""
    listed = is_list(values.type)
    flat = pc.list_flatten(values) if listed else values
    if _is_number(flat.type):
        found = pc.is_in(flat.cast(pa.float64()), value_set=pa.array([float(value) for value in wanted], pa.float64()))
    else:
        texts = pa.array([str(value).lower() for value in wanted], pa.string())
        found = pc.is_in(pc.utf8_lower(flat.cast(pa.string())), value_set=texts)
    mask = np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False))
    if not listed:
        return mask
    owner = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
    return np.bincount(owner[mask], minlength=len(values)).astype(np.bool_)
