"""Test the usual notations of lists, vectors and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.sources.values import parse_list
from twotower.errors import DataError

from .table_rows import Read

LISTS = {
    "['Drama', 'War']": ["Drama", "War"],
    '["Drama", "War"]': ["Drama", "War"],
    "['Drama' 'War']": ["Drama", "War"],
    "['Drama'\n 'War']": ["Drama", "War"],
    '[["Drama"], ["War", "War"]]': ["Drama", "War", "War"],
    "[['Drama'], ['War']]": ["Drama", "War"],
    "[{'id': 18, 'name': 'Drama'}, {'id': 7, 'name': 'War'}]": ["Drama", "War"],
    '[{"id": 18, "name": "Drama"}]': ["Drama"],
    "('Drama', 'War')": ["Drama", "War"],
    "{'War', 'Drama'}": ["Drama", "War"],
    "Drama|War": ["Drama", "War"],
    "[new]|sale": ["[new]", "sale"],
    "[]": [],
    "[1, 2]": ["1", "2"],
}


@pytest.mark.parametrize("name", ["i.parquet", "i.jsonl"])
def test_written_lists_are_labels(name: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\nu,0\n")
    rows = [{"item_id": str(n), "tags": text} for n, text in enumerate(LISTS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "i.parquet")
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, rows)))
    features = [{"name": "tags", "kind": "multi", "separator": "|"}]
    made = Read(tmp_path, interactions={"path": "e.csv"}, items={"path": name, "features": features})
    assert made.rows("items", "tags") == [(labels,) for labels in LISTS.values()]


VECTORS = {
    "[0.5 1.25]": [0.5, 1.25],
    "[0.5, 1.25]": [0.5, 1.25],
    "[ 5.e-01\n  1.25]": [0.5, 1.25],
    "0.5|1.25": [0.5, 1.25],
    "(1, 2)": [1, 2],
}


LOST = ["[0.1 0.2 ... 0.9]", "[1, null, 2]", "[1, 'x']", "[nan 1.]", "1||2", "[[1, 2], ['a']]"]


def test_written_lists_are_vectors_and_never_lose_a_number(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\nu,0\n")
    texts = [*VECTORS, *LOST]
    pq.write_table(pa.table({"item_id": [str(n) for n in range(len(texts))], "vec": texts}), tmp_path / "i.parquet")
    items = {"path": "i.parquet", "features": [{"name": "vec", "kind": "vector", "separator": "|"}]}
    made = Read(tmp_path, interactions={"path": "e.csv"}, items=items)
    assert made.rows("items", "vec") == [(numbers,) for numbers in VECTORS.values()]
    lost = [line for _, line, why in made.rejected() if "is not a list of numbers" in why]
    assert lost == list(range(len(VECTORS) + 1, len(texts) + 1))


NESTED: dict[str, tuple[pa.Array, list[str]]] = {
    "lists": (pa.array([[["a"], ["b", "c"]]]), ["a", "b", "c"]),
    "structs": (pa.array([[{"name": "a", "id": 1}, {"name": "b", "id": 2}]]), ["a", "b"]),
    "numbers": (pa.array([[1, 2]]), ["1", "2"]),
    "fixed": (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), ["a", "b"]),
    "large": (pa.array([["a"]], pa.large_list(pa.large_string())), ["a"]),
    "bytes": (pa.array([[b"a"]]), ["a"]),
    "dictionary": (pa.array(["a"]).dictionary_encode(), ["a"]),
}


@pytest.mark.parametrize(("column", "labels"), NESTED.values(), ids=NESTED.keys())
def test_nested_columns_are_flattened(column: pa.Array, labels: list[str], tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\nu,i\n")
    pq.write_table(pa.table({"item_id": ["i"], "tags": column}), tmp_path / "i.parquet")
    items = {"path": "i.parquet", "features": [{"name": "tags", "kind": "multi"}]}
    assert Read(tmp_path, interactions={"path": "e.csv"}, items=items).rows("items", "tags") == [(labels,)]


def test_a_type_without_single_values_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": pa.array([{"a": 1}]), "item_id": ["i"]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="column 'user_id' has the type struct<a: int64>, which has no single values"):
        Read(tmp_path, interactions={"path": "e.parquet"})


MONEY = {"$12.99": 12.99, "€ 1,299.50": 1299.5, "12 EUR": 12, "1,000,000": 1e6, "-3": -3, "1e3": 1000}


def test_money_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\nu,0\n")
    (tmp_path / "i.jsonl").write_text("\n".join(json.dumps({"item_id": n, "price": text}) for n, text in enumerate(MONEY)))
    items = {"path": "i.jsonl", "features": [{"name": "price", "kind": "number"}]}
    found = Read(tmp_path, interactions={"path": "e.csv"}, items=items).rows("items", "price")
    assert found == [(number,) for number in MONEY.values()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).map(str.strip).filter(bool), min_size=2))
def test_lists_of_any_labels_are_read_back(labels: list[str]) -> None:
    assert parse_list(json.dumps(labels)) == labels
    assert parse_list(repr(labels)) == labels
