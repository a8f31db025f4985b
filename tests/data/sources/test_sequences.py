"""Test sequence files: order, repeats and positions are kept; attributes and descriptions are joined by item."""

from __future__ import annotations

import gzip
import json
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import DuckDBEngine
from twotower.data.sources.raw_tables import RawTables
from twotower.data.sources.sequences import read_sequences
from twotower.errors import DataError
from twotower.schema import FeatureSpec
from twotower.utils.config import DataConfig, SequencesConfig


@cache
def engine() -> DuckDBEngine:
    """Return one engine for all tests: sources must work with other tables present."""
    return DuckDBEngine(Path(mkdtemp()))


def read(folder: Path, rejects: Rejects | None = None, **files: str) -> RawTables:
    """Read a folder; `train` defaults to "train.txt"."""
    names = SequencesConfig(**{"train": "train.txt", **files})  # type: ignore[arg-type]
    book = rejects or Rejects(folder / "rejects.jsonl", 0.0)
    raw = read_sequences(DataConfig(source="sequences", path=folder, sequences=names), engine(), book)
    book.check()
    return raw


def rows(table: Any, *columns: str) -> list[tuple[Any, ...]]:
    """Return columns of a table as tuples, events by order."""
    found = table.to_pyarrow()
    found = found.sort_by("order") if "order" in columns else found
    return [tuple(row[column] for column in columns) for row in found.to_pylist()]


EVENT = ("user_id", "item_id", "time_s", "order", "part")


def test_a_line_is_a_user_and_his_items_repeats_kept(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("u1 a b a\n\n007 b\tç-1 \r\nalone\nu1 c\n")
    raw = read(tmp_path)
    assert rows(raw.interactions, *EVENT) == [
        ("u1", "a", 0, 0, None),
        ("u1", "b", 1, 1, None),
        ("u1", "a", 2, 2, None),
        ("007", "b", 0, 3, None),
        ("007", "ç-1", 1, 4, None),
        ("u1", "c", 3, 5, None),
    ]
    assert set(rows(raw.interactions, "event_type", "stars", "chars")) == {("interaction", None, 0)}
    assert rows(raw.items, "item_id") == [("a",), ("b",), ("ç-1",), ("c",)]
    assert sorted(rows(raw.users, "user_id", "since_s", "elite")) == [("007", None, None), ("u1", None, None)]
    assert not raw.has_time and raw.features == () and raw.counts == {"train.txt": 4}


def test_a_test_line_goes_on_where_training_ended(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1 a b\n2 a\n")
    (tmp_path / "test.txt").write_text("2 d e\n1 c\n3 a\n")
    assert rows(read(tmp_path, test="test.txt").interactions, *EVENT) == [
        ("1", "a", 0, 0, "train"),
        ("1", "b", 1, 1, "train"),
        ("2", "a", 0, 2, "train"),
        ("2", "d", 1, 3, "test"),
        ("2", "e", 2, 4, "test"),
        ("1", "c", 2, 5, "test"),
        ("3", "a", 0, 6, "test"),
    ]


@settings(max_examples=25)
@given(lines=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 5), max_size=5)), min_size=1, max_size=12))
def test_any_lines_come_back(lines: list[tuple[int, list[int]]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lines")
    lines = [(0, [0]), *lines]
    (folder / "train.txt").write_text("\n".join(" ".join(map(str, [user, *items])) for user, items in lines))
    seen: dict[int, int] = {}
    expected = []
    for user, items in lines:
        for item in items:
            expected.append((str(user), str(item), seen.get(user, 0)))
            seen[user] = seen.get(user, 0) + 1
    found = rows(read(folder).interactions, "user_id", "item_id", "time_s", "order")
    assert found == [(*row, order) for order, row in enumerate(expected)]


def test_attributes_alone_are_displayed_and_learned(tmp_path: Path) -> None:
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"u 1 2\n"))
    (tmp_path / "a.json").write_text(json.dumps({"1": [5, 6], "9": [7]}))
    raw = read(tmp_path, train="train.txt.gz", attributes="a.json")
    assert rows(raw.items, "item_id", "categories") == [("1", ["5", "6"]), ("2", [])]
    assert raw.features == (FeatureSpec(name="categories", side="item", kind="multi", columns=("categories",)),)


def test_described_items_are_displayed_by_name_and_learned_by_attribute(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("u 1 2\n")
    (tmp_path / "a.json").write_text(json.dumps({"1": [5, 6]}))
    described = [
        {"item": 1, "name": "Blue Door", "categories": "Bars, Food", "city": "Reno", "latitude": "39.5", "longitude": -119.8},
        {"item": "3", "categories": ["Parks"]},
    ]
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, described)))
    raw = read(tmp_path, attributes="a.json", items="i.jsonl")
    assert rows(raw.items, "item_id", "name", "categories", "city", "latitude", "longitude", "category_ids") == [
        ("1", "Blue Door", ["Bars", "Food"], "Reno", 39.5, -119.8, ["5", "6"]),
        ("2", None, [], None, None, None, []),
        ("3", None, ["Parks"], None, None, None, []),
    ]
    assert raw.features[0].columns == ("category_ids",)


def test_bad_lines_are_rejected_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"u1 a\nu2 \xff\xfe\nu3 b\n")
    good = {"item": "a", "name": "A"}
    described = [good, {"name": "x"}, {"item": "b", "latitude": 99}, good]
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, described)) + '\n{"item": "b", "na')
    raw = read(tmp_path, Rejects(tmp_path / "rejects.jsonl", 1.0), items="i.jsonl")
    assert rows(raw.interactions, "user_id", "order") == [("u1", 0), ("u3", 1)]
    assert rows(raw.items, "item_id", "name") == [("a", "A"), ("b", None)]
    found = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in found] == [
        ("train.txt", 2, "not UTF-8 text"),
        ("i.jsonl", 2, "item is missing"),
        ("i.jsonl", 3, "latitude must be from -90 to 90, not '99'"),
        ("i.jsonl", 4, "item 'a' repeats an earlier line"),
        ("i.jsonl", 5, "not a complete JSON object with item"),
    ]


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "Yelp.txt").write_text("1 2\n")
    for setting in ("train", "test", "attributes", "items"):
        with pytest.raises(DataError, match=rf"none.txt: .* holds Yelp.txt. data.sequences.{setting} must be a file"):
            read(tmp_path, **{"train": "Yelp.txt", setting: "none.txt"})


@pytest.mark.parametrize("content", ["", "\n\n", "1,2,3\n", "u1\nu2\n"])
def test_a_file_of_another_form_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(content)
    with pytest.raises(DataError, match='Lines must be "user item item …"'):
        read(tmp_path)


@pytest.mark.parametrize("content", ["[1]", '{"1": [', "1 2 3"])
def test_attributes_of_another_form_are_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("u 1\n")
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match="is not a JSON object"):
        read(tmp_path, attributes="a.json")


def test_the_s3rec_split(real_data: Path) -> None:
    raw = read(real_data / "s3rec-yelp", train="Yelp.txt", attributes="Yelp_item2attributes.json", items="items.jsonl")
    events = raw.interactions.to_pyarrow()
    assert len(events) == 316_354
    assert len(set(events["user_id"].to_pylist())) == 30_431 and len(set(events["item_id"].to_pylist())) == 20_033
    items = raw.items.to_pyarrow().to_pylist()
    assert len(items) == 20_033
    assert len({value for item in items for value in item["category_ids"]}) == 1_001
    assert sum(item["latitude"] is not None for item in items) == 2_930
    assert min(len(item["category_ids"]) for item in items) >= 0 and sum(bool(item["name"]) for item in items) > 20_000


def test_the_lightgcn_split_in_a_few_seconds(real_data: Path) -> None:
    start = time.process_time()
    raw = read(real_data / "lightgcn-yelp2018", train="train.txt", test="test.txt")
    assert time.process_time() - start < 10
    parts = raw.interactions.to_pyarrow()["part"].to_pylist()
    assert (parts.count("train"), parts.count("test")) == (1_237_259, 324_147)
    assert raw.items.count().to_pyarrow().as_py() == 38_048 and raw.users.count().to_pyarrow().as_py() == 31_668
