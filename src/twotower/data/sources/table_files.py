"""Open one CSV, Parquet or JSON-lines file as a lazy table of chosen columns, and find the lines of its rows.

Rows have the order of the file and their position `ROW`. A malformed line does not change the position of other rows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.sources.engine import ROW, DuckDBEngine, Engine
from twotower.data.sources.other_columns import distinct_names
from twotower.data.sources.raw_tables import Locate, Rejects, json_lines, listing, locate_json, open_bytes, reading
from twotower.errors import ConfigError, DataError, nearest
from twotower.utils.frames import plain
from twotower.utils.ids import TEXT, id_type

FORMS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
DELIMITERS = ",\t;|"
SAMPLED_LINES = 1000  # lines of a JSON-lines file that are read to find its keys

Close = Callable[[], int]
Scan = tuple[ir.Table, Locate, Close]
"""(rows, locate, close): `close` reports malformed lines after the first full scan and returns their number."""


def scan_file(engine: Engine, file: Path, names: Sequence[str], section: str, rejects: Rejects, *, others: bool = False) -> Scan:
    """Open a file by its suffix; return rows, `locate` and `close` (see `Scan`). With `others`, its other columns follow `names`.

    Raises
    ------
    DataError
        The suffix is unknown, the file cannot be opened, or a column is missing (the message has the nearest name).
    ConfigError
        The engine is not DuckDB, and the file is CSV or Parquet.
    """
    if file.name in engine.tables:
        return _in_memory(engine.tables[file.name], file, names, section, others)
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    form = FORMS.get(suffix)
    if form is None:
        raise DataError(f"{file} has an unknown suffix. Allowed: {', '.join(FORMS)} (also .gz). Convert or rename the file.")
    if form != "json" and not isinstance(engine, DuckDBEngine):
        raise ConfigError(f"{file} is not JSON lines, which prepare.engine spark needs. Convert it, or use the engine duckdb.")
    with reading(file):
        return {"csv": _csv, "json": _json, "parquet": _parquet}[form](engine, file, names, section, rejects, others)


def find_files(engine: Engine, base: Path, path: Path, section: str) -> list[Path]:
    """Return the file, or the files of a glob, sorted by name; the path itself for a table in memory."""
    if str(path) in engine.tables:
        return [path]
    full = base / path
    if full.is_file():
        return [full]
    found = sorted(p for p in base.glob(str(path)) if p.is_file()) if not path.is_absolute() and set("*?[") & set(str(path)) else []
    if not found:
        forms = f"a file or glob ({', '.join(FORMS)}; also .gz)"
        instead = f"No file at {full}: {listing(full.parent)}"
        raise DataError(f"{instead}. data.{section}.path must be {forms}, relative to data.path. Correct it.")
    return found


def column_id_type(engine: Engine, base: Path, path: Path, column: str) -> str:
    """Return the type of an id column, as `utils.ids.id_type` names it; CSV and JSON lines have texts."""
    if str(path) in engine.tables:
        return id_type(engine.tables[str(path)].schema.field(column).type)
    files = find_files(engine, base, path, "interactions")
    kinds = {id_type(pq.read_schema(file).field(column).type) if file.suffix == ".parquet" else TEXT for file in files}
    return kinds.pop() if len(kinds) == 1 else TEXT


def _chosen(columns: Sequence[str], names: Sequence[str], file: Path, section: str, others: bool) -> list[str]:
    for name in names:
        if name not in columns:
            raise DataError(f"{file.name} has no column {name!r}, which data.{section} uses.{nearest(name, columns)}")
    return list(dict.fromkeys([*names, *(distinct_names(columns, names, file.name) if others else ())]))


def _in_memory(table: pa.Table, file: Path, names: Sequence[str], section: str, others: bool) -> Scan:
    chosen = table.select(_chosen(table.column_names, names, file, section, others))

    def locate(positions: Sequence[int]) -> Iterator[tuple[int, str]]:
        return ((position + 1, "") for position in positions)

    return _numbered(ibis.memtable(plain(chosen))), locate, lambda: 0


def _parquet(engine: Engine, file: Path, names: Sequence[str], section: str, rejects: Rejects, others: bool) -> Scan:  # noqa: ARG001
    try:
        schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is not a Parquet file: {str(error).splitlines()[0]} Replace the file.") from None
    rows = engine.con.read_parquet(str(file)).select(*_chosen(schema.names, names, file, section, others))

    def locate(positions: Sequence[int]) -> Iterator[tuple[int, str]]:
        return ((position + 1, "") for position in positions)

    return _numbered(rows), locate, lambda: 0


def _json(engine: Engine, file: Path, names: Sequence[str], section: str, rejects: Rejects, others: bool) -> Scan:  # noqa: ARG001
    keys: dict[str, None] = {}
    for _, line in islice(json_lines(file), SAMPLED_LINES):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        keys |= dict.fromkeys(row if isinstance(row, dict) else ())
    chosen = _chosen(list(keys), names, file, section, others)
    return engine.read_json(file, chosen), locate_json(file), lambda: 0


def _csv(engine: Engine, file: Path, names: Sequence[str], section: str, rejects: Rejects, others: bool) -> Scan:
    header, delimiter = _header(file)
    chosen = _chosen(header, names, file, section, others)
    table = ibis.util.gen_name("rejects")
    rows = engine.con.read_csv(
        str(file),
        columns={name or f"unnamed {n}": "VARCHAR" for n, name in enumerate(header)},  # pandas writes an index without a name
        auto_detect=False,
        header=True,
        delim=delimiter,
        quote='"',
        escape='"',
        nullstr="",
        ignore_errors=True,
        store_rejects=True,
        rejects_table=table,
        rejects_scan=f"{table}_scans",
    ).select(*chosen)

    def malformed() -> dict[int, str]:
        query = f'SELECT line_byte_position, min(error_message) FROM "{table}" GROUP BY 1 ORDER BY 1'
        found = engine.con.raw_sql(query).fetchall()
        lines = _lines_at(file, [int(place) for place, _ in found])
        return {line: " ".join(str(why).split()) for line, (_, why) in zip(lines, found, strict=True)}

    def close() -> int:
        lines = malformed()
        for line, text in _csv_lines(file, lines.keys()):
            rejects.add(file.name, line, f"not a row of {len(header)} columns: {lines[line]}", text)
        rejects.total(file.name, len(lines))
        return len(lines)

    def locate(positions: Sequence[int]) -> Iterator[tuple[int, str]]:
        return _csv_rows(file, delimiter, positions, malformed().keys())

    return _numbered(rows), locate, close


def _numbered(rows: ir.Table) -> ir.Table:
    return rows.mutate(ibis.row_number().cast("int64").name(ROW))


def _header(file: Path) -> tuple[list[str], str]:
    """Return the column names and the delimiter of a CSV file: the most frequent one in its first line."""
    with open_bytes(file) as source:
        line = source.readline().decode("utf-8-sig", "replace").rstrip("\r\n")
    delimiter = max(DELIMITERS, key=line.count)
    header = next(csv.reader([line], delimiter=delimiter), [])
    if not header or len(set(header)) < len(header):
        raise DataError(
            f"{file} has no valid header: its first line is {line[:100]!r}. It must name the columns, each once. Add a header."
        )
    return header, delimiter


def _lines_at(file: Path, places: Sequence[int]) -> list[int]:
    """Return the line number of each byte position, ascending. (The engine does not count line breaks inside quotes.)"""
    found: list[int] = []
    if places:
        end = 0
        with open_bytes(file) as source:
            for number, line in enumerate(source, 1):
                end += len(line)
                while len(found) < len(places) and places[len(found)] < end:
                    found.append(number)
    return found


def _csv_lines(file: Path, wanted: Collection[int]) -> Iterator[tuple[int, str]]:
    if wanted:
        with open_bytes(file) as source:
            for number, line in enumerate(source, 1):
                if number in wanted:
                    yield number, line.decode("utf-8", "replace").rstrip("\r\n")


def _csv_rows(file: Path, delimiter: str, positions: Sequence[int], malformed: Collection[int]) -> Iterator[tuple[int, str]]:
    """Yield first line number and content of the well-formed rows at `positions`."""
    wanted = iter(positions)
    row, position = next(wanted, None), -1
    with io.TextIOWrapper(open_bytes(file), "utf-8-sig", "replace", newline="") as source:
        reader = csv.reader(source, delimiter=delimiter)
        next(reader, None)
        start = reader.line_num + 1
        for record in reader:
            position += bool(record) and start not in malformed
            while record and position == row and start not in malformed:
                yield start, delimiter.join(record)
                row = next(wanted, None)
            if row is None:
                return
            start = reader.line_num + 1
