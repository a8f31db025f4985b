"""Open the files of a table, in any format, as lazy tables of selected columns. All sources of tables use it.

Files that are written alike are one scan: an engine plans a query for each scan, and a table may have thousands of parts. The
column `ROW` has the position of a row in its file, invalid ones included, after `FILE_ROWS` for each file before; in delimited
text, the position is that of the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.data.sources.account import Rejects
from twotower.data.sources.delimited_files import LINE, Lines, find_dialect, line_texts, read_batches
from twotower.data.sources.engine import ROW, Batches, Engine
from twotower.data.sources.json_files import JsonFile, joined, open_json
from twotower.data.sources.other_columns import distinct_names
from twotower.data.sources.table_paths import FORMS, form_of
from twotower.data.sources.text_files import base_suffix, check_ratio, open_bytes, reading
from twotower.data.sources.values import plain_column
from twotower.errors import ConfigError, DataError, clause, nearest
from twotower.utils.config import InteractionTableConfig, TableConfig

PARQUET_ROWS = 1 << 16
FILE_ROWS = 1 << 40  # room in `ROW` for the rows of one file
JOINED_BYTES = 1 << 22  # smaller files of JSON are copied to one file
VALUE_BYTES = 8  # of a value in memory, at least
EMPTY_BYTES = 64  # of a packed file without content
POSITION, PLACE = "scan_position", "scan_place"
Locate = Callable[[Sequence[int]], Iterator[tuple[int, str]]]  # ascending rows → (line number from 1, text) of each


@dataclass(frozen=True)
class FileRows:
    """The rows of one file of a scan.

    Attributes
    ----------
    label
        Name of the file in the account.
    locate
        Finds line number and text of its rows.
    expected
        Returns the number of its rows, given how many were read. None: unknown.
    malformed
        Returns the number of rejected lines that are not among the rows, after they were computed.
    number
        Position of the file: its rows have `ROW` from `number * FILE_ROWS`.
    """

    file: Path
    label: str
    locate: Locate
    expected: Callable[[int], int] | None
    malformed: Callable[[], int] = lambda: 0
    number: int = 0


@dataclass(frozen=True)
class Scan:
    """Files that are written alike, as one table.

    Attributes
    ----------
    rows
        The columns, and `ROW`. It can be computed once.
    files
        The files of the rows.
    own
        Columns that are in the files themselves, and not in the names of their folders.
    places
        `POSITION` → `PLACE`: the values of `ROW` of files that were joined, by their position in the joined file; see `placed`.
    shift
        What `ROW` lacks in the rows of a single file that is not the first.
    """

    rows: ir.Table
    files: tuple[FileRows, ...]
    own: tuple[str, ...] = ()
    is_json: bool = False
    places: ir.Table | None = None
    shift: int = 0

    def placed(self, rows: ir.Table) -> ir.Table:
        """Return rows, whose `ROW` is as the engine reads it, with `ROW` as in the description of this module."""
        if self.places is None:
            return rows.mutate(**{ROW: rows[ROW] + self.shift}) if self.shift else rows
        found = rows.join(self.places, rows[ROW] == self.places[POSITION])
        return found.mutate(**{ROW: found[PLACE]}).drop(POSITION, PLACE)


@dataclass(frozen=True)
class _Opened:
    """A file that was opened: its columns, values from the names of its folders, and its content as batches or as JSON lines."""

    rows: FileRows
    columns: dict[str, pa.DataType]
    folders: dict[str, str | None]
    batches: Batches | None = None
    source: JsonFile | None = None


def scan_files(
    engine: Engine,
    files: Sequence[tuple[Path, str]],
    names: Sequence[str],
    section: str,
    rejects: Rejects,
    *,
    table: TableConfig | None = None,
    others: bool = False,
    count: bool = True,
) -> list[Scan]:
    """Open files by their suffixes, as `names` and, with `others`, their other columns.

    Parameters
    ----------
    files
        The files, each with its name in the account.
    table
        Format of the files; None: detected for each.
    count
        False for a second reading, which is not accounted for.

    Raises
    ------
    DataError
        A suffix is unknown, a file cannot be opened, or a column is missing (the message has the nearest name).
    """
    groups: dict[object, list[_Opened]] = {}
    for number, (file, label) in enumerate(files):
        opener = {"text": _text, "json": _json, "parquet": _parquet}["parquet" if str(file) in engine.tables else form_of(file)]
        book = _Book(rejects if count else None, label, section, others)
        if len(files) > 1 and str(file) not in engine.tables and _is_empty(file):
            rejects.total(label, 0)  # engines write such parts, without a header
            continue
        with reading(file):
            opened = opener(engine, file, list(names), table or InteractionTableConfig(path=file), book)
        opened = replace(opened, rows=replace(opened.rows, number=number))
        groups.setdefault(_likeness(engine, opened), []).append(opened)
    if not groups:
        raise DataError(f"All {len(files):,} files of data.{section} are empty, such as {files[0][0]}. Name files with rows.")
    return [_streamed(engine, group) if group[0].batches else _joined_json(engine, group) for group in groups.values()]


def _is_empty(file: Path) -> bool:
    """Return True for a file of text or JSON without a byte, packed or not."""
    if form_of(file) == "parquet" or file.stat().st_size > EMPTY_BYTES:
        return False
    with reading(file), open_bytes(file) as source:
        return not source.read(1)


def _likeness(engine: Engine, file: _Opened) -> object:
    """Return a key, equal for files that can be one scan."""
    if file.source is None:
        return frozenset(file.columns.items()), frozenset(file.folders)
    small = engine.is_local and file.source.path.stat().st_size <= JOINED_BYTES
    return tuple(file.folders.items()), small or file.rows.number


def _streamed(engine: Engine, group: Sequence[_Opened]) -> Scan:
    """Return files of the same columns as one scan of their batches."""
    names, added = list(group[0].columns), list(group[0].folders)
    schema = pa.schema([*group[0].columns.items(), *((name, pa.string()) for name in added), (ROW, pa.int64())])

    def batches() -> Iterator[pa.RecordBatch]:
        for part in group:
            with reading(part.rows.file):
                for batch in part.batches() if part.batches else ():
                    folders = [pa.array([part.folders[name]] * len(batch), pa.string()) for name in added]
                    row = pc.add(batch.column(ROW), part.rows.number * FILE_ROWS)
                    yield pa.record_batch([*(batch.column(name) for name in names), *folders, row], schema=schema)

    return Scan(engine.stream(schema, batches, group[0].rows.file), tuple(part.rows for part in group), tuple(names))


def _joined_json(engine: Engine, group: Sequence[_Opened]) -> Scan:
    """Return JSON files as one scan; a key that a file lacks is null in its rows."""
    keys = list(dict.fromkeys(name for part in group for name in part.columns))
    sources = [part.source for part in group if part.source]
    path, sizes = (sources[0].path, []) if len(sources) == 1 else joined(sources, engine.spill)
    rows, places, shift = engine.read_json(path, keys), None, group[0].rows.number * FILE_ROWS
    if sizes:
        starts = [part.rows.number * FILE_ROWS for part in group]
        place = np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
        places = engine.save(pa.table({POSITION: np.arange(len(place)), PLACE: place}))
    folders = {name: ibis.literal(value, "string") for name, value in group[0].folders.items()}
    files = tuple(part.rows for part in group)
    return Scan(rows.mutate(**folders), files, tuple(keys), is_json=True, places=places, shift=shift)


@dataclass(frozen=True)
class _Book:
    """Records the lines and columns of a file in the account; without `rejects`, it records nothing."""

    rejects: Rejects | None
    label: str
    section: str
    others: bool

    def chosen(self, columns: Sequence[str], names: Sequence[str], file: Path, partitions: Sequence[str]) -> list[str]:
        """Return the columns to read of the file; the rest are noted as unused."""
        known = [*columns, *(name for name in partitions if name not in columns)]
        for name in names:
            if name not in known:
                what = f"{self.label} has no column {name!r}, which data.{self.section} uses."
                if any(part.startswith(f"{name}=") for part in file.parent.parts):
                    raise DataError(f"{what} Its folder has that name. To use it, set partition_columns: [{name}].")
                if FORMS.get(base_suffix(file)) == "text" and any(_is_number(column) for column in columns):
                    raise DataError(
                        f"{what} Its first line seems to be data: {', '.join(columns)[:80]}. Name the columns with columns: […]."
                    )
                raise DataError(f"{what}{nearest(name, known)}")
        by_case: dict[str, str] = {}
        for name in names:
            if by_case.setdefault(name.lower(), name) != name:
                raise ConfigError(
                    f"data.{self.section} uses the columns {by_case[name.lower()]!r} and {name!r} of {file.name}. They differ "
                    "only in case. Rename one."
                )
        kept = list(dict.fromkeys([*names, *(distinct_names(columns, names, file.name) if self.others else ())]))
        if self.rejects is not None:
            account = self.rejects.of(self.label)
            account.table = self.section
            read = set(kept)
            account.unused_columns = [name for name in columns if name and name not in read]
        own = set(columns)
        return [name for name in kept if name in own]

    def reject(self, line: int, why: str, text: str) -> None:
        """Record a malformed line."""
        if self.rejects is not None:
            self.rejects.add(self.label, line, why, text)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?\d+(\.\d+)?", text))


def _text(engine: Engine, file: Path, names: list[str], table: TableConfig, book: _Book) -> _Opened:  # noqa: ARG001
    dialect, lines = find_dialect(file, table, names), Lines()
    folders = _partitions(file, table)
    chosen = book.chosen([name for name in dialect.columns if name], names, file, list(folders))
    columns = dict.fromkeys(chosen, pa.string())
    schema = pa.schema([*columns.items(), (ROW, pa.int64())])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in read_batches(file, table, dialect, chosen, lines, book.reject):
            row = pc.subtract(batch.column(LINE), lines.offset)
            yield pa.record_batch([*batch.columns[:-1], row], schema=schema)
        if book.rejects is not None:
            account = book.rejects.of(book.label)
            account.lines = lines.total
            skipped = {"header": lines.header, "blank": lines.blank, "comments": lines.comments}
            account.skipped = {kind: number for kind, number in skipped.items() if number}

    def locate(rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        return line_texts(file, table.encoding, [row + lines.offset for row in rows])

    found = FileRows(file, book.label, locate, lambda _: lines.rows, lambda: lines.rejected)
    return _Opened(found, columns, _wanted(folders, names, chosen), batches)


def _json(engine: Engine, file: Path, names: list[str], table: TableConfig, book: _Book) -> _Opened:
    source = open_json(file, engine.spill, table.encoding)
    folders = _partitions(file, table)
    keys = source.keys(names)
    if not keys:
        raise DataError(
            f"{file} holds no JSON object that can be read. Expected one object a line, an array of objects, or Python dicts. "
            "Correct the file."
        )
    chosen = book.chosen(keys, names, file, list(folders))
    found = FileRows(file, book.label, source.locate, source.rows)
    return _Opened(found, dict.fromkeys(chosen, pa.string()), _wanted(folders, names, chosen), source=source)


def scan_json(engine: Engine, file: Path, keys: Sequence[str]) -> Scan:
    """Open a JSON file as some of its keys, all as strings; a key that no object has is null."""
    with reading(file):
        source = open_json(file, engine.spill)
    rows = engine.read_json(source.path, keys)
    return Scan(rows, (FileRows(file, file.name, source.locate, source.rows),), tuple(keys), is_json=True)


def _parquet(engine: Engine, file: Path, names: list[str], table: TableConfig, book: _Book) -> _Opened:
    in_memory: Any = engine.tables.get(str(file))
    try:
        parquet: Any = None if in_memory is not None else pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a Parquet file: {clause(str(error).splitlines()[0])}. Replace the file.") from None
    schema, folders = in_memory.schema if parquet is None else parquet.schema_arrow, _partitions(file, table)
    kinds = {field.name: empty.type for field in schema if (empty := plain_column(pa.array([], field.type))) is not None}
    for name in names:
        if schema.names.count(name) > 1:
            raise DataError(f"{file} has {schema.names.count(name)} columns {name!r}. Each column must be there once. Rename one.")
        if name in schema.names and name not in kinds:
            raise DataError(
                f"{file}: column {name!r} has the type {schema.field(name).type}, which has no single values. Convert it."
            )
    chosen = book.chosen(list(kinds), names, file, list(folders))
    if book.rejects is not None:
        unread = [name for name in schema.names if name not in kinds]
        book.rejects.of(book.label).unused_columns += unread
    columns = {name: kinds[name] for name in chosen}
    if parquet is not None:
        check_ratio(file, parquet.metadata.num_rows * len(chosen) * VALUE_BYTES)
    chosen_kinds = pa.schema([*columns.items(), (ROW, pa.int64())])

    def batches() -> Iterator[pa.RecordBatch]:
        start = 0
        read = pq.ParquetFile(file).iter_batches if in_memory is None else in_memory.select(chosen).to_batches
        for batch in read(PARQUET_ROWS, columns=chosen) if in_memory is None else read(PARQUET_ROWS):
            data = [plain_column(batch.column(name)) for name in chosen]
            yield pa.record_batch([*data, pa.array(np.arange(start, start + len(batch)))], schema=chosen_kinds)
            start += len(batch)

    def locate(positions: Sequence[int]) -> Iterator[tuple[int, str]]:
        return ((position + 1, "") for position in positions)

    size = parquet.metadata.num_rows if in_memory is None else in_memory.num_rows
    return _Opened(FileRows(file, book.label, locate, lambda _: size), columns, _wanted(folders, names, chosen), batches)


def _partitions(file: Path, table: TableConfig) -> dict[str, str]:
    """Return the wanted columns among the folder names ("day=2023-01-03") of a file."""
    pairs = (re.fullmatch(r"([^=]+)=(.*)", part) for part in file.parent.parts)
    return {pair[1]: unquote(pair[2]) for pair in pairs if pair and pair[1] in table.partition_columns}


def _wanted(folders: dict[str, str], names: Sequence[str], own: Sequence[str]) -> dict[str, str | None]:
    """Return the values from the names of folders that are read, which the file has no column for."""
    null = "__HIVE_DEFAULT_PARTITION__"
    return {name: None if value == null else value for name, value in folders.items() if name in names and name not in own}


__all__ = ["LINE", "FileRows", "JsonFile", "Locate", "Scan", "scan_files", "scan_json"]
