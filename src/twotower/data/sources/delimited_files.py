"""Read delimited text: any separator, with or without header and quotes. Every line is a row, a reject, or counted as skipped.

A block of lines goes through Arrow's parser if that makes one row of each line. Otherwise it is read record by record, so that a
stray quotation mark costs one line and never the lines after it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc

from twotower.data.sources.delimited_records import SEPARATOR_LINE, UNIT, Dialect, Records, quoted_fields, read_records
from twotower.data.sources.text_files import text_blocks
from twotower.errors import DataError
from twotower.utils.config import TableConfig

SEPARATORS = (",", "\t", ";", "|", "::")
WHOLE = re.compile(r'"(?:[^"\\]|""|\\.)*"')  # a quoted value
LINE = "line"  # int64: number of the first line of a row, from 1
SAMPLED_LINES = 200
OnReject = Callable[[int, str, str], None]  # line, reason, text


@dataclass
class Lines:
    """Count of what the lines of a file became: `total` = `header` + `blank` + `comments` + `rejected` + lines of `rows`."""

    total: int = 0
    offset: int = 1  # number of the line at which rows begin
    header: int = 0
    blank: int = 0
    comments: int = 0
    rejected: int = 0
    rows: int = 0
    row_lines: int = 0  # a quoted value may hold several

    def check(self, file: Path) -> None:
        """Raise `DataError` unless every line is accounted for."""
        known = self.header + self.blank + self.comments + self.rejected + self.row_lines
        if known != self.total:
            raise DataError(
                f"{file} has {self.total:,} lines, and {known:,} of them became rows, rejects or skipped lines. No line may be "
                "lost. Please report this file's form."
            )


def find_dialect(file: Path, table: TableConfig, names: Sequence[str]) -> Dialect:
    """Return how a file is written: what the settings say, and the rest by trying.

    Parameters
    ----------
    names
        Columns that will be read; the separator that finds most of them in the header is chosen.

    Raises
    ------
    DataError
        The first line does not name the columns, each once.
    """
    sample = _sample(file, table)
    named_by_line = SEPARATOR_LINE.fullmatch(sample[0]) if sample else None
    sample = [line for line in sample if not (named_by_line and SEPARATOR_LINE.fullmatch(line))]
    first = sample[0] if sample else ""
    quote, given = table.quote, table.separator or (named_by_line[1] if named_by_line else None)
    how = (quote, table.comment, bool(named_by_line))
    tried = {each: _split(first, each, quote != "") for each in ([given] if given else SEPARATORS)}
    wanted = set(names)

    def fits(separator: str) -> tuple[int, int]:
        found = tried[separator]
        if table.columns:
            return sum(len(_split(line, separator, quote != "")) == len(table.columns) for line in sample), len(found)
        return len(wanted & set(found)), len(found)

    separator = max(tried, key=fits)
    header = tried[separator]
    if table.columns and header != table.columns:
        return Dialect(separator, _with_trailing(table.columns, sample, separator), False, *how)
    named = [name for name in header if name]
    if not named or len(set(named)) < len(named):
        raise DataError(
            f"{file} has no valid header: its first line is {first[:100]!r}. It must name the columns, each once. Add a header, or "
            "set the table's columns."
        )
    return Dialect(separator, _with_trailing(header, sample[1:], separator), True, *how)


def _sample(file: Path, table: TableConfig) -> list[str]:
    """Return the first lines that are not blank and no comments."""
    kept: list[str] = []
    left = 10 * SAMPLED_LINES  # lines from the first of them on
    for block in text_blocks(file, table.encoding):
        for line in block.strip(b"\n").split(b"\n"):
            text = line.decode("utf-8", "replace")
            if text.strip() and not (table.comment and text.startswith(table.comment)):
                kept.append(text)
            left -= bool(kept)
            if len(kept) == SAMPLED_LINES or not left:
                return kept
    return kept


def _with_trailing(columns: Sequence[str], sample: Sequence[str], separator: str) -> tuple[str, ...]:
    """Return the columns, and a nameless one if every line ends with a separator more."""
    rows = [line.split(separator) for line in sample]
    more = bool(rows) and all(len(row) == len(columns) + 1 and not row[-1] for row in rows)
    return (*columns, "") if more else tuple(columns)


def _split(line: str, separator: str, quoted: bool) -> list[str]:
    fields = quoted_fields([line], separator) if quoted and '"' in line else None
    return line.split(separator) if fields is None else fields[0]


def read_batches(
    file: Path, table: TableConfig, dialect: Dialect, columns: Sequence[str], lines: Lines, on_reject: OnReject
) -> Iterator[pa.RecordBatch]:
    """Yield the columns of a file as strings, null where they are empty, with `LINE`; count every line in `lines`."""
    rest: list[bytes] = []
    header_left, quote, number = dialect.has_header, dialect.quote, 1
    wanted = [dialect.columns.index(name) for name in columns]
    schema = pa.schema([*((name, pa.string()) for name in columns), (LINE, pa.int64())])

    def counted(found: Records) -> pa.RecordBatch:
        lines.blank, lines.comments = lines.blank + found.blank, lines.comments + found.comments
        lines.rejected, lines.row_lines = lines.rejected + len(found.bad), lines.row_lines + found.row_lines
        lines.rows += len(found.rows)
        for bad in found.bad:
            on_reject(*bad)
        data = [pa.array([row[index] or None for row in found.rows], pa.string()) for index in wanted]
        return pa.record_batch([*data, pa.array(found.line, pa.int64())], schema=schema)

    for piece in text_blocks(file, table.encoding):
        block = piece
        lines.total += block.count(b"\n")
        if header_left:
            block = _after_header(block, dialect, lines)
            header_left, number = not lines.header, number + piece.count(b"\n") - block.count(b"\n")
            lines.offset = number
        if quote is None and b'"' in block:
            quote = _find_quote(block, dialect)
        size = block.count(b"\n")
        if not rest and not block.strip(b"\n"):
            lines.blank, number = lines.blank + size, number + size
            continue
        fast = None if rest or not size else _arrow_block(block, dialect, quote or "", columns, number)
        if fast is not None:
            lines.rows, lines.row_lines, number = lines.rows + size, lines.row_lines + size, number + size
            yield fast
            continue
        content = [*rest, *block[:-1].split(b"\n")] if size else rest
        found = read_records(content, dialect, quote or "", number, final=False)
        number, rest = number + len(content) - len(found.rest), found.rest
        yield counted(found)
    if rest:
        yield counted(read_records(rest, dialect, quote or "", number, final=True))
    lines.check(file)


def _after_header(block: bytes, dialect: Dialect, lines: Lines) -> bytes:
    """Return what follows the header in a block: nothing, if only blank lines and comments are in it."""
    begin = 0
    while begin < len(block) and not lines.header:
        end = block.index(b"\n", begin)
        text = block[begin:end].decode("utf-8", "replace")
        if not text.strip():
            lines.blank += 1
        elif dialect.skips(text):
            lines.comments += 1
        else:
            lines.header += 1
        begin = end + 1
    return block[begin:]


def _find_quote(block: bytes, dialect: Dialect) -> str:
    """Return the quotation mark of a file, or "", whichever rejects fewer lines of its first block with a mark.

    Where most marks enclose a whole value, they are quotes, even if a few lines with stray ones are rejected.
    """
    content = block[:-1].split(b"\n")
    found = {quote: read_records(content, dialect, quote, 1, final=True) for quote in ('"', "")}
    if len(found['"'].bad) <= len(found[""].bad):
        return '"'
    marked = [value for row in found[""].rows for value in row if '"' in value]
    whole = sum(WHOLE.fullmatch(value) is not None for value in marked)
    return '"' if 2 * whole > len(marked) else ""


def _is_utf8(block: bytes) -> bool:
    """Return whether a block is UTF-8. Arrow cannot report a bad row that is not."""
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


def _arrow_block(block: bytes, dialect: Dialect, quote: str, columns: Sequence[str], number: int) -> pa.RecordBatch | None:
    """Return a block as Arrow parses it, or None if that would not make one row of each line."""
    mark, separator = quote.encode(), dialect.separator.encode()
    if b"\r" in block or b"\n\n" in block or block.startswith(b"\n") or len(dialect.columns) < 2 or not _is_utf8(block):
        return None
    if dialect.names_separator and b"sep=" in block.lower():
        return None
    if dialect.comment and (block.startswith(dialect.comment.encode()) or b"\n" + dialect.comment.encode() in block):
        return None
    if quote and mark in block and not _simply_quoted(block, mark, separator):
        return None
    if len(separator) > 1:
        if UNIT.encode() in block:
            return None
        block, separator = block.replace(separator, UNIT.encode()), UNIT.encode()
    numbers = [f"{n}" for n in range(len(dialect.columns))]
    chosen = [numbers[dialect.columns.index(name)] for name in columns]
    bad: list[pc.InvalidRow] = []

    def skip(row: pc.InvalidRow) -> str:
        bad.append(row)
        return "error"

    try:
        table = pc.read_csv(
            io.BytesIO(block),
            pc.ReadOptions(column_names=numbers, block_size=len(block) + 1, use_threads=False),
            pc.ParseOptions(
                delimiter=separator.decode(), quote_char=quote or False, ignore_empty_lines=False, invalid_row_handler=skip
            ),
            pc.ConvertOptions(
                column_types=dict.fromkeys(numbers, pa.string()),
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=True,
                include_columns=list(dict.fromkeys(chosen)) or numbers[:1],
            ),
        )
    except (pa.ArrowInvalid, UnicodeError):
        return None
    if bad or table.num_rows != block.count(b"\n"):
        return None
    data = [table[column].combine_chunks() for column in chosen]
    data = [each.chunk(0) if isinstance(each, pa.ChunkedArray) else each for each in data]
    lines = pa.array(np.arange(number, number + table.num_rows))
    return pa.record_batch([*data, lines], schema=pa.schema([*((name, pa.string()) for name in columns), (LINE, pa.int64())]))


def _simply_quoted(block: bytes, mark: bytes, separator: bytes) -> bool:
    """Return True if every mark opens or closes a whole value, so that none is inside a value."""
    opening = block.count(separator + mark) + block.count(b"\n" + mark) + block.startswith(mark)
    closing = block.count(mark + separator) + block.count(mark + b"\n")
    return opening == closing and opening + closing == block.count(mark)


def line_texts(file: Path, encoding: str | None, wanted: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines at ascending numbers, which may repeat."""
    rest = iter(wanted)
    line, number = next(rest, None), 0
    for block in text_blocks(file, encoding):
        size = block.count(b"\n")
        if line is not None and line <= number + size:
            texts = block[:-1].split(b"\n")
            while line is not None and line <= number + size:
                yield line, re.sub(r"\r$", "", texts[line - number - 1].decode("utf-8", "replace"))
                line = next(rest, None)
        number += size
        if line is None:
            return
