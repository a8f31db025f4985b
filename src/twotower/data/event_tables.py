"""Write the events of a dataset as arrays: those of users, all by item, and beside them the negatives."""

from __future__ import annotations

from pathlib import Path

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.dataset import EVENTS_FILE, ITEM_EVENTS_FILE, NEGATIVES_FILE, POSITIONS_FILE
from twotower.data.selection import BY_TIME, ITEM_KEY, USER_KEY, Selection, Stage, row_count
from twotower.data.sources.raw_tables import POSITION, REQUEST
from twotower.schema import (
    EVENT_TYPE,
    FIRST_ROW,
    ITEM_ROW,
    NEGATIVE,
    ORDER,
    POSITIVE,
    SPLIT,
    SPLITS,
    STARS,
    TIME,
    TRAIN,
    USER_ROW,
    WEIGHT,
    WITHHELD,
)
from twotower.utils.array_files import open_arrays, write_arrays
from twotower.utils.manifests import KeptCounts
from twotower.utils.ragged import lengths_to_offsets
from twotower.utils.types import Array, Int

OFFSETS = "offsets"  # start of the events of each user or item


def write_events(
    stage: Stage, chosen: Selection, items: ir.Table, users: ir.Table, types: list[str], folder: Path
) -> tuple[KeptCounts, list[str]]:
    """Write all tables of events and return the numbers of their rows, and the event types of the negatives with codes 0, 1, …

    `items` and `users` have the rows of the keys, and `types` the event types with codes 1, 2, …
    """
    rows = chosen.events.join(items, ITEM_KEY).left_join(users, USER_KEY)
    rows = rows.mutate(stars=rows[STARS].fill_null(float("nan")).cast("float32"))
    code = rows[EVENT_TYPE].cases(*((name, i + 1) for i, name in enumerate(types)), else_=0).cast("int64")
    impression_columns = [name for name in (POSITION, REQUEST) if name in rows.columns]
    columns = [USER_ROW, ITEM_ROW, TIME, STARS, EVENT_TYPE, WEIGHT, SPLIT]
    full = stage.save(rows.filter(~rows[NEGATIVE]).mutate(event_type=code).select(*columns, ORDER, POSITIVE, *impression_columns))
    known = full.filter(full[USER_ROW].notnull()).order_by([USER_ROW, *BY_TIME])
    events = _arrays(known.select(*columns, POSITIVE))
    n_items, n_users = row_count(items) + FIRST_ROW, row_count(users) + FIRST_ROW
    negative_types: list[str] = []
    negative_counts: dict[str, int] = {}
    if row_count(chosen.events.filter(chosen.events[NEGATIVE])):
        negatives = rows.filter(rows[NEGATIVE]).order_by([USER_ROW, *BY_TIME]).select(*columns, *impression_columns).to_pyarrow()
        named = known.select(REQUEST).to_pyarrow()[REQUEST] if REQUEST in impression_columns else None
        if named is not None and named.null_count < len(named):
            events[REQUEST] = codes_of(pa.chunked_array([*named.chunks, *negatives[REQUEST].chunks]))[: len(named)]
        arrays, negative_types = _negatives(negatives, named, stage.config.prepare.impression_types)
        write_arrays(folder / NEGATIVES_FILE, _ragged(arrays, USER_ROW, n_users))
        negative_counts = dict(zip(negative_types, np.bincount(arrays[EVENT_TYPE]).tolist(), strict=True))
    write_arrays(folder / EVENTS_FILE, _ragged(events, USER_ROW, n_users))
    _write_positions(full, known, folder)
    item_events = _ragged(_arrays(full.order_by([ITEM_ROW, *BY_TIME]).select(ITEM_ROW, TIME, STARS, SPLIT)), ITEM_ROW, n_items)
    write_arrays(folder / ITEM_EVENTS_FILE, item_events)
    by_split = np.bincount(events[SPLIT], minlength=WITHHELD + 1).tolist()
    kept = KeptCounts(
        events=len(events[SPLIT]),
        **{f"{name}_events": by_split[code] for name, code in (SPLITS | {"withheld": WITHHELD}).items()},
        positive_events=int(events[POSITIVE].sum()),
        anonymous_events=len(item_events[SPLIT]) - len(events[SPLIT]),
        negative_events=negative_counts,
        items=n_items - FIRST_ROW,
        users=n_users - FIRST_ROW,
    )
    return kept, negative_types


def read_training(folder: Path) -> tuple[Int, Int, Int]:
    """Return user row, item row and time in seconds of each positive training event in the written tables."""
    events = open_arrays(folder / EVENTS_FILE)
    user = np.repeat(np.arange(len(events[OFFSETS]) - 1), np.diff(events[OFFSETS]))
    kept = events[POSITIVE] & (events[SPLIT] == TRAIN)
    return user[kept], events[ITEM_ROW][kept], events[TIME][kept]


def _negatives(rows: pa.Table, requests: pa.ChunkedArray | None, impressions: list[str]) -> tuple[dict[str, Array], list[str]]:
    """Return the arrays of the negatives, whose requests are numbered after those of the events, and their event types."""
    types = sorted(rows[EVENT_TYPE].unique().to_pylist())
    arrays = {name: rows[name].to_numpy() for name in (USER_ROW, ITEM_ROW, TIME, STARS, WEIGHT, SPLIT)}
    arrays[EVENT_TYPE] = pc.index_in(rows[EVENT_TYPE], pa.array(types)).to_numpy().astype(np.int64)
    arrays["impression"] = pc.is_in(rows[EVENT_TYPE], pa.array(impressions, pa.string())).to_numpy()
    nothing = np.zeros(len(rows), np.int64)
    arrays[POSITION] = pc.fill_null(rows[POSITION], 0).to_numpy() if POSITION in rows.column_names else nothing
    arrays[REQUEST] = nothing
    if requests is not None:
        arrays[REQUEST] = codes_of(pa.chunked_array([*requests.chunks, *rows[REQUEST].chunks], pa.string()))[len(requests) :]
    return arrays, types


def codes_of(texts: pa.ChunkedArray) -> Int:
    """Return a number from 1 for each text, in the order of first appearance; 0 for null."""
    return np.asarray(pc.fill_null(pc.index_in(texts, texts.unique().drop_null()), -1).to_numpy(), np.int64) + 1


def _write_positions(full: ir.Table, known: ir.Table, folder: Path) -> None:
    """Write the positions at which items were shown, if any event has one: int64 [E] in the order of the events, 0 without one."""
    if POSITION in full.columns and row_count(full.filter(full[POSITION].notnull())):
        write_arrays(folder / POSITIONS_FILE, _arrays(known.select(known[POSITION].fill_null(0).name(POSITION))))


def _ragged(arrays: dict[str, Array], key: str, size: int) -> dict[str, Array]:
    """Return arrays that are sorted by the row `key` with offsets in its place."""
    row = arrays.pop(key)
    return arrays | {OFFSETS: lengths_to_offsets(np.bincount(row, minlength=size))}


def _arrays(rows: ir.Table) -> dict[str, Array]:
    """Return the columns of a result as arrays."""
    table = rows.to_pyarrow()
    return {name: table[name].to_numpy() for name in table.column_names}
