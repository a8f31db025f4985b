"""Turn item rows and scores into `Recommendation`s with names, categories, locations and distances."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from twotower.features.geo import distances_km
from twotower.retrieval.request import Reason, Recommendation
from twotower.schema import FIRST_ROW, ITEM_ID
from twotower.utils.ids import TEXT, native_id
from twotower.utils.types import Float, Int

NAMES = (ITEM_ID, "name", "city")
CACHE_SIZE = 20_000  # items whose columns are kept as Python objects: some 20 MB

Home: TypeAlias = "tuple[float, float] | None"


class ItemDetails:
    """Display fields and raw columns of the items of a bundle.

    Parameters
    ----------
    items
        Raw columns; item row r is at position r - 2.
    category
        Name of the category column, if there is one.
    locations
        float [n_item_rows, 2]: degrees, NaN where unknown.
    id_type
        Type of the item ids in answers, see `utils.ids`.
    """

    def __init__(self, items: pa.Table, category: str | None, locations: Float, id_type: str = TEXT) -> None:
        self.items, self.category, self.degrees, self._id_type = items, category, locations, id_type
        names = [name for name in dict.fromkeys((*NAMES, category or ITEM_ID)) if name in items.column_names]
        columns = {name: items[name].combine_chunks() for name in names}
        self._read = lru_cache(CACHE_SIZE)(partial(_values, columns))  # not a method, which would keep this object alive

    def recommendations(self, lists: Sequence[tuple[Int, Float, Home, Sequence[tuple[Reason, ...]]]]) -> list[list[Recommendation]]:
        """Return lists of (rows, scores, origin of distances, reasons or none) as recommendations. All items are read at once."""
        columns = iter(self._columns_of(np.concatenate([rows for rows, *_ in lists]) if lists else np.zeros(0, np.int64)))
        return [
            self._recommendations([next(columns) for _ in range(len(rows))], rows, scores, home, reasons)
            for rows, scores, home, reasons in lists
        ]

    def describe(self, row: int) -> dict[str, Any]:
        """Return the raw columns of an item row."""
        columns: dict[str, Any] = self.items.slice(row - FIRST_ROW, 1).to_pylist()[0]
        return columns

    def display_fields(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return "item_id", "name" (the id if it has no name), "categories" and "city" from the raw columns of an item."""
        categories = columns.get(self.category or "") or []
        return {
            "item_id": native_id(columns[ITEM_ID], self._id_type),
            "name": columns.get("name") or columns[ITEM_ID],
            "categories": [categories] if isinstance(categories, str) else [str(one) for one in categories if one is not None],
            "city": columns.get("city"),
        }

    def _columns_of(self, rows: Int) -> list[dict[str, Any]]:
        """Return the display columns of item rows, from a cache if possible.

        Other items are read value by value: a rarely called Arrow `take` is not in the CPU cache and costs a fifth of a search.
        """
        return [self._read(row - FIRST_ROW) for row in rows.tolist()]

    def _recommendations(
        self, columns: list[dict[str, Any]], rows: Int, scores: Float, home: Home, reasons: Sequence[tuple[Reason, ...]]
    ) -> list[Recommendation]:
        at = self.degrees[rows]
        km = [np.nan] * len(rows) if home is None else distances_km(at, home).tolist()
        rows_in_order = zip(columns, at.tolist(), km, scores.tolist(), reasons or [()] * len(rows), strict=True)
        return [
            Recommendation(
                rank=rank,
                latitude=nan_to_none(latitude),
                longitude=nan_to_none(longitude),
                distance_km=None if away != away else round(away, 2),
                score=round(score, 4),
                reasons=why,
                **self.display_fields(one),
            )
            for rank, (one, (latitude, longitude), away, score, why) in enumerate(rows_in_order, 1)
        ]


def nan_to_none(degrees: float) -> float | None:
    """Return degrees with None instead of NaN."""
    return None if degrees != degrees else degrees


def _values(columns: dict[str, pa.Array], position: int) -> dict[str, Any]:
    return {name: column[position].as_py() for name, column in columns.items()}
