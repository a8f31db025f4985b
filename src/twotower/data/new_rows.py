"""Read new raw data for a dataset that exists: the events, items and users that an update adds to it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.dataset import Dataset
from twotower.data.matching import count_ids
from twotower.data.prepare import SOURCES, open_engine
from twotower.data.selection import ITEM_KEY, USER_KEY, Stage, row_count, select_events
from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import Engine
from twotower.data.sources.raw_tables import POSITION, REQUEST, RawTables
from twotower.data.sources.text_files import engine_errors
from twotower.errors import DataError
from twotower.schema import EVENT_TYPE, FIRST_ROW, ITEM_ID, NEGATIVE, ORDER, POSITIVE, STARS, TIME, USER_ID, WEIGHT
from twotower.utils.config import Config, DataConfig, SplitConfig
from twotower.utils.console import log

MIN_KNOWN_FRAC = 0.5
"""Smallest share of the new events whose items must be known, and of the catalogue that a table of items must have."""


@dataclass(frozen=True)
class NewRows:
    """New raw data.

    Attributes
    ----------
    what
        Name of the data in messages.
    events
        `user_id` (null: anonymous), `item_id`, `time_s`, `event_type`, `stars`, `weight`, `positive` and, if known, `position` and
        `request`, in the order of the source.
    items, users
        Rows with the columns of the tables; None if the data have no such table.
    negatives
        Explicit negatives and impressions of users with an id, with the same columns; None if there are none.
    counts
        What was read, for the account: "read", "files", "matched" and "dropped" of a `DatasetCounts`.
    partial
        A null of `items` stands for a value that the data do not tell: their table is in long form.
    """

    what: str
    events: pa.Table
    items: pa.Table | None = None
    users: pa.Table | None = None
    negatives: pa.Table | None = None
    counts: dict[str, Any] | None = None
    partial: bool = False


def read_new_rows(
    data: DataConfig,
    base: Dataset,
    what: str,
    tables: Mapping[str, pa.Table] | None = None,
    added_items: pa.Table | None = None,
) -> NewRows:
    """Read new raw data with the reader, the account and the rules of `prepare`.

    Filters by the number of events (`min_user_events` and so on) do not apply: they would drop most of a day.

    Parameters
    ----------
    data
        Where the new data are, and their columns.
    base
        The dataset that they extend.
    what
        Name of the data in messages.
    tables
        Tables in memory by name; see `prepare`.
    added_items
        Items that were added to the bundle of the run without training, in the columns of the catalogue.

    Raises
    ------
    DataError
        The data cannot be read, have no times, have less than half of the catalogue, or are about other items.
    """
    made = base.manifest.config
    config = Config(seed=made.seed, data=data, prepare=made.prepare.model_copy(update=_ONE_PART))
    with TemporaryDirectory() as folder, engine_errors():
        rejects = Rejects(Path(folder) / "rejects.jsonl", data.max_reject_frac)
        engine = open_engine(config.prepare, Path(folder) / "spill", tables)
        try:
            raw = SOURCES[data.source](data, engine, rejects)
            rejects.check()
            if not raw.has_time:
                raise DataError(f"{what} has no times. An update needs the time of every event. Name its column, or train again.")
            found = _selected(engine, config, raw, base, what, added_items)
        finally:
            rejects.close()
            engine.close()
            shutil.rmtree(Path(folder) / "spill", ignore_errors=True)
    files = {name: file.as_json() for name, file in rejects.files.items()}
    for warning in rejects.warnings():
        log.warning("%s", warning)
    return replace(found, counts={"read": raw.counts, "files": files, **(found.counts or {})})


_ONE_PART = {
    "split": SplitConfig(kind="time", valid=0.0, test=0.0),
    "min_user_events": 1,
    "min_item_events": 1,
    "k_core": False,
}


def _selected(engine: Engine, config: Config, raw: RawTables, base: Dataset, what: str, added: pa.Table | None) -> NewRows:
    """Return the events as `prepare` would select them, and the tables."""
    table = config.data.items
    partial = table is not None and table.path is not None and table.long_form is not None
    given = (*raw.described, *(("items",) if partial else ()))
    items, users = (getattr(raw, side).to_pyarrow() if side in given else None for side in ("items", "users"))
    if items is not None and not partial and (table is None or table.path is not None):
        _check_catalogue(items, base, what)
    items = _with_added(items, added)
    if not row_count(raw.interactions):
        return NewRows(what, _NO_EVENTS, items, users, partial=partial)
    described = "item" in base.manifest.counts.matched
    known = {
        "items": _ids(engine, ITEM_ID, base.items, raw.items if not described else None if items is None else engine.save(items)),
        "users": _ids(engine, USER_ID, base.users, raw.users),
    }
    prepare = config.prepare
    types = (*base.event_types, *base.manifest.negative_types, *prepare.event_weights, *prepare.impression_types)
    stage = Stage(engine, config, replace(raw, **known, described=("items",) if described else ()), event_types=types)
    if not described:  # then the events themselves name the new items
        _check_known(engine, raw.interactions, _ids(engine, ITEM_ID, base.items, None), base, what)
    else:
        _check_known(engine, raw.interactions, known["items"], base, what)
    chosen = select_events(stage)
    rows = chosen.events.join(chosen.items, ITEM_KEY).left_join(chosen.users, USER_KEY)
    columns = [USER_ID, ITEM_ID, TIME, EVENT_TYPE, STARS, WEIGHT, POSITIVE, NEGATIVE]
    columns += [name for name in (POSITION, REQUEST) if name in rows.columns]
    counts = {"matched": {side: asdict(match) for side, match in stage.matched.items()}, "dropped": stage.dropped}
    read = rows.order_by([TIME, ORDER]).select(columns).to_pyarrow()
    negatives = read.filter(pc.and_(read[NEGATIVE], pc.is_valid(read[USER_ID]))).drop_columns(NEGATIVE)
    events = read.filter(pc.invert(read[NEGATIVE])).drop_columns(NEGATIVE)
    return NewRows(what, events, items, users, negatives if len(negatives) else None, counts, partial)


_NO_EVENTS = pa.table(
    {
        USER_ID: pa.array([], pa.string()),
        ITEM_ID: pa.array([], pa.string()),
        TIME: pa.array([], pa.int64()),
        EVENT_TYPE: pa.array([], pa.string()),
        STARS: pa.array([], pa.float64()),
        WEIGHT: pa.array([], pa.float32()),
        POSITIVE: pa.array([], pa.bool_()),
    }
)


def _ids(engine: Engine, key: str, base: pa.Table, more: ir.Table | None) -> ir.Table:
    """Return the distinct ids of both tables."""
    known = engine.save(pa.table({key: base[key].cast(pa.string())}))
    return known if more is None else engine.save(known.union(more.select(key), distinct=True))


def _with_added(items: pa.Table | None, added: pa.Table | None) -> pa.Table | None:
    """Return the items of the new data, and those that were added before and that these lack."""
    if items is None or added is None:
        return added if items is None else items
    lacking = added.filter(pc.invert(pc.is_in(added[ITEM_ID], value_set=items[ITEM_ID].cast(pa.string()).combine_chunks())))
    return pa.concat_tables([items, lacking], promote_options="permissive")


def _check_known(engine: Engine, events: ir.Table, known: ir.Table, base: Dataset, what: str) -> None:
    """Check that at least half of the events are at known items."""
    counted = count_ids(engine, events, ITEM_ID)
    total = int(counted["n_events"].sum().to_pyarrow().as_py())
    strange = counted.anti_join(known, ITEM_ID).order_by(ITEM_ID).to_pyarrow()
    found = total - sum(strange["n_events"].to_pylist())
    if found < MIN_KNOWN_FRAC * total:
        raise DataError(
            f"{what} is about other items: only {found:,} of its {total:,} events are at items of the run. It has "
            f"{strange[ITEM_ID][0].as_py()!r}, the run has {str(base.items[ITEM_ID][0])!r}. Expected at least half. Nothing was "
            "changed. Name the data of this run, or add the table of the new items."
        )


def _check_catalogue(items: pa.Table, base: Dataset, what: str) -> None:
    """Check that a table of items has most of the catalogue, or only new items."""
    there = int((base.item_rows(items[ITEM_ID].cast(pa.string()).to_pylist()) >= FIRST_ROW).sum())
    if 0 < there < MIN_KNOWN_FRAC * base.n_items:
        raise DataError(
            f"The items table of {what} has {there:,} of the {base.n_items:,} items of the run. Expected the whole catalogue, or "
            "only new items. Nothing was changed. Export the whole catalogue, or leave the known items out."
        )
