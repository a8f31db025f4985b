"""Write random tables in every format and read them back; damage files at random: no traceback, and no silent loss."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from twotower.data.sources import delimited_files
from twotower.data.sources.json_files import open_json
from twotower.data.sources.values import id_text
from twotower.errors import TwoTowerError
from twotower.utils.config import InteractionTableConfig

from .table_rows import Read

Row = tuple[str, str, int, float | None, str | None]
NAMES = ("user_id", "item_id", "time", "stars", "text")
PRINTABLE = st.characters(
    codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="\ufeff"
)  # a mark at the start of a line is that of a joined file
IDS = st.text(PRINTABLE, min_size=1, max_size=8).filter(lambda text: id_text(text) == text and text.strip() == text)
TEXTS = st.text(st.one_of(PRINTABLE, st.sampled_from('\n",;\t|:')), min_size=1, max_size=20).filter(lambda text: text.strip() != "")
ROWS = st.lists(
    st.tuples(
        IDS,
        IDS,
        st.integers(315_532_800, 1_900_000_000),
        st.none() | st.sampled_from([0.5, 1.0, 2.5, 4.0, 5.0]),
        st.none() | TEXTS,
    ),
    min_size=1,
    max_size=12,
)
SLOW = [pytest.param(2_000, marks=pytest.mark.slow), 60]
DAMAGED = [pytest.param(1_000, marks=pytest.mark.slow), 60]  # each case takes some hundredths of a second


def as_csv(rows: list[Row], separator: str, end: str) -> str:
    """Return rows as Python's csv module writes them, every text in quotes."""
    target = io.StringIO()
    writer = csv.writer(target, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(NAMES)
    writer.writerows([tuple("" if value is None else value for value in row) for row in rows])
    return target.getvalue()


def write_json_lines(rows: list[Row], path: Path) -> None:
    path.write_text("\n".join(json.dumps(dict(zip(NAMES, row, strict=True)), ensure_ascii=False) for row in rows), encoding="utf-8")


def write_json_array(rows: list[Row], path: Path) -> None:
    path.write_text(json.dumps([dict(zip(NAMES, row, strict=True)) for row in rows], indent=2), encoding="utf-8")


def write_python(rows: list[Row], path: Path) -> None:
    path.write_text("\n".join(repr(dict(zip(NAMES, row, strict=True))) for row in rows), encoding="utf-8")


def write_parquet(rows: list[Row], path: Path) -> None:
    kinds = [pa.string(), pa.string(), pa.int64(), pa.float64(), pa.string()]
    columns = [pa.array([row[place] for row in rows], kind) for place, kind in enumerate(kinds)]
    pq.write_table(pa.table(columns, list(NAMES)), path)


def write_csv(rows: list[Row], path: Path) -> None:
    path.write_bytes(as_csv(rows, ",", "\n").encode())


def write_tsv(rows: list[Row], path: Path) -> None:
    path.write_bytes(gzip.compress(as_csv(rows, "\t", "\r\n").encode("utf-8-sig")))


FORMATS: dict[str, Callable[[list[Row], Path], None]] = {
    "rows.jsonl": write_json_lines,
    "array.json": write_json_array,
    "python.json": write_python,
    "rows.parquet": write_parquet,
    "rows.csv": write_csv,
    "rows.tsv.gz": write_tsv,
}


@pytest.mark.parametrize("name", FORMATS)
def test_random_tables_are_read_back(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ROWS)
    def check(rows: list[Row]) -> None:
        folder = tmp_path_factory.mktemp("rows")
        FORMATS[name](rows, folder / name)
        made = Read(folder, interactions={"path": name, "time": "time", "stars": "stars", "text": "text"})
        assert made.rows("interactions", "user_id", "item_id", "time_s", "stars") == [row[:4] for row in rows]
        texts = made.raw.texts.order_by("order").to_pyarrow()["text"].to_pylist()
        assert texts == [row[4] for row in rows]

    check()


def records(path: Path, rejected: list[Any], **form: Any) -> list[tuple[Any, ...]]:
    """Return the rows of a text file; every line is accounted for, or an error is raised."""
    table = InteractionTableConfig(path=path, **form)
    dialect, lines = delimited_files.find_dialect(path, table, NAMES), delimited_files.Lines()
    names = [name for name in NAMES if name in dialect.columns]
    batches = delimited_files.read_batches(path, table, dialect, names, lines, lambda *bad: rejected.append(bad))
    return [tuple(row.values())[:-1] for batch in batches for row in batch.to_pylist()]


@pytest.mark.parametrize("examples", SLOW)
def test_random_text_is_read_back(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ROWS, st.sampled_from([",", "\t", ";", "|"]), st.sampled_from(["\n", "\r\n"]))
    def check(rows: list[Row], separator: str, end: str) -> None:
        (tmp_path / "e.csv").write_bytes(as_csv(rows, separator, end).encode())
        rejected: list[Any] = []
        found = records(tmp_path / "e.csv", rejected, separator=separator, quote='"')
        texts = [(user, item, str(time), None if stars is None else str(stars), text) for user, item, time, stars, text in rows]
        assert found == texts and not rejected

    check()


@pytest.mark.parametrize("examples", SLOW)
def test_random_unquoted_text_is_read_back(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ROWS, st.sampled_from(["\t", "::", "|"]))
    def check(rows: list[Row], separator: str) -> None:
        def plain(text: str | None) -> str:
            return (text or "").replace("\n", " ").replace(separator, " ").replace(":", " ").replace("\r", " ")

        lines = [[plain(user), plain(item), str(time), plain(text)] for user, item, time, _, text in rows]
        (tmp_path / "e.tsv").write_text("".join(separator.join(line) + "\n" for line in lines), encoding="utf-8", newline="")
        rejected: list[Any] = []
        columns = ["user_id", "item_id", "time", "text"]
        found = records(tmp_path / "e.tsv", rejected, separator=separator, columns=columns, quote="")
        assert found == [tuple(value or None for value in line) for line in lines if any(line)] and not rejected

    check()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return a text file that was cut, or has flipped or foreign bytes."""
    rows, separator = draw(ROWS), draw(st.sampled_from([",", "\t", ";"]))
    data = bytearray(
        as_csv(rows, separator, draw(st.sampled_from(["\n", "\r\n", "\r"]))).encode(draw(st.sampled_from(["utf-8", "utf-16"])))
    )
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        data[place : place + 1] = draw(st.binary(max_size=3) | st.sampled_from([b'"', b"\n", b"\r", b"\xff", b"\x00", b",", b'""']))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.mark.parametrize("examples", DAMAGED)
def test_damaged_text_gives_one_line_or_accounts_for_all(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged())
    @example(b'user_id,item_id,time\nu,"i\n')
    @example(b"\xff\xfe")
    @example(b"\r")
    @example(b"\nuser_id,item_id,time")
    def check(data: bytes) -> None:
        (tmp_path / "e.csv").write_bytes(data)
        try:
            records(tmp_path / "e.csv", [])
        except TwoTowerError as error:
            assert "\n" not in str(error)

    check()


@pytest.mark.parametrize("examples", DAMAGED)
def test_damaged_json_gives_one_line_or_accounts_for_all(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ROWS, st.sampled_from(["rows.jsonl", "array.json", "python.json"]), st.data())
    def check(rows: list[Row], name: str, data: st.DataObject) -> None:
        path = tmp_path / name
        FORMATS[name](rows, path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
        try:
            source = open_json(path, tmp_path / "spill")
            assert source.rows() == len(list(source.lines()))
            source.path.unlink()
        except TwoTowerError as error:
            assert "\n" not in str(error)

    check()


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.jsonl", "rows.tsv.gz"])
def test_a_cut_file_never_gives_a_traceback(name: str, tmp_path: Path) -> None:
    rows: list[Row] = [(f"u{n}", f"i{n}", 1_600_000_000 + n, 4.0, "word " * 9) for n in range(300)]
    FORMATS[name](rows, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.0, 0.1, 0.5, 0.97):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        try:
            made = Read(tmp_path, interactions={"path": name, "time": "time"})
        except TwoTowerError as error:
            assert "\n" not in str(error) and name in str(error)
        else:
            account = made.rejects.files[name]
            assert len(made.kept()) + sum(account.rejected.values()) == account.rows
