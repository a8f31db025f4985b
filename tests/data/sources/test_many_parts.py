"""Test that the parts of a table are read as one, and are accounted for one by one."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.sources.account import MAX_FILES, account_table
from twotower.data.sources.engine import DuckDBEngine
from twotower.data.sources.file_form import read_sample
from twotower.errors import DataError

from .table_rows import Read, engine

Row = dict[str, Any]
START = 1_600_000_000


def events(first: int, n: int = 4) -> list[Row]:
    """Return events; the ids and times tell their position."""
    return [{"user_id": f"u{k}", "item_id": f"i{k % 5}", "time": START + k} for k in range(first, first + n)]


def as_csv(rows: list[Row], names: list[str] | None = None) -> str:
    names = names or list(rows[0] if rows else ("user_id", "item_id", "time"))
    return "\n".join([",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]) + "\n"


def as_json(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(as_csv(rows) if path.suffix == ".csv" else as_json(rows))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_parts_are_read_in_their_order_and_counted_each(suffix: str, tmp_path: Path) -> None:
    sizes = [3, 1, 7, 2, 12]
    for number, size in enumerate(sizes):
        rows = events(100 * number, size)
        rows[0] |= {"item_id": ""} if number == 2 else {}
        write(tmp_path / "log" / f"part-{number * 5}.{suffix}", rows)
    (tmp_path / "log" / "_SUCCESS").touch()
    read = Read(tmp_path, interactions={"path": "log", "time": "time"})
    times = [row[0] for row in read.rows("interactions", "time_s")]
    assert times == [START + 100 * number + k for number, size in enumerate(sizes) for k in range(number == 2, size)]
    assert read.raw.counts == {f"log/part-{number * 5}.{suffix}": size for number, size in enumerate(sizes)}
    assert read.rejected() == [(f"log/part-10.{suffix}", 2 if suffix == "csv" else 1, "item_id is missing")]


def test_parts_with_other_headers_keep_their_columns(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "part-1.csv").write_text(as_csv(events(0)))
    (folder / "part-2.csv").write_text(as_csv(events(10), ["time", "item_id", "user_id"]))
    (folder / "part-3.csv").write_text(as_csv(events(20), ["note", "user_id", "time", "item_id"]).replace(",", ";"))
    (folder / "part-4.csv").write_bytes("\ufeff".encode() + as_csv(events(30)).replace("\n", "\r\n").encode())
    read = Read(tmp_path, interactions={"path": "log", "time": "time"})
    assert read.rows("interactions", "user_id", "time_s") == [
        (row["user_id"], row["time"]) for first in (0, 10, 20, 30) for row in events(first)
    ]
    (folder / "part-5.csv").write_text("user_id,thing,time\nu1,i1,1600000000\n")
    with pytest.raises(DataError, match=r"log/part-5\.csv has no column 'item_id'"):
        Read(tmp_path, interactions={"path": "log", "time": "time"})


def test_a_header_within_a_part_is_rejected_also_with_partition_columns(tmp_path: Path) -> None:
    for day in ("2024-01-01", "2024-01-02"):
        part = tmp_path / "log" / f"day={day}" / "part.csv"
        part.parent.mkdir(parents=True)
        part.write_text("user_id,item_id\nu1,i1\nuser_id,item_id\nu2,i2\n")
    read = Read(tmp_path, interactions={"path": "log", "time": "day", "partition_columns": ["day"]})
    assert [reason for *_, reason in read.rejected()] == ["repeats the header"] * 2
    first = 1_704_067_200
    wanted = [("u1", first), ("u2", first), ("u1", first + 86_400), ("u2", first + 86_400)]
    assert read.rows("interactions", "user_id", "time_s") == wanted


def test_an_id_has_one_text_in_parts_of_any_type(tmp_path: Path) -> None:
    kinds = [pa.int64(), pa.string(), pa.float64(), pa.int16(), pa.dictionary(pa.int8(), pa.string()), pa.decimal128(21, 2)]
    (tmp_path / "log").mkdir()
    for number, kind in enumerate(kinds):
        ids = (
            pa.array([7, 8]).cast(pa.string()).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array([7, 8]).cast(kind)
        )
        table = pa.table({"user_id": ids, "item_id": ["a", "b"], "time": [START, START + number]})
        pq.write_table(table, tmp_path / "log" / f"part-{number}.parquet")
    (tmp_path / "log" / "part-8.csv").write_text(f"user_id,item_id,time\n7,a,{START}\n8.0,b,{START}\n")
    (tmp_path / "log" / "part-9.jsonl").write_text(as_json([{"user_id": 7.0, "item_id": "a", "time": START}]))
    read = Read(tmp_path, interactions={"path": "log", "time": "time"})
    assert Counter(read.rows("interactions", "user_id")) == {("7",): 8, ("8",): 7}
    assert not read.rejected()


@pytest.mark.parametrize("name", ["part-1.csv", "part-1.jsonl", "part-1.csv.gz", "part-1.jsonl.gz"])
def test_empty_parts_have_no_rows_and_one_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    empty = tmp_path / "log" / name
    empty.parent.mkdir()
    empty.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    with pytest.raises(DataError, match=r"part-1"):
        Read(tmp_path, interactions={"path": "log", "time": "time"})
    (tmp_path / "log" / "part-0.csv").write_text(as_csv([]))
    (tmp_path / "log" / "part-2.csv").write_text(as_csv(events(0)))
    read = Read(tmp_path, interactions={"path": "log", "time": "time"})
    assert read.rejects.files[f"log/{name}"].rows == 0
    assert len(read.kept()) == 4


def test_keys_that_parts_lack_are_null_and_the_newest_snapshot_wins(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    write(tmp_path / "log.csv", events(0, 9))
    parts = [
        [{"item_id": "i1", "colour": "red"}],
        [{"item_id": "i1", "size": 3}, {"item_id": "i2", "size": 4}],
        [{"item_id": "i2"}],
    ]
    for number, rows in enumerate(parts):
        (tmp_path / "items" / f"day-{number + 9}.jsonl").write_text(as_json(rows))
    read = Read(tmp_path, interactions={"path": "log.csv", "time": "time"}, items={"path": "items"})
    found = {row["item_id"]: (row["colour"], row["size"]) for row in read.raw.items.to_pyarrow().to_pylist()}
    assert found == {"i1": (None, 3), "i2": (None, None)}
    assert {name: file.left_out for name, file in read.rejects.files.items() if file.left_out} == {
        "items/day-9.jsonl": {"a later file has the id again": 1},
        "items/day-10.jsonl": {"a later file has the id again": 1},
    }


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_an_id_may_repeat_between_parts_and_not_within(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / "log.csv", events(0, 9))
    for number, ids in enumerate([["i1", "i2"], ["i2", "i3", "i2"]]):
        write(tmp_path / "items" / f"part-{number}.{suffix}", [{"item_id": name, "size": k} for k, name in enumerate(ids)])
    read = Read(tmp_path, interactions={"path": "log.csv", "time": "time"}, items={"path": "items"})
    assert [(file, reason[:24]) for file, _, reason in read.rejected()] == [(f"items/part-1.{suffix}", "item_id repeats an earli")]
    assert {row["item_id"]: row["size"] for row in read.raw.items.to_pyarrow().to_pylist()} == {"i1": 0, "i2": 0, "i3": 1}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_texts_of_parts_are_those_of_their_events(suffix: str, tmp_path: Path) -> None:
    for number in range(3):
        rows = [row | {"said": f"text of {row['user_id']}"} for row in events(10 * number)]
        path = tmp_path / "log" / f"part-{number}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(as_csv(rows, list(rows[0])) if suffix == "csv" else as_json(rows))
    read = Read(tmp_path, interactions={"path": "log", "time": "time", "text": "said"})
    assert read.raw.texts is not None
    texts = {row["order"]: row["text"] for row in read.raw.texts.to_pyarrow().to_pylist()}
    assert {texts[order] for (order,) in read.rows("interactions", "order")} == {
        f"text of u{10 * n + k}" for n in range(3) for k in range(4)
    }
    assert all(texts[order] == f"text of {user}" for order, user in read.rows("interactions", "order", "user_id"))


def test_many_parts_are_one_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        write(tmp_path / "log" / f"part-{number}.csv", events(number))
        write(tmp_path / "more" / f"part-{number}.jsonl", events(number))
    queries: list[str] = []
    save = DuckDBEngine.save
    monkeypatch.setattr(DuckDBEngine, "save", lambda self, rows: queries.append("save") or save(self, rows))
    assert isinstance(engine(), DuckDBEngine)
    for folder, most in (("log", 4), ("more", 6)):
        queries.clear()
        assert len(Read(tmp_path, interactions={"path": folder, "time": "time"}).kept()) == 200
        assert len(queries) <= most


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_damaged_part_is_named(suffix: str, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "log" / f"part-{number}.{suffix}", events(10 * number, 3))
    bad = tmp_path / "log" / f"part-1.{suffix}"
    bad.write_bytes(bad.read_bytes()[:-30])
    sections = {"interactions": {"path": "log", "time": "time"}}
    if suffix == "parquet":
        with pytest.raises(DataError, match=r"part-1.parquet is not"):
            Read(tmp_path, **sections)
    else:
        assert {file for file, *_ in Read(tmp_path, **sections).rejected()} == {f"log/part-1.{suffix}"}


def test_the_sample_of_a_folder_is_of_several_parts(tmp_path: Path) -> None:
    for number in range(9):
        write(tmp_path / "log" / f"part-{number}.csv", events(10 * number, 1))
    (tmp_path / "log" / "part-0.csv").write_bytes(b"")
    sample = read_sample(tmp_path / "log")
    assert sample.rows.num_rows == 5
    assert sample.name == "log"
    assert not sample.complete


def test_the_account_of_many_parts_shows_those_that_lost_rows(tmp_path: Path) -> None:
    for number in range(30):
        rows = events(10 * number)
        write(tmp_path / "log" / f"part-{number}.csv", [*rows, {**rows[0], "item_id": ""}] if number in (7, 28) else rows)
    read = Read(tmp_path, interactions={"path": "log", "time": "time"})
    files = {name: file.as_json() for name, file in read.rejects.files.items()}
    lines = account_table({"files": files, "dropped": {}, "matched": {}, "times_s": {}})
    shown = [line.split()[0] for line in lines if line.startswith("  log/") and ": " not in line]
    assert len(shown) == MAX_FILES
    assert {"log/part-0.csv", "log/part-7.csv", "log/part-28.csv"} <= set(shown)
    assert "  log/part-28.csv: 1 rejected: item_id is missing" in lines
    assert "  … and 10 more files; manifest.json has all" in lines
    assert len(read.rejects.warnings()) == 2


def test_warnings_of_many_parts_are_bounded(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 5):
        write(tmp_path / "log" / f"part-{number}.csv", [*events(number), {"user_id": "", "item_id": "i", "time": START}])
    warnings = Read(tmp_path, interactions={"path": "log", "time": "time"}).rejects.warnings()
    assert len(warnings) == MAX_FILES + 1
    assert warnings[-1] == "5 more files lost more than 1% of their rows"


def test_a_column_that_another_reading_of_the_file_uses_is_not_unused(tmp_path: Path) -> None:
    rows = [row | {"colour": "red", "age": 3, "note": "x"} for row in events(0)]
    write(tmp_path / "log.csv", rows)
    sides = {
        "items": {"from": "interactions", "features": [{"name": "colour", "kind": "categorical"}]},
        "users": {"from": "interactions", "features": [{"name": "age", "kind": "number"}]},
    }
    read = Read(tmp_path, interactions={"path": "log.csv", "time": "time"}, **sides)
    files = {name: file.as_json() for name, file in read.rejects.files.items()}
    lines = account_table({"files": files, "dropped": {}, "matched": {}, "times_s": {}})
    assert [line for line in lines if "unused" in line] == ["  unused columns of interactions: note"]


def test_a_damaged_name_of_a_column_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    write(path, [row | {"another": 1} for row in events(0)])
    path.write_bytes(path.read_bytes().replace(b"another", b"an\xdf\xffher"))
    with pytest.raises(DataError, match=r"log\.parquet is not "):
        Read(tmp_path, interactions={"path": "log.parquet", "time": "time"})
    with pytest.raises(DataError, match=r"log\.parquet cannot be read"):
        read_sample(path)
