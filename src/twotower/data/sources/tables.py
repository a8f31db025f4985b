"""Read your own CSV, Parquet or JSON-lines tables, as described in the configuration, as raw tables.

Paths may be globs; CSV and JSON lines may be gzipped. A value that does not fit the kind of its column makes a bad row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ibis
import ibis.expr.types as ir

from twotower.data.sources.engine import ROW, Engine
from twotower.data.sources.other_columns import other_columns, typed_by_values, union
from twotower.data.sources.raw_tables import (
    CHARS,
    Check,
    Columns,
    Locate,
    RawTables,
    Rejects,
    ids_only,
    interactions,
    missing,
    quoted,
    screen,
    seconds,
)
from twotower.data.sources.table_files import Close, column_id_type, find_files, scan_file
from twotower.errors import ConfigError
from twotower.schema import EVENT_TYPE, HOURS_PER_WEEK, ITEM_ID, ORDER, STARS, TEXT, TIME, USER_ID, FeatureSpec, Side
from twotower.utils.config import ColumnConfig, DataConfig, InteractionTableConfig, ItemTableConfig, TableConfig, UserTableConfig

FILE_ORDERS = 1 << 50  # room in `order` for the rows of one file
LAST_S = 4_102_444_800  # 2100
MAX_STARS = 5
DEFAULT_EVENT = "event"  # event type of tables without a column of types
ZONE = r"(\d\d:\d\d[\d:.]*)\s*([+-]\d\d):?(\d\d)?$"  # time zone of "2024-05-01T12:00:00+02:00"
SINCE, ELITE = "since_s", "elite"
PLACE, FIRST = "source_place", "source_first"

Typed = Callable[["Fields"], None]


def read_tables(config: DataConfig, engine: Engine, rejects: Rejects) -> RawTables:
    """Read the tables in `config.interactions`, `config.users` and `config.items`, and return the raw tables.

    Parameters
    ----------
    config
        `interactions` is required. Without `items`, the items are the ids in the interactions; likewise for users.
    engine
        Receives the tables.
    rejects
        Receives bad rows: an id that is missing or repeated in its table; an invalid time, number, coordinate or vector;
        stars outside 0 to 5.

    Returns
    -------
    RawTables
        `has_time` is False if no time column is set; then `time_s` is the position of the row.

    Raises
    ------
    DataError
        A file or column is missing, or a file cannot be read.
    ConfigError
        No interactions are set, or two features use one column with different types.
    """
    table = config.interactions
    if table is None:
        raise ConfigError(
            "data.interactions is not set, but data.source is tables. Describe your tables there, or set another data.source."
        )
    reader, ids = _Reader(config.path, engine, rejects, {}), {USER_ID: table.user_id, ITEM_ID: table.item_id}
    events, texts = _interactions(reader, table)
    items = _entities(reader, config.items) if config.items else ids_only(engine, events, ITEM_ID)
    users = _entities(reader, config.users) if config.users else ids_only(engine, events, USER_ID)
    return RawTables(
        interactions=events,
        users=users,
        items=items,
        features=(*_specs(config.items, "item"), *_specs(config.users, "user")),
        has_time=table.time is not None,
        counts=reader.counts,
        texts=texts,
        id_types={name: column_id_type(engine, reader.base, table.path, column) for name, column in ids.items()},
    )


Scanned = tuple[ir.Table, Locate, Close, Path, int]


class Fields:
    """Typed columns of one scanned file, whose own columns are named "raw NAME", and the checks for bad rows."""

    def __init__(self, rows: ir.Table) -> None:
        self._rows = rows
        self.columns: Columns = {}
        self.used: set[str] = set()
        self.checks: list[Check] = []

    def raw(self, name: str) -> ir.Value:
        """Return a column as it is in the file."""
        self.used.add(name)
        return self._rows[f"raw {name}"]

    @property
    def names(self) -> list[str]:
        """Its own columns."""
        return [name.removeprefix("raw ") for name in self._rows.columns if name.startswith("raw ")]

    def text(self, name: str) -> ir.StringValue:
        """Return a column as strings; empty ones are null."""
        value = self.raw(name)
        text: ir.StringValue = (value if value.type().is_string() else value.cast("string")).nullif("")
        return text

    def required(self, ours: str, name: str) -> None:
        """Add column `name` as the required id `ours`."""
        self.columns[ours] = self.text(name)
        self.checks.append((missing(self.columns[ours]), f"{name} is missing"))

    def number(self, name: str, limit: float | None = None) -> ir.FloatingValue:
        """Return a column as float64; NaN counts as missing. Values beyond ±limit are bad, if it is given."""
        value = self.text(name).try_cast("float64")
        value = ibis.ifelse(value.isnan(), ibis.null("float64"), value)
        said_so = self.text(name).lower().isin(["nan", "null", "none", "na"])
        self.checks.append(
            (self.text(name).notnull() & ~said_so & value.isnull(), f"{name} is not a number: " + quoted(self.text(name)))
        )
        out = value.isinf() if limit is None else value.abs() > limit
        self.checks.append((out, f"{name} is out of range: " + quoted(self.text(name))))
        return value

    def stars(self, name: str) -> ir.FloatingValue:
        """Return a column of ratings, 0 to 5."""
        value = self.number(name)
        self.checks.append((~value.between(0, MAX_STARS), f"{name} is not on the 0-{MAX_STARS} scale: " + quoted(self.text(name))))
        return value

    def time(self, name: str, *, required: bool) -> ir.IntegerValue:
        """Return a date, a timestamp, or epoch (milli)seconds as seconds since 1970; a UTC offset in the text is subtracted."""
        value, text = self.raw(name), self.text(name)
        if value.type().is_temporal():
            time = value.cast("timestamp").epoch_seconds().cast("int64")
        else:
            hours, minutes = (text.re_extract(ZONE, part).try_cast("int64").fill_null(0) for part in (2, 3))
            sign = ibis.ifelse(text.re_extract(ZONE, 2).startswith("-"), -1, 1)
            time = seconds(text.re_replace(ZONE, r"\1")) - hours * 3600 - sign * minutes * 60
        self.checks.append((text.notnull() & time.isnull(), f"{name} is not a time: " + quoted(text)))
        self.checks.append((time < 0, f"{name} is before 1970: " + quoted(text)))
        self.checks.append((time > LAST_S, f"{name} is after 2100: " + quoted(text)))
        if required:
            self.checks.append((text.isnull(), f"{name} is missing"))
        return time

    def many(self, name: str, separator: str) -> ir.ArrayValue:
        """Return a native list, a JSON list, or a string split by `separator`, as a list of strings."""
        value = self.raw(name)
        if value.type().is_array():
            parts = value.cast("array<string>")
        else:
            text = self.text(name)
            listed = text.try_cast("json").cast("array<string>")
            parts = ibis.ifelse(text.strip().startswith("["), listed, text.split(separator))
        return parts.map(lambda part: part.strip()).filter(lambda part: part != "")

    def feature(self, feature: ColumnConfig) -> None:
        """Add the columns of one feature."""
        for name in columns_of(feature):
            self.columns[name] = self._value(feature, name)

    def _value(self, feature: ColumnConfig, name: str) -> ir.Value:
        if feature.kind == "number":
            return self.number(name)
        if feature.kind == "geo":
            return self.number(name, limit=90 if name == columns_of(feature)[0] else 180)
        if feature.kind in ("multi", "vector"):
            parts = self.many(name, feature.separator)
            if feature.kind == "multi":
                return parts
            vector = parts.map(lambda part: part.try_cast("float64"))
            bad = parts.length() != vector.filter(lambda number: number.abs() < float("inf")).length()
            self.checks.append((bad, f"{name} is not a list of numbers: " + quoted(self.raw(name).cast("string"))))
            return vector
        text = self.text(name)
        if feature.kind == "hours":
            bad = text.notnull() & ~text.re_search(f"^[01]{{{HOURS_PER_WEEK}}}$")
            self.checks.append((bad, f"{name} is not {HOURS_PER_WEEK} characters of 0 and 1: " + quoted(text)))
        return text


@dataclass(frozen=True)
class _Reader:
    """Folder of the files, engine, rejected rows and row counts."""

    base: Path
    engine: Engine
    rejects: Rejects
    counts: dict[str, int]

    def read(
        self, table: TableConfig, section: str, names: list[str], typed: Typed, *, unique: str | None = None, others: bool = False
    ) -> ir.Table:
        """Return the good rows of all files of a table, with typed columns and their order `PLACE`; with `others`, all columns."""
        parts = []
        for rows, locate, close, file, place in self.scans(table, section, names, others):
            fields = Fields(rows)
            typed(fields)
            if others:
                left = {name: fields.raw(name) for name in fields.names if name not in fields.used}
                fields.columns |= other_columns(left, fields.columns, file.name)
            nothing = ibis.and_(*(fields.raw(name).isnull() for name in names))
            checks = [(nothing, f"not a row with {', '.join(names)}"), *fields.checks]
            good, count = screen(
                self.engine, rows, checks, fields.columns, file=file, rejects=self.rejects, locate=locate, unique=unique
            )
            self.counts[file.name] = self.counts.get(file.name, 0) + count + close()
            parts.append(good.select((good[ROW] + place).name(PLACE), *fields.columns))
        return union(parts)

    def texts(self, table: TableConfig, section: str, name: str) -> ir.Table:
        """Return a column of all files of a table as `TEXT`, with `ORDER`; bad rows are included."""
        scans = ((rows, place) for rows, *_, place in self.scans(table, section, [name]))
        return union([rows.select((rows[ROW] + place).name(ORDER), Fields(rows).text(name).name(TEXT)) for rows, place in scans])

    def scans(self, table: TableConfig, section: str, names: list[str], others: bool = False) -> Iterator[Scanned]:
        """Yield, for each file of a table: rows for `Fields`, `locate`, `close`, the file, and the order of its first row."""
        for number, file in enumerate(find_files(self.engine, self.base, table.path, section)):
            rows, locate, close = scan_file(self.engine, file, names, section, self.rejects, others=others)
            named = rows.rename({f"raw {name}": name for name in rows.columns if name != ROW or name in names})
            yield named, locate, close, file, number * FILE_ORDERS


def _interactions(reader: _Reader, table: InteractionTableConfig) -> tuple[ir.Table, ir.Table | None]:
    """Return the interactions and their texts (None without a text column)."""
    names = [table.user_id, table.item_id, table.time, table.stars, table.event_type, table.text]

    def typed(fields: Fields) -> None:
        fields.required(USER_ID, table.user_id)
        fields.required(ITEM_ID, table.item_id)
        fields.columns[EVENT_TYPE] = (
            fields.text(table.event_type).fill_null(DEFAULT_EVENT) if table.event_type else ibis.literal(DEFAULT_EVENT)
        )
        if table.time:
            fields.columns[TIME] = fields.time(table.time, required=True)
        if table.stars:
            fields.columns[STARS] = fields.stars(table.stars)
        if table.text:
            fields.columns[CHARS] = fields.text(table.text).length().fill_null(0)

    rows = reader.read(table, "interactions", _distinct(names), typed)
    given = {name: rows[name] for name in rows.columns if name != PLACE}
    texts = reader.texts(table, "interactions", table.text) if table.text else None
    return interactions(rows, **{TIME: rows[PLACE], **given, ORDER: rows[PLACE]}), texts


def _entities(reader: _Reader, table: ItemTableConfig | UserTableConfig) -> ir.Table:
    """Return items or users: the id, the built-in columns, and the feature columns."""
    ours: dict[str, str | None]
    if isinstance(table, ItemTableConfig):
        section, key, theirs, also = "items", ITEM_ID, table.item_id, table.name
        ours = {key: theirs, "name": also}
    else:
        section, key, theirs, also = "users", USER_ID, table.user_id, table.since
        ours = {key: theirs, SINCE: None, ELITE: None}
    declared = [column for feature in table.features for column in columns_of(feature)]
    for column in declared:
        if ours.get(column, column) != column or column in (ROW, PLACE, FIRST):
            raise ConfigError(f"A feature of data.{section} uses the column {column!r}, a reserved name. Rename the column.")
    _check_kinds(table.features, section, {"name": "string"} if ours.get("name") == "name" else {})

    def typed(fields: Fields) -> None:
        fields.required(key, theirs)
        if section == "items":
            named = also or ("name" if others and "name" in fields.names else None)
            fields.columns["name"] = fields.text(named) if named else ibis.null("string")
        else:
            fields.columns[SINCE] = fields.time(also, required=False) if also else ibis.null("int64")
            fields.columns[ELITE] = ibis.null("array<int64>")
        for feature in table.features:
            fields.feature(feature)

    others = isinstance(table, ItemTableConfig) and table.other_columns
    names = _distinct([theirs, also, *declared])
    rows = reader.read(table, section, names, typed, unique=key, others=others)
    files = find_files(reader.engine, reader.base, table.path, section)
    if others and not any(file.suffix == ".parquet" or file.name in reader.engine.tables for file in files):
        rows = typed_by_values(rows, [name for name in rows.columns if name not in (PLACE, *ours, *names)])
    first = ibis.row_number().over(group_by=key, order_by=PLACE) == 0  # files of one glob may repeat ids
    once = rows.mutate(first.name(FIRST)).filter(ibis._[FIRST]).order_by(PLACE).drop(FIRST, PLACE)
    return reader.engine.save(once)


def columns_of(feature: ColumnConfig) -> list[str]:
    """Return the raw columns of a feature.

    Raises
    ------
    ConfigError
        The number of columns does not fit the kind of the feature.

    Examples
    --------
    >>> columns_of(ColumnConfig(name="brand", kind="categorical"))
    ['brand']
    """
    columns = feature.columns or [feature.name]
    wanted = 2 if feature.kind == "geo" else 1
    if len(columns) != wanted:
        what = "two columns, latitude and longitude" if wanted == 2 else "one column"
        raise ConfigError(
            f"Feature {feature.name!r} has the columns {', '.join(columns)}. Kind {feature.kind!r} needs {what}. Set its columns."
        )
    return columns


def _specs(table: ItemTableConfig | UserTableConfig | None, side: Side) -> tuple[FeatureSpec, ...]:
    features = table.features if table else []
    return tuple(FeatureSpec(name=f.name, side=side, kind=f.kind, columns=tuple(columns_of(f))) for f in features)


def _check_kinds(features: list[ColumnConfig], section: str, seen: dict[str, str]) -> None:
    """Check that each column has one type over all features; `seen` has the types of other uses."""
    types = {"number": "number", "geo": "number", "multi": "list", "vector": "vector"}
    for feature in features:
        for column in columns_of(feature):
            kind = types.get(feature.kind, "string")
            if seen.setdefault(column, kind) != kind:
                raise ConfigError(f"Column {column!r} of data.{section} is used as {seen[column]} and as {kind}. Copy the column.")


def _distinct(names: list[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))
