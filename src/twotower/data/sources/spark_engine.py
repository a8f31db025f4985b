"""Run `prepare` on Spark, for data that does not fit on one machine.

Spark is imported only when a `SparkEngine` is created.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from twotower.data.sources.engine import ROW, Batches
from twotower.utils.spark_session import spark_session

SETTINGS = {
    "spark.sql.ansi.enabled": "true",
    "spark.driver.maxResultSize": "0",
    "spark.sql.json.enablePartialResults": "false",
    "spark.sql.files.minPartitionNum": "64",  # else the partitions depend on the number of workers: see `_position`
}
LOCAL = {"spark.sql.shuffle.partitions": "4"}  # for a single process
IN_PARTITION = (1 << 33) - 1  # bits of `monotonically_increasing_id` with the position in the partition
JSON_OPTIONS = {"allowSingleQuotes": "false", "allowNumericLeadingZeros": "false"}


class SparkEngine:
    """Engine that runs Spark, on a cluster or in a local process.

    Parameters
    ----------
    master
        Address of the master: "local[*]", "spark://host:7077", "yarn", …. All workers must be able to read the raw files.
    spill
        Folder of the driver for data that exceeds memory.

    Raises
    ------
    ConfigError
        pyspark or Java is not installed, or Spark does not start.
    """

    def __init__(self, master: str, spill: Path) -> None:
        self.spill = spill
        self.tables: Mapping[str, pa.Table] = {}  # Spark reads files
        places = {"spark.local.dir": str(spill), "spark.sql.warehouse.dir": str(spill)}
        settings = {**SETTINGS, **(LOCAL if master.startswith("local") else {}), **places}
        self.session: Any = spark_session("twotower prepare", master, settings, other="duckdb")
        self.con: Any = _connection(self.session)

    def save(self, rows: ir.Table | pa.Table) -> ir.Table:
        """See `Engine`. Partitions stay on the workers and their plan is dropped, so that plans do not grow with every step."""
        frame = _typed(self.con, rows) if isinstance(rows, ir.Table) else self.session.createDataFrame(rows)
        return self._view(frame.localCheckpoint(eager=True))

    def save_rows(self, rows: ir.Table, columns: dict[str, ir.Value]) -> ir.Table:
        """See `Engine`."""
        return self.save(rows.select(**{ROW: rows[ROW], **columns}))

    def free(self, table: ir.Table) -> None:
        """See `Engine`."""
        self.session.catalog.dropTempView(table.get_name())

    def stream(self, schema: pa.Schema, batches: Batches, file: Path) -> ir.Table:  # noqa: ARG002
        """See `Engine`. Files other than JSON lines are read by the driver."""
        return self._view(self.session.createDataFrame(pa.Table.from_batches(list(batches()), schema)))

    def read_json(self, path: Path, keys: Sequence[str]) -> ir.Table:
        """See `Engine`. A line is parsed as the only element of an array, so that text after the object is an error."""
        from pyspark.sql import functions as f
        from pyspark.sql.types import ArrayType, StringType, StructField, StructType

        lines = self.session.read.text(str(path), lineSep="\n").filter(f.col("value").rlike(r"\S"))
        kind = ArrayType(StructType([StructField(key, StringType()) for key in keys]))
        found = f.from_json(f.concat(f.lit("["), "value", f.lit("]")), kind, JSON_OPTIONS)
        only = f.when(f.is_valid_utf8("value") & (f.size(found) == 1), f.try_element_at(found, f.lit(1)))
        rows = lines.select(only.alias("row"), self._position(lines).alias(ROW))
        return self._view(rows.select(*(f.col("row")[key].alias(key) for key in keys), ROW))

    def close(self) -> None:
        """See `Engine`."""
        self.session.stop()

    def _position(self, lines: Any) -> Any:
        """Return the position of each line: known within a partition, and partitions have the order of the file."""
        from pyspark.sql import functions as f

        sizes = {row[0]: row[1] for row in lines.groupBy(f.spark_partition_id()).count().collect()}
        before, pairs = 0, []
        for partition in sorted(sizes):
            pairs += [f.lit(partition), f.lit(before)]
            before += sizes[partition]
        number = f.monotonically_increasing_id()
        start = f.create_map(*pairs)[f.shiftright(number, 33).cast("int")] if pairs else f.lit(0)
        return (number.bitwiseAND(f.lit(IN_PARTITION)) + start).cast("long")

    def _view(self, frame: Any) -> ir.Table:
        name = ibis.util.gen_name("kept")
        frame.createOrReplaceTempView(name)
        table: ir.Table = self.con.table(name)
        return table


def _connection(session: Any) -> Any:
    """Return an Ibis connection whose results skip pandas, which would turn NaN into null and integers into floats."""
    from ibis.backends.pyspark import Backend

    class Connection(Backend):  # type: ignore[misc]
        def to_pyarrow(self, expr: ir.Expr, /, **_: Any) -> Any:
            table = expr.as_table()
            found = _typed(self, table).toArrow()
            return expr.__pyarrow_result__(found.cast(table.schema().to_pyarrow()))

    connection = Connection()
    Connection.register_options()
    connection.do_connect(session)
    return connection


def _typed(connection: Any, rows: ir.Table) -> Any:
    """Return a data frame with the types of Ibis: Spark would use a decimal for 1.0, and 32 bits for a row number."""
    from ibis.backends.pyspark.datatypes import PySparkSchema
    from pyspark.sql import functions as f

    frame = connection._session.sql(connection.compile(rows))
    kinds = PySparkSchema.from_ibis(rows.schema())
    return frame.select(*(f.col(f"`{field.name}`").cast(field.dataType).alias(field.name) for field in kinds))
