"""Write recommendations for all users of a bundle on a Spark cluster: partitioned Parquet, resumable.

The lists are those of `recommend_all`, from the same code and the same blocks of users. The folder has

    _twotower.json      bundle, request and time of the lists, and the users of a part
    part=00000/         Parquet files in the order of the users; complete once it has a file _SUCCESS
    _SUCCESS            all parts are complete

A part is one Spark job. Parts that are complete are not computed again, so a run that was interrupted goes on when it is started
again. Each Python worker of an executor opens the bundle once, for all its tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from time import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import DataError
from twotower.retrieval.recommend_all import BLOCK, Ids, check_request, lists_of, native_ids_of
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Request
from twotower.search.approximate import one_thread
from twotower.utils.console import Report, silent
from twotower.utils.spark_session import spark_errors, spark_session

TASK_BLOCKS = 8  # blocks of users of a task: some seconds of work
TASKS_A_CORE = 8  # tasks of a part for each core: the cores wait for the last task of a part
ABOUT = "_twotower.json"
DONE = "_SUCCESS"
SETTINGS = {
    "spark.python.worker.reuse": "true",  # a worker opens the bundle once
    "spark.sql.execution.arrow.maxRecordsPerBatch": "1",  # a block at a time
}
ADVICE = "Check that the path is right, and that Spark has the library and the keys of this storage."


def recommend_on_spark(
    bundle: Path,
    out: str,
    request: Request,
    *,
    master: str | None = None,
    overwrite: bool = False,
    report: Report = silent,
) -> int:
    """Answer `request` for every user on Spark and write the lists to the folder `out`. Return the number of users.

    Parameters
    ----------
    bundle
        Folder of the bundle, which the driver and all executors can read.
    out
        Folder of any storage that Spark can write: a path, or an address such as "s3a://bucket/lists".
    request
        The request; its user is filled in. `explain` has no effect.
    master
        See `spark_session`.
    overwrite
        Replace lists of another bundle or request, or lists that are complete.
    report
        Called with the progress.

    Raises
    ------
    ConfigError
        pyspark or Java is missing, or Spark does not start.
    DataError
        `out` has other files or lists, Spark cannot write there, or an executor cannot open the same bundle.
    RequestError
        The request is invalid, for instance because of a malformed filter.
    """
    recommender = Recommender.load(bundle)
    check_request(recommender, request)
    seal, users = recommender.bundle.manifest.seal, recommender.dataset.n_users
    session = spark_session("twotower recommend", master, SETTINGS, other="local")
    try:
        with spark_errors(f"write lists to {out}", ADVICE):
            folder = _Folder(session, out)
            cores = session.sparkContext.defaultParallelism
            about = folder.begin({"bundle": seal, "block": BLOCK, "request": asdict(request)}, cores, overwrite=overwrite)
            names = lists_of(recommender, request, about["now"], 0, 0, _plain_ids(recommender)).schema
            lists = partial(_lists, str(bundle.resolve()), seal, request, about["now"], BLOCK)
            for number, start in enumerate(range(0, users, about["part_users"])):
                stop = min(start + about["part_users"], users)
                if not folder.has(f"part={number:05d}/{DONE}"):
                    folder.write(f"part={number:05d}", _blocks(session, start, stop).mapInArrow(lists, _spark_schema(names)))
                report("recommend", stop, users)
            folder.put(DONE, b"")
    finally:
        session.stop()
    return users


def _blocks(session: Any, start: int, stop: int) -> Any:
    """Return a frame with the number of each block of the users from `start` to `stop`, in order, some to a task."""
    first, last = start // BLOCK, -(-stop // BLOCK)
    return session.range(first, last, 1, -(-(last - first) // TASK_BLOCKS))


def _spark_schema(names: pa.Schema) -> Any:
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(names)


def _lists(
    path: str, seal: str, request: Request, now: int, block: int, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Yield the lists of blocks of users, which come by number.

    Runs in a worker of an executor, on one thread: Spark starts a task for each core.
    """
    recommender, native = _opened(path, seal)
    with one_thread():
        for batch in batches:
            for number in batch.column(0).to_pylist():
                stop = min((number + 1) * block, recommender.dataset.n_users)
                yield from lists_of(recommender, request, now, number * block, stop, native).to_batches()


@lru_cache(1)
def _opened(path: str, seal: str) -> tuple[Recommender, Ids]:
    """Open a bundle once in this process."""
    recommender = Recommender.load(path)
    found = recommender.bundle.manifest.seal
    if found != seal:
        raise DataError(
            f"An executor has another bundle at {path}: version {found[:12]}, expected {seal[:12]}. "
            "Give all executors the same folder, and start again."
        )
    return recommender, _plain_ids(recommender)


def _plain_ids(recommender: Recommender) -> Ids:
    """Return the ids of all users and items in types that Spark has: text, or signed integers."""
    users, items = (_plain(column) for column in native_ids_of(recommender.dataset))
    return users, items


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if not pa.types.is_unsigned_integer(column.type):
        return column
    fits = (pc.max(column).as_py() or 0) < 2**63
    return column.cast(pa.int64() if fits else pa.string())


@dataclass(frozen=True, slots=True)
class _Folder:
    """The output folder, on any storage of Hadoop."""

    session: Any
    path: str

    def begin(self, settings: dict[str, Any], cores: int, *, overwrite: bool) -> dict[str, Any]:
        """Return `settings` with the time and the size of a part: of the lists that are there, or of new ones."""
        settings = json.loads(json.dumps(settings))
        found = self._about()
        if found is None and self._names():
            raise DataError(f"{self.path} has other files: {', '.join(self._names()[:3])}. Choose an empty folder, or a new one.")
        if found is not None and not overwrite:
            if any(found.get(name) != value for name, value in settings.items()):
                raise DataError(f"{self.path} has lists of another bundle or request. Choose another folder, or add --overwrite.")
            if self.has(DONE):
                raise DataError(f"{self.path} has all these lists already. Choose another folder, or add --overwrite.")
            return found
        if found is not None:
            self._hadoop().delete(self._at(""), True)
        part_users = BLOCK * TASK_BLOCKS * TASKS_A_CORE * cores
        about = {**settings, "now": int(time()), "part_users": part_users}
        self.put(ABOUT, json.dumps(about, sort_keys=True).encode())
        return about

    def write(self, part: str, rows: Any) -> None:
        """Write a part in place of what an interrupted job left of it."""
        rows.write.mode("overwrite").option("compression", "zstd").parquet(f"{self.path.rstrip('/')}/{part}")

    def has(self, name: str) -> bool:
        """Return True if the file exists."""
        return bool(self._hadoop().exists(self._at(name)))

    def put(self, name: str, content: bytes) -> None:
        """Write a small file."""
        stream = self._hadoop().create(self._at(name), True)
        try:
            stream.write(bytearray(content))
        finally:
            stream.close()

    def _about(self) -> dict[str, Any] | None:
        if not self.has(ABOUT):
            return None
        stream = self._hadoop().open(self._at(ABOUT))
        try:
            content = bytes(self._jvm().org.apache.commons.io.IOUtils.toByteArray(stream))
        finally:
            stream.close()
        try:
            found: dict[str, Any] = json.loads(content)
            return found if isinstance(found["now"], int) and isinstance(found["part_users"], int) else None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.path}/{ABOUT} is damaged. Choose another folder, or delete this one.") from None

    def _names(self) -> list[str]:
        hadoop, at = self._hadoop(), self._at("")
        return sorted(one.getPath().getName() for one in hadoop.listStatus(at)) if hadoop.exists(at) else []

    def _jvm(self) -> Any:
        return self.session.sparkContext._jvm

    def _at(self, name: str) -> Any:
        return self._jvm().org.apache.hadoop.fs.Path(f"{self.path.rstrip('/')}/{name}" if name else self.path)

    def _hadoop(self) -> Any:
        return self._at("").getFileSystem(self.session.sparkContext._jsc.hadoopConfiguration())
