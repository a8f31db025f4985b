"""Test ids: the same thing is the same id in every type and format."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.sources.values import MISSING, id_text

from .table_rows import Read

IDS: dict[str, pa.Array] = {
    "int8": pa.array([7, 12], pa.int8()),
    "int64": pa.array([7, 12], pa.int64()),
    "uint64": pa.array([7, 12], pa.uint64()),
    "float": pa.array([7.0, 12.0], pa.float32()),
    "double with a gap": pa.array([7.0, 12.0]),
    "decimal": pa.array([Decimal("7.00"), Decimal("12.00")]),
    "text": pa.array(["7", "12"]),
    "text of floats": pa.array(["7.0", "12.0"]),
    "large text": pa.array(["7", "12"], pa.large_string()),
    "text view": pa.array(["7", "12"], pa.string_view()),
    "binary": pa.array([b"7", b"12"]),
    "dictionary": pa.array(["7", "12"]).dictionary_encode(),
    "dictionary of numbers": pa.array([7, 12]).dictionary_encode(),
}


@pytest.mark.parametrize("column", IDS.values(), ids=IDS.keys())
def test_a_number_is_the_same_id_in_every_type(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": column, "item_id": column}), tmp_path / "e.parquet")
    assert Read(tmp_path, interactions={"path": "e.parquet"}).rows("interactions", "user_id", "item_id") == [
        ("7", "7"),
        ("12", "12"),
    ]


@pytest.mark.parametrize("written", [("7", "12"), ("7.0", "12.0"), ('"7"', '"12.0"'), ("7", "12.00")])
@pytest.mark.parametrize("name", ["e.csv", "e.jsonl"])
def test_a_number_is_the_same_id_in_text(written: tuple[str, str], name: str, tmp_path: Path) -> None:
    if name == "e.csv":
        (tmp_path / name).write_text("user_id,item_id\n" + "".join(f"{text},{text}\n" for text in written))
    else:
        (tmp_path / name).write_text("".join(f'{{"user_id": {text}, "item_id": {text}}}\n' for text in written))
    assert Read(tmp_path, interactions={"path": name}).rows("interactions", "user_id") == [("7",), ("12",)]


def test_mixed_parts_have_one_id(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number, (name, column) in enumerate(IDS.items()):
        pq.write_table(pa.table({"user_id": column, "item_id": column}), tmp_path / "parts" / f"{number} {name}.parquet")
    (tmp_path / "parts" / "z.csv").write_text("user_id,item_id\n7.0,7\n12,12\n")
    made = Read(tmp_path, interactions={"path": "parts"})
    assert {row[0] for row in made.rows("interactions", "user_id")} == {"7", "12"}


@pytest.mark.parametrize(
    ("written", "id"),
    [("1.2345678E7", "12345678"), ("1.2345678e+07", "12345678"), ("1e+05", "100000"), ("-1.5E+01", "-15"), ("1.0E0", "1")],
)
def test_a_number_in_scientific_notation_is_the_same_id(written: str, id: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id\n{written},i\n")
    (tmp_path / "e.jsonl").write_text(f'{{"user_id": {written}, "item_id": "i"}}\n{{"user_id": "{written}", "item_id": "i"}}\n')
    pq.write_table(pa.table({"user_id": [written], "item_id": ["i"]}), tmp_path / "e.parquet")
    for name in ("e.csv", "e.jsonl", "e.parquet"):
        assert {row[0] for row in Read(tmp_path, interactions={"path": name}).rows("interactions", "user_id")} == {id}
    assert id_text(written) == id


@pytest.mark.parametrize("scale", [2, 10, 18])
def test_zero_is_the_same_id_in_every_scale_of_decimals(scale: int, tmp_path: Path) -> None:
    ids = pa.array([Decimal(0), Decimal(7)], pa.decimal128(38, scale))
    pq.write_table(pa.table({"user_id": ids, "item_id": ids}), tmp_path / "e.parquet")
    assert Read(tmp_path, interactions={"path": "e.parquet"}).rows("interactions", "user_id") == [("0",), ("7",)]


@pytest.mark.parametrize("written", ["9007199254740992.0", "9.007199254740993E15", "1e+16"])
@pytest.mark.parametrize("name", ["e.csv", "e.jsonl", "e.parquet"])
def test_the_text_of_an_inexact_float_is_no_id(written: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id\n{written},i\nu,i\n")
    (tmp_path / "e.jsonl").write_text(f'{{"user_id": "{written}", "item_id": "i"}}\n{{"user_id": "u", "item_id": "i"}}\n')
    pq.write_table(pa.table({"user_id": [written, "u"], "item_id": ["i", "i"]}), tmp_path / "e.parquet")
    made = Read(tmp_path, interactions={"path": name})
    assert made.rows("interactions", "user_id") == [("u",)] and "is a float too large to be exact" in made.rejected()[0][2]


KEPT_IDS = [
    "007",
    "1e3",
    "7.5",
    "1.50",
    "x.0",
    "v1.0",
    " 7",
    "A",
    "a",
    "NULLIFY",
    "nano",
    "-0",
    "+7",
    "1.25e1",
    "1.5E",
    "12.5E+3",
    "1E5",
]


def test_other_ids_keep_their_text(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\n" + "".join(f"{text},i\n" for text in KEPT_IDS))
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps({"user_id": text, "item_id": "i"}) for text in KEPT_IDS))
    for name in ("e.csv", "e.jsonl"):
        assert Read(tmp_path, interactions={"path": name}).rows("interactions", "user_id") == [(text,) for text in KEPT_IDS]
    assert [id_text(text) for text in KEPT_IDS] == KEPT_IDS


@pytest.mark.parametrize("name", ["e.csv", "e.jsonl", "e.parquet"])
def test_missing_ids_are_rejected(name: str, tmp_path: Path) -> None:
    texts = [each for word in MISSING if word for each in (word, word.upper(), word.title(), f" {word} ")]
    rows = [pair for text in texts for pair in (("u", text), (text, "i"), ("u", "i"))]
    (tmp_path / "e.csv").write_text("user_id,item_id\n" + "".join(f"{user},{item}\n" for user, item in rows))
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps({"user_id": user, "item_id": item}) for user, item in rows))
    pq.write_table(pa.table({"user_id": [row[0] for row in rows], "item_id": [row[1] for row in rows]}), tmp_path / "e.parquet")
    made = Read(tmp_path, interactions={"path": name})
    assert made.rows("interactions", "user_id", "item_id") == [("u", "i")] * len(texts)
    assert [why for _, _, why in made.rejected()] == ["item_id is missing", "user_id is missing"] * len(texts)
    assert all(id_text(text) is None for text in texts)


def test_nan_and_inexact_floats_are_no_ids(tmp_path: Path) -> None:
    floats = pa.array([1.0, float("nan"), None, 2.0**53, 1e300])
    pq.write_table(pa.table({"user_id": floats, "item_id": ["i"] * 5}), tmp_path / "e.parquet")
    made = Read(tmp_path, interactions={"path": "e.parquet"})
    assert made.rows("interactions", "user_id") == [("1",)]
    assert [why.partition(":")[0] for _, _, why in made.rejected()] == [
        "user_id is missing",
        "user_id is missing",
        "user_id is a float too large to be exact",
        "user_id is a float too large to be exact",
    ]


@pytest.mark.parametrize("value", [{"$oid": "5f"}, ["7"], [7, 8]])
def test_objects_and_lists_are_no_ids(value: Any, tmp_path: Path) -> None:
    rows = [{"user_id": value, "item_id": "i"}, {"user_id": "u", "item_id": "i"}]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = Read(tmp_path, interactions={"path": "e.jsonl"})
    assert made.rows("interactions", "user_id") == [("u",)] and "is not a single value" in made.rejected()[0][2]
