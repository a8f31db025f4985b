"""Look up items by name, users, histories and the available filters in a bundle."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.features.item_columns import as_lists, hours_column
from twotower.retrieval.request import HistoryEvent
from twotower.schema import FIRST_ROW, UNKNOWN, USER_ID
from twotower.serving.columns import Columns, is_number
from twotower.serving.event_journal import Journal
from twotower.serving.model_version import Engine
from twotower.serving.text_search import fold, folded, holding
from twotower.utils.ids import Id, id_types, native_id
from twotower.utils.nouns import plural
from twotower.utils.types import Json

MAX_HISTORY_OUT = 1000  # events of a history
CATEGORIES = 50


class Browser:
    """Looks up items, users and histories in one bundle version and in the accepted events."""

    def __init__(self, engine: Engine, journal: Journal) -> None:
        self.engine, self.dataset, self.journal = engine, engine.dataset, journal
        self._lock, self._looked_at = threading.Lock(), 0
        self._new: list[str] = []
        self._new_names = pa.array([], pa.string())

    def with_engine(self, engine: Engine) -> Browser:
        """Return a browser of the same bundle with refreshed items."""
        other = copy(self)
        other.engine = engine
        return other

    @cached_property
    def _names(self) -> pa.Array:
        items = self.dataset.items
        return folded(items["name" if "name" in items.column_names else "item_id"])

    @cached_property
    def _users(self) -> pa.Array:
        return folded(self.dataset.users["user_id"])

    @cached_property
    def _popular(self) -> Any:
        return np.diff(self.dataset.item_events.offsets)[FIRST_ROW:]

    def items(self, query: str, limit: int, skip: int = 0) -> list[Json]:
        """Return items whose name contains `query`, ignoring case and accents: names that begin with it first, then by events.

        The first `skip` of them are left out.
        """
        found, offered = holding(self._names, query), self.engine.recommender.offered
        found = found if offered is None else found[offered[found + FIRST_ROW]]
        begins = pc.starts_with(self._names, pattern=fold(query)).to_numpy(zero_copy_only=False)[found]
        order = np.lexsort((found, -self._popular[found], ~begins.astype(bool)))[skip : skip + limit]
        return [self.engine.item(int(row)) for row in found[order] + FIRST_ROW]

    def items_of(self, item_ids: Sequence[str], columns: bool = False) -> list[Json]:
        """Return the items with these ids, in this order, without unknown ones; with all their columns if asked."""
        known = [item_id for item_id in item_ids if self.engine.row(item_id) != UNKNOWN]
        return [self.item(item_id) if columns else self.engine.item(self.engine.row(item_id)) for item_id in known]

    def item(self, item_id: str) -> Json:
        """Return a known item, with all its raw columns under "columns"."""
        row = self.engine.row(item_id)
        return {**self.engine.item(row), "columns": self.engine.recommender.details.describe(row)}

    def users(self, query: str, limit: int) -> list[Json]:
        """Return users whose id contains `query`: those of the bundle by number of events, then those with only accepted events."""
        found = holding(self._users, query)
        counts = np.diff(self.dataset.events.offsets)[FIRST_ROW:][found]
        known = [str(self.dataset.user_ids[at + FIRST_ROW]) for at in found[np.lexsort((found, -counts))[:limit]]]
        known = [user for user in known if not self.journal.is_forgotten(user)]
        newcomers, names = self._newcomers()
        new = [newcomers[at] for at in holding(names, query)]
        return [self._user(user) for user in [*known, *new[::-1]][:limit]]

    def _newcomers(self) -> tuple[list[str], pa.Array]:
        """Return the users with only accepted events, and their folded ids. Each call reads only the users added since the last."""
        with self._lock:
            everybody = self.journal.users()
            fresh = [user for user in everybody[self._looked_at :] if self.engine.user_row(user) == UNKNOWN]
            self._looked_at = len(everybody)
            if fresh:
                self._new = [*self._new, *fresh]
                self._new_names = pa.concat_arrays([self._new_names, folded(pa.chunked_array([pa.array(fresh, pa.string())]))])
            return self._new, self._new_names

    def random_user(self) -> list[Json]:
        """Return a list with one random user that has a history; empty if there is none."""
        some = np.flatnonzero(np.diff(self.dataset.events.offsets) > 0)
        return [self._user(str(self.dataset.user_ids[some[random.randrange(len(some))]]))] if len(some) else []

    def history(self, user: str) -> Json:
        """Return the last events of a user, oldest first: those of the bundle, then the accepted ones."""
        own = [] if self.journal.is_forgotten(user) else self._own(user)
        accepted = self.engine.news(user, self.journal.of(user))
        return {"user": self._native(user), "events": [self._event(event) for event in (*own, *accepted)[-MAX_HISTORY_OUT:]]}

    def about(self) -> Json:
        """Describe the served bundle and the filters that it supports."""
        recommender, items = self.engine.recommender, self.dataset.items
        return {
            "version": self.engine.version,
            "name": self.engine.name,
            "items": self.dataset.n_items,
            "users": self.dataset.n_users,
            "noun": self.dataset.noun,
            "nouns": plural(self.dataset.noun),
            "metrics": self.engine.manifest.model_dump(mode="json", include={"metrics", "report"}, exclude_none=True),
            "filters": {
                "categories": self._categories,
                "has_price": self._levels,
                "has_amounts": not self._levels and "price" in items.column_names and is_number(items["price"].type),
                "has_locations": bool(np.isfinite(recommender.filter.locations).any()),
                "has_hours": hours_column(items, self.dataset.specs) is not None,
                "has_zones": recommender.filter.zoned,
                "example": recommender.filter.example,
            },
        }

    @cached_property
    def columns(self) -> Columns:
        """Return what a filter can compare."""
        return Columns(self.engine.recommender.filter)

    @cached_property
    def _levels(self) -> bool:
        """Return True if all prices are levels from 1 to 4, which the page can offer as a filter."""
        if "price" not in self.dataset.items.column_names:
            return False
        found = self.dataset.items["price"].unique().drop_null().to_pylist()
        return bool(found) and set(found) <= {1, 2, 3, 4}

    @cached_property
    def _categories(self) -> list[str]:
        column = self.engine.recommender.filter.category
        if column is None:
            return []
        counted = Counter(one for one in as_lists(self.dataset.items[column]).flatten().to_pylist() if one is not None)
        return [name for name, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:CATEGORIES]]

    def _own(self, user: str) -> list[HistoryEvent]:
        row = self.engine.user_row(user)
        events, types = self.dataset.events, ["", *self.dataset.event_types]
        at = range(max(int(events.offsets[row]), int(events.offsets[row + 1]) - MAX_HISTORY_OUT), int(events.offsets[row + 1]))
        return [
            HistoryEvent(
                str(self.dataset.item_ids[events.item_row[i]]),
                int(events.time_s[i]) if self.dataset.has_time else None,
                float(events.stars[i]) if np.isfinite(events.stars[i]) else None,
                types[events.event_type[i]] or None,
            )
            for i in at
        ]

    def _event(self, event: HistoryEvent) -> Json:
        row = self.engine.row(event.item_id)
        item = self.engine.item(row) if row != UNKNOWN else {"item_id": event.item_id, "name": event.item_id}
        return {**NOTHING, **item, "time_s": event.time_s, "stars": event.stars, "event_type": event.event_type}

    def _user(self, user: str) -> Json:
        row = self.engine.user_row(user)
        own = int(np.diff(self.dataset.events.offsets[row : row + 2])[0])
        accepted = sum(map(self.engine.recommender.reader.is_history, self.journal.of(user)))
        return {"user": self._native(user), "events": own + accepted}

    def _native(self, user: str) -> Id:
        return native_id(user, id_types(self.dataset.manifest)[USER_ID])


NOTHING: Json = {"categories": [], "city": None, "latitude": None, "longitude": None}  # for items that the bundle no longer has
