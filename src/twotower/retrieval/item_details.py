"""What people are shown of items: rows and scores in, places out.

Enters: the raw columns of a bundle's items. Leaves: `Place`s, and facts by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from twotower.features.geo import distances_km
from twotower.retrieval.request import Place, Reason
from twotower.schema import FIRST_ROW, ITEM_ID
from twotower.utils.lru_cache import LRUCache
from twotower.utils.types import Float, Int

NAMES = (ITEM_ID, "name", "city")
CACHE_SIZE = 20_000  # items whose facts are kept as Python objects: some 20 MB

Home: TypeAlias = "tuple[float, float] | None"


class ItemDetails:
    """The items of a bundle in people's terms.

    Parameters
    ----------
    items
        Raw columns; row r of the id space is at position r - 2.
    category
        Name of the column of categories, if there is one.
    places
        float [n_items, 2]: degrees, NaN where unknown.
    """

    def __init__(self, items: pa.Table, category: str | None, places: Float) -> None:
        self.items, self.category, self.degrees = items, category, places
        names = [name for name in dict.fromkeys((*NAMES, category or ITEM_ID)) if name in items.column_names]
        self._columns = {name: items[name].combine_chunks() for name in names}
        self._cache: LRUCache[dict[str, Any]] = LRUCache(CACHE_SIZE)

    def places(self, lists: Sequence[tuple[Int, Float, Home, Sequence[tuple[Reason, ...]]]]) -> list[list[Place]]:
        """Lists of rows, scores, where distances count from, and reasons (or none), as places; all read at once."""
        facts = iter(self._facts(np.concatenate([rows for rows, *_ in lists]) if lists else np.zeros(0, np.int64)))
        return [
            self._told([next(facts) for _ in range(len(rows))], rows, scores, home, reasons)
            for rows, scores, home, reasons in lists
        ]

    def describe(self, row: int) -> dict[str, Any]:
        """Raw columns of an item row."""
        facts: dict[str, Any] = self.items.slice(row - FIRST_ROW, 1).to_pylist()[0]
        return facts

    def display_fields(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What an item is called, of its raw columns: "item_id", "name" (its id where it has none), "categories", "city"."""
        categories = facts.get(self.category or "") or []
        return {
            "item_id": facts[ITEM_ID],
            "name": facts.get("name") or facts[ITEM_ID],
            "categories": [categories] if isinstance(categories, str) else [str(one) for one in categories if one is not None],
            "city": facts.get("city"),
        }

    def _facts(self, rows: Int) -> list[dict[str, Any]]:
        """Of those shown of late they are at hand; others are read value by value: a kernel that takes rows out of a table is not
        in the cache of a processor that calls it now and then, and takes as long as a fifth of a search."""
        return [self._cache.get(row) or self._cache.put(row, self._read(row - FIRST_ROW)) for row in rows.tolist()]

    def _read(self, position: int) -> dict[str, Any]:
        return {name: column[position].as_py() for name, column in self._columns.items()}

    def _told(
        self, facts: list[dict[str, Any]], rows: Int, scores: Float, home: Home, reasons: Sequence[tuple[Reason, ...]]
    ) -> list[Place]:
        at = self.degrees[rows]
        km = [np.nan] * len(rows) if home is None else distances_km(at, home).tolist()
        told = zip(facts, at.tolist(), km, scores.tolist(), reasons or [()] * len(rows), strict=True)
        return [
            Place(
                rank=rank,
                latitude=nan_to_none(latitude),
                longitude=nan_to_none(longitude),
                distance_km=None if away != away else round(away, 2),
                score=round(score, 4),
                reasons=why,
                **self.display_fields(one),
            )
            for rank, (one, (latitude, longitude), away, score, why) in enumerate(told, 1)
        ]


def nan_to_none(degrees: float) -> float | None:
    """Degrees as people read them: None instead of NaN."""
    return None if degrees != degrees else degrees
