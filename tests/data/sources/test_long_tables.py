"""Read tables with one row for each property of an item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.errors import ConfigError

from .table_rows import Read

ROWS = [
    ("a", "colour", "red", "2024-01-01"),
    ("a", "colour", "blue", "2024-01-08"),
    ("a", "tags", "['x', 'y']", "2024-01-01"),
    ("a", "colour", "green", "2024-01-04"),
    ("a", "price", "$1,299.50", "2024-01-01"),
    ("b", "price", "cheap", "2024-01-02"),
    ("b", "price", "5", "2024-01-01"),
    ("b", "size", "7", "2024-01-01"),
    ("b", "colour", "", "2024-01-09"),
    ("b", "colour", "grey", "soon"),
    ("", "colour", "grey", "2024-01-01"),
    ("d", "weight", "3", "2024-01-01"),
]
FEATURES = [{"name": "colour", "kind": "categorical"}, {"name": "price", "kind": "number"}, {"name": "tags", "kind": "multi"}]
FORM = {"property": "p", "value": "v", "time": "t", "keep": ["size"]}


def write(folder: Path, name: str) -> None:
    (folder / "e.csv").write_text("user_id,item_id\nu,a\nu,c\n")
    if name.endswith(".parquet"):
        pq.write_table(pa.table([list(column) for column in zip(*ROWS, strict=True)], ["item_id", "p", "v", "t"]), folder / name)
    else:
        text = "".join(f"{';'.join(row)}\n" for row in [("item_id", "p", "v", "t"), *ROWS])
        (folder / name).write_text(text)


def read(folder: Path, name: str, **form: Any) -> Read:
    write(folder, name)
    items = {"path": name, "features": FEATURES, "long_form": FORM | form}
    return Read(folder, interactions={"path": "e.csv"}, items=items)


@pytest.mark.parametrize("name", ["i.csv", "i.parquet"])
def test_the_newest_value_of_each_property_counts(name: str, tmp_path: Path) -> None:
    made = read(tmp_path, name)
    assert made.rows("items", "item_id", "name", "colour", "price", "tags", "size") == [
        ("a", None, "blue", 1299.5, ["x", "y"], None),
        ("b", None, None, 5.0, None, 7),
        ("d", None, None, None, None, None),
        ("c", None, None, None, None, None),
    ]
    first = 2 if name == "i.csv" else 1
    assert made.rejected() == [
        (name, first + 5, "price is not a number: 'cheap'"),
        (name, first + 9, "t is not a time: 'soon'"),
        (name, first + 10, "item_id is missing"),
    ]
    assert made.rejects.files[name].rows == len(ROWS) and made.raw.described == ()


def test_without_times_the_last_row_counts(tmp_path: Path) -> None:
    made = read(tmp_path, "i.csv", time=None)
    assert made.rows("items", "item_id", "colour") == [("a", "green"), ("b", "grey"), ("d", None), ("c", None)]


def test_parts_are_one_table_and_equal_times_take_the_last(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\nu,a\n")
    for part, colour in ((1, "red"), (2, "blue")):
        (tmp_path / f"i{part}.csv").write_text(f"item_id,property,value,time\na,colour,{colour},2024-01-01\n")
    items = {"path": "i*.csv", "long_form": {"keep": ["colour"], "time": "time"}}
    made = Read(tmp_path, interactions={"path": "e.csv"}, items=items)
    assert made.rows("items", "item_id", "colour") == [("a", "blue")]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"from": "interactions", "long_form": {"keep": ["x"]}}, "long_form needs a file of its own"),
        ({"path": "i.csv", "long_form": {}}, "long_form reads only the properties that are named"),
    ],
)
def test_a_long_form_that_reads_nothing_is_refused(items: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "i.csv")
    with pytest.raises(ConfigError, match=message):
        Read(tmp_path, interactions={"path": "e.csv"}, items=items)
