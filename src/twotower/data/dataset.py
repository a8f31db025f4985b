"""A prepared folder, opened: events by user, visits by item, features, and the questions a split holds.

Enters: the folder `prepare` wrote. Leaves: numpy arrays and `Queries`. Tables are read when first asked for; events, visits and
features are memory maps, not to be written to: opening them costs nothing, histories are read where they are touched, and processes
of one host share the pages.

Promise: the history of a question never holds an event of its own moment or later (`held_out` says what that means per split).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from twotower.errors import DataError
from twotower.features.encoders import Encoders
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW, FORMAT_VERSION, ITEM_ID, SPLITS, TRAIN, TRUTH_FILE, UNKNOWN, USER_ID, WITHHELD, FeatureSpec
from twotower.utils.array_files import open_arrays
from twotower.utils.ragged import changes, lengths_to_offsets, lower_bound, ragged_arange
from twotower.utils.types import Float, Int, Mask

EVENTS_FILE, ITEM_EVENTS_FILE = "events.safetensors", "visits.safetensors"
ITEM_FEATURES_FILE, USER_FEATURES_FILE = "item_features.safetensors", "user_features.safetensors"
ASIDE = ("rejects.jsonl", TRUTH_FILE)  # files of the folder that no model is made from


@dataclass(frozen=True, slots=True)
class Events:
    """Events of known users, by user, oldest first.

    Attributes
    ----------
    offsets
        int64 [n_users + 1]: the events of user row u are offsets[u]:offsets[u + 1].
    item_row, time_s, event_type
        int64 [E]: item row; seconds (without a clock: position in the user's sequence); code (`Dataset.event_types`).
    stars, weight
        float32 [E]: stars (NaN where none were given); weight in the loss.
    positive
        bool [E]: may be a target.
    split
        int8 [E]: TRAIN, VALID, TEST or WITHHELD.
    """

    offsets: Int
    item_row: Int
    time_s: Int
    event_type: Int
    stars: Float
    weight: Float
    positive: Mask
    split: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.item_row)

    @property
    def user_row(self) -> Int:
        """int64 [E]: the user of each event."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True, slots=True)
class ItemEvents:
    """Every kept event and every anonymous one, by item, oldest first.

    Attributes
    ----------
    offsets
        int64 [n_items + 1]: the visits of item row i are offsets[i]:offsets[i + 1].
    time_s, stars, split
        [V]: as in `Events`.
    """

    offsets: Int
    time_s: Int
    stars: Float
    split: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def item_row(self) -> Int:
        """int64 [V]: the item of each visit."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The questions of a split and their answers.

    Attributes
    ----------
    queries
        `B` questions, by user, then moment.
    target_offsets, target_row
        int64 [B + 1], [T]: distinct items (rows ascending) of the positive events of each question.
    event_index
        int64 [T]: the first such event, as a position in `Dataset.events`.
    """

    queries: Queries
    target_offsets: Int
    target_row: Int
    event_index: Int

    def by_time(self) -> HeldOut:
        """Return the same questions in the order of their moments."""
        order = np.argsort(self.queries.time_s, kind="stable")
        size = np.diff(self.target_offsets)[order]
        _, at = ragged_arange(self.target_offsets[order], size)
        return HeldOut(self.queries.take(order), lengths_to_offsets(size), self.target_row[at], self.event_index[at])


class Dataset:
    """An opened dataset folder; see `Dataset.open`.

    Attributes
    ----------
    n_items, n_users
        Rows of the id spaces, the two reserved ones included.
    n_train_items, n_train_users
        Entities seen in training: rows 2 … 2 + n - 1.
    has_time
        False when `time_s` is only a position.
    event_types
        Names of the codes 1, 2, …: the types seen in training. An event of another type has code 0.
    specs
        The declared static features.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.n_items, self.n_users = int(manifest["n_items"]), int(manifest["n_users"])
        self.n_train_items, self.n_train_users = int(manifest["n_train_items"]), int(manifest["n_train_users"])
        self.has_time = bool(manifest["has_time"])
        self.event_types: list[str] = manifest["event_types"]
        self.specs = tuple(FeatureSpec(**{**spec, "columns": tuple(spec["columns"])}) for spec in manifest["features"])

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open the folder `path`.

        Raises
        ------
        DataError
            It is no dataset, of another format version, or lacks a file its manifest names.
        """
        try:
            manifest = json.loads((path / "manifest.json").read_text())
        except (OSError, ValueError):
            raise DataError(f"A dataset is a folder with a manifest.json. {path} holds none. Run `twotower prepare`.") from None
        if not isinstance(manifest, dict) or manifest.get("kind") != "dataset":
            raise DataError(f"A dataset's manifest says so. {path}/manifest.json is another's. Run `twotower prepare`.")
        if manifest.get("format") != FORMAT_VERSION:
            found = manifest.get("format")
            raise DataError(f"The dataset must have format {FORMAT_VERSION}. {path} has {found}. Run `twotower prepare` again.")
        missing = [name for name in manifest.get("hashes", {}) if not (path / name).is_file()]
        if missing:
            raise DataError(f"The dataset must be complete. {path} lacks {', '.join(missing)}. Run `twotower prepare` again.")
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        """sha256 over the hashes of all files that a model is made from: equal when, and only when, the data are."""
        hashes = sorted((name, digest) for name, digest in self.manifest["hashes"].items() if name not in ASIDE)
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @cached_property
    def events(self) -> Events:
        """Events of known users."""
        return Events(**open_arrays(self.path / EVENTS_FILE))

    @cached_property
    def item_events(self) -> ItemEvents:
        """Everything that happened at each item."""
        return ItemEvents(**open_arrays(self.path / ITEM_EVENTS_FILE))

    @cached_property
    def items(self) -> pa.Table:
        """Raw columns of the items; row r of the id space is at position r - 2."""
        return pq.read_table(self.path / "items.parquet")

    @cached_property
    def users(self) -> pa.Table:
        """Raw columns of the users; row r of the id space is at position r - 2."""
        return pq.read_table(self.path / "users.parquet")

    @cached_property
    def item_features(self) -> dict[str, NDArray[Any]]:
        """Encoded static features of the items, over all rows."""
        return open_arrays(self.path / ITEM_FEATURES_FILE)

    @cached_property
    def user_features(self) -> dict[str, NDArray[Any]]:
        """Encoded static features of the users, over all rows."""
        return open_arrays(self.path / USER_FEATURES_FILE)

    @cached_property
    def encoders(self) -> Encoders:
        """What encoded them."""
        return Encoders.load(self.path)

    @cached_property
    def item_ids(self) -> NDArray[np.object_]:
        """Object array [n_items] of ids; "" for the reserved rows."""
        return _ids(self.items[ITEM_ID])

    @cached_property
    def user_ids(self) -> NDArray[np.object_]:
        """Object array [n_users] of ids; "" for the reserved rows."""
        return _ids(self.users[USER_ID])

    @cached_property
    def item_train_count(self) -> Int:
        """int64 [n_items]: positive training events of each item."""
        counted = self.events.positive & (self.events.split == TRAIN)
        return np.bincount(self.events.item_row[counted], minlength=self.n_items).astype(np.int64)

    @property
    def n_train_events(self) -> int:
        """Positive events of the training part."""
        return int(self.item_train_count.sum())

    @property
    def ordered(self) -> bool:
        """Whether held-out events come after their histories; under a given split they come from anywhere in them."""
        return bool(self.manifest["config"]["prepare"]["split"]["kind"] != "predefined")

    def item_rows(self, ids: list[str]) -> Int:
        """Rows int64 [len(ids)] of item ids; UNKNOWN where there is no such item."""
        return _rows(ids, self.items[ITEM_ID])

    def user_rows(self, ids: list[str]) -> Int:
        """Rows int64 [len(ids)] of user ids; UNKNOWN where there is no such user."""
        return _rows(ids, self.users[USER_ID])

    def histories(self, user_rows: Int, time_s: Int) -> Queries:
        """Queries of known users [B] at moments [B]: all their events strictly before. UNKNOWN has none."""
        events = self.events
        begin = events.offsets[user_rows]
        end = lower_bound(events.time_s, begin, events.offsets[user_rows + 1], time_s)
        return self._queries(None, begin, end, user_rows, time_s)

    def held_out(self, split: str, *, max_queries: int | None = None, seed: int = 0) -> HeldOut:
        """Questions of the split "valid" or "test": what did the user choose at that moment?

        A question is a user and a moment with at least one positive event of the split. Its history is:

        - time split: the user's events strictly before the moment, earlier ones of the same split included. Where times are
          days, nothing of the same day.
        - leave-one-out: all events before the held-out one in the user's order (which breaks ties of time), so for test the
          validation event too.
        - given split: all training and withheld events for "valid", the validation events too for "test"; one question per user,
          just after the last of them.

        Parameters
        ----------
        max_queries
            Keep a sample of so many, drawn with `seed`; None keeps all.

        Raises
        ------
        DataError
            `split` is not "valid" or "test".
        """
        if split not in ("valid", "test"):
            raise DataError(f"Held-out events are those of the split valid or test. Got {split!r}.")
        events, code = self.events, SPLITS[split]
        user_row = events.user_row
        given = not self.ordered
        target = np.flatnonzero(events.positive & (events.split == code))
        moment = np.zeros(len(target), np.int64) if given else events.time_s[target]
        # One line per (user, moment, item), the first event of each; events are sorted by user and time already.
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
        """Histories of the questions with first target `event` [B]: slices begin:end of `pool` (positions of events, or None: of
        the events themselves), and moments."""
        events, kind = self.events, self.manifest["config"]["prepare"]["split"]["kind"]
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
