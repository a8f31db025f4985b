"""Spark as the engine of `prepare`, for data that one machine does not hold.

Enters: the address of a Spark master. Leaves: an `Engine`. Spark is imported when an engine is made, and not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from twotower.data.sources.engine import ROW
from twotower.errors import ConfigError

SETTINGS = {
    "spark.sql.session.timeZone": "UTC",  # times of the raw files have no zone
    "spark.sql.ansi.enabled": "true",
    "spark.driver.maxResultSize": "0",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "OFF",  # errors are raised all the same; the log repeats them, and every retry, by the page
    "spark.sql.json.enablePartialResults": "false",
    "spark.sql.files.minPartitionNum": "64",  # else a file is cut by how many workers there are at the moment: see `_position`
}
LOCAL = {
    "spark.sql.shuffle.partitions": "4",
    "spark.driver.memory": "4g",
    "spark.driver.host": "localhost",
}  # one process does it all
IN_PARTITION = (1 << 33) - 1  # of `monotonically_increasing_id`: the position of a row in its partition
JSON_OPTIONS = {"allowSingleQuotes": "false", "allowNumericLeadingZeros": "false"}


class SparkEngine:
    """Spark, on the cluster or in the local process that `master` names.

    Parameters
    ----------
    master
        "local[*]", "spark://host:7077", "yarn" …; raw files must stand where all its workers can read them.
    spill
        Where the driver puts what memory does not hold.

    Raises
    ------
    ConfigError
        pyspark is not installed, or Java is not.
    """

    def __init__(self, master: str, spill: Path) -> None:
        try:
            from pyspark.sql import SparkSession

            warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
            builder = SparkSession.builder.master(master).appName("twotower prepare")
            places = {"spark.local.dir": str(spill), "spark.sql.warehouse.dir": str(spill)}
            for name, value in {**SETTINGS, **(LOCAL if master.startswith("local") else {}), **places}.items():
                builder = builder.config(name, value)
            self.session: Any = builder.getOrCreate()
        except (ImportError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(
                f"prepare.engine spark needs pyspark and Java. {why}. Install two-tower-rec[spark] and Java 17, or use duckdb."
            ) from None
        self.con: Any = _connection(self.session)

    def save(self, rows: ir.Table | pa.Table) -> ir.Table:
        """See `Engine`. Partitions stay on the workers, their plan is forgotten: without that, plans grow with every step."""
        frame = _typed(self.con, rows) if isinstance(rows, ir.Table) else self.session.createDataFrame(rows)
        return self._view(frame.localCheckpoint(eager=True))

    def save_rows(self, rows: ir.Table, columns: dict[str, ir.Value]) -> ir.Table:
        """See `Engine`."""
        return self.save(rows.select(**{ROW: rows[ROW], **columns}))

    def free(self, table: ir.Table) -> None:
        """See `Engine`."""
        self.session.catalog.dropTempView(table.get_name())

    def read_json(self, path: Path, keys: Sequence[str]) -> ir.Table:
        """See `Engine`. A line is parsed as the only element of an array: what follows the object makes the line a bad one."""
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
        """The position of each line: Spark knows it within a partition, and partitions of one file are in its order."""
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
    """Ibis on a session, but results come as Arrow alone: by way of pandas NaN would become null, and integers floats."""
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
    """A data frame with the types that Ibis promises: Spark takes 1.0 for a decimal, and a row number for 32 bits."""
    from ibis.backends.pyspark.datatypes import PySparkSchema
    from pyspark.sql import functions as f

    frame = connection._session.sql(connection.compile(rows))
    kinds = PySparkSchema.from_ibis(rows.schema())
    return frame.select(*(f.col(f"`{field.name}`").cast(field.dataType).alias(field.name) for field in kinds))
