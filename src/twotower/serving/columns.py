"""Describe the columns of the catalogue for people who write filters: kinds, ranges, frequent values and examples."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import RequestError
from twotower.features.item_columns import as_lists, is_list
from twotower.schema import ITEM_ID
from twotower.search.filters.item_filter import ItemFilter
from twotower.search.filters.parser import parse_filter
from twotower.search.filters.tree import Among
from twotower.serving.text_search import folded, holding
from twotower.utils.types import Json

MAX_VALUES = 20  # frequent values returned of each column
MAX_COLUMNS = 60
MAX_TEXT = 60  # characters of a value that is returned or used in an example
FEW = 12  # numbers with at most so many distinct values are returned as values


class Columns:
    """Describes the columns that a filter in text form can name.

    Parameters
    ----------
    filter_
        The filter of the catalogue. Its coordinates and opening hours have conditions of their own and are left out.

    Examples
    --------
    >>> shop = pa.table({"item_id": ["a", "b", "c"], "brand": ["Uji", "Yame", "Uji"], "price": [3.5, 9.0, 20.0]})
    >>> columns = Columns(ItemFilter(shop))
    >>> [(column["name"], column["kind"]) for column in columns.about()["columns"]]
    [('brand', 'text'), ('price', 'number')]
    >>> columns.about()["examples"]
    ['brand == "Uji"', 'price <= 9', 'brand == "Uji" and price <= 9']
    >>> columns.values("brand", "ya", 10)
    [{'value': 'Yame', 'items': 1}]
    """

    def __init__(self, filter_: ItemFilter) -> None:
        self._filter, self._items = filter_, filter_.items
        self._counted: dict[str, tuple[list[str], list[int], pa.Array]] = {}

    def about(self) -> Json:
        """Return the columns in the order of the catalogue, and filters that are true of some items."""
        return self._about

    @cached_property
    def _about(self) -> Json:
        columns = [self._column(name) for name in self._names[:MAX_COLUMNS]]
        return {"columns": columns, "examples": self._examples(columns)}

    @cached_property
    def _names(self) -> list[str]:
        own = {ITEM_ID, self._filter.hours, "latitude", "longitude"}
        return [name for name in self._items.column_names if name not in own and _readable(name) and self._comparable(name)]

    def _comparable(self, name: str) -> bool:
        kind = self._items[name].type
        kind = kind.value_type if is_list(kind) or pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or is_number(kind))

    def _column(self, name: str) -> Json:
        column = self._items[name]
        if is_number(column.type):
            numbers = column.drop_null().to_numpy().astype(np.float64)
            numbers = numbers[np.isfinite(numbers)]
            distinct, counts = np.unique(numbers, return_counts=True)
            few = zip(distinct.tolist(), counts.tolist(), strict=True) if len(distinct) <= FEW else ()
            values = [{"value": _plain(value), "items": count} for value, count in few]
            ends = {"min": _plain(numbers.min()), "max": _plain(numbers.max())} if len(numbers) else {"min": None, "max": None}
            return {"name": name, "kind": "number", "items": len(numbers), **ends, "values": values, "has_more": False}
        values = self.values(name, "", MAX_VALUES)
        kind = "list" if is_list(column.type) else "text"
        has_more = len(self._values(name)[0]) > len(values)
        return {
            "name": name,
            "kind": kind,
            "items": len(column) - column.null_count,
            "min": None,
            "max": None,
            "values": values,
            "has_more": has_more,
        }

    def values(self, name: str, query: str, limit: int) -> list[Json]:
        """Return values of a column of texts or lists that contain `query`, ignoring case and accents: frequent ones first.

        Raises
        ------
        RequestError
            There is no such column, or it holds numbers.
        """
        if name not in self._names or is_number(self._items[name].type):
            texts = [one for one in self._names if not is_number(self._items[one].type)]
            raise RequestError(f"Unknown column {name[:80]!r}. Columns with values: {', '.join(texts[:20]) or 'none'}.")
        texts, counts, plain = self._values(name)
        return [{"value": texts[at], "items": counts[at]} for at in holding(plain, query)[:limit].tolist()]

    def _values(self, name: str) -> tuple[list[str], list[int], pa.Array]:
        """Return the distinct values of a column, most frequent first, with the number of items and as folded texts."""
        if name not in self._counted:
            found = as_lists(self._items[name]).flatten().drop_null().value_counts()
            texts, counts = found.field("values").cast(pa.string()), found.field("counts").to_numpy()
            order = np.lexsort((pc.rank(texts).to_numpy(), -counts)) if len(texts) else np.zeros(0, np.int64)
            texts = texts.take(pa.array(order))
            self._counted[name] = texts.to_pylist(), counts[order].tolist(), folded(pa.chunked_array([texts]))
        return self._counted[name]

    def _examples(self, columns: list[Json]) -> list[str]:
        """Return filters made from the values of the catalogue, from the most telling columns first."""
        texts = [one for one in columns if one["kind"] != "number" and self._tells(one)]
        texts.sort(key=lambda one: (one["name"] != self._filter.category, one["name"] == "name"))
        numbers = [one for one in columns if one["kind"] == "number" and one["min"] != one["max"] and one["min"] is not None]
        numbers.sort(key=lambda one: one["name"] != "price")
        equal = [f"{one['name']} == {_quoted(one['values'][0]['value'])}" for one in texts[:2]]
        bounds = [f"{one['name']} <= {self._middle(one['name'])}" for one in numbers[:1]]
        both = [f"{equal[0]} and {bounds[0]}"] if equal and bounds else []
        other = [
            f"{one['name']} in [{', '.join(_quoted(value['value']) for value in one['values'][1:3])}]"
            for one in texts[:1]
            if len(one["values"]) > 2 and max(len(value["value"]) for value in one["values"][1:3]) <= MAX_TEXT
        ]
        return [text for text in (*equal, *bounds, *other, *both) if self._filter.compile(text).any()]

    def _tells(self, column: Json) -> bool:
        """Return True if a column has a frequent value that is short enough for an example."""
        values = column["values"]
        return len(values) > 1 and values[0]["items"] > 1 and len(values[0]["value"]) <= MAX_TEXT

    def _middle(self, name: str) -> float | int:
        numbers = self._items[name].drop_null().to_numpy().astype(np.float64)
        return _plain(np.quantile(numbers[np.isfinite(numbers)], 0.5, method="lower"))


def _readable(name: str) -> bool:
    """Return True if a filter in text form can name the column."""
    try:
        tree = parse_filter(f"{name} == 1")
    except RequestError:
        return False
    return isinstance(tree, Among) and tree.column == name


def is_number(kind: pa.DataType) -> bool:
    """Return True for the type of a column of numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _plain(value: Any) -> float | int:
    """Return a number without a decimal point if it is whole.

    Examples
    --------
    >>> _plain(9.0), _plain(3.5)
    (9, 3.5)
    """
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value)


def _quoted(text: str) -> str:
    """Return a text as the filter language writes it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r") + '"'
