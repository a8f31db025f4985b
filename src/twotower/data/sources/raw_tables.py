"""Define what all sources share: the raw tables they return, the rejected rows, and reading of lines.

A source turns raw files into Ibis tables of readable rows. A bad row is written to `rejects.jsonl` with file, line number and
reason, and counted; other rows are not affected. The engine scans a file once, into a table of the used columns. Only files with
bad rows are read a second time, to find the lines. Texts are not kept in tables: they are read again for the selected events.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import ibis
import ibis.expr.types as ir

from twotower.data.sources.engine import ROW, Engine
from twotower.errors import DataError
from twotower.schema import EVENT_TYPE, ITEM_ID, ORDER, PART, STARS, TIME, USER_ID, FeatureSpec
from twotower.utils.config import DataConfig

CHARS = "chars"  # int64: length of what the user wrote
REASON = "reject_reason"
ENGINES = ("duckdb", "_duckdb", "pyspark", "py4j")  # modules of the engines' errors
SHOWN_CHARS = 200  # characters written of a rejected row
SHOWN_REJECTS = 3
MS_FROM = 1e11  # numbers from here on are milliseconds: as seconds they would be after the year 5000
INTERACTIONS = {
    USER_ID: "string",
    ITEM_ID: "string",
    TIME: "int64",
    ORDER: "int64",
    EVENT_TYPE: "string",
    STARS: "float64",
    CHARS: "int64",
    PART: "string",
}


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """Raw tables of a source, on the engine it was given.

    Attributes
    ----------
    interactions
        `user_id` string (null: anonymous), `item_id` string, `time_s` int64 (seconds; the position in the line if `has_time` is
        False), `order` int64 (unique, in the order of the source), `event_type` string, `stars` float64 or null, `chars` int64
        (length of the text, 0 without one), `part` "train", "test" or null.
    users
        `user_id` unique, `since_s` int64 or null, `elite` array of years, and feature columns. May lack users of the interactions.
    items
        `item_id` unique, `name`, and the feature columns. Interactions with other items are dropped.
    features
        Static features of the columns.
    has_time
        False if only the order of a user's events is known.
    counts
        By file: rows read, and rows left out for reasons other than rejection.
    texts
        `order` and `text` of the interactions, read from the raw files at each use; may include rejected rows. None: no texts.
    id_types
        By id column: the type that ids have outside, as `utils.ids.id_type` names it; text if it is not listed.
    truth
        File with the true preferences of a simulated town, if the raw folder has one.
    """

    interactions: ir.Table
    users: ir.Table
    items: ir.Table
    features: tuple[FeatureSpec, ...]
    has_time: bool
    counts: dict[str, int] = field(default_factory=dict)
    texts: ir.Table | None = None
    id_types: dict[str, str] = field(default_factory=dict)
    truth: Path | None = None


class Rejects:
    """Rejected rows of a source, written to `path` as they are found; without any, no file is written.

    Parameters
    ----------
    path
        JSON lines {"file", "line" (from 1), "reason", "text" (first 200 characters)}.
    max_frac
        Largest allowed share of rejected rows of a file.
    """

    def __init__(self, path: Path, max_frac: float) -> None:
        self.path, self.max_frac = path, max_frac
        self.rejected: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}
        self._file: IO[str] | None = None

    def add(self, file: str, line: int, reason: str, text: str) -> None:
        """Record a bad row."""
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        row = {"file": file, "line": line, "reason": reason, "text": text[:SHOWN_CHARS]}
        self._file.write(json.dumps(row) + "\n")
        self.rejected[file] = self.rejected.get(file, 0) + 1
        first = self._first.setdefault(file, [])
        if len(first) < SHOWN_REJECTS:
            first.append(f"{file}:{line} {reason}")

    def total(self, file: str, rows_read: int) -> None:
        """Record the number of rows of a file, including bad ones."""
        self._rows[file] = self._rows.get(file, 0) + rows_read

    def check(self) -> None:
        """Close the file of rejects.

        Raises
        ------
        DataError
            More than `max_frac` of a file's rows were rejected; the first three are shown.
        """
        self.close()
        for file, count in self.rejected.items():
            rows = max(self._rows.get(file, 0), count)
            if count > self.max_frac * rows:
                raise DataError(
                    f"{file} has {count:,} unreadable rows of {rows:,} ({count / rows:.2%}): {'; '.join(self._first[file])}. "
                    f"At most {self.max_frac:.2%} are allowed. Correct the file or raise data.max_reject_frac."
                )

    def close(self) -> None:
        """Close the file of rejects. Do not call `add` afterwards."""
        if self._file is not None:
            self._file.close()
            self._file = None


Source = Callable[[DataConfig, Engine, Rejects], RawTables]
Check = tuple[ir.BooleanValue, "ir.StringValue | str"]  # (the row is bad, why)
Columns = dict[str, ir.Value]
Locate = Callable[[Sequence[int]], Iterator[tuple[int, str]]]  # ascending rows → (line number from 1, text) of each


def open_bytes(path: Path) -> BinaryIO:
    """Open a plain or gzipped (".gz") file for reading."""
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield line number (from 1) and content of every line that is not blank; these are the rows of the engine."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, line


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an engine's error about an unreadable file into a `DataError` that names the file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (EOFError, OSError)) and type(error).__module__.partition(".")[0] not in ENGINES:
            raise
        raise DataError(f"{file} is not readable to its end: {_one_line(error)} Restore or replace the file.") from None


def locate_json(path: Path) -> Locate:
    """Return a function that finds the lines of rows of `Engine.read_json`."""

    def locate(rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        wanted = iter(rows)
        row = next(wanted, None)
        for position, (number, line) in enumerate(json_lines(path)):
            while position == row:  # a row may have several errors
                yield number, line.decode("utf-8", "replace").rstrip("\r\n")
                row = next(wanted, None)
            if row is None:
                return

    return locate


def screen(
    engine: Engine,
    rows: ir.Table,
    checks: Sequence[Check],
    columns: Columns,
    *,
    file: Path,
    rejects: Rejects,
    locate: Locate,
    unique: str | None = None,
) -> tuple[ir.Table, int]:
    """Read the rows once, report the bad ones, and return the table of good ones and the number of all rows.

    Parameters
    ----------
    rows
        Rows with `ROW`.
    checks
        Conditions of bad rows and their reasons; the first that holds is reported.
    columns
        Columns kept of a good row, besides `ROW`.
    file
        File of the rows, named in reports and errors.
    locate
        Finds the lines of rows; called only if there are bad rows.
    unique
        Kept column with unique values: the first row with a value is good, later ones are bad.
    """
    with reading(file):
        flagged = engine.save_rows(rows, {REASON: ibis.cases(*checks, else_=ibis.null("string")), **columns})
        if unique and _repeats(flagged, unique):
            flagged = engine.save(_first_of_each(flagged, unique))
        counts = flagged.aggregate(total=flagged.count(), bad=flagged[REASON].count()).to_pyarrow().to_pylist()[0]
        rejects.total(file.name, counts["total"])
        if counts["bad"]:
            bad = flagged.filter(flagged[REASON].notnull()).select(ROW, REASON).order_by(ROW).to_pyarrow()
            found = locate(bad[ROW].to_pylist())
            for why, (line, text) in zip(bad[REASON].to_pylist(), found, strict=True):
                rejects.add(file.name, line, why, text)
            flagged = flagged.filter(flagged[REASON].isnull())
    return flagged.drop(REASON), counts["total"]


def _repeats(flagged: ir.Table, key: str) -> bool:
    """Return True if two good rows have the same key. This is much cheaper than numbering the rows of each key."""
    good = flagged.filter(flagged[REASON].isnull())
    counts = good.aggregate(rows=good.count(), keys=good[key].nunique()).to_pyarrow().to_pylist()[0]
    return bool(counts["rows"] != counts["keys"])


def _first_of_each(flagged: ir.Table, key: str) -> ir.Table:
    """Return `flagged` with a reject reason for good rows that repeat the key of an earlier one."""
    repeat = ibis.row_number().over(group_by=[key, flagged[REASON].isnull()], order_by=ROW) > 0
    why = ibis.literal(f"{key} repeats an earlier row: ") + quoted(flagged[key])
    return flagged.mutate(flagged[REASON].coalesce(ibis.ifelse(repeat, why, ibis.null("string"))).name(REASON))


def seconds(text: ir.StringValue) -> ir.IntegerValue:
    """Return seconds since 1970 of a date, timestamp, month ("2009-03"), or epoch seconds or milliseconds; null for other text."""
    stamp = text.try_cast("timestamp").coalesce((text + ibis.literal("-01")).try_cast("timestamp"))
    number = text.try_cast("float64")
    number = ibis.ifelse(number.abs() >= MS_FROM, number / 1000, number)
    number = ibis.ifelse(number.abs() < MS_FROM, number.floor(), ibis.null("float64"))
    return stamp.epoch_seconds().cast("float64").floor().cast("int64").coalesce(number.cast("int64"))


def missing(value: ir.StringValue) -> ir.BooleanValue:
    """Return True for strings that are null or empty."""
    return (value.isnull() | (value == "")).fill_null(True)


def quoted(value: ir.StringValue) -> ir.StringValue:
    """Return a value for a reject reason: quoted, and cut after 60 characters."""
    return ibis.literal("'") + value.substr(0, 60) + ibis.literal("'")


def interactions(table: ir.Table, **columns: Any) -> ir.Table:
    """Return the columns of `INTERACTIONS` in order, with their types; missing ones are null, `chars` is 0."""
    values = {name: columns.get(name, ibis.null(kind)) for name, kind in INTERACTIONS.items()} | {CHARS: columns.get(CHARS, 0)}
    return table.select(**{name: _value(value).cast(INTERACTIONS[name]) for name, value in values.items()})


def ids_only(engine: Engine, events: ir.Table, name: str) -> ir.Table:
    """Return a table of the distinct ids in the interactions, for sources without an items or users table."""
    ids = events.filter(events[name].notnull()).select(name).distinct()
    if name == ITEM_ID:
        return engine.save(ids.mutate(name=ibis.null("string")))
    return engine.save(ids.mutate(since_s=ibis.null("int64"), elite=ibis.null("array<int64>")))


def listing(folder: Path, most: int = 6) -> str:
    """Return a description of a folder's content for a message."""
    if not folder.exists():
        return f"{folder} does not exist"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {', '.join(names[:most]) or 'nothing'}{rest}"


def _one_line(error: Exception) -> str:
    """Return the first line of an error message, ending with a full stop."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _value(value: Any) -> ir.Value:
    return value if isinstance(value, ir.Value) else ibis.literal(value)
