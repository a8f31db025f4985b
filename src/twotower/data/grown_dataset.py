"""Extend a dataset by new events, items and users. What a model knows keeps its row; new rows follow.

Vocabularies and event types are only appended to, statistics and text components stay. So the tables of a model that was trained on
the old dataset fit the new one, except that they lack rows at their end. The newest events become the validation part; all earlier
ones, those that were held out before included, are training events.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.dataset import EVENTS_FILE, ITEM_EVENTS_FILE, ITEM_FEATURES_FILE, POSITIONS_FILE, USER_FEATURES_FILE, Dataset
from twotower.data.event_arrays import Events, ItemEvents
from twotower.data.grown_negatives import new_requests, write_negatives
from twotower.data.growth import Growth, last_event_s, rows_of
from twotower.data.new_rows import NewRows
from twotower.data.prepare import finish, replacing, write_neighbours, write_table
from twotower.data.sources.raw_tables import POSITION
from twotower.errors import DataError
from twotower.features.encoders import encode_items, encode_users, grow_encoders
from twotower.schema import (
    EVENT_TYPE,
    FIRST_ROW,
    ITEM_ID,
    NEIGHBOURS,
    POSITIVE,
    STARS,
    TRAIN,
    USER_ID,
    VALID,
    WEIGHT,
    WITHHELD,
)
from twotower.utils.array_files import arrays_of, open_arrays, write_arrays
from twotower.utils.config import SplitConfig
from twotower.utils.manifests import DatasetCounts, DatasetManifest, KeptCounts
from twotower.utils.ragged import lengths_to_offsets
from twotower.utils.types import Array, Int


def grow(base: Dataset, rows: NewRows, growth: Growth, out: Path) -> Dataset:
    """Write the extended dataset to the folder `out` and open it. The same input gives the same bytes."""
    with replacing(out) as folder:
        split = np.where(growth.time_s < growth.cut_s, TRAIN, VALID).astype(np.int8)
        old = np.where(base.events.split == WITHHELD, WITHHELD, TRAIN)
        owner = np.concatenate([base.events.user_row, growth.user_row])
        bought = np.concatenate([base.events.item_row, growth.item_row])
        trained = np.concatenate([old, split]) == TRAIN
        n_users, n_items = base.n_user_rows + len(growth.new_users), base.n_item_rows + len(growth.new_items)
        user_new_row, n_train_users = _new_rows(owner[trained & (owner >= FIRST_ROW)], base.n_train_user_rows, n_users)
        item_new_row, n_train_items = _new_rows(bought[trained & (owner >= FIRST_ROW)], base.n_train_item_rows, n_items)
        types = _event_types(base, growth, split)
        request, of_negatives = new_requests(base, growth)
        kept = _write_events(base, growth, (split, request), user_new_row, item_new_row, types, folder)
        counts, negative_types = write_negatives(base, growth, of_negatives, user_new_row, item_new_row, folder)
        items = _merged(base.items, rows.items, ITEM_ID, growth.new_items, rows.what, partial=rows.partial).take(
            _order(item_new_row)
        )
        users = _merged(base.users, rows.users, USER_ID, growth.new_users, rows.what).take(_order(user_new_row))
        write_table(items, folder / "items.parquet")
        write_table(users, folder / "users.parquet")
        sizes = {"n_train_items": n_train_items, "n_train_users": n_train_users}
        _write_features(base, items, users, item_new_row, sizes, folder)
        manifest = _manifest(
            base, rows, growth, kept | {"negative_events": counts}, types, {**sizes, "n_items": len(items), "n_users": len(users)}
        )
        finish(folder, manifest.model_copy(update={"negative_types": negative_types}))
    return Dataset.open(out)


def _new_rows(trained: Int, first_untrained: int, n_rows: int) -> tuple[Int, int]:
    """Return the new row of every row, int64 [n_rows], and the number of trained ones: these first, each group in its order."""
    known = np.arange(n_rows) < first_untrained
    known[trained] = True
    rest = np.arange(FIRST_ROW, n_rows)
    order = np.concatenate([np.arange(FIRST_ROW), rest[known[rest]], rest[~known[rest]]])
    new_row = np.empty(n_rows, np.int64)
    new_row[order] = np.arange(n_rows)
    return new_row, int(known[FIRST_ROW:].sum())


def _order(new_row: Int) -> Int:
    """Return the position in the old order of each item or user in the new one."""
    return np.argsort(new_row)[FIRST_ROW:] - FIRST_ROW


def _event_types(base: Dataset, growth: Growth, split: Array) -> list[str]:
    trained = growth.events.filter(pa.array((split == TRAIN) & (growth.user_row >= FIRST_ROW)))
    return [*base.event_types, *sorted(set(pc.unique(trained[EVENT_TYPE]).to_pylist()) - set(base.event_types))]


def _write_events(
    base: Dataset, growth: Growth, chosen: tuple[Array, Int], user_new_row: Int, item_new_row: Int, types: list[str], folder: Path
) -> dict[str, Any]:
    """Write both event files, and return the numbers of their events. `chosen`: split and list number of each new event."""
    split, request = chosen
    old, item_events, named = base.events, base.item_events, growth.user_row >= FIRST_ROW
    columns = {name: growth.events[name].to_numpy(zero_copy_only=False) for name in (STARS, WEIGHT, POSITIVE)}
    fresh: dict[str, Array] = {
        "item_row": item_new_row[growth.item_row],
        "time_s": growth.time_s,
        "event_type": np.maximum(rows_of(["", *types], growth.events[EVENT_TYPE]) - FIRST_ROW, 0),
        "stars": columns[STARS].astype(np.float32),
        "weight": columns[WEIGHT].astype(np.float32),
        "positive": columns[POSITIVE].astype(np.bool_),
        "split": split,
    }
    kept = arrays_of(old) | {"item_row": item_new_row[old.item_row], "split": _as_trained(old.split)}
    if old.request is not None or (request.any() and not (base.negatives is None and growth.negatives is None)):
        fresh["request"] = request
        kept["request"] = np.zeros(len(old), np.int64) if old.request is None else old.request
    owner = np.concatenate([user_new_row[old.user_row], user_new_row[growth.user_row[named]]])
    joined = {name: np.concatenate([kept[name], value[named].astype(kept[name].dtype)]) for name, value in fresh.items()}
    order = np.lexsort((joined["time_s"], owner))
    offsets = lengths_to_offsets(np.bincount(owner, minlength=len(user_new_row)))
    events = Events(offsets=offsets, **{name: value[order] for name, value in joined.items()})
    write_arrays(folder / EVENTS_FILE, arrays_of(events))
    if (base.path / POSITIONS_FILE).is_file():
        position = growth.events[POSITION].fill_null(0) if POSITION in growth.events.column_names else None
        new = np.zeros(len(named), np.int64) if position is None else position.to_numpy().astype(np.int64)
        before = open_arrays(base.path / POSITIONS_FILE)[POSITION]
        write_arrays(folder / POSITIONS_FILE, {POSITION: np.concatenate([before, new[named]])[order]})
    row = np.concatenate([item_new_row[item_events.item_row], fresh["item_row"]])
    every = {name: np.concatenate([getattr(item_events, name), fresh[name]]) for name in ("time_s", "stars")}
    every["split"] = np.concatenate([_as_trained(item_events.split), split])
    order = np.lexsort((every["time_s"], row))
    offsets = lengths_to_offsets(np.bincount(row, minlength=len(item_new_row)))
    write_arrays(
        folder / ITEM_EVENTS_FILE, arrays_of(ItemEvents(offsets=offsets, **{name: value[order] for name, value in every.items()}))
    )
    counts = np.bincount(events.split, minlength=WITHHELD + 1).tolist()
    names = {"train_events": TRAIN, "valid_events": VALID, "withheld_events": WITHHELD}
    return {
        "events": len(events),
        **{name: counts[code] for name, code in names.items()},
        "test_events": 0,
        "positive_events": int(events.positive.sum()),
        "anonymous_events": len(row) - len(events),
    }


def _as_trained(split: Array) -> Array:
    return np.where(split == WITHHELD, WITHHELD, TRAIN).astype(np.int8)


def _merged(old: pa.Table, new: pa.Table | None, key: str, ids: list[str], what: str, *, partial: bool = False) -> pa.Table:
    """Return the old rows with the values of the new table, then rows of `ids`; columns that a table lacks are kept or null.

    With `partial`, a null of the new table keeps the old value.
    """
    every = pa.array([*old[key].to_pylist(), *ids], pa.string())
    known = pa.array([*range(len(old)), *[None] * len(ids)], pa.int64())
    fresh = None if new is None else pc.index_in(every, value_set=new[key].cast(pa.string()).combine_chunks())
    columns: dict[str, Any] = {}
    for name in old.column_names:
        values, at = old[name], known
        if name == key:
            columns[name] = every.cast(old.schema.field(name).type)
            continue
        if new is not None and fresh is not None and name in new.column_names:
            try:
                added = new[name].cast(values.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"The column {name!r} of {what} is {new[name].type}, but that of the run is {values.type}: "
                    f"{str(error).splitlines()[0]}. Nothing was changed. Write the column as before, or train again."
                ) from None
            values = pa.chunked_array([*values.chunks, *added.chunks], values.type)
            changed_rows = pc.if_else(pc.is_valid(added.take(fresh)), fresh, None) if partial else fresh
            at = pc.coalesce(pc.add(changed_rows.cast(pa.int64()), len(old)), known)
        columns[name] = values.take(at)
    return pa.table(columns, schema=old.schema)


def _write_features(base: Dataset, items: pa.Table, users: pa.Table, new_row: Int, sizes: dict[str, int], folder: Path) -> None:
    """Encode items and users. An item whose text column has not changed keeps the vector of its text, reviews included."""
    encoders = grow_encoders(base.encoders, items, users, **sizes)
    encoders.save(folder)
    encoded = encode_items(encoders, items)
    spec = next((spec for spec in base.specs if spec.side == "item" and spec.kind == "text"), None)
    if spec is not None:
        rows = new_row[FIRST_ROW : base.n_item_rows]
        before, after = base.items[spec.columns[0]].to_pylist(), items[spec.columns[0]].take(rows - FIRST_ROW).to_pylist()
        same = np.array([one == other for one, other in zip(before, after, strict=True)], np.bool_)
        encoded[spec.name][rows[same]] = base.item_features[spec.name][FIRST_ROW:][same]
    if NEIGHBOURS in base.item_features:
        most = base.item_features[NEIGHBOURS].shape[1]
        shape = {"n_user_rows": len(users) + FIRST_ROW, "n_item_rows": len(items) + FIRST_ROW, "most": most}
        encoded[NEIGHBOURS] = write_neighbours(folder, shape, ordered=True)
    write_arrays(folder / ITEM_FEATURES_FILE, encoded)
    write_arrays(folder / USER_FEATURES_FILE, encode_users(encoders, users))


def _manifest(
    base: Dataset, rows: NewRows, growth: Growth, kept: dict[str, Any], types: list[str], sizes: dict[str, int]
) -> DatasetManifest:
    counts, old = rows.counts or {}, base.manifest
    first = old.counts.times_s.get("first", int(base.item_events.time_s.min(initial=0)))
    last = max(last_event_s(base), int(growth.time_s.max()))
    dropped = counts.get("dropped", {"events": {}, "users": {}, "items": {}})
    split = SplitConfig(kind="time", valid=max(kept["valid_events"], 1) / (kept["events"] + 1), test=0.0)
    prepare = old.config.prepare.model_copy(update={"split": split})
    return old.model_copy(
        update={
            "config": old.config.model_copy(update={"prepare": prepare}),
            "counts": DatasetCounts(
                read=counts.get("read", {}),
                files=counts.get("files", {}),
                matched=counts.get("matched") or old.counts.matched,
                times_s={"first": min(first, int(growth.time_s.min())), "last": last},
                kept=KeptCounts(**kept, items=sizes["n_items"], users=sizes["n_users"]),
                dropped={**dropped, "events": {**dropped["events"], **growth.dropped}},
            ),
            "warnings": [],
            "event_types": types,
            "cuts_s": {"valid": growth.cut_s, "test": last + 1},
            "hashes": {},
            **sizes,
        }
    )
