"""Compile filters over the catalogue to one bool per item. They are applied before top-k, so k items are returned if k exist.

Filters are text or JSON in the language of `parser`. An unknown value (no price, no location) makes a comparison neither true nor
false: the item matches neither `price <= 2` nor `price != 2` nor `not price <= 2`. A comparison with a list column (categories)
tests whether the list contains the value.

The columns of location, categories and opening hours are found by `item_columns`, whatever their names. Opening hours are local
times. "Now" is a time in seconds. If the catalogue has a column "timezone" with names such as "America/New_York", it is UTC and
converted to the local time of each item. Otherwise it is in the time of the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
from cachetools import LRUCache

from twotower.errors import RequestError, nearest
from twotower.features.item_columns import category_column, hours_column, location_columns, locations
from twotower.schema import FIRST_ROW, HOURS_PER_WEEK, ITEM_ID, FeatureSpec
from twotower.search.filters.column_index import Column, GeoIndex, Hours
from twotower.search.filters.example import example_filter
from twotower.search.filters.parser import WORDS, parse_filter
from twotower.search.filters.tree import MAX_QUOTED_CHARS, Among, And, Compared, Node, Not, Open, Or, Part, Seen, Within, walk
from twotower.search.filters.tree import check_location as check_location
from twotower.utils.types import Int, Mask

ALIASES = {"attribute": "attributes", "id": ITEM_ID}
ZONE = "timezone"
CACHE_BYTES = 2**26  # memory of cached masks and their filters
CACHE_TREES = 1024
CACHE_CHARS = 4000  # longer filters, usually lists of ids, are not cached
KEY_BYTES = 4 * CACHE_CHARS  # upper bound
LAST_MOMENT_S = 253_402_300_800  # the year 10000
Truth = tuple[Mask, Mask]
"""Two masks: the items for which a condition is true, and the items for which its value is known."""


@dataclass(frozen=True, slots=True)
class _Context:
    """Values of the request that a filter refers to; None if unknown or not used by the filter."""

    home: tuple[float, ...] | None
    now: int | None
    seen: Int | None


@dataclass(frozen=True, slots=True)
class ResolvedFilter:
    """A filter of one request without references: with names of the catalogue's columns, locations and hours.

    Attributes
    ----------
    tree
        The filter. `Open` without an hour means now in the time zone of each item.
    seen
        Item rows of the history; None: no item is seen.
    """

    tree: Node
    seen: Int | None


class ItemFilter:
    """Compiles filters for one catalogue. Thread-safe.

    Parameters
    ----------
    items
        Raw item columns (pyarrow), one entry per item from row 2 on.
    specs
        Features of the dataset. They name the columns of locations, categories and opening hours.
    offered
        bool [n_item_rows]: False for items that never match; None: all items may match.

    Attributes
    ----------
    locations
        float64 [len(items), 2]: latitude and longitude in degrees, NaN where unknown.
    category, hours
        Names of the columns of categories and of opening hours, or None.
    """

    def __init__(self, items: pa.Table, specs: Sequence[FeatureSpec] = (), *, offered: Mask | None = None) -> None:
        self.items, self.offered = items, offered
        self._located = location_columns(items, specs)
        self.locations = locations(items, self._located)
        self.category, self.hours = category_column(items, specs), hours_column(items, specs)
        self._aliases = ALIASES | ({"category": self.category, "categories": self.category} if self.category else {})
        self._columns: dict[str, Column] = {}
        self._masks: LRUCache[Hashable, Mask] = LRUCache(max(8, CACHE_BYTES // (len(items) + FIRST_ROW + KEY_BYTES)))
        self._lock = Lock()

    def warm(self) -> None:
        """Build the indexes of common columns now instead of on first use."""
        usual = [self.category, "city", "price", "stars", ITEM_ID]
        for name in usual:
            if name and name in self.items.column_names:
                self._column(name)
        _ = self._geo_index, self._hours, self._zones

    @cached_property
    def example(self) -> str:
        """A filter of the catalogue's own columns, such as 'brand == "Uji" and price <= 20'; "" if no column is fit for one."""
        return example_filter(self.items, self.category, {ITEM_ID, "name", self.hours, *(self._located or ())})

    def compile(
        self,
        filter_: str | dict[str, Any],
        *,
        home: Sequence[float] | None = None,
        now: int | None = None,
        seen: Int | None = None,
    ) -> Mask:
        """Return the mask of matching items, bool [n_item_rows]; the two reserved rows are False. It may be cached: read-only.

        Parameters
        ----------
        filter_
            The filter, as text or as JSON.
        home
            Latitude and longitude for `within(km)`.
        now
            Time in seconds for `open_now`.
        seen
            Item rows of the history for `seen`; None: no item is seen.

        Raises
        ------
        RequestError
            The filter is malformed, or uses a column or data that the catalogue does not have. The message and `location` name the
            part.
        """
        text = filter_ if isinstance(filter_, str) else _written(filter_)
        is_json, kept = not isinstance(filter_, str), len(text) <= CACHE_CHARS
        tree, kinds = (_read if kept else _read.__wrapped__)(text, is_json)
        context = _Context(
            home=tuple(home) if home is not None and Within in kinds else None,
            now=None if now is None or Open not in kinds else now // 900 * 900,  # time zones differ by multiples of 15 minutes
            seen=seen if Seen in kinds else None,
        )
        key = (text, is_json, context.home, context.now)
        kept = kept and context.seen is None
        with self._lock:
            cached = self._masks.get(key) if kept else None
        if cached is not None:
            return cached
        mask = np.zeros(len(self.items) + FIRST_ROW, np.bool_)
        mask[FIRST_ROW:] = self._certain(tree, True, context)
        if self.offered is not None:
            mask &= self.offered
        mask.flags.writeable = False
        if kept:
            with self._lock:
                self._masks[key] = mask
        return mask

    def resolve(
        self,
        filter_: str | dict[str, Any],
        *,
        home: Sequence[float] | None = None,
        now: int | None = None,
        seen: Int | None = None,
    ) -> ResolvedFilter:
        """Return a filter that `compile` accepts without references to the request; the parameters are those of `compile`."""
        text = filter_ if isinstance(filter_, str) else _written(filter_)
        tree, _ = (_read if len(text) <= CACHE_CHARS else _read.__wrapped__)(text, not isinstance(filter_, str))

        def absolute(node: Node) -> Node:
            if isinstance(node, Not):
                return Not(absolute(node.part))
            if isinstance(node, And | Or):
                return type(node)(tuple(absolute(part) for part in node.parts))
            if isinstance(node, Among | Compared):
                return replace(node, column=self._named(node.column, node.at))
            if isinstance(node, Within) and node.near is None and home is not None:
                return replace(node, near=(home[0], home[1]))
            if isinstance(node, Open) and node.hour is None and now is not None and not self.zoned:
                return replace(node, hour=_hour(now))
            return node

        return ResolvedFilter(absolute(tree), seen)

    def _certain(self, node: Node, holds: bool, context: _Context) -> Mask:
        """Return the items that certainly match, or with `holds` False certainly do not match."""
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
            rule = "compare it with a number, without quotes"
        elif isinstance(node, Compared) and (column.listed or not column.number):
            rule = "only numbers can be compared with < <= > >="
        else:
            found = column.among(node.values) if isinstance(node, Among) else column.compare(node.bound, float(node.value))
            return found, column.known
        raise RequestError(
            f"Invalid comparison {node.at}: column {node.column!r} is {column.type}; {rule}.", location=node.at.location
        )

    def _named(self, name: str, at: Part) -> str:
        names = self.items.column_names
        column = name if name in names else self._aliases.get(name, name)
        if column not in names:
            known = [*names, *(["category"] if self.category else [])]
            hint = nearest(name, known if isinstance(at.location, int) else [*known, *WORDS])
            if not hint.startswith(" Did you mean"):
                hint = nearest(name, known)
            raise RequestError(f"Unknown column {name[:MAX_QUOTED_CHARS]!r} in {at}.{hint}", location=at.location)
        return column

    def _column(self, name: str, at: Part | None = None) -> Column:
        if name not in self._columns:
            try:
                self._columns[name] = Column(self.items[name])
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                kind = self.items[name].type
                raise RequestError(
                    f"Column {name!r} in {at} cannot be compared: its type is {kind}. Use another column.",
                    location=None if at is None else at.location,
                ) from None
        return self._columns[name]

    def _within(self, node: Within, home: Sequence[float] | None) -> Truth:
        location = node.at.location
        if not self._geo_index.known.any():
            raise RequestError(
                f"within is not available: the items of this catalogue have no locations. Remove {node.at}.", location=location
            )
        centre = home if node.near is None else node.near
        if centre is None:
            raise RequestError(
                f"within(km) has no origin: the request has no location, and neither has its history. Add a point to {node.at}.",
                location=location,
            )
        return self._geo_index.within(centre, node.km), self._geo_index.known

    def _open(self, node: Open, now: int | None) -> Truth:
        if self._hours is None:
            raise RequestError(f"This catalogue has no opening hours. Remove {node.at}.", location=node.at.location)
        if node.hour is not None:
            return self._hours.at(node.hour), self._hours.known
        if now is None or not 0 <= now < LAST_MOMENT_S:
            raise RequestError(
                f"Got the time {now} for {node.at}. It must be in seconds since 1970, before the year 10000.",
                location=node.at.location,
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
        """Return True if the catalogue has the time zones of its items."""
        return bool(self._zones)

    @cached_property
    def _zones(self) -> list[tuple[ZoneInfo, Mask]] | None:
        """Return each time zone with its items; None without a time zone column.

        Items with an unknown time zone have an unknown local time.
        """
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
    """Return the hours since Monday 00:00. 1970 began on a Thursday."""
    return (time_s // 3600 + 3 * 24) % HOURS_PER_WEEK


def _written(filter_: Any) -> str:
    try:
        return json.dumps(filter_)
    except (TypeError, ValueError, RecursionError):
        raise RequestError(
            "The filter is not JSON. Use a text, or JSON of objects, lists, texts, numbers, true and false.", location=""
        ) from None


@lru_cache(CACHE_TREES)
def _read(text: str, is_json: bool) -> tuple[Node, frozenset[type[Any]]]:
    tree = parse_filter(json.loads(text) if is_json else text)
    return tree, frozenset(type(node) for node, _ in walk(tree))
