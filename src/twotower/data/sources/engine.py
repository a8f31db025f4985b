"""Compute the tables of `prepare`: the interface of an engine, and the DuckDB engine.

`prepare` uses Ibis expressions, which are the same for all engines. `Engine` covers what differs: storing tables and reading files.
Rows of a file have `ROW`, their position in it. A line that is not a JSON object is a row of nulls, and other rows keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis.expr.operations import DatabaseTable

ROW = "source_row"  # int64: position among the rows of the file, from 0
MEMORY_LIMIT = "2GB"  # of DuckDB; beyond it, DuckDB spills to disk


class Engine(Protocol):
    """Interface of an engine, which stores tables and computes Ibis expressions.

    Attributes
    ----------
    con
        The Ibis connection.
    tables
        Tables in memory by name; the `tables` source takes a `path` of that name as one of them.
    """

    con: Any
    tables: Mapping[str, pa.Table]

    def save(self, rows: ir.Table | pa.Table) -> ir.Table:
        """Compute `rows` once and store them until `free`."""

    def save_rows(self, rows: ir.Table, columns: dict[str, ir.Value]) -> ir.Table:
        """Compute `columns` of the rows of a file once and store them with `ROW`, unless `columns` has it."""

    def free(self, table: ir.Table) -> None:
        """Drop a table of `save`; do not compute expressions over it afterwards."""

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
        self.tables = tables or {}
        self.con: Any = ibis.duckdb.connect(memory_limit=MEMORY_LIMIT, temp_directory=str(spill))

    def save(self, rows: ir.Table | pa.Table) -> ir.Table:
        """See `Engine`."""
        table = rows if isinstance(rows, ir.Table) else ibis.memtable(rows)
        kept: ir.Table = self.con.create_table(ibis.util.gen_name("kept"), table, temp=True)
        return kept

    def save_rows(self, rows: ir.Table, columns: dict[str, ir.Value]) -> ir.Table:
        """See `Engine`. Rows are numbered by the stored table; a window over the scan would use one thread."""
        kept = self.save(rows.select(**columns))
        return kept if ROW in columns else kept.mutate(kept.rowid().cast("int64").name(ROW))

    def free(self, table: ir.Table) -> None:
        """See `Engine`."""
        self.con.raw_sql(f"DROP TABLE {table.get_name()}")  # unquoted: DuckDB 2.0 does not find a quoted name here

    def read_json(self, path: Path, keys: Sequence[str]) -> ir.Table:
        """See `Engine`."""
        types = dict.fromkeys(keys, "VARCHAR")
        table = self.con.read_json(str(path), columns=types, format="newline_delimited", ignore_errors=True)
        return table.mutate(ibis.row_number().cast("int64").name(ROW))

    def close(self) -> None:
        """See `Engine`."""
        self.con.disconnect()


def kept_below(rows: ir.Table) -> list[ir.Table]:
    """Return the stored tables that an expression reads."""
    return list({op.name: op.to_expr() for op in rows.op().find(DatabaseTable)}.values())
