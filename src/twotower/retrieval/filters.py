"""A small filter language over item columns, compiled to one bool per item; applied before top-k, so that k come back when k exist.

    category == "Mexican" and price <= 2
    city in ["Tampa", "Largo"] and not category == "Bars"
    within(27.95, -82.46, 5)          within 5 km of a point (latitude, longitude in degrees)
    within(5)                         within 5 km of where the user usually goes
    open_at("Fri 19:30")              open at that hour of the week

Python's own grammar is the parser (`ast.parse`); only the forms above pass, and nothing is ever executed. A comparison with a
list column (categories) asks whether the list holds the value. Unknown facts (no price, no place) never match, also under `!=`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from twotower.encoders import points_km
from twotower.errors import RequestError, nearest
from twotower.retriever import Mask
from twotower.schema import FIRST_ROW, HOURS_PER_WEEK

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
ALIASES = {"category": "categories", "attribute": "attributes", "stars": "stars", "id": "item_id"}
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
    # Chord to arc on a sphere of 6371 km; matters beyond some 300 km only.
    arc = 2 * 6371.0 * np.arcsin(np.clip(chord / (2 * 6371.0), 0, 1))
    return np.where(np.isfinite(places).all(axis=1), arc, np.nan).astype(np.float32)


class ItemFilter:
    """Compiles filter texts for one catalogue.

    Parameters
    ----------
    items
        Raw item columns (pyarrow), one line per item from row 2 on.
    """

    def __init__(self, items: pa.Table) -> None:
        self.items = items
        self.places = np.full((len(items), 2), np.nan)
        if {"latitude", "longitude"} <= set(items.column_names):
            columns = [pc.fill_null(items[name].cast(pa.float64()), float("nan")).to_numpy() for name in ("latitude", "longitude")]
            self.places = np.stack(columns, axis=1)

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
            mask = self._visit(tree.body, text, home)
        except RecursionError:
            raise RequestError("A filter must not be nested deeper than a few hundred levels.") from None
        return np.concatenate([np.zeros(FIRST_ROW, np.bool_), mask])

    def _visit(self, node: ast.expr, text: str, home: Sequence[float] | None) -> Mask:
        if isinstance(node, ast.BoolOp):
            parts = [self._visit(value, text, home) for value in node.values]
            joined: Mask = np.logical_and.reduce(parts) if isinstance(node.op, ast.And) else np.logical_or.reduce(parts)
            return joined
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._visit(node.operand, text, home)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.left, ast.Name):
            return self._compare(node.left.id, node.ops[0], _literal(node.comparators[0], text), node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, [_literal(value, text) for value in node.args], home)
        raise RequestError(f"A filter is made of comparisons, within(…), open_at(…), and, or, not. Found {_part(node)}.")

    def _compare(self, name: str, op: ast.cmpop, value: Any, node: ast.expr) -> Mask:
        column = ALIASES.get(name, name)
        if column not in self.items.column_names:
            raise RequestError(f"Unknown column {name!r} in {_part(node)}.{nearest(name, [*self.items.column_names, 'category'])}")
        values = self.items[column].combine_chunks()
        if isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)):
            wanted = value if isinstance(value, list) else [value]
            known: Mask = ~pc.is_null(values).to_numpy(zero_copy_only=False)
            found = _is_in(values, wanted)
            return known & (~found if isinstance(op, (ast.NotEq, ast.NotIn)) else found)
        if (
            type(op) in _COMPARE
            and isinstance(value, (int, float))
            and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type))
        ):
            with np.errstate(invalid="ignore"):
                numbers = pc.fill_null(values.cast(pa.float64()), float("nan")).to_numpy(zero_copy_only=False)
                return np.asarray(_COMPARE[type(op)](numbers, value), np.bool_)
        raise RequestError(f"This comparison needs a number on both sides: {_part(node)}; column {name!r} is {values.type}.")

    def _call(self, name: str, values: list[Any], home: Sequence[float] | None) -> Mask:
        if name == "within" and len(values) in (1, 3) and all(isinstance(value, (int, float)) for value in values):
            *place, radius_km = values
            centre = place or home
            if centre is None:
                raise RequestError(
                    "within(km) needs a history with places. This one has none. Give the point: within(latitude, longitude, km)."
                )
            with np.errstate(invalid="ignore"):
                return np.asarray(distances_km(self.places, centre) <= radius_km)
        if name == "open_at" and len(values) == 1 and isinstance(values[0], str):
            return self._open_at(hour_of_week(values[0]))
        raise RequestError(
            f'A filter knows within(km), within(latitude, longitude, km) and open_at("Fri 19:30"). Got {name} with {values}.'
        )

    def _open_at(self, hour: int) -> Mask:
        if "hours" not in self.items.column_names:
            raise RequestError("open_at needs opening hours. This catalogue has none.")
        hours = pc.utf8_slice_codeunits(self.items["hours"].combine_chunks(), hour, hour + 1)
        return np.asarray(pc.fill_null(pc.equal(hours, "1"), False).to_numpy(zero_copy_only=False))


def hour_of_week(text: str) -> int:
    """ "Fri 19:30" → 115: hours since Monday 00:00, rounded down.

    Raises
    ------
    RequestError
        It is not a weekday's first three letters and a time.
    """
    day, _, clock = text.strip().lower().partition(" ")
    hour = clock.partition(":")[0]
    if day[:3] not in DAYS or not hour.isdigit() or int(hour) > 23:
        raise RequestError(f'A time must look like "Fri 19:30". Got {text!r}.')
    return (DAYS.index(day[:3]) * 24 + int(hour)) % HOURS_PER_WEEK


def _part(node: ast.expr) -> str:
    """How an error names a part of the text."""
    return f"{ast.unparse(node)!r} at character {node.col_offset + 1}"


def _literal(node: ast.expr, text: str) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise RequestError(
            f"A value must be a text in quotes, a number or a list of them. Found {_part(node)} of {text!r}."
        ) from None
    listed = list(value) if isinstance(value, (list, tuple, set)) else [value]
    if any(not isinstance(part, (str, int, float)) or isinstance(part, bool) for part in listed):
        raise RequestError(f"A value must be a text in quotes, a number or a list of them. Found {_part(node)} of {text!r}.")
    return listed if isinstance(value, (list, tuple, set)) else value


def _is_in(values: pa.Array, wanted: list[Any]) -> Mask:
    """Whether each value, or any value of each list, is one of `wanted`; text compares without case."""
    listed = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    flat = pc.list_flatten(values) if listed else values
    if pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type):
        found = pc.is_in(
            pc.utf8_lower(flat.cast(pa.string())), value_set=pa.array([str(value).lower() for value in wanted], pa.string())
        )
    else:
        numbers = [float(value) for value in wanted if not isinstance(value, str)]
        found = pc.is_in(flat.cast(pa.float64()), value_set=pa.array(numbers, pa.float64()))
    mask = np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False))
    if not listed:
        return mask
    owner = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
    return np.bincount(owner[mask], minlength=len(values)).astype(np.bool_)
