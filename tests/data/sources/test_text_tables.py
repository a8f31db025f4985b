"""Test delimited text of every form: separators, headers, quotes, encodings, line ends; every line is a row or a counted reject."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from twotower.data.sources import delimited_files, text_files
from twotower.data.sources.account import FileAccount
from twotower.errors import ConfigError, DataError
from twotower.utils.config import InteractionTableConfig

from .table_rows import Read

ROWS = [(f"u{n % 5}", f"i{n % 7}", str(1_600_000_000 + n), f"text {n}") for n in range(40)]
NAMES = ("user_id", "item_id", "time", "text")
COLUMNS = {"time": "time", "text": "text"}


def table(rows: list[tuple[str, ...]] = ROWS, separator: str = ",", end: str = "\n", header: bool = True) -> str:
    """Return rows as text."""
    return "".join(separator.join(row) + end for row in ([NAMES] if header else []) + rows)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Read]:
    """Return `read(content, name, **settings of the interactions)`."""

    def make(content: str | bytes, name: str = "e.csv", **settings: Any) -> Read:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return Read(tmp_path, interactions={"path": name, **COLUMNS, **settings})

    return make


class Records:
    """Rows, account and rejects of one file, read without an engine."""

    def __init__(self, path: Path, **settings: Any) -> None:
        form = InteractionTableConfig(path=path, **settings)
        dialect, self.lines = delimited_files.find_dialect(path, form, NAMES), delimited_files.Lines()
        self.rejected: list[tuple[int, str, str]] = []
        batches = delimited_files.read_batches(path, form, dialect, NAMES, self.lines, lambda *bad: self.rejected.append(bad))
        self.rows = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]

    @property
    def pairs(self) -> list[tuple[Any, ...]]:
        """User, item and time of each row."""
        return [(user, item, int(time)) for user, item, time, *_ in self.rows]


@pytest.fixture
def scan(tmp_path: Path) -> Callable[..., Records]:
    """Return `scan(content, name, **settings of the interactions)`, which checks that every line is accounted for."""

    def make(content: str | bytes, name: str = "e.csv", **settings: Any) -> Records:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return Records(tmp_path / name, **settings)

    return make


def pairs(made: Read) -> list[tuple[str, ...]]:
    """Return user, item and time of all events."""
    return made.rows("interactions", "user_id", "item_id", "time_s")


EXPECTED = [(user, item, int(time)) for user, item, time, _ in ROWS]


def conserved(account: FileAccount) -> bool:
    """Return True if every line is a row or was skipped, for files without values over several lines."""
    return account.lines == account.rows + sum(account.skipped.values())


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "::", "|||", " ", "\x01", "<>"])
def test_any_separator(separator: str, scan: Callable[..., Records]) -> None:
    rows = [(user, item, time, text.replace(" ", "_")) for user, item, time, text in ROWS]
    found = separator in delimited_files.SEPARATORS
    assert scan(table(rows, separator), **({} if found else {"separator": separator})).pairs == EXPECTED


@pytest.mark.parametrize("separator", ["::", "\t", ","])
def test_a_file_without_a_header(separator: str, scan: Callable[..., Records], read: Callable[..., Read]) -> None:
    assert scan(table(ROWS, separator, header=False), "ratings.dat", columns=list(NAMES)).pairs == EXPECTED
    assert scan(table(ROWS, separator), "ratings.dat", columns=list(NAMES)).pairs == EXPECTED  # it has one after all
    with pytest.raises(DataError, match=r"(no valid header|Its first line seems to be data).*columns"):
        read(table(ROWS, separator, header=False).replace("u", "").replace("i", ""), "ratings.dat")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-16-le", "cp1252"])
def test_line_ends_and_encodings(end: str, encoding: str, scan: Callable[..., Records]) -> None:
    rows = [(f"é{user}", item, time, text) for user, item, time, text in ROWS]
    marked = encoding in ("utf-8", "utf-8-sig", "utf-16")
    made = scan(table(rows, end=end).encode(encoding), **({} if marked else {"encoding": encoding}))
    assert made.pairs == [(f"é{user}", item, time) for user, item, time in EXPECTED]


@pytest.mark.parametrize("ends", ["\r\n|\n", "\n|\r\n", "\r|\n", "\n|\r", "\r\n|\r"])
def test_files_of_several_systems_joined(ends: str, scan: Callable[..., Records]) -> None:
    first, second = ends.split("|")
    assert scan(table(ROWS[:20], end=first) + table(ROWS[20:], end=second, header=False)).pairs == EXPECTED


def test_other_encodings_are_named_in_one_line(read: Callable[..., Read]) -> None:
    with pytest.raises(DataError, match=r"as in UTF-16. Set the table's encoding: utf-16-be"):
        read(table().encode("utf-16-be"))
    with pytest.raises(DataError, match=r"is not utf-8 text|is not shift_jis text|is not ascii text"):
        read(table().encode() + "é".encode("latin-1"), encoding="ascii")
    with pytest.raises(ConfigError, match="unknown encoding 'utf-99'"):
        read(table(), encoding="utf-99")
    made = read(table().encode() + b"\xe9,i1,1600000000,x\n")
    assert [why.partition(";")[0] for _, _, why in made.rejected()] == ["not UTF-8 text"] and pairs(made) == EXPECTED


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lambda data: pa.compress(data, codec="zstd", asbytes=True)])
def test_compressed_files(pack: Callable[[bytes], bytes], read: Callable[..., Read]) -> None:
    suffix = {"compress": {"gzip": "gz", "bz2": "bz2"}.get(pack.__module__, "zst")}.get(pack.__name__, "zst")
    packed = pack(table().encode())
    if suffix == "zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(table().encode())
        packed = sink.getvalue().to_pybytes()
    assert pairs(read(packed, f"e.csv.{suffix}")) == EXPECTED
    with pytest.raises(DataError, match="not readable to its end"):
        read(packed[: len(packed) // 2], f"e.csv.{suffix}")


STRAY = ['"half', 'half"', '"a" b', '5" screen', '"', '""', "it's", '"a', 'a"b"c', '"a""']


@pytest.mark.parametrize("separator", ["\t", ",", "::"])
@pytest.mark.parametrize("text", STRAY)
@pytest.mark.parametrize("places", [(10,), (10, 25), (3, 4, 39)])
def test_a_stray_quotation_mark_swallows_no_row(
    text: str, places: tuple[int, ...], separator: str, scan: Callable[..., Records]
) -> None:
    rows = [(*row[:3], text) if n in places else row for n, row in enumerate(ROWS)]
    assert scan(table(rows, separator), "e.tsv").pairs == EXPECTED


@pytest.mark.parametrize("fast", [True, False])
def test_quoted_values_with_separators_marks_and_line_ends(
    fast: bool, read: Callable[..., Read], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(delimited_files, "_arrow_block", lambda *_: None)
    texts = ["plain", '"a, b"', '"say ""hi"""', '"two\nlines"', '"three\r\n\nlines, and ""marks"""', '""', '"x"']
    rows = [(*row[:3], texts[n % len(texts)]) for n, row in enumerate(ROWS)]
    made = read(table(rows))
    plain = [None if text == '""' else text.strip('"').replace('""', '"').replace("\r\n", "\n") for text in texts]
    plain[2], plain[4] = 'say "hi"', 'three\n\nlines, and "marks"'
    assert pairs(made) == EXPECTED
    kept = made.raw.texts.order_by("order").to_pyarrow()["text"].to_pylist()
    assert kept == [plain[n % len(plain)] for n in range(len(ROWS))]
    assert made.rejects.files["e.csv"].lines == table(rows).count("\n")


def test_one_broken_line_of_a_quoted_file_costs_itself_alone(read: Callable[..., Read]) -> None:
    rows = [(*row[:3], f'"{row[3]}, more"') for row in ROWS]
    rows[12] = (*rows[12][:3], '"never closed, text')
    made = read(table(rows))
    assert len(pairs(made)) == 39 and [line for _, line, _ in made.rejected()] == [14]


def test_quotes_off_and_on(read: Callable[..., Read]) -> None:
    rows = [(f'"{user}"', item, time, text) for user, item, time, text in ROWS]
    assert pairs(read(table(rows))) == EXPECTED
    assert pairs(read(table(rows), quote=""))[0][0] == '"u0"'
    singly = [(f"'{user}'", item, time, "'a, b'") for user, item, time, _ in ROWS]
    assert pairs(read(table(singly), quote="'")) == EXPECTED


def test_blocks_split_anywhere(scan: Callable[..., Records], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(*row[:3], '"two\nlines, é"' if n % 3 else '"é ""q"""') for n, row in enumerate(ROWS)]
    expected = scan(table(rows)).rows
    for size in (64, 97, 128, 333):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
        assert scan(table(rows)).rows == expected, size


def test_columns_without_a_name_give_no_question(read: Callable[..., Read]) -> None:
    header, *lines = table().splitlines()
    indexed = "\n".join([f",{header}", *(f"{n},{line}" for n, line in enumerate(lines))])
    assert pairs(read(indexed)) == EXPECTED
    assert pairs(read("\n".join([f"{header},", *(f"{line}," for line in lines)]))) == EXPECTED
    assert pairs(read("\n".join([header, *(f"{line}," for line in lines)]))) == EXPECTED


def test_comments_and_blank_lines_are_counted(read: Callable[..., Read]) -> None:
    header, *lines = table().splitlines()
    made = read("\n".join(["# made by", "", header, lines[0], "# in between", "  ", *lines[1:], ""]), comment="#")
    assert pairs(made) == EXPECTED
    account = made.rejects.files["e.csv"]
    assert account.skipped == {"header": 1, "blank": 2, "comments": 2} and conserved(account)


def test_columns_that_differ_in_case(read: Callable[..., Read]) -> None:
    assert pairs(read(table().replace("user_id,", "User_ID,user_id,", 1).replace("\nu", "\nx,u"))) == EXPECTED
    with pytest.raises(ConfigError, match=r"'TEXT' and 'text' of e.csv. They differ only in case"):
        read(table().replace("item_id", "TEXT", 1), item_id="TEXT")


def test_bad_lines_are_found_by_their_number(read: Callable[..., Read]) -> None:
    content = table().splitlines()
    content[5], content[9] = "too,few", "one,too,many,values,here"
    made = read("\n".join(content))
    assert [(line, why) for _, line, why in made.rejected()] == [
        (6, "not a row of 4 columns: it has 2"),
        (10, "not a row of 4 columns: it has 5"),
    ]
    assert conserved(made.rejects.files["e.csv"]) and len(pairs(made)) == 38


def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 12)
    (tmp_path / "e.csv").write_bytes(table().encode() + b"x" * (1 << 18))
    with pytest.raises(DataError, match="has a line of more than 0 MiB that begins with"):
        Read(tmp_path, interactions={"path": "e.csv"})


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.csv"
    path.write_text(table())
    whole = delimited_files.read_batches

    def growing(*args: Any) -> Any:
        for batch in whole(*args):
            with path.open("a") as file:
                file.write("u,i,1600000000,late\n")
            yield batch

    monkeypatch.setattr("twotower.data.sources.table_files.read_batches", growing)
    with pytest.raises(DataError, match=r"changed while it was read.*Read a finished copy"):
        Read(tmp_path, interactions={"path": "e.csv"})


def test_very_many_columns(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(20_000)]
    lines = [",".join(["user_id", "item_id", *names])] + [",".join([f"u{n}", "i", *["1"] * 20_000]) for n in range(5)]
    (tmp_path / "e.csv").write_text("\n".join(lines))
    made = Read(tmp_path, interactions={"path": "e.csv"})
    assert made.rows("interactions", "user_id") == [(f"u{n}",) for n in range(5)]
