"""Filters over the catalogue, compiled to one bool per item and applied before top-k, so that k come back when k exist.

Enter: the raw item columns, once; then filters in the language of `parser`, as text or as JSON. Leaves: a mask. What is
not known of an item (no price, no place) makes a comparison neither true nor false: the item passes neither `price <= 2` nor
`price != 2` nor `not price <= 2`. A comparison with a list column (categories) asks whether the list holds the value.

Where an item is, its categories and its hours are the columns that `item_columns` finds, whatever they are called. Opening hours
are in the time of the place. "Now" is a moment in seconds: where the catalogue has a column "timezone" with names such as
"America/New_York" it is UTC, and every item has its own hour; else it is the clock of the data, as all times in the dataset are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from twotower.errors import RequestError, nearest
from twotower.features.item_columns import category_column, hours_column, location_columns, locations
from twotower.schema import FIRST_ROW, HOURS_PER_WEEK, ITEM_ID, FeatureSpec
from twotower.search.filters.column_index import Column, GeoIndex, Hours
from twotower.search.filters.parser import WORDS, parse_filter
from twotower.search.filters.tree import MAX_QUOTED_CHARS, Among, And, Compared, Node, Not, Open, Or, Part, Seen, Within, walk
from twotower.search.filters.tree import check_location as check_location
from twotower.utils.lru_cache import LRUCache
from twotower.utils.types import Int, Mask

ALIASES = {"attribute": "attributes", "id": ITEM_ID}
ZONE = "timezone"
CACHE_BYTES = 2**26  # of masks and the filters they belong to
CACHE_TREES = 1024
CACHE_CHARS = 4000  # of a filter; a longer one is a list of ids that nobody sends twice
KEY_BYTES = 4 * CACHE_CHARS  # at most
LAST_MOMENT_S = 253_402_300_800  # the year 10000
Truth = tuple[Mask, Mask]
"""Of which items something holds, and of which it is known whether it does."""


@dataclass(frozen=True, slots=True)
class _Context:
    """What a filter refers to besides the catalogue; None also where this one does not."""

    home: tuple[float, ...] | None
    now: int | None
    seen: Int | None


class ItemFilter:
    """Compiles filters for one catalogue; safe to share among threads.

    Parameters
    ----------
    items
        Raw item columns (pyarrow), one line per item from row 2 on.
    specs
        The features of the dataset: they say which columns hold places, categories and hours.
    offered
        bool [n_items]: items that may pass at all; None: every one.

    Attributes
    ----------
    locations
        float64 [len(items), 2]: latitude and longitude in degrees, NaN where unknown.
    category, hours
        The columns of the categories and of the opening hours, or None.
    """

    def __init__(self, items: pa.Table, specs: Sequence[FeatureSpec] = (), *, offered: Mask | None = None) -> None:
        self.items, self.offered = items, offered
        self.locations = locations(items, location_columns(items, specs))
        self.category, self.hours = category_column(items, specs), hours_column(items, specs)
        self._aliases = ALIASES | ({"category": self.category, "categories": self.category} if self.category else {})
        self._columns: dict[str, Column] = {}
        self._trees = LRUCache[tuple[Node, frozenset[type[Any]]]](CACHE_TREES)
        self._masks = LRUCache[Mask](max(8, CACHE_BYTES // (len(items) + FIRST_ROW + KEY_BYTES)))

    def warm(self) -> None:
        """Make the usual columns ready now, instead of at the first filter that names them."""
        usual = [self.category, "city", "price", "stars", ITEM_ID]
        for name in usual:
            if name and name in self.items.column_names:
                self._column(name)
        _ = self._geo_index, self._hours, self._zones

    def compile(
        self,
        filter_: str | dict[str, Any],
        *,
        home: Sequence[float] | None = None,
        now: int | None = None,
        seen: Int | None = None,
    ) -> Mask:
        """Return bool [n_items] over all rows (the two reserved ones False): which items pass. Read-only: it may be cached.

        Parameters
        ----------
        filter_
            The filter, as text or as JSON.
        home
            Latitude and longitude that `within(km)` refers to.
        now
            Seconds: the moment that `open_now` refers to.
        seen
            Item rows of the history that `seen` refers to; None: nothing was.

        Raises
        ------
        RequestError
            The filter is not of the language, or asks for what the catalogue has not; message and `location` point at the part.
        """
        text = filter_ if isinstance(filter_, str) else _written(filter_)
        source, kept = (type(filter_), text), len(text) <= CACHE_CHARS
        tree, kinds = (self._trees.get(source) or self._trees.put(source, _read(filter_))) if kept else _read(filter_)
        context = _Context(
            home=tuple(home) if home is not None and Within in kinds else None,
            now=None if now is None or Open not in kinds else now // 900 * 900,  # clocks differ by whole quarters of an hour
            seen=seen if Seen in kinds else None,
        )
        key = (source, context.home, context.now)
        kept = kept and context.seen is None
        if kept and (mask := self._masks.get(key)) is not None:
            return mask
        mask = np.zeros(len(self.items) + FIRST_ROW, np.bool_)
        mask[FIRST_ROW:] = self._certain(tree, True, context)
        if self.offered is not None:
            mask &= self.offered
        mask.flags.writeable = False
        return self._masks.put(key, mask) if kept else mask

    def _certain(self, node: Node, holds: bool, context: _Context) -> Mask:
        """Which items certainly pass, or with `holds` False certainly fail."""
        if isinstance(node, Not):
            return self._certain(node.part, not holds, context)
        if isinstance(node, And | Or):
            every = isinstance(node, And) is holds
            found = np.full(len(self.items), every)
            for part in node.parts:
                mask = self._certain(part, holds, context)
                found = np.logical_and(found, mask, out=found) if every else np.logical_or(found, mask, out=found)
            return found
        true, known = self._leaf(node, context)
        return true if holds else known & ~true

    def _leaf(self, node: Among | Compared | Within | Open | Seen, context: _Context) -> Truth:
        if isinstance(node, Within):
            return self._within(node, context.home)
        if isinstance(node, Open):
            return self._open(node, context.now)
        if isinstance(node, Seen):
            found = np.zeros(len(self.items) + FIRST_ROW, np.bool_)
            found[[] if context.seen is None else context.seen] = True
            return found[FIRST_ROW:], np.ones(len(self.items), np.bool_)
        return self._compare(node)

    def _compare(self, node: Among | Compared) -> Truth:
        column = self._column(self._named(node.column, node.at), node.at)
        wanted = node.values if isinstance(node, Among) else (node.value,)
        if column.number and any(isinstance(value, str) for value in wanted):
            rule = "This comparison needs numbers, without quotes"
        elif isinstance(node, Compared) and (column.listed or not column.number):
            rule = "This comparison needs a number on both sides"
        else:
            found = column.among(node.values) if isinstance(node, Among) else column.compare(node.bound, float(node.value))
            return found, column.known
        raise RequestError(f"{rule}: {node.at}; column {node.column!r} is {column.type}.", location=node.at.location)

    def _named(self, name: str, at: Part) -> str:
        names = self.items.column_names
        column = name if name in names else self._aliases.get(name, name)
        if column not in names:
            hint = nearest(name, [*names, *(["category"] if self.category else []), *WORDS])
            raise RequestError(f"Unknown column {name[:MAX_QUOTED_CHARS]!r} in {at}.{hint}", location=at.location)
        return column

    def _column(self, name: str, at: Part | None = None) -> Column:
        if name not in self._columns:
            try:
                self._columns[name] = Column(self.items[name])
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                kind = self.items[name].type
                raise RequestError(
                    f"Column {name!r} cannot be compared: it is {kind}. Found {at}.", location=None if at is None else at.location
                ) from None
        return self._columns[name]

    def _within(self, node: Within, home: Sequence[float] | None) -> Truth:
        location = node.at.location
        if not self._geo_index.known.any():
            raise RequestError(f"within needs items with places. This catalogue has none. Leave out {node.at}.", location=location)
        centre = home if node.near is None else node.near
        if centre is None:
            raise RequestError(
                f"within(km) needs a history with places. This one has none. Give the point: {node.at}.",
                location=location,
            )
        return self._geo_index.within(centre, node.km), self._geo_index.known

    def _open(self, node: Open, now: int | None) -> Truth:
        if self._hours is None:
            raise RequestError(
                f"Opening hours are needed. This catalogue has none. Leave out {node.at}.", location=node.at.location
            )
        if node.hour is not None:
            return self._hours.at(node.hour), self._hours.known
        if now is None or not 0 <= now < LAST_MOMENT_S:
            raise RequestError(
                f"Open now needs the moment of the request in seconds. Got {now}. Found {node.at}.", location=node.at.location
            )
        if self._zones is None:
            return self._hours.at(_hour(now)), self._hours.known
        found, known = (np.zeros(len(self.items), np.bool_) for _ in range(2))
        for zone, there in self._zones:
            ahead = datetime.fromtimestamp(now, UTC).astimezone(zone).utcoffset()
            found |= self._hours.at(_hour(now + int(ahead.total_seconds() if ahead else 0))) & there
            known |= there
        return found, known & self._hours.known

    @cached_property
    def _geo_index(self) -> GeoIndex:
        return GeoIndex(self.locations)

    @cached_property
    def _hours(self) -> Hours | None:
        return None if self.hours is None else Hours(self.items[self.hours])

    @property
    def zoned(self) -> bool:
        """Whether the catalogue says which time zone its places are in."""
        return bool(self._zones)

    @cached_property
    def _zones(self) -> list[tuple[ZoneInfo, Mask]] | None:
        """Each time zone and the items in it; None where the catalogue has no such column. An unknown name is an unknown hour."""
        if ZONE not in self.items.column_names or not pa.types.is_string(self.items[ZONE].type):
            return None
        zones = []
        for name in self.items[ZONE].unique().drop_null().to_pylist():
            try:
                zones.append((ZoneInfo(name), self._column(ZONE).among([name])))
            except (KeyError, ValueError, OSError):
                continue
        return zones


def _hour(time_s: int) -> int:
    """Hours since Monday 00:00; 1970 began on a Thursday."""
    return (time_s // 3600 + 3 * 24) % HOURS_PER_WEEK


def _written(filter_: Any) -> str:
    try:
        return json.dumps(filter_)
    except (TypeError, ValueError, RecursionError):
        raise RequestError(
            "A filter is a text, or JSON made of objects, lists, texts, numbers and truth values.", location=""
        ) from None


def _read(filter_: str | dict[str, Any]) -> tuple[Node, frozenset[type[Any]]]:
    tree = parse_filter(filter_)
    return tree, frozenset(type(node) for node, _ in walk(tree))
