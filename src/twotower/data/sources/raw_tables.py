"""Define what all sources share: the raw tables they return, the rejected rows, and reading of lines.

A source turns raw files into Ibis tables of readable rows. A bad row is written to `rejects.jsonl` with file, line number and
reason, and counted; other rows are not affected. The engine scans a file once, into a table of the used columns. Only files with
bad rows are read a second time, to find the lines. Texts are not kept in tables: they are read again for the selected events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis.expr.operations import Field, Literal, Value, WindowFunction

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import ROW, Engine
from twotower.data.sources.table_files import FILE_ROWS, Scan
from twotower.data.sources.text_files import reading, unchanged
from twotower.data.sources.values import Late, as_text, inexact_id
from twotower.errors import DataError
from twotower.schema import EVENT_TYPE, ITEM_ID, ORDER, PART, STARS, TIME, USER_ID, FeatureSpec
from twotower.utils.config import DataConfig

CHARS = "chars"  # int64: length of what the user wrote
MAX_ID_CHARS = 1000
REASON = "reject_reason"
RAW_WEIGHT = "raw_weight"  # float64: weight of an event in the source, null: 1
POSITION = "position"  # int64: rank of the displayed item in its list, from 1; null: unknown
REQUEST = "request"  # string: id of that list; null: unknown
INTERACTIONS = {
    USER_ID: "string",
    ITEM_ID: "string",
    TIME: "int64",
    ORDER: "int64",
    EVENT_TYPE: "string",
    STARS: "float64",
    RAW_WEIGHT: "float64",
    POSITION: "int64",
    REQUEST: "string",
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
        False), `order` int64 (unique, in the order of the source), `event_type` string, `stars` float64 or null, `raw_weight`
        float64 or null, `position` int64 or null and `request` string or null (in the list in which an item was shown), `chars`
        int64 (length of the text, 0 without one), `part` "train", "test" or null.
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
    described
        Tables ("items", "users") that were read; the others have only the ids of the interactions.
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
    described: tuple[str, ...] = ()
    texts: ir.Table | None = None
    id_types: dict[str, str] = field(default_factory=dict)
    truth: Path | None = None


Source = Callable[[DataConfig, Engine, Rejects], RawTables]
Check = tuple[ir.BooleanValue, "ir.StringValue | str"]  # (the row is bad, why)
Columns = dict[str, ir.Value]


def screen(
    engine: Engine,
    scan: Scan,
    checks: Sequence[Check],
    columns: Columns,
    *,
    rejects: Rejects,
    unique: str | None = None,
    late: Mapping[str, Late] | None = None,
) -> tuple[ir.Table, dict[str, int]]:
    """Read the rows once, report the bad ones, and return the table of good ones and the number of all rows of each file.

    Parameters
    ----------
    scan
        The files; `checks` and `columns` are expressions over their rows.
    checks
        Conditions of bad rows and their reasons; the first that holds is reported.
    columns
        Columns kept of a good row, besides `ROW`.
    rejects
        Receives the bad rows, and the number of all rows.
    unique
        Kept column with unique values in a file: the first row with a value is good, later ones are bad.
    late
        By kept column: values that the engine leaves to Python. Rows with values that Python cannot read are bad.

    Raises
    ------
    DataError
        A file cannot be read to its end, changes meanwhile, or has other rows than were counted.
    """
    late = late or {}
    left = {f"late {column}": value.text for column, value in late.items()}
    files = [part.file for part in scan.files if str(part.file) not in engine.tables]
    with reading(scan.files[0].file, len(scan.files) - 1), unchanged(files):
        wanted = {REASON: ibis.cases(*checks, else_=ibis.null("string")), **columns, **left}
        flagged = engine.save_rows(*_computed_once(scan.rows, wanted, columns))
        flagged = scan.placed(flagged) if scan.places is None else engine.save(scan.placed(flagged))
        flagged = _read_late(engine, flagged, late)
        if unique and _repeats(flagged, unique):
            flagged = engine.save(_first_of_each(flagged, unique))
        totals, bad = _count(scan, flagged, rejects)
        if bad:
            _report(scan, flagged, rejects)
            flagged = flagged.filter(flagged[REASON].isnull())
    return flagged.drop(REASON), totals


def _count(scan: Scan, flagged: ir.Table, rejects: Rejects) -> tuple[dict[str, int], int]:
    """Record the number of rows of each file; return them by file, and the number of bad ones."""
    groups = flagged.group_by((flagged[ROW] // FILE_ROWS).name("file"))
    counts = groups.aggregate(total=ibis._.count(), bad=ibis._[REASON].count()).to_pyarrow().to_pylist()
    found, totals = {row["file"]: row["total"] for row in counts}, dict[str, int]()
    for part in scan.files:
        total = found.get(part.number, 0)
        expected = part.expected(total) if part.expected else total
        if total != expected:
            raise DataError(
                f"{part.file} has {expected:,} rows, and {total:,} were read. No row may be lost. Correct lines that are very long "
                "or damaged."
            )
        totals[part.label] = total + part.malformed()
        rejects.total(part.label, totals[part.label])
    return totals, sum(row["bad"] for row in counts)


def _report(scan: Scan, flagged: ir.Table, rejects: Rejects) -> None:
    """Write the bad rows with their line numbers; their files are read again."""
    bad = flagged.filter(flagged[REASON].notnull()).select(ROW, REASON).order_by(ROW).to_pyarrow().to_pylist()
    parts = {part.number: part for part in scan.files}
    for number, rows in groupby(bad, lambda row: row[ROW] // FILE_ROWS):
        part, found = parts[number], list(rows)
        places = part.locate([row[ROW] - number * FILE_ROWS for row in found])
        for row, (line, text) in zip(found, places, strict=True):
            rejects.add(part.label, line, row[REASON], text)


def _computed_once(rows: ir.Table, wanted: Columns, columns: Columns) -> tuple[ir.Table, Columns]:
    """Return rows that have `columns` computed, and the wanted expressions over them: checks then use the values of a column.

    Otherwise the engine would read each time and id anew for every check.
    """
    if ROW in columns:  # rows that are numbered by a source
        return rows, wanted
    costly = {name: value for name, value in columns.items() if not isinstance(value.op(), (Field, Literal))}
    numbered = bool(rows.op().find(WindowFunction))  # by a window over the scan, which would use one thread
    raw = [name for name in rows.columns if name != ROW or not numbered]
    typed = rows.select(*raw, **{f"typed {name}": value for name, value in costly.items()}).view()
    known = {rows[name].op(): typed[name].op() for name in raw}
    known |= {value.op(): typed[f"typed {name}"].op() for name, value in costly.items()}
    # Only values are searched: below them are relations, with all columns of the file.
    return typed, {name: value.op().replace(known, filter=Value).to_expr() for name, value in wanted.items()}


def _read_late(engine: Engine, flagged: ir.Table, late: Mapping[str, Late]) -> ir.Table:
    """Return the rows with the values that the engine left to Python, each distinct one read once."""
    if not late:
        return flagged
    counts = flagged.aggregate(**{column: flagged[f"late {column}"].count() for column in late}).to_pyarrow().to_pylist()[0]
    for column, value in late.items():
        text = f"late {column}"
        if counts[column]:
            texts = flagged.filter(flagged[text].notnull()).select(text).distinct().to_pyarrow()[text].to_pylist()
            read = engine.save(_parsed(texts, value))
            joined = flagged.left_join(read, flagged[text] == read["late_text"])
            values = {column: joined[column].coalesce(joined["late_value"]), REASON: joined[REASON].coalesce(joined["late_why"])}
            flagged = engine.save(joined.mutate(**values).drop("late_text", "late_value", "late_why"))
    return flagged.drop(*(f"late {column}" for column in late))


def _parsed(texts: Sequence[str], late: Late) -> pa.Table:
    """Return what Python makes of texts: a value, or the reason of a bad row."""
    values: list[Any] = []
    whys: list[str | None] = []
    for text in texts:
        try:
            value, why = late.parse(text), None
        except ValueError as error:
            value, why = None, f"{late.name} {error}"
        values.append(value)
        whys.append(why)
    kinds = {"int64": pa.int64(), "array<string>": pa.list_(pa.string()), "array<float64>": pa.list_(pa.float64())}
    return pa.table(
        {
            "late_text": pa.array(texts, pa.string()),
            "late_value": pa.array(values, kinds[late.kind]),
            "late_why": pa.array(whys, pa.string()),
        }
    )


def _repeats(flagged: ir.Table, key: str) -> bool:
    """Return True if two good rows of a file have the same key. This is much cheaper than numbering the rows of each key."""
    good = flagged.filter(flagged[REASON].isnull())
    keys = good.group_by((good[ROW] // FILE_ROWS).name("file")).aggregate(rows=ibis._.count(), keys=ibis._[key].nunique())
    return any(row["rows"] != row["keys"] for row in keys.to_pyarrow().to_pylist())


def _first_of_each(flagged: ir.Table, key: str) -> ir.Table:
    """Return `flagged` with a reject reason for good rows that repeat the key of an earlier one of their file."""
    repeat = ibis.row_number().over(group_by=[key, flagged[ROW] // FILE_ROWS, flagged[REASON].isnull()], order_by=ROW) > 0
    why = ibis.literal(f"{key} repeats an earlier row: ") + quoted(flagged[key])
    return flagged.mutate(flagged[REASON].coalesce(ibis.ifelse(repeat, why, ibis.null("string"))).name(REASON))


def missing(value: ir.StringValue) -> ir.BooleanValue:
    """Return True for strings that are null or empty."""
    return (value.isnull() | (value == "")).fill_null(True)


def id_checks(value: ir.Value, found: ir.StringValue, name: str, *, is_json: bool = True) -> list[Check]:
    """Return checks for values that are no ids: inexact floats, objects and lists of JSON, and long ones.

    Parameters
    ----------
    value
        The column of the file.
    found
        The ids that `as_id` makes of it.
    """
    checks: list[Check] = [(inexact_id(value), f"{name} is a float too large to be exact: " + quoted(as_text(value)))]
    if is_json:
        nested = found.re_search(r"^([{].*[}]|\[.*\])$")
        checks.append((nested, f"{name} is not a single value: " + quoted(found)))
    return [*checks, (found.length() > MAX_ID_CHARS, f"{name} is longer than {MAX_ID_CHARS:,} characters: " + quoted(found))]


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


def _value(value: Any) -> ir.Value:
    return value if isinstance(value, ir.Value) else ibis.literal(value)
