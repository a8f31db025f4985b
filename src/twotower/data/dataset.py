"""Open a dataset folder: events by user and by item, features, and the held-out queries of a split.

`prepare` writes the folder. Tables are read on first use. Events and features are read-only memory maps, shared by the processes
of a host. The history of a query holds only events before its time; `Dataset.held_out` defines this for each split.
"""

from __future__ import annotations

import hashlib
import json
from copy import copy
from functools import cached_property
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from twotower.data.event_arrays import Events, ItemEvents, NegativeEvents
from twotower.data.held_out import HeldOut
from twotower.errors import DataError
from twotower.features.encoders import Encoders
from twotower.features.transitions import Transitions
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW, ITEM_ID, SPLITS, TRAIN, TRUTH_FILE, UNKNOWN, USER_ID, WITHHELD
from twotower.utils.array_files import open_arrays
from twotower.utils.manifests import DatasetManifest, open_manifest
from twotower.utils.nouns import plural
from twotower.utils.ragged import changes, lengths_to_offsets, lower_bound, ragged_arange
from twotower.utils.types import Array, Float64, Int

EVENTS_FILE, ITEM_EVENTS_FILE, POSITIONS_FILE = "events.safetensors", "item_events.safetensors", "positions.safetensors"
NEGATIVES_FILE, TRANSITIONS_FILE = "negatives.safetensors", "transitions.safetensors"
ITEM_FEATURES_FILE, USER_FEATURES_FILE = "item_features.safetensors", "user_features.safetensors"
ASIDE = ("rejects.jsonl", TRUTH_FILE, POSITIONS_FILE)  # files that no model depends on


class Dataset:
    """An open dataset folder; create it with `Dataset.open`.

    Attributes
    ----------
    n_items, n_users, n_train_items, n_train_users
        Number of items and users, and of those seen in training, which come first.
    n_item_rows, n_user_rows, n_train_item_rows, n_train_user_rows
        The same with the two reserved rows: the lengths of arrays over rows, and the first rows that training has not seen.
    has_time
        False if `time_s` is only a position.
    event_types
        Names of the event types seen in training, with codes 1, 2, …. Events of other types have code 0.
    specs
        The declared static features.
    """

    def __init__(self, path: Path, manifest: DatasetManifest) -> None:
        self.path, self.manifest = path, manifest
        self.n_items, self.n_users = manifest.n_items, manifest.n_users
        self.n_train_items, self.n_train_users = manifest.n_train_items, manifest.n_train_users
        self.n_item_rows, self.n_user_rows = self.n_items + FIRST_ROW, self.n_users + FIRST_ROW
        self.n_train_item_rows, self.n_train_user_rows = self.n_train_items + FIRST_ROW, self.n_train_users + FIRST_ROW
        self.has_time, self.event_types, self.specs = manifest.has_time, manifest.event_types, tuple(manifest.features)

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Return the dataset in the folder `path`.

        Raises
        ------
        DataError
            `path` is not a dataset, has another format version, or lacks a file named in its manifest.
        """
        manifest = open_manifest(DatasetManifest, path, "Run `twotower prepare`.")
        if missing := [name for name in manifest.hashes if not (path / name).is_file()]:
            raise DataError(f"The dataset {path} is incomplete: {', '.join(missing)} missing. Run `twotower prepare` again.")
        return cls(path, manifest)

    def known_to(self, n_train_items: int, n_train_users: int) -> Dataset:
        """Return the same data as a model sees them that was trained on fewer items and users; all later rows are new to it."""
        other = copy(self)
        other.n_train_items, other.n_train_users = n_train_items, n_train_users
        other.n_train_item_rows, other.n_train_user_rows = n_train_items + FIRST_ROW, n_train_users + FIRST_ROW
        return other

    def with_items(self, items: pa.Table, item_features: dict[str, Array], item_events: ItemEvents) -> Dataset:
        """Return the same data with other items, in memory. Known items keep their rows; new ones follow."""
        other = Dataset(self.path, self.manifest.model_copy(update={"n_items": len(items)}))
        kept = ("events", "negatives", "transitions", "users", "user_features", "encoders", "user_ids")
        other.__dict__ |= {name: getattr(self, name) for name in kept}
        other.__dict__ |= {"items": items, "item_features": item_features, "item_events": item_events}
        other.n_train_items, other.n_train_item_rows = self.n_train_items, self.n_train_item_rows
        other.n_train_users, other.n_train_user_rows = self.n_train_users, self.n_train_user_rows
        return other

    @property
    def size(self) -> str:
        """Return the numbers of events, users and items as text."""
        return f"{len(self.events):,} events of {self.n_users:,} users at {self.n_items:,} {plural(self.noun)}"

    @property
    def noun(self) -> str:
        """Return the word for an item of this dataset, see `data.items.noun`."""
        items = self.manifest.config.data.items
        return "item" if items is None else items.noun

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}): {self.size}"

    def _repr_html_(self) -> str:
        return f"<b>Dataset</b> in {escape(str(self.path))}<br>{self.size}"

    @property
    def fingerprint(self) -> str:
        """Return a SHA-256 over the hashes of all files that a model depends on. Equal data have equal fingerprints."""
        hashes = sorted((name, digest) for name, digest in self.manifest.hashes.items() if name not in ASIDE)
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @cached_property
    def events(self) -> Events:
        """Return the events of users with an id."""
        return Events(**open_arrays(self.path / EVENTS_FILE))

    @cached_property
    def negatives(self) -> NegativeEvents | None:
        """Return the explicit negatives and impressions; None if there are none."""
        path = self.path / NEGATIVES_FILE
        return NegativeEvents(**open_arrays(path)) if path.is_file() else None

    @cached_property
    def item_events(self) -> ItemEvents:
        """Return all events by item, including anonymous ones."""
        return ItemEvents(**open_arrays(self.path / ITEM_EVENTS_FILE))

    @cached_property
    def first_event_s(self) -> Float64:
        """Return the time of the first event of each item in seconds, float64 [n_item_rows]; infinity without one."""
        first = np.full(self.n_item_rows, np.inf)
        kept = self.item_events.split != WITHHELD
        np.minimum.at(first, self.item_events.item_row[kept], self.item_events.time_s[kept])
        return first

    @cached_property
    def items(self) -> pa.Table:
        """Return the raw columns of the items; item row r is at position r - 2."""
        return pq.read_table(self.path / "items.parquet")

    @cached_property
    def users(self) -> pa.Table:
        """Return the raw columns of the users; user row r is at position r - 2."""
        return pq.read_table(self.path / "users.parquet")

    @cached_property
    def item_features(self) -> dict[str, Array]:
        """Return the encoded static features of the items, over all rows."""
        return open_arrays(self.path / ITEM_FEATURES_FILE)

    @cached_property
    def transitions(self) -> Transitions | None:
        """Return the items after and before each item in the training events; None if they were not prepared."""
        path = self.path / TRANSITIONS_FILE
        return Transitions(**open_arrays(path)) if path.is_file() else None

    @cached_property
    def user_features(self) -> dict[str, Array]:
        """Return the encoded static features of the users, over all rows."""
        return open_arrays(self.path / USER_FEATURES_FILE)

    @cached_property
    def encoders(self) -> Encoders:
        """Return the encoders of the features."""
        return Encoders.load(self.path)

    @cached_property
    def item_ids(self) -> NDArray[np.object_]:
        """Return the item ids, an object array [n_item_rows]; "" for the reserved rows."""
        return _ids(self.items[ITEM_ID])

    @cached_property
    def user_ids(self) -> NDArray[np.object_]:
        """Return the user ids, an object array [n_user_rows]; "" for the reserved rows."""
        return _ids(self.users[USER_ID])

    @cached_property
    def item_train_count(self) -> Int:
        """Return the number of positive training events of each item, int64 [n_item_rows]."""
        counted = self.events.positive & (self.events.split == TRAIN)
        return np.bincount(self.events.item_row[counted], minlength=self.n_item_rows).astype(np.int64)

    @property
    def n_train_events(self) -> int:
        """Return the number of positive training events."""
        return int(self.item_train_count.sum())

    @property
    def ordered(self) -> bool:
        """Return True if held-out events come after their histories; False for a predefined split."""
        return self.manifest.config.prepare.split.kind != "predefined"

    def item_rows(self, ids: list[str]) -> Int:
        """Return the rows of item ids, int64 [len(ids)]; UNKNOWN for unknown ids."""
        return _rows(ids, self.items[ITEM_ID])

    def user_rows(self, ids: list[str]) -> Int:
        """Return the rows of user ids, int64 [len(ids)]; UNKNOWN for unknown ids."""
        return _rows(ids, self.users[USER_ID])

    def histories(self, user_rows: Int, time_s: Int) -> Queries:
        """Return queries of users [B] at times [B] (seconds), with all events strictly before. UNKNOWN has an empty history."""
        events = self.events
        begin = events.offsets[user_rows]
        end = lower_bound(events.time_s, begin, events.offsets[user_rows + 1], time_s)
        return self._queries(None, begin, end, user_rows, time_s)

    def disliked(self, user_rows: Int, time_s: Int) -> tuple[Int, Int] | None:
        """Return the items that users dislike before times: offsets int64 [B + 1] and rows; None if there are no negatives."""
        if self.negatives is None:
            return None
        rows = self.negatives
        begin = rows.offsets[user_rows]
        end = lower_bound(rows.time_s, begin, rows.offsets[user_rows + 1], time_s)
        query, at = ragged_arange(begin, end - begin)
        kept = ~rows.impression[at]
        return lengths_to_offsets(np.bincount(query[kept], minlength=len(begin))), rows.item_row[at[kept]]

    def held_out(self, split: str, *, max_queries: int | None = None, seed: int = 0) -> HeldOut:
        """Return the queries of the split "valid" or "test" and their targets.

        A query is a user and a time with at least one positive event of the split. Its history depends on the kind of split:

        - time: the user's events strictly before the time, including earlier ones of the same split. If times are days, events
          of the same day are excluded.
        - leave_one_out: all events before the held-out one in the user's order (which breaks ties of time). For "test" this
          includes the validation event.
        - predefined: all training and withheld events, for "test" also the validation events; one query per user, just after
          the last of them.

        Parameters
        ----------
        split
            "valid" or "test".
        max_queries
            Size of a sample drawn with `seed`; None: all queries.

        Raises
        ------
        DataError
            `split` is not "valid" or "test".
        """
        if split not in ("valid", "test"):
            raise DataError(f"Unknown split {split!r}. Held-out queries exist for 'valid' and 'test'.")
        events, code = self.events, SPLITS[split]
        user_row = events.user_row
        timeless = not self.ordered  # one query per user
        target = np.flatnonzero(events.positive & (events.split == code))
        moment = np.zeros(len(target), np.int64) if timeless else events.time_s[target]
        # One row per (user, time, item), the first event of each; events are already sorted by user and time.
        order = np.lexsort((target, events.item_row[target], moment, user_row[target]))
        target, moment = target[order], moment[order]
        user, item = user_row[target], events.item_row[target]
        opens = changes(user, moment)
        distinct = opens | changes(item)
        query = (np.cumsum(opens) - 1)[distinct]
        first = np.minimum.reduceat(target, np.flatnonzero(opens)) if len(target) else target
        chosen = _sample(len(first), max_queries, seed)
        pool, begin, end, time_s = self._before(first[chosen], user_row, code)
        sizes = np.bincount(query, minlength=len(first))
        kept = np.isin(query, chosen)
        return HeldOut(
            queries=self._queries(pool, begin, end, user_row[first[chosen]], time_s),
            target_offsets=lengths_to_offsets(sizes[chosen]),
            target_row=item[distinct][kept],
            event_index=target[distinct][kept],
        )

    def _before(self, event: Int, user_row: Int, code: int) -> tuple[Int | None, Int, Int, Int]:
        """Return pool, begin, end and times of the queries with first target `event` [B].

        The histories are slices begin:end of `pool` (positions of events), or of the events themselves if `pool` is None.
        """
        events, kind = self.events, self.manifest.config.prepare.split.kind
        begin, moment = events.offsets[user_row[event]], events.time_s[event]
        if kind == "leave_one_out":
            return None, begin, event, moment
        if kind == "time":
            return None, begin, lower_bound(events.time_s, begin, event, moment), moment
        pool = np.flatnonzero((events.split < code) | (events.split == WITHHELD))
        begin = np.searchsorted(pool, begin)
        end = np.searchsorted(pool, events.offsets[user_row[event] + 1])
        last = events.time_s[pool[np.maximum(end - 1, 0)]] if len(pool) else moment
        return pool, begin, end, np.where(end > begin, last + 1, moment)

    def _queries(self, pool: Int | None, begin: Int, end: Int, user_row: Int, time_s: Int) -> Queries:
        events, offsets = self.events, lengths_to_offsets(end - begin)
        _, at = ragged_arange(begin, end - begin)
        at = at if pool is None else pool[at]
        return Queries(
            offsets=offsets,
            item_row=events.item_row[at],
            event_time_s=events.time_s[at],
            event_type=events.event_type[at],
            stars=events.stars[at],
            time_s=np.asarray(time_s, np.int64),
            user_row=np.asarray(user_row, np.int64),
            location=np.full((len(begin), 2), np.nan, np.float32),
            disliked=self.disliked(user_row, time_s),
        )


def _sample(size: int, most: int | None, seed: int) -> Int:
    taken = size if most is None else min(most, size)
    return np.sort(np.random.default_rng(seed).choice(size, taken, replace=False)) if taken < size else np.arange(size)


def _ids(column: pa.ChunkedArray) -> NDArray[np.object_]:
    return np.array([""] * FIRST_ROW + column.to_pylist(), dtype=object)


def _rows(ids: list[str], column: pa.ChunkedArray) -> Int:
    values = column.combine_chunks()
    found = pc.index_in(pa.array(ids, values.type), value_set=values, skip_nulls=True)
    return np.asarray(pc.fill_null(found, UNKNOWN - FIRST_ROW).to_numpy(zero_copy_only=False), np.int64) + FIRST_ROW
