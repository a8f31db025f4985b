"""Read your own tables, as described in the configuration, as raw tables: delimited text, Parquet or JSON.

Paths may be globs or folders of parts. A value that does not fit the kind of its column makes a bad row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow.parquet as pq

from twotower.data.sources.account import REPLACED, Rejects
from twotower.data.sources.engine import ROW, Engine
from twotower.data.sources.long_tables import SNAPSHOT, newest_values, spread
from twotower.data.sources.other_columns import other_columns, typed_by_values, union, with_open_flag
from twotower.data.sources.raw_tables import CHARS, POSITION, RAW_WEIGHT, REQUEST, RawTables, ids_only, interactions, screen
from twotower.data.sources.table_columns import Fields
from twotower.data.sources.table_files import FILE_ROWS, scan_files
from twotower.data.sources.table_paths import form_of, table_paths
from twotower.data.sources.times import check_pattern
from twotower.errors import ConfigError
from twotower.schema import EVENT_TYPE, ITEM_ID, ORDER, TEXT, TIME, USER_ID, FeatureSpec, Side
from twotower.utils.config import ColumnConfig, DataConfig, InteractionTableConfig, ItemTableConfig, TableConfig, UserTableConfig
from twotower.utils.ids import TEXT as TEXT_ID
from twotower.utils.ids import id_type
from twotower.utils.open_flag import IS_OPEN

MAX_PARTS = 64  # scans that are united at once: a query of thousands of tables is too deep for an engine
DEFAULT_EVENT = "event"  # event type of tables without a column of types
SINCE, ELITE = "since_s", "elite"
SOURCE_ORDER, FIRST = "source_order", "source_first"

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
    items = _items(reader, config.items, table, events)
    users = _entities(reader, config.users, table) if config.users else ids_only(engine, events, USER_ID)
    return RawTables(
        interactions=events,
        users=users,
        items=items,
        features=(*_specs(config.items, "item"), *_specs(config.users, "user")),
        has_time=table.time is not None,
        counts=reader.counts,
        described=_described(config),
        texts=texts,
        id_types={name: _column_id_type(engine, config.path, table.path, column) for name, column in ids.items()},
    )


def _described(config: DataConfig) -> tuple[str, ...]:
    """Return the tables that know all their ids; a table in long form need not have a row of each item."""
    items = config.items is not None and config.items.is_read and config.items.long_form is None
    return (*(("items",) if items else ()), *(("users",) if config.users else ()))


def _column_id_type(engine: Engine, base: Path, path: Path, column: str) -> str:
    """Return the type of an id column, as `utils.ids.id_type` names it; text and JSON files have texts."""
    held = engine.tables.get(str(path))
    if held is not None:
        return id_type(held.schema.field(column))
    files = table_paths(base, path, "interactions")
    schemas = [pq.read_schema(file) if form_of(file) == "parquet" else None for file in files]
    kinds = {id_type(schema.field(column)) if schema and column in schema.names else TEXT_ID for schema in schemas}
    return kinds.pop() if len(kinds) == 1 else TEXT_ID


@dataclass(frozen=True)
class _Reader:
    """Folder of the files, engine, account and row counts."""

    base: Path
    engine: Engine
    rejects: Rejects
    counts: dict[str, int]

    def read(self, table: TableConfig, path: Path, section: str, names: list[str], typed: Typed, **options: Any) -> ir.Table:
        """Return the good rows of all files of a table, with typed columns and their order `SOURCE_ORDER`.

        Options: `unique`, a column that has each value once in a file; `others`, to keep all columns; `mark`, added to the names
        of the files in the account; `spread`, the long form and its properties.
        """
        unique, others, mark = options.get("unique"), options.get("others", False), options.get("mark", "")
        files = [(file, label + mark) for file, label in self.files(path, section)]
        scans = scan_files(self.engine, files, names, section, self.rejects, table=table, others=others)
        parts = []
        for scan in scans:
            rows = _raw(scan.rows, names)
            rows = spread(rows, *options["spread"]) if options.get("spread") else rows
            fields = Fields(rows, is_json=scan.is_json)
            typed(fields)
            if others:
                left = {name: fields.raw(name) for name in fields.names if name not in fields.used}
                fields.columns |= other_columns(left, fields.columns, scan.files[0].file.name)
            nothing = ibis.and_(*(fields.raw(name).isnull() for name in names))
            checks = [(nothing, f"not a row with {', '.join(names)}"), *fields.header_again(scan.own), *fields.checks]
            good, counts = screen(
                self.engine, replace(scan, rows=rows), checks, fields.columns, rejects=self.rejects, unique=unique, late=fields.late
            )
            for name, count in counts.items():
                self.counts[name] = self.counts.get(name, 0) + count
            parts.append(good.select(good[ROW].name(SOURCE_ORDER), *fields.columns))
            if len(parts) == MAX_PARTS:
                parts = [self.engine.save(union(parts))]
        return union(parts)

    def texts(self, table: TableConfig, path: Path, section: str, name: str) -> ir.Table:
        """Return a column of all files of a table as `TEXT`, with `ORDER`; bad rows are included."""
        parts = []
        for scan in scan_files(self.engine, self.files(path, section), [name], section, self.rejects, table=table, count=False):
            rows = scan.placed(_raw(scan.rows, [name]))
            parts.append(rows.select(rows[ROW].name(ORDER), Fields(rows).text(name).name(TEXT)))
        return union(parts)

    def files(self, path: Path, section: str) -> list[tuple[Path, str]]:
        """Return the files of a table by name, each with its name in the account: its path below the folder."""
        if str(path) in self.engine.tables:
            return [(path, str(path))]
        found = table_paths(self.base, path, section)
        return [(file, file.relative_to(self.base).as_posix() if file.is_relative_to(self.base) else str(file)) for file in found]


def _raw(rows: ir.Table, names: list[str]) -> ir.Table:
    return rows.rename({f"raw {name}": name for name in rows.columns if name != ROW or name in names})


def _interactions(reader: _Reader, table: InteractionTableConfig) -> tuple[ir.Table, ir.Table | None]:
    """Return the interactions and their texts (None without a text column)."""
    check_pattern(table.time_format)
    numbers = [table.weight, table.quantity, table.position]
    names = [table.user_id, table.item_id, table.time, table.stars, table.event_type, table.text, table.request, *numbers]

    def typed(fields: Fields) -> None:
        fields.required(USER_ID, table.user_id)
        fields.required(ITEM_ID, table.item_id)
        fields.columns[EVENT_TYPE] = (
            fields.text(table.event_type).fill_null(DEFAULT_EVENT) if table.event_type else ibis.literal(DEFAULT_EVENT)
        )
        if table.time:
            fields.time(TIME, table.time, table.time_format, required=True)
        if table.stars:
            fields.stars(table.stars, table.stars_scale)
        if table.text:
            fields.columns[CHARS] = fields.text(table.text).length().fill_null(0)
        if table.position:
            fields.columns[POSITION] = fields.count(table.position)
        if table.request:
            fields.columns[REQUEST] = fields.text(table.request)
        weights = [fields.weight(table.weight)] if table.weight else []
        weights += [fields.weight(table.quantity, pieces=True)] if table.quantity else []
        if weights:
            fields.columns[RAW_WEIGHT] = weights[0].fill_null(1.0) * weights[1].fill_null(1.0) if len(weights) > 1 else weights[0]

    rows = reader.read(table, table.path, "interactions", _distinct(names), typed)
    given = {name: rows[name] for name in rows.columns if name != SOURCE_ORDER}
    texts = reader.texts(table, table.path, "interactions", table.text) if table.text else None
    return interactions(rows, **{TIME: rows[SOURCE_ORDER], **given, ORDER: rows[SOURCE_ORDER]}), texts


def _items(reader: _Reader, table: ItemTableConfig | None, events: InteractionTableConfig, known: ir.Table) -> ir.Table:
    """Return the items: from their table, in wide or long form, or else the ids of the interactions `known`."""
    if table is None or not table.is_read:
        return ids_only(reader.engine, known, ITEM_ID)
    form = table.long_form
    if form is None or table.path is None:
        return _entities(reader, table, events)
    declared = [column for feature in table.features for column in columns_of(feature)]
    wanted = _distinct([table.name, *declared, *form.keep])
    _check_kinds(table.features, "items", {})

    def typed(fields: Fields) -> None:
        fields.required(ITEM_ID, table.item_id)
        if form.time:
            fields.time(SNAPSHOT, form.time, None, required=True)
        for name in _distinct([table.name, *form.keep]):
            fields.columns[name] = fields.text(name)
        for feature in table.features:
            fields.feature(feature, columns_of(feature))

    names = _distinct([table.item_id, form.property, form.value, form.time])
    rows = reader.read(table, table.path, "items", names, typed, spread=(form, wanted))
    found = newest_values(rows, known, ITEM_ID, SOURCE_ORDER, wanted)
    found = typed_by_values(found, [name for name in form.keep if name not in declared])
    label = found[table.name] if table.name else ibis.null("string")
    saved = reader.engine.save(found.mutate(name=label).order_by([SOURCE_ORDER, ITEM_ID]).drop(SOURCE_ORDER))
    _note_empty(reader, saved, wanted, "items")
    return saved


def _entities(reader: _Reader, table: ItemTableConfig | UserTableConfig, events: InteractionTableConfig) -> ir.Table:
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
        if ours.get(column, column) != column or column in (ROW, SOURCE_ORDER, FIRST):
            raise ConfigError(f"A feature of data.{section} uses the column {column!r}, a reserved name. Rename the column.")
    _check_kinds(table.features, section, {"name": "string"} if ours.get("name") == "name" else {})

    def typed(fields: Fields) -> None:
        fields.required(key, theirs)
        if section == "items":
            named = also or ("name" if others and "name" in fields.names else None)
            fields.columns["name"] = fields.text(named) if named else ibis.null("string")
        else:
            fields.columns[ELITE] = ibis.null("array<int64>")
            fields.columns[SINCE] = ibis.null("int64")
            if also:
                fields.time(SINCE, also, None, required=False)
        for feature in table.features:
            fields.feature(feature, columns_of(feature))

    taken = table.path is None
    others = isinstance(table, ItemTableConfig) and table.other_columns and not taken
    names = _distinct([theirs, also, *declared])
    path = events.path if table.path is None else table.path
    options = {"unique": None if taken else key, "others": others, "mark": f" ({section})" if taken else ""}
    rows = reader.read(events if taken else table, path, section, names, typed, **options)
    kept = _one_value_each(rows, key, table.value) if taken else _newest(reader, rows, key, path, section)
    kept = with_open_flag(kept) if others and IS_OPEN not in (*ours, *names) else kept
    if others and not any(
        str(file) in reader.engine.tables or form_of(file) == "parquet" for file, _ in reader.files(path, section)
    ):
        kept = typed_by_values(kept, [name for name in kept.columns if name not in (SOURCE_ORDER, *ours, *names)])
    saved = reader.engine.save(kept.order_by(SOURCE_ORDER).drop(SOURCE_ORDER))
    _note_empty(reader, saved, declared, section)
    return saved


def _newest(reader: _Reader, rows: ir.Table, key: str, path: Path, section: str) -> ir.Table:
    """Return the rows of the last file that has each id, and count those of earlier files as left out."""
    files = reader.files(path, section)
    if len(files) == 1:
        return rows
    ranked = reader.engine.save(
        rows.mutate((ibis.row_number().over(group_by=key, order_by=ibis.desc(SOURCE_ORDER)) == 0).name(FIRST))
    )
    older = ranked.filter(~ranked[FIRST]).group_by((ranked[SOURCE_ORDER] // FILE_ROWS).name("file")).aggregate(n=ibis._.count())
    for row in older.to_pyarrow().to_pylist():
        reader.rejects.of(files[row["file"]][1]).left_out[REPLACED] = row["n"]
    return ranked.filter(ranked[FIRST]).drop(FIRST)


def _one_value_each(rows: ir.Table, key: str, which: str) -> ir.Table:
    """Return one row of each id: the first or last value of each column that is not null."""

    def chosen(name: str) -> ir.Value:
        return rows[name].first(order_by=SOURCE_ORDER) if which == "first" else rows[name].last(order_by=SOURCE_ORDER)

    values = {name: chosen(name) for name in rows.columns if name not in (key, SOURCE_ORDER)}
    return rows.group_by(key).aggregate(**{SOURCE_ORDER: rows[SOURCE_ORDER].min()}, **values).relocate(key)


def _note_empty(reader: _Reader, rows: ir.Table, declared: list[str], section: str) -> None:
    """Note the features that no row has a value of."""
    if declared:
        counts = rows.aggregate(**{f"n{n}": rows[name].count() for n, name in enumerate(declared)}).to_pyarrow().to_pylist()[0]
        empty = [name for n, name in enumerate(declared) if not counts[f"n{n}"]]
        if empty:
            reader.rejects.notes.append(f"no row of the {section} table has a value in {', '.join(empty)}")


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
