"""Test that bad rows are reported by file and line, and that the other rows keep the order of the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import ROW, DuckDBEngine
from twotower.data.sources.raw_tables import interactions, missing, screen
from twotower.data.sources.table_files import scan_json
from twotower.data.sources.table_paths import listing
from twotower.data.sources.times import seconds
from twotower.errors import DataError
from twotower.schema import ITEM_ID


@pytest.fixture(scope="module")
def con(tmp_path_factory: pytest.TempPathFactory) -> DuckDBEngine:
    """Return one engine for all tests."""
    return DuckDBEngine(tmp_path_factory.mktemp("spill"))


def screened(con: DuckDBEngine, path: Path, rejects: Rejects, unique: str | None = None) -> tuple[list[dict[str, Any]], int]:
    """Return rows of a file with keys `id` and `n`, after the check that `id` exists."""
    scan = scan_json(con, path, ["id", "n"])
    rows = scan.rows
    checks, columns = [(missing(rows["id"]), "id is missing")], {"id": rows["id"], "n": rows["n"]}
    good, counts = screen(con, scan, checks, columns, rejects=rejects, unique=unique)
    return good.order_by(ROW).to_pyarrow().to_pylist(), counts[path.name]


BAD_LINES = {
    "cut off": b'{"id": "x", "n": "1',
    "garbage": b"not json at all",
    "an array": b'["x"]',
    "a number": b"5",
    "null": b"null",
    "two objects": b'{"id": "x"} {"id": "y"}',
    "no text": b'{"id": "\xff\xfe"}',
    "a raw control character": b'{"id": "\x01"}',
    "another object": b'{"other": 1}',
    "an empty id": b'{"id": ""}',
    "a null id": b'{"id": null}',
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_reported_and_moves_no_other(bad: bytes, tmp_path: Path, con: DuckDBEngine) -> None:
    lines = [b'{"id": "a", "n": 1}', b"", bad, b"  \t ", b'{"id": "b", "n": 2}\r', bad, b'{"n": [3, {}], "id": 7}']
    path = tmp_path / "rows.json"
    path.write_bytes(b"\n".join(lines))
    rejects = Rejects(tmp_path / "rejects.jsonl", 1.0)
    rows, total = screened(con, path, rejects)
    rejects.check()
    assert [(row["id"], row["n"]) for row in rows] == [("a", "1"), ("b", "2"), ("7", "[3,{}]")]
    assert total == 5
    found = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in found] == [("rows.json", line, "id is missing") for line in (3, 6)]
    assert {row["text"] for row in found} == {bad.decode("utf-8", "replace")}


@settings(max_examples=25)
@given(kinds=st.lists(st.sampled_from(["good", "bad", "blank"]), max_size=60))
def test_any_mixture_of_lines_keeps_its_line_numbers(
    kinds: list[str], tmp_path_factory: pytest.TempPathFactory, con: DuckDBEngine
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    text = {"good": '{{"id": "r{}"}}', "bad": '{{"id": "r{}', "blank": " "}
    (folder / "rows.jsonl").write_text("\n".join(text[kind].format(number) for number, kind in enumerate(kinds, 1)))
    rejects = Rejects(folder / "rejects.jsonl", 1.0)
    rows, total = screened(con, folder / "rows.jsonl", rejects)
    rejects.check()
    by_kind = {kind: [number for number, each in enumerate(kinds, 1) if each == kind] for kind in text}
    assert [row["id"] for row in rows] == [f"r{number}" for number in by_kind["good"]]
    assert total == len(by_kind["good"]) + len(by_kind["bad"])
    report = folder / "rejects.jsonl"
    found = report.read_text().splitlines() if report.exists() else []
    assert [json.loads(line)["line"] for line in found] == by_kind["bad"]


def test_rows_keep_the_order_of_the_file_when_read_in_parallel(tmp_path: Path, con: DuckDBEngine) -> None:
    path = tmp_path / "rows.json"
    size = 400_000
    path.write_text("".join(f'{{"id": "{i}"}}\n' if i % 1000 else '{"id\n' for i in range(size)))
    assert path.stat().st_size > 5 << 20
    con.con.raw_sql("SET threads = 4")
    rows = con.read_json(path, ["id"])
    for _ in range(2):
        displaced = rows.filter(rows["id"].notnull() & (rows["id"].cast("int64") != rows[ROW]))
        assert displaced.count().to_pyarrow().as_py() == 0
    assert rows.filter(rows["id"].isnull()).count().to_pyarrow().as_py() == size // 1000


def test_a_repeated_key_keeps_the_first_good_row(tmp_path: Path, con: DuckDBEngine) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"id": "a", "n": "bad"}\n{"id": "a", "n": "1"}\n{"id": "b", "n": "2"}\n{"id": "a", "n": "3"}\n')
    rejects = Rejects(tmp_path / "rejects.jsonl", 1.0)
    scan = scan_json(con, path, ["id", "n"])
    rows = scan.rows
    good, _ = screen(
        con,
        scan,
        [(rows["n"] == "bad", "bad n")],
        {"id": rows["id"], "n": rows["n"]},
        rejects=rejects,
        unique="id",
    )
    assert [row["n"] for row in good.order_by(ROW).to_pyarrow().to_pylist()] == ["1", "2"]
    rejects.check()
    found = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in found] == [(1, "bad n"), (4, "id repeats an earlier row: 'a'")]


def test_gzipped_lines_are_read_and_a_broken_archive_is_an_error(tmp_path: Path, con: DuckDBEngine) -> None:
    path = tmp_path / "rows.json.gz"
    content = gzip.compress(b'{"id": "a"}\n{"id": \n' * 1000)
    path.write_bytes(content)
    rejects = Rejects(tmp_path / "rejects.jsonl", 1.0)
    rows, total = screened(con, path, rejects)
    assert len(rows) == 1000 and total == 2000 and rejects.rejected == {"rows.json.gz": 1000}
    rejects.close()
    path.write_bytes(content[:-30])
    with pytest.raises(DataError, match=r"rows.json.gz is not readable to its end"):
        screened(con, path, Rejects(tmp_path / "rejects.jsonl", 1.0))


def test_no_bad_row_writes_no_file(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejects.jsonl", 0.0)
    rejects.total("a", 10)
    rejects.check()
    assert not (tmp_path / "rejects.jsonl").exists()


@pytest.mark.parametrize(
    ("bad", "rows", "limit", "fails"), [(1, 100, 0.01, False), (2, 100, 0.01, True), (1, 9, 0.0, True), (9, 9, 1.0, False)]
)
def test_the_limit_is_a_share_of_each_files_rows(bad: int, rows: int, limit: float, fails: bool, tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejects.jsonl", limit)
    rejects.total("large", 1_000_000)
    for line in range(bad):
        rejects.add("small", line + 1, f"reason {line}", "x" * 300)
    rejects.total("small", rows)
    if not fails:
        rejects.check()
    else:
        with pytest.raises(
            DataError,
            match=rf"small has {bad} unreadable rows of {rows} \({bad / rows:.2%}\): small:1 reason 0.*raise data.max_reject_frac",
        ):
            rejects.check()
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in written] == list(range(1, bad + 1)) and {len(row["text"]) for row in written} == {200}


def test_the_error_shows_the_first_three(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejects.jsonl", 0.1)
    for line in range(1, 6):
        rejects.add("f", line, "r", "")
    rejects.total("f", 10)
    with pytest.raises(DataError) as caught:
        rejects.check()
    assert (
        "f:3 r" in str(caught.value) and "f:4" not in str(caught.value) and "5 unreadable rows of 10 (50.00%)" in str(caught.value)
    )


TIMES = {
    "2018-07-07": 1_530_921_600,
    "2018-07-07 22:09:11": 1_531_001_351,
    "2018-07-07T22:09:11": 1_531_001_351,
    "2018-07-07 22:09:11.9": 1_531_001_351,
    "1531001351": 1_531_001_351,
    "1531001351000": 1_531_001_351,
    "1.531001351e12": None,  # left to `parse_time`
    "2009-03": 1_235_865_600,
    "1969-12-31 23:59:59": -1,
    "": None,
    "soon": None,
    "2018-02-30": None,
    "infinity": None,
    "nan": None,
    "1e300": None,
    "-inf": None,
}


@pytest.mark.parametrize(("text", "expected"), TIMES.items(), ids=[text or "empty" for text in TIMES])
def test_seconds_of(text: str, expected: int | None, con: DuckDBEngine) -> None:
    table = con.save(pa.table({"text": [text]}))
    assert table.select(s=seconds(table["text"])).to_pyarrow().to_pylist() == [{"s": expected}]


def test_interactions_have_their_columns_and_types(con: DuckDBEngine) -> None:
    table = con.save(pa.table({"item": ["i"]}))
    made = interactions(table, item_id=table["item"], time_s=3, order=0, event_type="tip")
    given = {"item_id": "i", "time_s": 3, "order": 0, "event_type": "tip", "chars": 0}
    assert made.to_pyarrow().to_pylist() == [dict.fromkeys(made.columns) | given]
    assert dict(made.schema())[ITEM_ID].is_string() and dict(made.schema())["stars"].is_float64()


def test_listing_says_what_a_folder_holds(tmp_path: Path) -> None:
    assert listing(tmp_path / "none").endswith("none does not exist")
    assert listing(tmp_path).endswith("holds nothing")
    for name in "abcdefgh":
        (tmp_path / name).touch()
    assert listing(tmp_path).endswith("holds a, b, c, d, e, f and 2 more")
