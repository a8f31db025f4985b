"""Columns of an items table that no feature declares: kept for display and filters, and read by no model."""

from __future__ import annotations

import csv
import json
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.bundle.bundle import export_bundle
from twotower.bundle.item_arrays import offered_items
from twotower.bundle.revision import add_items
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import DuckDBEngine
from twotower.data.sources.tables import read_tables
from twotower.retrieval.recommender import Recommender
from twotower.utils.checkpoint import save_checkpoint
from twotower.utils.config import parse_config

from ...drawn_bundle import checkpoint_of, drawn
from .table_rows import Read

LABEL = {"name": "kind", "kind": "categorical"}
ROWS: list[dict[str, Any]] = [
    {"item_id": "p0", "kind": "bar", "price": 3, "weight": 2.5, "code": "02139", "outdoor": True, "tags": ["a", "b"], "none": None},
    {"item_id": "p1", "kind": "pub", "price": 12, "weight": 7.0, "code": "10115", "outdoor": False, "tags": ["c"], "none": None},
    {"item_id": "p2", "kind": "bar", "price": None, "weight": None, "code": None, "outdoor": None, "tags": None, "none": None},
]
KEPT = [
    ("p0", None, "bar", 3, 2.5, "02139", "true", ["a", "b"], None),
    ("p1", None, "pub", 12, 7.0, "10115", "false", ["c"], None),
    ("p2", None, "bar", None, None, None, None, None, None),
]


def write(folder: Path, rows: list[dict[str, Any]], name: str) -> None:
    """Write a table in the form of its suffix."""
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    elif name.endswith(".jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            plain = (str, int, float, type(None))
            for row in rows:
                writer.writerow(
                    {key: value if type(value) in plain else json.dumps(value, default=str) for key, value in row.items()}
                )


def read(folder: Path, path: str, **items: Any) -> pa.Table:
    """The items that `read_tables` makes of a file or glob."""
    (folder / "events.csv").write_text("user_id,item_id\nu,p0\nu,p1\n")
    table = {"path": path, "features": [LABEL], **items}
    values = {"source": "tables", "path": str(folder), "interactions": {"path": "events.csv"}, "items": table}
    engine = DuckDBEngine(folder / "spill")
    try:
        return read_tables(parse_config({"data": values}).data, engine, Rejects(folder / "rejects", 0.0)).items.to_pyarrow()
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["items.csv", "items.jsonl", "items.parquet"])
def test_columns_have_the_types_of_their_values(name: str, tmp_path: Path) -> None:
    write(tmp_path, ROWS, name)
    found = read(tmp_path, name)
    wanted = ["item_id", "name", "kind", "price", "weight", "code", "outdoor", "tags"]
    assert [column for column in found.column_names if column != "none"] == wanted
    assert [tuple(row.get(column) for column in [*wanted, "none"]) for row in found.to_pylist()] == KEPT
    types = {column: str(found[column].type) for column in wanted}
    assert types["price"] == "int64" and types["weight"] == "double" and types["code"] == "string"
    assert read(tmp_path, name, other_columns=False).column_names == ["item_id", "name", "kind"]


def test_dates_odd_types_and_codes(tmp_path: Path) -> None:
    odd = {"opened": date(2020, 5, 1), "seen": datetime(2020, 5, 1, 12), "map": {"a": 1}, "inf": float("inf")}
    table = pa.Table.from_pylist([{"item_id": "p0", "kind": "bar", **odd}])
    pq.write_table(table.append_column("long", pa.array([2**64 - 1], pa.uint64())), tmp_path / "i.parquet")
    (row,) = read(tmp_path, "i.parquet").to_pylist()
    assert row["opened"] == "2020-05-01" and row["seen"].startswith("2020-05-01 12:00") and row["inf"] is None
    assert row["long"] == str(2**64 - 1) and "map" not in row
    write(tmp_path, [{"item_id": "p0", "kind": "b", "ean": "12345678901234567890", "half": "1", "e": "1e5"}], "i.csv")
    (row,) = read(tmp_path, "i.csv").to_pylist()
    assert (row["ean"], row["half"], row["e"]) == ("12345678901234567890", 1, 1e5)


def test_names_that_are_taken_are_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"sku": "p0", "kind": "bar", "item_id": "x", "Kind": "y", "item_row": 3, "colour": "red", "Colour": "r", "": 1}]
    write(tmp_path, rows, "i.jsonl")
    found = read(tmp_path, "i.jsonl", item_id="sku")
    assert found.column_names == ["item_id", "name", "kind", "colour"] and found["item_id"].to_pylist() == ["p0"]
    assert "alone: Kind, Colour" in caplog.text and "compared: item_id, item_row" in caplog.text
    (tmp_path / "pandas.csv").write_text(",item_id,kind,size\n0,p0,bar,4\n")
    assert read(tmp_path, "pandas.csv").to_pylist() == [{"item_id": "p0", "name": None, "kind": "bar", "size": 4}]


def test_files_of_one_glob_may_have_different_columns(tmp_path: Path) -> None:
    write(tmp_path, [{"item_id": "p0", "kind": "bar", "size": 1, "left": "l"}], "i1.parquet")
    write(tmp_path, [{"item_id": "p1", "kind": "bar", "size": "big", "right": 2}], "i2.parquet")
    found = read(tmp_path, "i*.parquet").to_pylist()
    assert [(row["size"], row["left"], row["right"]) for row in found] == [("1", "l", None), ("big", None, 2)]


def test_a_column_called_name_is_displayed(tmp_path: Path) -> None:
    write(tmp_path, [{"item_id": "p0", "kind": "bar", "name": "Joe's"}], "i.csv")
    assert read(tmp_path, "i.csv")["name"].to_pylist() == ["Joe's"]
    assert read(tmp_path, "i.csv", other_columns=False)["name"].to_pylist() == [None]


def test_other_columns_are_displayed_and_filtered_and_change_no_model(tmp_path: Path) -> None:
    events = [f"u{u},p{(u * k + k) % 19},{1_600_000_000 + 5000 * u + k}" for u in range(12) for k in range(1, 7)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,when", *events]))
    kinds = ["bar", "pub", "café"]
    write(tmp_path, [{"item_id": f"p{n}", "kind": kinds[n % 3]} for n in range(19)], "plain.csv")
    more = [{"price": n, "outdoor": n % 2 == 0, "tags": [f"t{n % 3}"], "category": "secret", "text": "later"} for n in range(19)]
    write(tmp_path, [{"item_id": f"p{n}", "kind": kinds[n % 3], **more[n]} for n in range(19)], "more.jsonl")

    def dataset_of(file: str) -> Dataset:
        source = {"path": str(tmp_path), "interactions": {"path": "events.csv", "time": "when"}}
        items = {"path": file, "features": [LABEL]}
        config = parse_config({"data": {"source": "tables", **source, "items": items}, "prepare": {"text_dim": 4}})
        prepare(config, tmp_path / file.replace(".", "_"))
        return Dataset.open(tmp_path / file.replace(".", "_"))

    plain, dataset = dataset_of("plain.csv"), dataset_of("more.jsonl")
    assert plain.specs == dataset.specs
    names = {path.name for path in plain.path.iterdir()}
    assert {path.name for path in dataset.path.iterdir()} == names
    for name in names - {"items.parquet", "manifest.json"}:  # what a model reads is the same to the byte
        assert (plain.path / name).read_bytes() == (dataset.path / name).read_bytes(), name

    tower = {"embedding_dim": 8, "hidden_dims": [8]}
    model, config = drawn(dataset, {"user_tower": tower, "item_tower": tower})
    save_checkpoint(tmp_path / "best.pt", checkpoint_of(dataset, model, config))
    export_bundle(tmp_path / "best.pt", dataset, tmp_path / "bundle")
    recommender = Recommender.load(tmp_path / "bundle")

    def ids(filter_: Any) -> set[str]:
        return {one.item_id for one in recommender.recommend(history=["p1"], k=30, filter=filter_, exclude_seen=False)}

    assert ids("price >= 15") == {"p15", "p16", "p17", "p18"}
    assert ids('outdoor == "true" and price < 5') == {"p0", "p2", "p4"}
    assert ids({"tags": {"any": ["t1"]}, "price": {"max": 8}}) == {"p1", "p4", "p7"}
    shown = recommender.details.describe(recommender.reader.item("p4"))
    assert shown | more[4] | {"outdoor": "true"} == shown

    write(tmp_path, [{"item_id": "new", "kind": "bar", "price": 99, "outdoor": "true", "tags": ["t9"]}], "new.jsonl")
    add_items(tmp_path / "bundle", tmp_path / "new.jsonl")
    recommender = Recommender.load(tmp_path / "bundle")
    assert ids("price > 50") == {"new"} == ids('tags == "t9"')


@pytest.mark.parametrize("name", ["it.csv", "it.jsonl", "it.parquet"])
@pytest.mark.parametrize(
    ("available", "closed"),
    [("TRUE", "FALSE"), ("yes", "no"), ("1", "0"), (True, False), (1, 0), (1.0, 0.0), ("Y", " n "), ("open", "Closed")],
)
def test_a_closed_item_is_not_offered_however_it_is_written(available: Any, closed: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path, [{"item_id": f"i{n}", "is_open": each} for n, each in enumerate([available, closed, None])], name)
    (tmp_path / "e.csv").write_text("user_id,item_id\n" + "".join(f"u{n},i{m}\n" for n in range(4) for m in range(3)))
    data = {"source": "tables", "path": str(tmp_path), "interactions": {"path": "e.csv"}, "items": {"path": name}}
    sections = {"data": data, "prepare": {"split": {"kind": "leave_one_out"}, "text_dim": 0}}
    prepare(parse_config(sections), tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    assert dataset.items["is_open"].to_pylist() == [1, 0, None], "the filter is_open == 1 must find it"
    assert offered_items(dataset)[2:].tolist() == [True, False, True]


def test_another_word_for_open_stays_text(tmp_path: Path) -> None:
    write(tmp_path, [{"item_id": f"i{n}", "is_open": each} for n, each in enumerate(["yes", "seasonal"])], "it.csv")
    (tmp_path / "e.csv").write_text("user_id,item_id\nu,i0\nu,i1\n")
    made = Read(tmp_path, interactions={"path": "e.csv"}, items={"path": "it.csv"})
    assert made.rows("items", "is_open") == [("yes",), ("seasonal",)]
