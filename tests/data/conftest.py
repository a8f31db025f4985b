"""Prepare datasets from a few rows in a test, through the real `prepare` with a source that returns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import ibis
import pyarrow as pa
import pytest

from twotower.data.dataset import Dataset
from twotower.data.prepare import SOURCES, prepare
from twotower.data.sources.engine import Engine
from twotower.data.sources.raw_tables import RawTables
from twotower.schema import DAY_S, SPLITS, FeatureSpec
from twotower.utils.config import parse_config

CUTS = {"kind": "time", "valid": "1970-01-11", "test": "1970-01-21"}  # day 10 and day 20
EVERYTHING = {"kind": "time", "valid": "2100-01-01", "test": "2100-01-02"}
LAST = {"kind": "leave_one_out"}
NAMES = {code: name for name, code in SPLITS.items()}
INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("time_s", pa.int64()),
        ("order", pa.int64()),
        ("event_type", pa.string()),
        ("stars", pa.float64()),
        ("text", pa.string()),
        ("part", pa.string()),
        ("position", pa.int64()),
        ("request", pa.string()),
    ]
)
ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("name", pa.string()),
        ("city", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("price", pa.int64()),
        ("latitude", pa.float64()),
        ("longitude", pa.float64()),
    ]
)
USERS = pa.schema([("user_id", pa.string()), ("since_s", pa.int64()), ("elite", pa.list_(pa.int64()))])
FEATURES = (
    FeatureSpec(name="city", side="item", kind="categorical", columns=("city",)),
    FeatureSpec(name="categories", side="item", kind="multi", columns=("categories",)),
    FeatureSpec(name="price", side="item", kind="number", columns=("price",)),
    FeatureSpec(name="location", side="item", kind="geo", columns=("latitude", "longitude")),
    FeatureSpec(name="text", side="item", kind="text", columns=("name",)),
)


Row = str | dict[str, Any]
Prepared = Callable[..., Dataset]


def day(number: float) -> int:
    return int(number * DAY_S)


def listed(dataset: Dataset) -> list[tuple[str, str, int, str]]:
    """Return (user, item, time, split) of every event, in the order of the file."""
    events = dataset.events
    users, items = dataset.user_ids[events.user_row], dataset.item_ids[events.item_row]
    return list(zip(users, items, events.time_s.tolist(), [NAMES[code] for code in events.split.tolist()], strict=True))


def business(item_id: str, **values: Any) -> dict[str, Any]:
    return {"item_id": item_id, "name": f"The {item_id}", "city": "Town", "categories": ["Food"], "price": 2, **values}


def parsed(row: Row) -> dict[str, Any]:
    """Return an interaction from a dict, or from "user item time_s [stars [event_type]]" with "-" for null."""
    if isinstance(row, dict):
        return row
    user, item, time_s, *rest = (None if word == "-" else word for word in row.split())
    stars, event_type = [*rest, *[None, None][len(rest) :]]
    numbers = {"time_s": int(time_s or 0), "stars": None if stars is None else float(stars)}
    return {"user_id": user, "item_id": item, **numbers, "event_type": event_type or "review"}


def create(engine: Engine, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> ibis.Table:
    """Return a table of the engine from a list of dicts."""
    return engine.save(pa.Table.from_pylist(list(rows), schema))


def ids(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return the id table of a source that has only interactions."""
    return [{key: value} for value in sorted({row[key] for row in rows if row.get(key) is not None})]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return `prepared(rows, **settings of the section "prepare")`, which returns an open dataset.

    Further keywords: `items`, `users` (lists of dicts; by default the ids of the interactions), `features` (True: those of the
    columns above), `has_time`, `truth`, `out` (by default a new folder), `seed`.
    """
    base, numbers = tmp_path_factory.mktemp("datasets"), count()

    def make(
        rows: Sequence[Row],
        *,
        items: Sequence[dict[str, Any]] | None = None,
        users: Sequence[dict[str, Any]] | None = None,
        features: bool = False,
        has_time: bool = True,
        truth: Path | None = None,
        out: Path | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Dataset:
        events = [{"event_type": "review", "order": i, **parsed(row)} for i, row in enumerate(rows)]

        def read(_data: Any, engine: Engine, _rejects: Any) -> RawTables:
            texts = create(engine, events, INTERACTIONS)
            return RawTables(
                interactions=engine.save(texts.mutate(chars=texts["text"].length().fill_null(0).cast("int64")).drop("text")),
                texts=texts.select("order", "text"),
                items=create(engine, ids(events, "item_id") if items is None else items, ITEMS),
                users=create(engine, ids(events, "user_id") if users is None else users, USERS),
                features=FEATURES if features else (),
                has_time=has_time,
                counts={"interactions": len(events)},
                truth=truth,
            )

        folder = out or base / str(next(numbers))
        with mock.patch.dict(SOURCES, {"tables": read}):
            prepare(parse_config({"seed": seed, "data": {"source": "tables"}, "prepare": settings}), folder)
        return Dataset.open(folder)

    return make
