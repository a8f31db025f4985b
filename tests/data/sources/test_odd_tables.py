"""Read tables as programs and people leave them: joined files, other encodings and compressions, odd types and names."""

from __future__ import annotations

import bz2
import gzip
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.sources.file_form import read_sample
from twotower.data.sources.table_paths import table_paths
from twotower.data.sources.values import parse_list
from twotower.errors import DataError

from .table_rows import Read

TIME_S = 1_600_000_000
CSV = f"user_id,item_id,time\nu,i,{TIME_S}\nv,j,{TIME_S + 1}\n"
EVENTS = [("u", "i", TIME_S), ("v", "j", TIME_S + 1)]


def events(folder: Path, name: str = "e.csv", **settings: Any) -> list[tuple[Any, ...]]:
    return Read(folder, interactions={"path": name, "time": "time", **settings}).rows(
        "interactions", "user_id", "item_id", "time_s"
    )


JOINED: dict[str, bytes] = {
    "marks": b"\xef\xbb\xbfuser_id,item_id,time\nu,i,1600000000\n\xef\xbb\xbfv,j,1600000001\n",
    "two marks": b"\xef\xbb\xbf\xef\xbb\xbf" + CSV.encode(),
    "CRLF and marks": b"\xef\xbb\xbfuser_id,item_id,time\r\nu,i,1600000000\r\n\xef\xbb\xbfv,j,1600000001\r\n",
    "quotes and marks": b'"user_id","item_id","time"\n"u","i",1600000000\n\xef\xbb\xbf"v","j",1600000001\n',
    "UTF-32": CSV.encode("utf-32"),
    "UTF-32 BE": b"\0\0\xfe\xff" + CSV.encode("utf-32-be"),
    "UTF-16": CSV.encode("utf-16"),
}


@pytest.mark.parametrize("content", JOINED.values(), ids=JOINED.keys())
def test_marks_and_wide_encodings_are_no_part_of_an_id(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_bytes(content)
    assert events(tmp_path) == EVENTS
    assert read_sample(tmp_path / "e.csv").rows.column_names == ["user_id", "item_id", "time"]


@pytest.mark.parametrize("again", ["user_id,item_id\n", "\ufeffuser_id,item_id\n", '"user_id","item_id"\n'])
def test_a_header_that_is_repeated_is_no_event(again: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id\nu,i\n{again}v,j\n", encoding="utf-8")
    (tmp_path / "i.csv").write_text("item_id,colour\ni,red\nitem_id,colour\n")
    made = Read(tmp_path, interactions={"path": "e.csv"}, items={"path": "i.csv"})
    assert made.rows("interactions", "user_id", "item_id") == [("u", "i"), ("v", "j")]
    assert made.rows("items", "item_id", "colour") == [("i", "red")]
    assert made.rejected() == [("e.csv", 3, "repeats the header"), ("i.csv", 3, "repeats the header")]


def test_an_id_that_is_named_like_its_column_is_an_id(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\nuser_id,i\nu,item_id\n")
    made = Read(tmp_path, interactions={"path": "e.csv"})
    assert made.rows("interactions", "user_id", "item_id") == [("user_id", "i"), ("u", "item_id")]


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "zstd": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}
JSON = f'{{"user_id": "u", "item_id": "i", "time": {TIME_S}}}\n{{"user_id": "v", "item_id": "j", "time": {TIME_S + 1}}}\n'


@pytest.mark.parametrize("pack", COMPRESSIONS.values(), ids=COMPRESSIONS.keys())
def test_the_content_says_how_a_file_is_compressed_if_its_name_does_not(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_bytes(pack(CSV.encode()))
    (tmp_path / "e.json").write_bytes(pack(JSON.encode()))
    assert events(tmp_path) == events(tmp_path, "e.json") == EVENTS


FOREIGN = {
    b"PK\x03\x04rest": "is a zip archive or a spreadsheet. Expected text",
    b"PAR1rest": "is a Parquet file. Its name must end with .parquet or .pq. Rename it.",
    b"SQLite format 3": "is an SQLite database",
}


@pytest.mark.parametrize("name", ["e.csv", "e.json"])
@pytest.mark.parametrize(("content", "message"), FOREIGN.items(), ids=["zip", "parquet", "sqlite"])
def test_a_file_of_another_kind_is_named_as_such(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        events(tmp_path, name)


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"part-{number}.csv").write_text(f"user_id,item_id\nu,{number}\n")
        (tmp_path / f"items-{number}.csv").write_text(f"item_id,colour\n1,{number}\n")
    assert [path.name for path in table_paths(tmp_path, Path("part-*.csv"), "interactions")] == [
        "part-1.csv",
        "part-2.csv",
        "part-10.csv",
    ]
    made = Read(tmp_path, interactions={"path": "part-*.csv"}, items={"path": "items-*.csv"})
    assert made.rows("interactions", "item_id") == [("1",), ("2",), ("10",)]
    assert made.rows("items", "item_id", "colour") == [("1", 10)], "the last snapshot counts"


def test_folder_names_are_decoded(tmp_path: Path) -> None:
    for name, user in (("2023-01-02%2010%3A00%3A00", "u"), ("2023-01-03", "v")):
        (tmp_path / "ev" / f"time={name}").mkdir(parents=True)
        (tmp_path / "ev" / f"time={name}" / "a.csv").write_text(f"user_id,item_id\n{user},i\n")
    assert events(tmp_path, "ev", partition_columns=["time"]) == [("u", "i", 1672653600), ("v", "i", 1672704000)]


def test_columns_of_uuids_and_other_extensions_are_read(tmp_path: Path) -> None:
    ids = [uuid.UUID(int=n * 10**30) for n in (1, 2)]
    raw = [each.bytes for each in ids]
    columns = {
        "user_id": pa.array(raw, pa.uuid()),
        "item_id": pa.array(raw, pa.binary(16)),
        "time": pa.array([TIME_S, TIME_S]),
    }
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    assert events(tmp_path, "e.parquet") == [(str(each), each.hex, TIME_S) for each in ids]


def test_bytes_of_one_width_are_written_alike(tmp_path: Path) -> None:
    data = {"user_id": pa.array([b"abcd", b"\xff\x00\x01\x02"], pa.binary(4)), "item_id": ["i", "j"]}
    pq.write_table(pa.table(data), tmp_path / "e.parquet")
    made = Read(tmp_path, interactions={"path": "e.parquet"})
    assert made.rows("interactions", "user_id") == [("61626364",), ("ff000102",)]


@pytest.mark.parametrize("twice", ["user_id", "time"])
def test_a_column_that_is_there_twice_is_refused(twice: str, tmp_path: Path) -> None:
    names = ["user_id", "item_id", "time", "other", "other", twice]
    pq.write_table(pa.Table.from_arrays([pa.array(["1600000000"])] * 6, names=names), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=f"e.parquet has 2 columns '{twice}'. Each column must be there once. Rename one."):
        events(tmp_path, "e.parquet")


def test_a_float_of_json_that_was_rounded_is_no_id(tmp_path: Path) -> None:
    ids = ["9007199254740993.0", "18446744073709551617", "9007199254740991.0", '"9007199254740993"']
    (tmp_path / "e.jsonl").write_text("".join(f'{{"user_id": {each}, "item_id": "i"}}\n' for each in ids))
    made = Read(tmp_path, interactions={"path": "e.jsonl"})
    found = [user for (user,) in made.rows("interactions", "user_id")]
    assert found == ["18446744073709551617", "9007199254740991", "9007199254740993"]
    assert [line for _, line, why in made.rejected() if "too large to be exact" in why] == [1]


def test_a_missing_weight_leaves_the_quantity(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,w,n\nu,i,,1\nu,j,2,\nu,k,,\nu,l,2,1\nu,m,0,1\n")
    made = Read(tmp_path, interactions={"path": "e.csv", "weight": "w", "quantity": "n"})
    assert made.rows("interactions", "raw_weight") == [(1.0,), (2.0,), (1.0,), (2.0,), (0.0,)]


BARE = {"[x, y]": ["x", "y"], "[x]": ["x"], "[x|y z]": ["x", "y z"], "[new]|sale": ["[new]", "sale"], "[a] b": ["[a] b"]}


@pytest.mark.parametrize(("text", "labels"), BARE.items())
def test_lists_without_quotes_are_lists(text: str, labels: list[str]) -> None:
    assert parse_list(text, "|") == labels
