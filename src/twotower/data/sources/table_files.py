"""Open one file of a table, in any format, as a lazy table of selected columns. All sources of tables use it.

The column `ROW` has the position of a row in the file, invalid ones included; in delimited text, of its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
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
from twotower.data.sources.engine import ROW, Engine
from twotower.data.sources.json_files import JsonFile, open_json
from twotower.data.sources.other_columns import distinct_names
from twotower.data.sources.text_files import COMPRESSED, base_suffix, reading
from twotower.data.sources.values import plain_column
from twotower.errors import ConfigError, DataError, nearest
from twotower.utils.config import InteractionTableConfig, TableConfig
from twotower.utils.ids import TEXT, id_type

FORMS = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".dat", ".inter", ".item", ".user", ".data", ".tab"), "text"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
}
PARQUET_ROWS = 1 << 16
Locate = Callable[[Sequence[int]], Iterator[tuple[int, str]]]  # ascending rows → (line number from 1, text) of each


@dataclass(frozen=True)
class Scan:
    """One file as a table.

    Attributes
    ----------
    rows
        The columns, and `ROW`. It can be computed once.
    locate
        Finds line number and text of rows.
    expected
        Returns the number of rows of the file, given that of `rows`. None: unknown.
    malformed
        Returns the number of rejected lines that are not in `rows`, after `rows` was computed.
    """

    rows: ir.Table
    locate: Locate
    expected: Callable[[int], int] | None
    malformed: Callable[[], int] = lambda: 0
    is_json: bool = False


def form_of(file: Path) -> str:
    """Return "text", "parquet" or "json" by a file's suffix.

    Raises
    ------
    DataError
        The suffix is unknown.
    """
    form = FORMS.get(base_suffix(file))
    if form is None:
        raise DataError(
            f"{file} has an unknown suffix. Allowed: {', '.join(FORMS)}; text and JSON also with {', '.join(COMPRESSED)}. Convert "
            "or rename the file."
        )
    return form


def scan_file(
    engine: Engine,
    file: Path,
    names: Sequence[str],
    section: str,
    rejects: Rejects,
    *,
    label: str | None = None,
    table: TableConfig | None = None,
    others: bool = False,
    count: bool = True,
) -> Scan:
    """Open a file by its suffix, as `names` and, with `others`, its other columns.

    Parameters
    ----------
    label
        Name of the file in the account; None: the name of the file.
    table
        Format of the file; None: detected.
    count
        False for a second reading, which is not accounted for.

    Raises
    ------
    DataError
        The suffix is unknown, the file cannot be opened, or a column is missing (the message has the nearest name).
    """
    table = table or InteractionTableConfig(path=file)
    opener = {"text": _text, "json": _json, "parquet": _parquet}["parquet" if str(file) in engine.tables else form_of(file)]
    book = _Book(rejects if count else None, label or file.name, section, others)
    return opener(engine, file, list(names), table, book)


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


def _text(engine: Engine, file: Path, names: list[str], table: TableConfig, book: _Book) -> Scan:
    dialect, lines = find_dialect(file, table, names), Lines()
    folders = _partitions(file, table)
    chosen = book.chosen([name for name in dialect.columns if name], names, file, list(folders))
    schema = pa.schema([*((name, pa.string()) for name in chosen), (ROW, pa.int64())])

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

    rows = _with_partitions(engine.stream(schema, batches, file), folders, names)
    return Scan(rows, locate, lambda _: lines.rows, lambda: lines.rejected)


def _json(engine: Engine, file: Path, names: list[str], table: TableConfig, book: _Book) -> Scan:
    source = open_json(file, engine.spill, table.encoding)
    folders = _partitions(file, table)
    keys = source.keys(names)
    if not keys:
        raise DataError(
            f"{file} holds no JSON object that can be read. Expected one object a line, an array of objects, or Python dicts. "
            "Correct the file."
        )
    chosen = book.chosen(keys, names, file, list(folders))
    rows = _with_partitions(engine.read_json(source.path, chosen), folders, names)
    return Scan(rows, source.locate, source.rows, is_json=True)


def scan_json(engine: Engine, file: Path, keys: Sequence[str]) -> Scan:
    """Open a JSON file as some of its keys, all as strings; a key that no object has is null."""
    with reading(file):
        source = open_json(file, engine.spill)
    return Scan(engine.read_json(source.path, keys), source.locate, source.rows, is_json=True)


def column_id_type(engine: Engine, base: Path, path: Path, column: str) -> str:
    """Return the type of an id column, as `utils.ids.id_type` names it; text and JSON files have texts."""
    in_memory = engine.tables.get(str(path))
    if in_memory is not None:
        return id_type(in_memory.schema.field(column).type)
    files = table_paths(base, path, "interactions")
    schemas = [pq.read_schema(file) if form_of(file) == "parquet" else None for file in files]
    kinds = {id_type(schema.field(column).type) if schema and column in schema.names else TEXT for schema in schemas}
    return kinds.pop() if len(kinds) == 1 else TEXT


def _parquet(engine: Engine, file: Path, names: list[str], table: TableConfig, book: _Book) -> Scan:
    in_memory: Any = engine.tables.get(str(file))
    try:
        parquet: Any = None if in_memory is not None else pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a Parquet file: {str(error).splitlines()[0]} Replace the file.") from None
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
    chosen_kinds = pa.schema([*((name, kinds[name]) for name in chosen), (ROW, pa.int64())])

    def batches() -> Iterator[pa.RecordBatch]:
        start = 0
        read = pq.ParquetFile(file).iter_batches if in_memory is None else in_memory.select(chosen).to_batches
        for batch in read(PARQUET_ROWS, columns=chosen) if in_memory is None else read(PARQUET_ROWS):
            data = [plain_column(batch.column(name)) for name in chosen]
            yield pa.record_batch([*data, pa.array(np.arange(start, start + len(batch)))], schema=chosen_kinds)
            start += len(batch)

    def locate(positions: Sequence[int]) -> Iterator[tuple[int, str]]:
        return ((position + 1, "") for position in positions)

    rows = _with_partitions(engine.stream(chosen_kinds, batches, file), folders, names)
    return Scan(rows, locate, lambda _: parquet.metadata.num_rows if in_memory is None else in_memory.num_rows)


def table_paths(base: Path, path: Path, section: str) -> list[Path]:
    """Return the files of a table, part-2 before part-10: one file, the parts in a folder, or the files of a glob.

    Files whose names begin with "_" or "." are ignored: they are markers of the program that wrote the folder.

    Raises
    ------
    DataError
        There is no file.
    """
    full = base / path
    if full.is_file():
        return [full]
    if full.is_dir():
        found = [full]
    else:
        found = [base / name for name in glob(str(path), root_dir=base, recursive=True)] if set("*?[") & set(str(path)) else []
    parts = [part for each in found for part in (each.rglob("*") if each.is_dir() else [each])]
    kept = sorted({part for part in parts if part.is_file() and not _is_marker(part, full)}, key=_in_number_order)
    if not kept:
        forms = f"a file, a folder or a glob ({', '.join(FORMS)}; also {', '.join(COMPRESSED)})"
        holds = listing(full if full.is_dir() else full.parent)
        raise DataError(f"No file at {full}: {holds}. data.{section}.path must be {forms}, relative to data.path. Correct it.")
    return kept


def _in_number_order(part: Path) -> tuple[list[tuple[int, str]], Path]:
    """Return a key that puts part-2 before part-10."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", str(part))
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], part


def _is_marker(part: Path, below: Path) -> bool:
    names = part.relative_to(below).parts if part.is_relative_to(below) else part.parts[-1:]
    return any(name.startswith(("_", ".")) for name in names)


def listing(folder: Path, most: int = 6) -> str:
    """Return a description of a folder's content for a message."""
    if not folder.exists():
        return f"{folder} does not exist"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {', '.join(names[:most]) or 'nothing'}{rest}"


def _partitions(file: Path, table: TableConfig) -> dict[str, str]:
    """Return the wanted columns among the folder names ("day=2023-01-03") of a file."""
    pairs = (re.fullmatch(r"([^=]+)=(.*)", part) for part in file.parent.parts)
    return {pair[1]: unquote(pair[2]) for pair in pairs if pair and pair[1] in table.partition_columns}


def _with_partitions(rows: ir.Table, folders: dict[str, str], names: Sequence[str]) -> ir.Table:
    missing = {name: value for name, value in folders.items() if name in names and name not in rows.columns}
    null = "__HIVE_DEFAULT_PARTITION__"
    return rows.mutate(**{name: ibis.literal(None if value == null else value, "string") for name, value in missing.items()})


__all__ = ["FORMS", "LINE", "JsonFile", "Locate", "Scan", "form_of", "scan_file"]
