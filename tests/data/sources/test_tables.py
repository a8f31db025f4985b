"""Test your own tables: three formats, every kind of column, and every error of a file or row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.errors import ConfigError, DataError
from twotower.schema import FeatureSpec

from .table_rows import Read

EVENTS = "user_id,item_id,when\nu1,i1,2020-01-01\nu2,i2,2020-01-02\n"
NEW_YEAR = 1_577_836_800


@pytest.fixture
def events(tmp_path: Path) -> Callable[..., Read]:
    """Return `events(content, name="e.csv", **table)`, which reads one file of interactions."""

    def make(content: str | bytes, name: str = "e.csv", **table: Any) -> Read:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return Read(tmp_path, interactions={"path": name, **table})

    return make


@pytest.fixture
def items(tmp_path: Path) -> Callable[..., Read]:
    """Return `items(rows, *features)`, which reads items from Parquet and JSON lines; both must agree."""

    def make(rows: list[dict[str, Any]], *features: dict[str, Any], schema: Any = None) -> Read:
        (tmp_path / "e.csv").write_text(EVENTS)
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "i.parquet")
        (tmp_path / "i.jsonl").write_text("\n".join(json.dumps(row, default=str) for row in rows))
        reads = [
            Read(tmp_path, interactions={"path": "e.csv"}, items={"path": name, "features": list(features)})
            for name in ("i.jsonl", "i.parquet")
        ]
        tables = [read.raw.items.to_pyarrow().to_pylist() for read in reads]
        assert tables[0] == tables[1]
        return reads[1]

    return make


def test_a_csv_file_by_its_columns(events: Callable[..., Read]) -> None:
    content = 'who,what,score,kind,note,when\nu1,i1,4.5,view,"a, ""b""\nnext line",2020-01-01\nu2,i1,,,,2020-01-01 00:00:01\n'
    made = events(content, user_id="who", item_id="what", stars="score", event_type="kind", text="note", time="when")
    columns = ("user_id", "item_id", "stars", "event_type", "chars", "time_s", "order", "part")
    assert made.rows("interactions", *columns) == [
        ("u1", "i1", 4.5, "view", len('a, "b"\nnext line'), NEW_YEAR, 0, None),
        ("u2", "i1", None, "event", 0, NEW_YEAR + 1, 2, None),  # after the second line of a value
    ]
    assert made.raw.texts.to_pyarrow().to_pylist() == [{"order": 0, "text": 'a, "b"\nnext line'}, {"order": 2, "text": None}]
    assert made.raw.has_time and made.raw.counts == {"e.csv": 2} and not made.rejected()
    assert sorted(made.rows("items", "item_id", "name")) == [("i1", None)]
    assert sorted(made.rows("users", "user_id", "since_s", "elite")) == [("u1", None, None), ("u2", None, None)]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("packed", [False, True])
def test_delimiters_and_gzip(delimiter: str, packed: bool, events: Callable[..., Read]) -> None:
    content = ("\ufeff" + EVENTS.replace(",", delimiter)).encode()
    made = events(gzip.compress(content) if packed else content, "e.tsv.gz" if packed else "e.tsv", time="when")
    assert made.rows("interactions", "user_id", "time_s") == [("u1", NEW_YEAR), ("u2", NEW_YEAR + 86_400)]


def test_json_lines_and_parquet_say_the_same(tmp_path: Path) -> None:
    rows = [{"user_id": "u1", "item_id": 7, "stars": 3}, {"user_id": "u2", "item_id": 8, "stars": None}]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress((tmp_path / "e.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name in ("e.jsonl", "e.json.gz", "e.parquet"):
        made = Read(tmp_path, interactions={"path": name, "stars": "stars"})
        assert made.rows("interactions", "user_id", "item_id", "stars", "time_s") == [("u1", "7", 3.0, 0), ("u2", "8", None, 1)]
        assert not made.raw.has_time


def test_a_glob_reads_its_files_by_name(tmp_path: Path) -> None:
    for name, user in (("b", "u2"), ("a", "u1"), ("c", "u3")):
        (tmp_path / f"part-{name}.csv").write_text(f"user_id,item_id\n{user},i1\n,i1\n{user},i2\n")
    made = Read(tmp_path, interactions={"path": "part-*.csv"}, users={"path": "part-*.csv"})
    assert made.rows("interactions", "user_id") == [("u1",), ("u1",), ("u2",), ("u2",), ("u3",), ("u3",)]
    assert len(set(made.rows("interactions", "order"))) == 6
    assert made.rows("users", "user_id") == [("u1",), ("u2",), ("u3",)]
    assert ("part-b.csv", 3, "user_id is missing") in made.rejected()


TIMES = {
    "2020-01-01": NEW_YEAR,
    "2020-01-01T01:00:00": NEW_YEAR + 3_600,
    "2020-01-01T01:00:00Z": NEW_YEAR + 3_600,
    "2020-01-01T01:00:00+02:00": NEW_YEAR - 3_600,
    "2019-12-31 18:30:00.5-0530": NEW_YEAR,
    "1577836800": NEW_YEAR,
    "1577836800000": NEW_YEAR,
}


@pytest.mark.parametrize(("text", "expected"), TIMES.items())
def test_times_in_strings(text: str, expected: int, events: Callable[..., Read]) -> None:
    assert events(f"user_id,item_id,t\nu,i,{text}\n", time="t").rows("interactions", "time_s") == [(expected,)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([NEW_YEAR]),
        pa.array([NEW_YEAR * 1000]),
        pa.array([float(NEW_YEAR)]),
        pa.array([date(2020, 1, 1)]),
        pa.array([datetime(2020, 1, 1)], pa.timestamp("us")),
        pa.array([datetime(2020, 1, 1)], pa.timestamp("ns")),
        pa.array([datetime(2020, 1, 1, tzinfo=UTC)], pa.timestamp("us", "Asia/Tokyo")),
    ],
    ids=["seconds", "milliseconds", "float", "date", "us", "ns", "zone"],
)
def test_times_in_native_columns(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"], "t": column}), tmp_path / "e.parquet")
    made = Read(tmp_path, interactions={"path": "e.parquet", "time": "t"})
    assert made.rows("interactions", "time_s") == [(NEW_YEAR,)]


def test_bad_rows_of_a_csv_file_are_found_by_line(events: Callable[..., Read]) -> None:
    rows = [
        "user_id,item_id,t,stars",
        'u1,i1,2020-01-01,"1"',
        "u2,i1",  # 3: too few
        "u3,i1,2020-01-01,2,more",  # 4: too many
        "",
        '"u\n4",i1,2020-01-01,3',  # 6 and 7
        ",i1,2020-01-01,4",  # 8
        "u5,,2020-01-01,5",  # 9
        "u6,i1,,5",  # 10
        "u7,i1,someday,5",  # 11
        "u8,i1,2200-01-01,5",  # 12
        "u9,i1,2020-01-01,many",  # 13
        "u0,i1,2020-01-01,1e999",  # 14
        "u1,i1,1969-12-31,5",  # 15
        "u1,i1,2020-01-01,5.1",  # 16
        "u1,i1,2020-01-01,-1",  # 17
        "u1,i2,2020-01-02,nan",
    ]
    made = events("\n".join(rows) + "\n", time="t", stars="stars")
    assert made.rows("interactions", "user_id", "item_id", "stars") == [("u1", "i1", 1), ("u\n4", "i1", 3), ("u1", "i2", None)]
    found = {line: reason for _, line, reason in made.rejected()}
    assert found.pop(3).startswith("not a row of 4 columns") and found.pop(4).startswith("not a row of 4 columns")
    assert found.pop(14).startswith("stars is")
    assert found == {
        8: "user_id is missing",
        9: "item_id is missing",
        10: "t is missing",
        11: "t is not a time: 'someday'",
        12: "t is after 2100: '2200-01-01'",
        13: "stars is not a number: 'many'",
        15: "t is before 1970: '1969-12-31'",
        16: "stars is not on the 0-5 scale: '5.1'",
        17: "stars is not on the 0-5 scale: '-1'",
    }
    assert made.raw.counts == {"e.csv": 15}


def test_a_cut_json_line_is_rejected_alone(events: Callable[..., Read]) -> None:
    made = events('{"user_id": "u1", "item_id": "i1"}\n{"user_id": "u2", "it\n{"user_id": "u3", "item_id": "i3"}', "e.jsonl")
    assert sorted(made.rows("interactions", "user_id")) == [("u1",), ("u3",)]
    assert made.rejected() == [("e.jsonl", 2, "not a row with user_id, item_id")]


def test_features_of_every_kind(items: Callable[..., Read]) -> None:
    hours = "1" * 168
    full = {"item_id": "i1", "kind": "bar", "tags": ["a", "b "], "size": 2.5, "lat": 1.0, "lon": 2.0}
    full |= {"open": hours, "about": "words", "vec": [1.0, 2.0]}
    empty = {"item_id": "i2"} | dict.fromkeys([name for name in full if name != "item_id"])
    made = items(
        [full, empty],
        {"name": "kind", "kind": "categorical"},
        {"name": "labels", "kind": "multi", "columns": ["tags"]},
        {"name": "size", "kind": "number"},
        {"name": "place", "kind": "geo", "columns": ["lat", "lon"]},
        {"name": "open", "kind": "hours"},
        {"name": "about", "kind": "text"},
        {"name": "vec", "kind": "vector"},
    )
    names = ("item_id", "name", "kind", "tags", "size", "lat", "lon", "open", "about", "vec")
    assert made.rows("items", *names) == [
        ("i1", None, "bar", ["a", "b"], 2.5, 1.0, 2.0, hours, "words", [1.0, 2.0]),
        ("i2", *[None] * 9),
    ]
    assert made.raw.features[1] == FeatureSpec(name="labels", side="item", kind="multi", columns=("tags",))
    assert made.raw.features[3] == FeatureSpec(name="place", side="item", kind="geo", columns=("lat", "lon"))


def test_lists_in_strings(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(EVENTS)
    (tmp_path / "i.csv").write_text('item_id,tags,vec\ni1,a| b||c,1|2.5\ni2,"[""x, y"", ""z""]","[3, 4]"\ni3,,\n')
    features = [{"name": "tags", "kind": "multi", "separator": "|"}, {"name": "vec", "kind": "vector", "separator": "|"}]
    made = Read(tmp_path, interactions={"path": "e.csv"}, items={"path": "i.csv", "features": features})
    assert made.rows("items", "tags", "vec") == [(["a", "b", "c"], [1, 2.5]), (["x, y", "z"], [3, 4]), (None, None)]


def test_bad_items_are_rejected_alone(items: Callable[..., Read]) -> None:
    rows = [
        {"item_id": "i1", "lat": "1", "lon": "2", "open": None, "vec": "1,2"},
        {"item_id": "i1", "lat": "1", "lon": "2", "open": None, "vec": "1,2"},
        {"item_id": "i2", "lat": "91", "lon": "2", "open": None, "vec": None},
        {"item_id": "i3", "lat": "1", "lon": "east", "open": None, "vec": None},
        {"item_id": "i4", "lat": None, "lon": None, "open": "0101", "vec": None},
        {"item_id": "i5", "lat": None, "lon": None, "open": None, "vec": "1,two"},
        {"item_id": "i6", "lat": None, "lon": None, "open": None, "vec": None},
    ]
    features = (
        {"name": "at", "kind": "geo", "columns": ["lat", "lon"]},
        {"name": "open", "kind": "hours"},
        {"name": "vec", "kind": "vector"},
    )
    made = items(rows, *features)
    assert made.rows("items", "item_id") == [("i1",), ("i6",)]
    assert [(line, reason) for _, line, reason in made.rejected()] == [
        (2, "item_id repeats an earlier row: 'i1'"),
        (3, "lat is out of range: '91'"),
        (4, "lon is not a number: 'east'"),
        (5, "open is not 168 characters of 0 and 1: '0101'"),
        (6, "vec is not a list of numbers: '1,two'"),
    ]


def test_users_have_features_and_a_first_day(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(EVENTS)
    (tmp_path / "u.csv").write_text("id,joined,age\nu1,2020-01-01,30\nu2,,\n")
    users = {"path": "u.csv", "user_id": "id", "since": "joined", "features": [{"name": "age", "kind": "number"}]}
    made = Read(tmp_path, interactions={"path": "e.csv"}, users=users)
    assert made.rows("users", "user_id", "since_s", "age", "elite") == [("u1", NEW_YEAR, 30, None), ("u2", None, None, None)]
    assert made.raw.features == (FeatureSpec(name="age", side="user", kind="number", columns=("age",)),)


def test_an_unknown_column_names_the_nearest_and_the_file(events: Callable[..., Read]) -> None:
    with pytest.raises(DataError, match=r"e.csv has no column 'wen', which data.interactions uses. Did you mean 'when'\?"):
        events(EVENTS, time="wen")
    with pytest.raises(DataError, match=r"e.jsonl has no column 'zzz', which data.interactions uses. Known: item_id, user_id."):
        events('{"user_id": "u", "item_id": "i"}', "e.jsonl", stars="zzz")


def test_an_invalid_file_is_one_line(events: Callable[..., Read], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No file at .*nowhere.csv: .* holds nothing"):
        Read(tmp_path, interactions={"path": "nowhere.csv"})
    with pytest.raises(DataError, match=r"e.xls has an unknown suffix. Allowed: .csv"):
        events(EVENTS, "e.xls")
    with pytest.raises(DataError, match=r"is not a Parquet file.*Replace the file"):
        events(EVENTS, "e.parquet")
    with pytest.raises(DataError, match=r"no valid header.*'a,a'.*must name the columns, each once"):
        events("a,a\n1,2\n")
    with pytest.raises(DataError, match=r"no valid header.*''.*must name the columns, each once"):
        events("")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "data.interactions is not set"),
        ({"interactions": {"features": []}}, "Unknown setting 'data.interactions.features'"),
        ({"interactions": {"tiem": "t"}}, "Unknown setting 'data.interactions.tiem'. Did you mean 'time'?"),
        (
            {"items": {"text": "t"}},
            "Unknown setting 'data.items.text'. Known: columns, comment, encoding, features, from, item_id,",
        ),
        ({"items": {"time": "t"}}, "Unknown setting 'data.items.time'"),
        ({"users": {"stars": "t"}}, "Unknown setting 'data.users.stars'"),
        ({"users": {"features": [{"name": "x", "kind": "text", "colums": ["y"]}]}}, "Did you mean 'columns'"),
        ({"users": {"features": [{"name": "", "kind": "text"}]}}, "at least 1 character"),
        ({"items": {"features": [{"name": "at", "kind": "geo"}]}}, "'at' has the columns at. Kind 'geo' needs two columns"),
        ({"items": {"features": [{"name": "t", "kind": "text", "columns": ["a", "b"]}]}}, "'text' needs one column"),
        (
            {
                "items": {
                    "features": [{"name": "t", "kind": "text", "columns": ["a"]}, {"name": "n", "kind": "number", "columns": ["a"]}]
                }
            },
            "'a' of data.items is used as string and as number",
        ),
        (
            {"items": {"name": "title", "features": [{"name": "name", "kind": "text"}]}},
            "data.items uses the column 'name', a reserved name",
        ),
        ({"users": {"features": [{"name": "elite", "kind": "text"}]}}, "data.users uses the column 'elite', a reserved name"),
    ],
)
def test_contradicting_declarations(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(EVENTS)
    if sections:
        sections = {"interactions": {}, **sections}
    full = {section: {"path": "e.csv", **table} for section, table in sections.items()}
    with pytest.raises(ConfigError, match=message):
        Read(tmp_path, **full)
