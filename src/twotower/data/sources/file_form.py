"""Find how a file is written by trying, and read a sample of its rows: compression, encoding, separator, quotes, header, JSON."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.sources.column_words import WORDS, words
from twotower.data.sources.delimited_records import SEPARATOR_LINE
from twotower.data.sources.json_rows import SAMPLED_ROWS, TRIED_LINES, json_rows
from twotower.data.sources.table_paths import table_paths
from twotower.data.sources.text_files import ARCHIVES, MAGIC
from twotower.errors import DataError

SEPARATORS = (",", "\t", ";", "|", "::", "||", "^", "~", "\x01", " ")
HEAD_BYTES, BLOCK_BYTES, BLOCKS = 2 << 20, 512 << 10, 4
BOMS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
NUMBER = re.compile(r"^[-+]?\d*[.,]?\d+([eE][-+]?\d+)?$")

Kind = Literal["text", "JSON lines", "JSON array", "Python dicts", "JSON over several lines", "Parquet", "sequences"]


@dataclass(frozen=True)
class FileForm:
    """Format of a file.

    Attributes
    ----------
    kind
        "text": rows of cells; "sequences": lines "user item item …"; or a form of JSON or Parquet.
    columns
        Names given to the columns of a text file without header ("column_1" …); None if the file has its own.
    """

    kind: Kind
    compression: str | None = None
    encoding: str = "utf-8"
    separator: str | None = None
    quote: str = '"'
    columns: tuple[str, ...] | None = None
    comment: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings of a table in `data:` that differ from their defaults.

        Examples
        --------
        >>> FileForm("text", separator="::", columns=("column_1", "column_2")).settings()
        {'separator': '::', 'columns': ['column_1', 'column_2']}
        """
        if self.kind != "text":
            return {}
        found: dict[str, Any] = (
            {} if self.separator in (",", "\t", ";", "|") and not self.columns else {"separator": self.separator}
        )
        found |= {"columns": list(self.columns)} if self.columns else {}
        found |= {"quote": self.quote} if self.quote != '"' else {}
        found |= {"encoding": self.encoding} if self.encoding not in ("utf-8", "utf-16", "utf-32") else {}
        return found | ({"comment": self.comment} if self.comment else {})

    def __str__(self) -> str:
        """Describe the form in words."""
        parts: list[str] = [self.kind]
        if self.kind == "text":
            separator_names = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar", " ": "blank"}
            parts.append(f"separator {separator_names.get(str(self.separator), repr(self.separator))}")
            parts += ["no header"] if self.columns else ["header"]
            parts += [] if self.quote else ["quotes are text"]
        parts += [self.encoding] if self.encoding != "utf-8" else []
        return ", ".join(parts + ([self.compression] if self.compression else []))


@dataclass(frozen=True)
class Sample:
    """Rows of a file or of a table in memory, from which its columns are guessed.

    Attributes
    ----------
    name
        File name, or the name of a frame.
    rows
        The sampled rows; cells of text files are strings.
    form
        Format of the file; None for a table in memory.
    path
        The file; None for a table in memory.
    complete
        True if `rows` are all rows.
    notes
        Remarks for the reader of the guess.
    """

    name: str
    rows: pa.Table
    form: FileForm | None = None
    path: Path | None = None
    complete: bool = True
    notes: tuple[str, ...] = field(default=())


def read_sample(path: Path) -> Sample:
    """Detect the format of a file and read a sample of its rows; of a large file, or of the parts in a folder, from several places.

    Raises
    ------
    DataError
        The file is missing, empty, an archive or binary, or its cells have no common separator.
    """
    if not path.is_dir():
        return _read_file(path)
    parts = [part for part in table_paths(path, Path(), "interactions") if part.stat().st_size]
    if not parts:
        raise DataError(f"{path} has only empty files. Expected the parts of a table. Name a file.")
    last = len(parts) - 1
    samples = [_read_file(parts[place]) for place in sorted({round(n * last / BLOCKS) for n in range(BLOCKS + 1)})]
    like = [sample for sample in samples if sample.rows.schema.equals(samples[0].rows.schema)]
    rows = pa.concat_tables([sample.rows for sample in like])
    return replace(
        samples[0], name=path.name, path=path, rows=rows, complete=all(s.complete for s in samples) and len(parts) <= len(like)
    )


def _read_file(path: Path) -> Sample:
    try:
        with path.open("rb") as file:
            magic = file.read(8)
        if magic[:4] == b"PAR1":
            return _parquet(path)
        for start, what in ARCHIVES.items():
            if magic.startswith(start):
                raise DataError(f"{path} is {what}. Expected text, JSON or Parquet. Unpack it and name the file inside.")
        compression = next((name for start, name in MAGIC.items() if magic.startswith(start)), None)
        head, complete = _head(path, compression)
    except (OSError, EOFError, UnicodeError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}. Check the path, or replace the file.") from None
    if not head.strip():
        raise DataError(f"{path} is empty. Expected rows of text, JSON or Parquet. Name another file.")
    encoding, text = _decoded(head, path)
    if not complete:
        text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1] or text
    if text.lstrip()[:1] in ("{", "["):
        found = json_rows(text, path, complete=complete)
        if found:
            kind, rows = found
            return Sample(path.name, rows, FileForm(kind, compression, encoding), path, complete)
    more = [] if complete or compression or encoding in ("utf-16", "utf-32") else _blocks(path, encoding)
    return _text(path, text, more, FileForm("text", compression, encoding), complete)


def _parquet(path: Path) -> Sample:
    file = pq.ParquetFile(path)
    groups = file.num_row_groups
    chosen = sorted({round(number * (groups - 1) / BLOCKS) for number in range(BLOCKS + 1)}) if groups else []
    share = SAMPLED_ROWS // max(len(chosen), 1)
    batches = [next(file.iter_batches(batch_size=share, row_groups=[group]), None) for group in chosen]
    rows = pa.Table.from_batches([batch for batch in batches if batch is not None], schema=file.schema_arrow)
    return Sample(path.name, rows, FileForm("Parquet"), path, rows.num_rows == file.metadata.num_rows)


def _head(path: Path, compression: str | None) -> tuple[bytes, bool]:
    """Return the first bytes of a file, and whether they are all."""
    with pa.input_stream(str(path), compression=compression) as stream:
        head = stream.read(HEAD_BYTES + 1)
    return head[:HEAD_BYTES], len(head) <= HEAD_BYTES


def _blocks(path: Path, encoding: str) -> list[str]:
    """Return blocks of complete lines from later positions of a large file."""
    size = path.stat().st_size
    found = []
    with path.open("rb") as file:
        for number in range(1, BLOCKS + 1):
            file.seek(max(HEAD_BYTES, number * size // (BLOCKS + 1)))
            block = file.read(BLOCK_BYTES)
            found.append(block[block.find(b"\n") + 1 : block.rfind(b"\n") + 1].decode(encoding, "replace"))
    return found


def _decoded(head: bytes, path: Path) -> tuple[str, str]:
    """Return the encoding of the bytes and their text."""
    for bom, encoding in BOMS.items():
        if head.startswith(bom):
            return encoding, head.decode("utf-8-sig" if encoding == "utf-8" else encoding, "ignore").lstrip("\ufeff")
    if b"\0" in head[:4096]:
        if head[1:64:2].count(0) > 16:
            return "utf-16-le", head.decode("utf-16-le", "ignore")
        raise DataError(f"{path} holds binary data. Expected text, JSON or Parquet. Export it as one of these.")
    try:
        return "utf-8", head.decode()
    except UnicodeDecodeError as error:
        if error.start >= len(head) - 4:  # a character cut by the end of the sample
            return "utf-8", head[: error.start].decode()
    return "latin-1", head.decode("latin-1")


def _text(path: Path, text: str, more: list[str], form: FileForm, complete: bool) -> Sample:
    """Read rows of cells: find separator, quotes and header."""
    named = SEPARATOR_LINE.fullmatch(text.partition("\n")[0].rstrip("\r"))
    text = text.partition("\n")[2] if named else text
    comment = next((sign for sign in ("#", "%") if text.startswith(sign) and not _is_header(text, sign)), None)
    if comment:
        text, *more = ("\n".join(x for x in part.splitlines() if not x.startswith(comment)) + "\n" for part in (text, *more))
    lines = [line for line in islice(io.StringIO(text, newline=None), TRIED_LINES) if line.strip()]
    separator = named[1] if named else _separator(lines)
    if separator is None and (sequences := _sequences(lines)):
        return Sample(path.name, sequences, FileForm("sequences", form.compression, form.encoding), path, complete)
    separator = separator or ","
    quote = _quote(text, separator)
    rows = _cells(text, separator, quote)
    if not rows:
        raise DataError(f"{path} has no rows. Expected lines of cells, JSON or Parquet. Name another file.")
    width = Counter(map(len, rows)).most_common(1)[0][0]
    header = rows[0] if _has_header(rows, width) else None
    rows = [row for row in (rows[1:] if header else rows) if len(row) == width]
    rows += [row for block in more for row in _cells(block, separator, quote) if len(row) == width]
    if header and len(header) == width - 1:  # R writes no name above its column of row names
        header = ["", *header]
    made = None if header else tuple(f"column_{number}" for number in range(1, width + 1))
    names = made or tuple(name.strip() or f"unnamed {number}" for number, name in enumerate(header or ()))
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{path} has no valid header: {repeated[0]!r} stands twice in its first line. Name each column once.")
    columns = {name: pa.array([row[number] for row in rows], pa.string()) for number, name in enumerate(names)}
    form = FileForm("text", form.compression, form.encoding, separator, quote, made, comment)
    return Sample(path.name, pa.table(columns), form, path, complete and len(rows) < SAMPLED_ROWS)


def _is_header(text: str, sign: str) -> bool:
    """Return True if a first line such as "#user,item" names the columns of the next one."""
    first, second = (*text.split("\n", 2), "")[:2]
    separator = _separator([first, second]) if second else None
    return separator is not None and second[:1] != sign and len(first.split(separator)) > 1


def _separator(lines: list[str]) -> str | None:
    """Return the separator that splits most lines into equally many cells, as many as in the first line."""
    best: tuple[float, int, int] = (0.9, 0, 0)
    chosen = None
    for number, separator in enumerate(SEPARATORS):
        widths = [len(row) for row in _cells("".join(lines), separator, '"')] or [0]
        width, count = Counter(widths).most_common(1)[0]
        share = count / len(widths)
        if width < 2 or abs(widths[0] - width) > (1 if separator in ",\t" else 0) or share < 0.9:
            continue
        rank = (min(share, 0.99) if separator != " " else 0.91, width * len(separator), -number)
        if rank > best:
            best, chosen = rank, separator
    return chosen


def _quote(text: str, separator: str) -> str:
    """Return '"' if cells are quoted, or "" if quotes are text: then more lines are whole rows without quoting."""
    if f'{separator}"' not in text and '\n"' not in text and not text.startswith('"'):
        return '"'
    lines = text.count("\n")
    quoted, plain = (Counter(map(len, _cells(text, separator, quote, limit=10**9))) for quote in ('"', ""))
    width, whole = quoted.most_common(1)[0] if quoted else (0, 0)
    swallowed = lines - sum(quoted.values())
    return "" if swallowed > 1 and plain[width] > whole and plain[width] > 0.98 * sum(plain.values()) else '"'


def _cells(text: str, separator: str, quote: str, limit: int = SAMPLED_ROWS) -> list[list[str]]:
    source = io.StringIO(text, newline=None if not quote else "")
    if len(separator) > 1 or not quote:
        return [line.rstrip("\r\n").split(separator) for line in islice(source, limit) if line.strip()]
    found: list[list[str]] = []
    try:
        found += (row for row in islice(csv.reader(source, delimiter=separator, skipinitialspace=False), limit) if row)
    except csv.Error:  # a cell beyond the limit of the csv module
        return [line.rstrip("\r\n").split(separator) for line in islice(io.StringIO(text, newline=None), limit) if line.strip()]
    return found


def _has_header(rows: list[list[str]], width: int) -> bool:
    """Return True if the first row names the columns: it has no numbers, and words of columns or other cells than the rest."""
    first, rest = rows[0], [row for row in rows[1 : TRIED_LINES + 1] if len(row) == width]
    if len(first) not in (width, width - 1) or not rest:
        return not rest
    if any(NUMBER.match(cell.strip()) for cell in first):
        return False
    known = sum(any(word in some for some in WORDS.values()) for cell in first for word in words(cell) if len(cell) < 40)
    numeric = [number for number in range(min(len(first), width)) if all(NUMBER.match(row[number].strip() or "0") for row in rest)]
    if numeric:
        return True
    return len(set(first)) == len(first) and (
        known > 0 or not any(cell in {row[number] for row in rest} for number, cell in enumerate(first) if cell)
    )


def _sequences(lines: list[str]) -> pa.Table | None:
    """Return users and items of lines "user item item …", or None if the lines are something else."""
    rows = [line.split() for line in lines]
    if (
        len(rows) < 2
        or len({len(row) for row in rows}) < 2
        or not all(re.match(r"^[\w.:-]{1,40}$", token) for row in rows for token in row)
    ):
        return None
    pairs = [(row[0], item) for row in rows for item in row[1:]]
    return pa.table({"user": [user for user, _ in pairs], "item": [item for _, item in pairs]}) if pairs else None
