"""Read delimited lines record by record, for the blocks that no fast parser reads without a loss."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_RECORD_BYTES = 1 << 24
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[,;\t|]*', re.IGNORECASE)
UNIT = "\x1f"  # stands for a separator of several characters
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Dialect:
    """Format of the lines of a file. `quote` is "" without quotes, and None until the first quotation mark is seen."""

    separator: str
    columns: tuple[str, ...]
    has_header: bool
    quote: str | None
    comment: str | None = None
    names_separator: bool = False

    def skips(self, text: str) -> bool:
        """Return True for a comment, and for a line such as "sep=;", with which Excel names the separator."""
        return bool((self.comment and text.startswith(self.comment)) or (self.names_separator and SEPARATOR_LINE.fullmatch(text)))


@dataclass
class Records:
    """Records of a block: values by column of the file, first lines of the rows, and lines left for the next block."""

    rows: list[list[str]] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    rest: list[bytes] = field(default_factory=list)
    blank: int = 0
    comments: int = 0
    row_lines: int = 0


def read_records(content: Sequence[bytes], dialect: Dialect, quote: str, number: int, *, final: bool) -> Records:
    """Read lines record by record; `number` is that of the first line. With `final`, no line is left for a next block."""
    found, width, at = Records(), len(dialect.columns), 0
    texts = [_text(line) for line in content]
    while at < len(texts):
        text, used, fields, why = texts[at], 1, None, ""
        if text is None:
            why = "not UTF-8 text; the table's encoding may be another"
        elif not text.strip() and dialect.separator not in text:
            found.blank += 1
        elif dialect.skips(text):
            found.comments += 1
        elif quote and quote in text:
            opened = _record(texts, at, dialect, quote, final=final)
            if opened is None:
                found.rest = list(content[at:])
                break
            fields, used, why = opened
        else:
            fields = text.split(dialect.separator)
        if fields is not None and not why:
            rows = [fields] if len(fields) == width else _old_mac_rows(text or "", dialect)
            if rows:
                found.rows += rows
                found.line += [number + at] * len(rows)
                found.row_lines += used
            else:
                why, used = f"not a row of {width} columns: it has {len(fields)}", 1
        if why:
            found.bad.append((number + at, why, content[at].decode("utf-8", "replace")))
        at += used
    return found


def _text(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _old_mac_rows(text: str, dialect: Dialect) -> list[list[str]]:
    """Return the rows of a line that holds carriage returns, as where files of several systems were joined; [] if it has none."""
    rows = [part.split(dialect.separator) for part in text.split("\r") if part] if "\r" in text else []
    return rows if all(len(row) == len(dialect.columns) for row in rows) else []


def _record(
    texts: Sequence[str | None], at: int, dialect: Dialect, quote: str, *, final: bool
) -> tuple[list[str], int, str] | None:
    """Return the values of the record at a line, its number of lines, and why it is bad; None if its end is not in this block."""
    text, width = texts[at] or "", len(dialect.columns)
    single = quoted_fields([text], dialect.separator, quote)
    if f"\\{quote}" in text and (single is None or len(single[0]) != width):
        escaped = quoted_fields([text], dialect.separator, quote, escape="\\")  # as MySQL and Spark write it
        if escaped is not None and len(escaped[0]) == width:
            return escaped[0], 1, ""
    if single is not None:
        return single[0], 1, ""
    parsed = quoted_fields(_span(texts, at), dialect.separator, quote)
    if parsed is None:
        # Malformed, unless the end of the record is still to come.
        cut_off = not final and _open_lines(_span(texts, at), dialect.separator, quote) == len(texts) - at
        return None if cut_off else ([], 1, "a quotation mark is not closed, or text follows it")
    fields, used = parsed
    if len(fields) == width and used > 1:
        if all((text or "").count(dialect.separator) == width - 1 for text in texts[at : at + used]) and width > 1:
            return [], 1, f"a quoted value goes over {used} lines, each of which is a whole row"
        return fields, used, ""
    return fields, used, "" if used == 1 else f"not a row of {width} columns: a quoted value goes over {used} lines"


def _span(texts: Sequence[str | None], at: int) -> Iterator[str]:
    """Yield the lines from one on that a record may hold; a reader takes no more than it needs."""
    size = 0
    while at < len(texts) and size < MAX_RECORD_BYTES:
        text = texts[at]
        if text is None:
            return
        yield text
        size += len(text)
        at += 1


def _reader(span: Iterable[str], separator: str, quote: str, escape: str | None = None) -> Any:
    several = len(separator) > 1
    ended = (f"{text.replace(separator, UNIT) if several else text}\n" for text in span)
    form: dict[str, Any] = {"doublequote": escape is None, "escapechar": escape, "strict": True}
    return csv.reader(ended, delimiter=UNIT if several else separator, quotechar=quote, **form)


def quoted_fields(span: Iterable[str], separator: str, quote: str = '"', escape: str | None = None) -> tuple[list[str], int] | None:
    """Return the first record of the lines and how many it takes; None if it is malformed or not closed."""
    reader = _reader(span, separator, quote, escape)
    try:
        fields = next(reader)
    except (csv.Error, StopIteration):
        return None
    return fields, int(reader.line_num)


def _open_lines(span: Iterable[str], separator: str, quote: str) -> int:
    """Return the number of lines if they end inside a quoted value, else 0."""
    reader = _reader(span, separator, quote)
    try:
        next(reader)
    except csv.Error as error:
        return int(reader.line_num) if "unexpected end" in str(error) else 0
    except StopIteration:
        return int(reader.line_num)
    return 0
