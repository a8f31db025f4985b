"""What computes the tables of `prepare`: where they are kept, and how the lines of a file become rows.

Enters: Ibis expressions and the paths of files. Leaves: Ibis tables. Everything else in `prepare` is Ibis and the same for all
engines; what they do differently stands behind `Engine`.

Promise: the rows of a file come with `ROW`, their position in it; a line that is no JSON object is a row of nulls and moves no
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis.expr.operations import DatabaseTable

ROW = "source_row"  # int64: position among the rows of the file, from 0
MEMORY_LIMIT = "2GB"  # of DuckDB alone; beyond it, it spills


class Engine(Protocol):
    """Where tables live.

    Attributes
    ----------
    con
        The Ibis connection.
    """

    con: Any

    def save(self, rows: ir.Table | pa.Table) -> ir.Table:
        """Compute `rows` once, and keep them until `free`."""

    def save_rows(self, rows: ir.Table, columns: dict[str, ir.Value]) -> ir.Table:
        """Compute `columns` of the rows of a file once, and keep them with `ROW`, unless `columns` bring one."""

    def free(self, table: ir.Table) -> None:
        """Drop what `save` kept; expressions over it must not be computed afterwards."""

    def read_json(self, path: Path, keys: Sequence[str]) -> ir.Table:
        """A lazy table of the named keys of a file of JSON lines, plain or gzipped, all as strings, with `ROW`.

        Blank lines are no rows. A value that is no string is its JSON text.
        """

    def close(self) -> None:
        """Free everything."""


class DuckDBEngine:
    """DuckDB in this process.

    Parameters
    ----------
    spill
        Where tables go that memory does not hold.
    """

    def __init__(self, spill: Path) -> None:
        self.con: Any = ibis.duckdb.connect(memory_limit=MEMORY_LIMIT, temp_directory=str(spill))

    def save(self, rows: ir.Table | pa.Table) -> ir.Table:
        """See `Engine`."""
        table = rows if isinstance(rows, ir.Table) else ibis.memtable(rows)
        kept: ir.Table = self.con.create_table(ibis.util.gen_name("kept"), table, temp=True)
        return kept

    def save_rows(self, rows: ir.Table, columns: dict[str, ir.Value]) -> ir.Table:
        """See `Engine`. A table keeps the order of the file and numbers its rows; a window over the scan would do so on one."""
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
    """The tables of the engine that an expression reads."""
    return list({op.name: op.to_expr() for op in rows.op().find(DatabaseTable)}.values())
