"""Read inputs of extreme form: time and memory stay in proportion to the input, and each ends with rows, rejects or one sentence.

Work is counted where its growth matters; sizes are those at which quadratic work would take minutes. `benchmarks/limits.py`
measures the real sizes.
"""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.sources import delimited_records, guess_features, other_columns, table_files, tables, text_files
from twotower.data.sources.delimited_records import Dialect, read_records
from twotower.data.sources.file_form import read_sample
from twotower.data.sources.guess import guess_dataset
from twotower.data.sources.json_files import open_json
from twotower.data.sources.json_rows import json_rows
from twotower.data.sources.raw_tables import MAX_ID_CHARS
from twotower.data.sources.values import parse_list
from twotower.errors import DataError

from .table_rows import Read

TIME_S = 1_600_000_000
HEADER = "user_id,item_id,time\n"
ROW = f"u,i,{TIME_S}\n"
DIALECT = Dialect(",", ("user_id", "item_id", "time"), False, '"')


def read(folder: Path, name: str = "e.csv", **settings: Any) -> Read:
    return Read(folder, interactions={"path": name, "time": "time", **settings})


def test_open_quotes_cost_their_own_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = 0
    real = delimited_records._span

    def counted(*args: Any) -> Any:
        nonlocal parsed
        for text in real(*args):
            parsed += 1
            yield text

    monkeypatch.setattr(delimited_records, "_span", counted)
    content = [b'u,"i,1' if n % 3 == 0 else b"u,i,1" for n in range(30_000)]
    found = read_records(content, DIALECT, '"', 1, final=True)
    assert len(found.rows) == 20_000 and len(found.bad) == 10_000
    assert parsed < 4 * len(content), "lines are parsed again for each open quotation mark"


def test_broken_elements_of_an_array_do_not_search_the_whole_file(tmp_path: Path) -> None:
    rows = ['{"user_id": "u", "item_id": "i", "time": 1600000000}', '{"user_id": broken}'] * 20_000
    (tmp_path / "e.json").write_text("[\n" + ",\n".join(rows) + "]")
    source = open_json(tmp_path / "e.json", tmp_path / "spill")
    found = [line for _, line in source.lines()]
    assert len(found) == 40_000 and sum(b"broken" in line for line in found) == 20_000


def test_an_element_that_ends_in_the_next_block_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 64)
    rows = [
        {"user_id": f"u{n}", "item_id": "i", "time": TIME_S, "tags": [{"a": k, "b": "x\\u00e9"} for k in range(n)]}
        for n in range(9)
    ]
    (tmp_path / "e.json").write_text(json.dumps(rows, indent=None).replace('"tags"', '\n"tags"'))
    made = read(tmp_path, "e.json")
    assert [user for (user,) in made.rows("interactions", "user_id")] == [row["user_id"] for row in rows] and not made.rejected()


def test_a_sample_of_an_array_is_read_in_one_pass() -> None:
    rows = [{"user_id": n, "item_id": n} for n in range(15_000)]
    kind, found = json_rows(json.dumps(rows), Path("e.json"), complete=True) or ("", pa.table({}))
    assert kind == "JSON array" and found.num_rows == len(rows)


def test_a_header_is_found_behind_any_number_of_lines(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("# a comment\n\n" * 30_000 + HEADER + ROW)
    account = read(tmp_path, comment="#").rejects.files["e.csv"]
    assert account.rows == 1 and account.skipped == {"header": 1, "blank": 30_000, "comments": 30_000}


def test_blank_blocks_are_counted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 16)
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((HEADER + ROW + "\n" * (4 << 20) + "u,i\n").encode()))
    read_lines = 0

    def counted(content: Any, *args: Any, **more: Any) -> Any:
        nonlocal read_lines
        read_lines += len(content)
        return read_records(content, *args, **more)

    monkeypatch.setattr("twotower.data.sources.delimited_files.read_records", counted)
    made = read(tmp_path, "e.csv.gz")
    assert made.rejects.files["e.csv.gz"].skipped == {"header": 1, "blank": 4 << 20}
    assert made.rejected() == [("e.csv.gz", (4 << 20) + 3, "not a row of 3 columns: it has 2")]
    assert read_lines < 1 << 19


@pytest.mark.parametrize("name", ["e.csv", "e.csv.gz", "e.jsonl", "e.jsonl.gz", "e.json"])
def test_a_line_without_an_end_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1 << 20)
    row = {"user_id": "u", "item_id": "i", "time": TIME_S}
    text = (
        HEADER + ROW + "u,i," + "9" * (9 << 20)
        if ".csv" in name
        else json.dumps(row) + "\n" + json.dumps(row | {"x": "y" * (9 << 20)})
    )
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match="has a line of more than 1 MiB that begins with b"):
        read(tmp_path, name)


def test_an_id_has_a_greatest_length(tmp_path: Path) -> None:
    long = "x" * (MAX_ID_CHARS + 1)
    (tmp_path / "e.csv").write_text(f"{HEADER}{long},i,{TIME_S}\n{long[1:]},i,{TIME_S}\nu,{long * 9},{TIME_S}\n")
    made = read(tmp_path)
    assert made.rows("interactions", "user_id") == [(long[1:],)]
    why = [f"{name} is longer than 1,000 characters: '{'x' * 60}'" for name in ("user_id", "item_id")]
    assert made.rejected() == [("e.csv", 2, why[0]), ("e.csv", 4, why[1])]


DEEP = {
    "brackets": "[" * 3000 + "]" * 3000,
    "dicts": '{"a": ' * 600 + "1" + "}" * 600,
    "Python": "[" * 900 + "'a'" + "]" * 900,
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP.keys())
def test_deep_lists_are_labels_or_a_reason(text: str) -> None:
    try:
        assert parse_list(text) in ([], ["1"], ["a"])
    except ValueError as error:
        assert "is nested too deeply" in str(error) or "is not a list" in str(error)


@pytest.mark.parametrize("depth", [900, 960, 990, 3000, 20_000])
def test_deep_json_is_a_row_or_a_reject(depth: int, tmp_path: Path) -> None:
    deep = '{"a": ' * depth + "1" + "}" * depth
    row = f'{{"user_id": "u", "item_id": "i", "time": {TIME_S}, "x": %s}}'
    (tmp_path / "e.jsonl").write_text(f"{row % 1}\n{row % deep}\n{row % 2}\n")
    (tmp_path / "e.json").write_text(f"[{row % 1},\n{row % deep},\n{row % 2}]")
    (tmp_path / "p.json").write_text("".join(f"{line}\n" for line in (row % 1, row % deep, row % 2)).replace('"', "'"))
    for name in ("e.jsonl", "e.json", "p.json"):
        made = read(tmp_path, name)
        account = made.rejects.files[name]
        assert len(made.kept()) + sum(account.rejected.values()) == account.rows >= 3 and len(made.kept()) >= 2


def test_other_columns_are_bounded_and_named_as_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(other_columns, "MAX_OTHER_COLUMNS", 3)
    (tmp_path / "e.csv").write_text(HEADER + ROW)
    (tmp_path / "i.csv").write_text("item_id,a,b,c,d,e\ni,1,2,3,4,5\n")
    items = {"path": "i.csv", "features": [{"name": "e", "kind": "number"}]}
    made = Read(tmp_path, interactions={"path": "e.csv", "time": "time"}, items=items)
    assert made.rows("items", "a", "b", "c", "e") == [(1, 2, 3, 5.0)]
    assert made.rejects.files["i.csv"].unused_columns == ["d"]
    assert "i.csv has 4 columns that no setting uses: the first 3 are kept" in caplog.text


def test_guessed_features_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guess_features, "MAX_FEATURES", len(guess_features.RESERVED_FEATURES) + 2)
    (tmp_path / "e.csv").write_text(HEADER + "".join(f"u{n % 9},i{n % 7},{TIME_S + n}\n" for n in range(60)))
    names = [f"price_{n}" for n in range(5)]
    rows = "".join(f"i{n}," + ",".join(str(n * 3.5 + k) for k in range(5)) + "\n" for n in range(7))
    (tmp_path / "i.csv").write_text(f"item_id,{','.join(names)}\n{rows}")
    guess = guess_dataset([read_sample(tmp_path / "e.csv"), read_sample(tmp_path / "i.csv")])
    assert guess.items is not None
    assert [column.role for column in guess.items.columns] == ["item", "feature", "feature", "shown", "shown", "shown"]


def test_thousands_of_parts_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_PARTS", 3)
    for n in range(10):
        (tmp_path / f"part-{n}.csv").write_text(f"{HEADER}u{n},i,{TIME_S}\nu{n},j,{TIME_S}\n")
    made = read(tmp_path, "part-*.csv")
    assert made.rows("interactions", "user_id", "item_id") == [(f"u{n}", item) for n in range(10) for item in "ij"]
    assert table_files.FILE_ROWS * 1_000_000 < 1 << 63


def test_many_row_groups_are_one_table(tmp_path: Path) -> None:
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("time", pa.int64())])
    with pq.ParquetWriter(tmp_path / "e.parquet", schema) as target:
        for n in range(500):
            target.write_table(pa.table([[f"u{n}"], ["i"], [TIME_S + n]], schema=schema))
    assert read(tmp_path, "e.parquet").rows("interactions", "user_id") == [(f"u{n}",) for n in range(500)]


@pytest.mark.parametrize("name", ["e.csv", "e.csv.gz", "e.json"])
def test_a_file_that_never_ends_growing_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 10)
    path = tmp_path / name
    row = json.dumps({"user_id": "u", "item_id": "i", "time": TIME_S})
    text = "[" + ",\n".join([row] * 100) + "]" if name == "e.json" else HEADER + ROW * 300
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    real = text_files._utf8
    calls = 0

    def growing(*args: Any) -> Any:
        nonlocal calls
        for chunk in real(*args):
            calls += 1
            assert calls < 50, "reading goes on as long as the file grows"
            with path.open("ab") as target:
                target.write(gzip.compress(ROW.encode() * 100) if name.endswith(".gz") else b" " * 2000)
            yield chunk

    monkeypatch.setattr(text_files, "_utf8", growing)
    with pytest.raises(DataError, match="changed while it was read"):
        read(tmp_path, name)


def test_lists_of_display_columns_are_never_lost(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(HEADER + ROW)
    (tmp_path / "i.csv").write_text('item_id,a,b\ni,[new],"[""x"", ""y""]"\nj,[old],"[""z""]"\n')
    made = Read(tmp_path, interactions={"path": "e.csv", "time": "time"}, items={"path": "i.csv"})
    assert made.rows("items", "a", "b") == [("[new]", ["x", "y"]), ("[old]", ["z"])]


@pytest.mark.parametrize("name", ["e.csv.gz", "e.csv.bz2", "e.csv.zst", "e.jsonl.gz", "e.json.zst", "e.parquet"])
def test_a_small_file_with_a_huge_content_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "FREE_BYTES", 1 << 20)
    size = 200_000
    line = json.dumps({"user_id": "u", "item_id": "i", "time": TIME_S}) + "\n"
    data = (line * size if ".json" in name else HEADER + ROW * size).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"user_id": ["u"] * size, "item_id": ["i"] * size, "time": [TIME_S] * size}), tmp_path / name)
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda text: bytes(pa.compress(text, "zstd", asbytes=True))}
        (tmp_path / name).write_bytes(pack[name.rpartition(".")[2]](data))
    with pytest.raises(DataError, match="unpacks to more than"):
        read(tmp_path, name)
    monkeypatch.setattr(text_files, "FREE_BYTES", 1 << 26)
    assert len(read(tmp_path, name).rows("interactions", "user_id")) == size
