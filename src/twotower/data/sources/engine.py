"""Compute the tables of `prepare`: the interface of an engine, and the DuckDB engine.

`prepare` uses Ibis expressions, which are the same for all engines. `Engine` covers what differs: storing tables and reading files.
Rows of a file have `ROW`, their position in it. A line that is not a JSON object is a row of nulls, and other rows keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis.expr.operations import DatabaseTable

ROW = "source_row"  # int64: position among the rows of the file, from 0
MEMORY_LIMIT = "2GB"  # of DuckDB; beyond it, DuckDB spills to disk
OBJECTS = {"maximum_object_size": 1 << 26, "hive_partitioning": False}
Batches = Callable[[], Iterator[pa.RecordBatch]]


class Engine(Protocol):
    """Interface of an engine, which stores tables and computes Ibis expressions.

    Attributes
    ----------
    con
        The Ibis connection.
    spill
        Folder for temporary files.
    tables
        Tables in memory by name; the `tables` source takes a `path` of that name as one of them.
    is_local
        True if the engine runs in this process, and can read the files of `spill`.
    """

    con: Any
    spill: Path
    tables: Mapping[str, pa.Table]
    is_local: bool

    def save(self, rows: ir.Table | pa.Table) -> ir.Table:
        """Compute `rows` once and store them until `free`."""

    def save_rows(self, rows: ir.Table, columns: dict[str, ir.Value]) -> ir.Table:
        """Compute `columns` of the rows of a file once and store them with `ROW`, unless `columns` has it."""

    def free(self, table: ir.Table) -> None:
        """Drop a table of `save`; do not compute expressions over it afterwards."""

    def stream(self, schema: pa.Schema, batches: Batches, file: Path) -> ir.Table:
        """Return a lazy table of record batches with `ROW`, which come from `file`. It can be computed once."""

    def read_json(self, path: Path, keys: Sequence[str]) -> ir.Table:
        """Return a lazy table of the keys of a JSON-lines file, plain or gzipped, all as strings, with `ROW`.

        Blank lines are not rows. Values that are not strings become their JSON text.
        """

    def close(self) -> None:
        """Free everything."""


class DuckDBEngine:
    """Engine that runs DuckDB in this process.

    Parameters
    ----------
    spill
        Folder for data that exceeds memory.
    tables
        See `Engine`.
    """

    def __init__(self, spill: Path, tables: Mapping[str, pa.Table] | None = None) -> None:
        self.tables, self.is_local = tables or {}, True
        self.con: Any = ibis.duckdb.connect(memory_limit=MEMORY_LIMIT, temp_directory=str(spill))
        self.spill = spill
        self._streams: set[str] = set()
        self._failed: list[Exception] = []  # errors of streams: the engine would wrap them in its own

    def save(self, rows: ir.Table | pa.Table) -> ir.Table:
        """See `Engine`."""
        table = rows if isinstance(rows, ir.Table) else ibis.memtable(rows)
        try:
            kept: ir.Table = self.con.create_table(ibis.util.gen_name("kept"), table, temp=True)
        except Exception:
            if self._failed:
                raise self._failed.pop() from None
            raise
        return kept

    def save_rows(self, rows: ir.Table, columns: dict[str, ir.Value]) -> ir.Table:
        """See `Engine`. Rows are numbered by the stored table; a window over the scan would use one thread."""
        streamed = any(table.get_name() in self._streams for table in kept_below(rows))
        kept = self.save(rows.select(**({ROW: rows[ROW]} if streamed else {}), **columns))
        return kept if streamed or ROW in columns else kept.mutate(kept.rowid().cast("int64").name(ROW))

    def free(self, table: ir.Table) -> None:
        """See `Engine`."""
        self.con.raw_sql(f"DROP TABLE {table.get_name()}")  # unquoted: DuckDB 2.0 does not find a quoted name here

    def stream(self, schema: pa.Schema, batches: Batches, file: Path) -> ir.Table:  # noqa: ARG002
        """See `Engine`."""

        def guarded() -> Iterator[pa.RecordBatch]:
            try:
                yield from batches()
            except Exception as error:
                self._failed.append(error)
                raise

        name = ibis.util.gen_name("stream")
        self._streams.add(name)
        self.con.con.register(name, pa.RecordBatchReader.from_batches(schema, guarded()))
        table: ir.Table = self.con.table(name)
        return table

    def read_json(self, path: Path, keys: Sequence[str]) -> ir.Table:
        """See `Engine`."""
        types = dict.fromkeys(keys, "VARCHAR")
        table = self.con.read_json(str(path), columns=types, format="newline_delimited", ignore_errors=True, **OBJECTS)
        return table.mutate(ibis.row_number().cast("int64").name(ROW))

    def close(self) -> None:
        """See `Engine`."""
        self.con.disconnect()


def kept_below(rows: ir.Table) -> list[ir.Table]:
    """Return the stored tables that an expression reads."""
    return list({op.name: op.to_expr() for op in rows.op().find(DatabaseTable)}.values())
