"""Find out what new raw data add to a dataset: which events, users and items it does not have, and which events validate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.dataset import Dataset
from twotower.data.new_rows import NewRows
from twotower.errors import DataError
from twotower.schema import DAY_S, EVENT_TYPE, FIRST_ROW, ITEM_ID, POSITIVE, TIME, USER_ID
from twotower.utils.console import log
from twotower.utils.ragged import lower_bound, ragged_arange
from twotower.utils.types import Int, Mask


@dataclass(frozen=True)
class NewNegatives:
    """Explicit negatives and impressions that a dataset does not have, and the rows of their users and items as in `Growth`."""

    rows: pa.Table
    user_row: Int
    item_row: Int


@dataclass(frozen=True)
class Growth:
    """The growth of a dataset by new events.

    Attributes
    ----------
    events
        The new events that the dataset does not have.
    user_row, item_row
        int64 [n]: their users (0: anonymous) and items, as rows of the old dataset, followed by those of `new_users`, `new_items`.
    new_users, new_items
        Ids that the dataset does not have, sorted.
    cut_s
        First second of the validation part.
    dropped
        Numbers of events that do not count, by reason.
    negatives
        New negatives; None if there are none.
    """

    events: pa.Table
    user_row: Int
    item_row: Int
    new_users: list[str]
    new_items: list[str]
    cut_s: int
    dropped: dict[str, int]
    negatives: NewNegatives | None = None

    @property
    def time_s(self) -> Int:
        """Return the times of the events."""
        return np.asarray(self.events[TIME].to_numpy(), np.int64)


def last_event_s(dataset: Dataset) -> int:
    """Return the time of the last event of a dataset, in seconds."""
    return int(dataset.item_events.time_s.max(initial=0))


def plan_growth(base: Dataset, rows: NewRows, *, valid_frac: float) -> Growth | None:
    """Find out what is new.

    Parameters
    ----------
    valid_frac
        Share of the new events, the newest ones, that becomes the validation part.

    Returns
    -------
    Growth
        None if the dataset has all events already; new negatives alone cannot validate.

    Raises
    ------
    DataError
        The clock has gone back, no new event is later than the dataset, or there are too few.
    """
    last, now = last_event_s(base), time.time() + DAY_S
    if now < last:
        raise DataError(
            f"The clock of this machine says {_day(int(now) - DAY_S)}, but the run has events until {_day(last)}: it has gone "
            "back. Nothing was changed. Correct the clock."
        )
    negatives = _new_negatives(base, rows.negatives, int(now))
    more = [table[ITEM_ID].to_pylist() for table in (rows.items, negatives) if table is not None]
    items = _known_first(base.items[ITEM_ID], rows.events[ITEM_ID], [name for names in more for name in names])
    times = np.asarray(rows.events[TIME].to_numpy(), np.int64)
    item_row, user_row = rows_of(items, rows.events[ITEM_ID]), base.user_rows(rows.events[USER_ID].to_pylist())
    user_row = np.where(np.asarray(rows.events[USER_ID].is_null()), 0, user_row)
    future = times > now
    contained = ~future & _contains(base, user_row, item_row, times, rows.events[EVENT_TYPE])
    dropped = {"already in the run": int(contained.sum()), "later than this machine's clock": int(future.sum())}
    if rows.negatives is not None:
        dropped["negative, and already in the run or later"] = len(rows.negatives) - (0 if negatives is None else len(negatives))
    for reason, count in dropped.items():
        if count:
            log.info("%s: %s events do not count: %s", rows.what, f"{count:,}", reason)
    events = rows.events.filter(pa.array(~contained & ~future))
    if future.all() and len(times):
        raise DataError(
            f"All {len(times):,} events of {rows.what} are later than this machine's clock, {_day(int(now) - DAY_S)}. Nothing was "
            "changed. Correct the clock, or the times."
        )
    if not len(events):
        return None
    users = _known_first(base.users[USER_ID], events[USER_ID], [] if negatives is None else negatives[USER_ID].to_pylist())
    added = None
    if negatives is not None:
        added = NewNegatives(negatives, rows_of(users, negatives[USER_ID]), rows_of(items, negatives[ITEM_ID]))
    cut = _cut(events, last, valid_frac, rows.what)
    known, n_items = base.n_users, base.n_items
    user_row, item_row = rows_of(users, events[USER_ID]), item_row[~contained & ~future]
    return Growth(events, user_row, item_row, users[known:], items[n_items:], cut, dropped, added)


def _day(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")


def _known_first(known: pa.ChunkedArray, found: pa.ChunkedArray, more: Sequence[str]) -> list[str]:
    """Return the known ids, then the sorted other ones."""
    there = known.to_pylist()
    return [*there, *sorted({*pc.unique(found.drop_null()).to_pylist(), *more} - set(there))]


def rows_of(ids: list[str], values: pa.ChunkedArray) -> Int:
    """Return the row of every value; 0 for null."""
    found = pc.index_in(values.cast(pa.string()), value_set=pa.array(ids, pa.string()), skip_nulls=True)
    return np.asarray(pc.fill_null(found, -FIRST_ROW).to_numpy(), np.int64) + FIRST_ROW


def _contains(base: Dataset, user_row: Int, item_row: Int, time_s: Int, event_type: pa.ChunkedArray) -> Mask:
    """Return the mask of events that the dataset has already.

    Events of a user are compared by item, second and type, or by item alone if the dataset keeps no repeats. Anonymous events are
    compared by item and second.
    """
    events, item_events = base.events, base.item_events
    user, named = np.where(user_row >= FIRST_ROW, user_row, 0), user_row >= FIRST_ROW
    start, stop = events.offsets[user], events.offsets[np.where(named, user + 1, 0)]
    if base.manifest.config.prepare.duplicates == "keep":
        start, stop = lower_bound(events.time_s, start, stop, time_s), lower_bound(events.time_s, start, stop, time_s + 1)
    owner, at = ragged_arange(start, stop - start)
    same = events.item_row[at] == item_row[owner]
    if base.manifest.config.prepare.duplicates == "keep":
        code = rows_of(["", *base.event_types], event_type) - FIRST_ROW  # of a type that training has not seen: negative
        same &= events.event_type[at] == np.maximum(code, 0)[owner]
    contained: Mask = np.bincount(owner[same], minlength=len(user_row)) > 0
    item = np.where((user_row == 0) & (item_row < base.n_item_rows), item_row, 0)
    start, stop = item_events.offsets[item], item_events.offsets[item + 1]
    found = lower_bound(item_events.time_s, start, stop, time_s + 1) > lower_bound(item_events.time_s, start, stop, time_s)
    return contained | (found & (item >= FIRST_ROW))


def _new_negatives(base: Dataset, rows: pa.Table | None, now: int) -> pa.Table | None:
    """Return the negatives that the dataset does not have, by user, item, second and type, and that are not later than now."""
    if rows is None:
        return None
    times, user = np.asarray(rows[TIME].to_numpy(), np.int64), base.user_rows(rows[USER_ID].to_pylist())
    kept = times <= now
    if base.negatives is not None:
        old, item = base.negatives, base.item_rows(rows[ITEM_ID].to_pylist())
        code = rows_of(base.manifest.negative_types, rows[EVENT_TYPE]) - FIRST_ROW
        start, stop = old.offsets[user], old.offsets[user + 1]
        start, stop = lower_bound(old.time_s, start, stop, times), lower_bound(old.time_s, start, stop, times + 1)
        owner, at = ragged_arange(start, stop - start)
        same = (old.item_row[at] == item[owner]) & (old.event_type[at] == code[owner])
        kept &= np.bincount(owner[same], minlength=len(times)) == 0
    return rows.filter(pa.array(kept)) if kept.any() else None


def _cut(events: pa.Table, last: int, valid_frac: float, what: str) -> int:
    """Return the first second of the validation part: the newest of the new events that may be targets."""
    times = np.sort(np.asarray(events[TIME].to_numpy(), np.int64))
    if times[-1] <= last:
        raise DataError(
            f"{what} is older than the run: its {len(times):,} new events end on {_day(int(times[-1]))}, the run on {_day(last)}. "
            "Nothing was changed. Give later events, or train again with all data."
        )
    targets = np.sort(np.asarray(events.filter(pc.and_(events[POSITIVE], pc.is_valid(events[USER_ID])))[TIME].to_numpy(), np.int64))
    targets = targets[targets > last]
    if not len(targets):
        raise DataError(
            f"{what} has no event after {_day(last)} that can be a target: positive, and of a user with an id. An update validates "
            "on such events. Nothing was changed. Give more events."
        )
    cut = ceil(np.quantile(targets, 1 - valid_frac))
    return int(np.clip(cut, last + 1, targets[-1]))
