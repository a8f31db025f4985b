"""Start Spark sessions, and turn failures of Spark into errors of one line.

Spark is imported only when a session starts.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from twotower.errors import ConfigError, DataError, clause

QUIET = {
    "spark.sql.session.timeZone": "UTC",  # times in raw files have no zone
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "OFF",  # errors are raised anyway; the log would repeat them at length
}
LOCAL = {"spark.driver.memory": "4g", "spark.driver.host": "localhost"}  # for a single process
JAVA = "Install two-tower-rec[spark] and Java 17, or use the engine {other}."
_OURS = re.compile(r"^twotower\.errors\.\w+: (.+)$", re.M)


def spark_session(name: str, master: str | None, settings: Mapping[str, str], *, other: str) -> Any:
    """Return a session with a master such as "local[*]" or "spark://host:7077".

    Parameters
    ----------
    name
        Name of the application.
    master
        None: the master of `spark-submit` or spark-defaults.conf, else "local[*]".
    settings
        Settings of Spark in addition to `QUIET`, and to `LOCAL` for a local master.
    other
        The engine that needs no Spark, for the error.

    Raises
    ------
    ConfigError
        pyspark or Java is not installed, or Spark cannot start with this master.
    """
    what = f"engine spark needs pyspark and Java. {JAVA.format(other=other)}"
    try:
        from pyspark import SparkConf
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise ConfigError(f"Cannot start Spark: {clause(error)}. The {what}") from None
    if shutil.which("java") is None and not _java_home():
        raise ConfigError(f"Cannot start Spark: there is no java on the PATH, and JAVA_HOME is not set. The {what}")
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
    try:
        chosen = master or SparkConf().get("spark.master") or "local[*]"
        if chosen.startswith("local"):
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else workers run the first python3 of the PATH
        builder = SparkSession.builder.master(chosen).appName(name)
        for key, value in {**QUIET, **(LOCAL if chosen.startswith("local") else {}), **settings}.items():
            builder = builder.config(key, value)
        return builder.getOrCreate()
    except (RuntimeError, PySparkException) as error:
        raise ConfigError(f"Cannot start Spark: {reason(error)}. The {what}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "py4j":
            raise
        raise ConfigError(f"Cannot start Spark with the master {master!r}: {reason(error)}. Check the address.") from None


def _java_home() -> bool:
    home = os.environ.get("JAVA_HOME", "")
    return bool(home) and shutil.which("java", path=os.path.join(home, "bin")) is not None


@contextmanager
def spark_errors(doing: str, advice: str) -> Iterator[None]:
    """Turn an error of Spark in the block into a `DataError` of one line: ours from a worker as it was, else with `advice`."""
    from pyspark.errors import PySparkException

    try:
        yield
    except Exception as error:
        if not isinstance(error, PySparkException) and type(error).__module__.partition(".")[0] != "py4j":
            raise
        ours = _OURS.search(str(error))
        raise DataError(ours[1] if ours else f"Spark cannot {doing}: {reason(error)}. {advice}") from None


def reason(error: BaseException) -> str:
    """Return the last cause that a message of Spark names, on one line without a full stop."""
    text = str(error)
    causes = re.findall(r"^(?:Caused by: |: )?((?:[\w$]+\.)*\w*(?:Error|Exception)(?:: .+))$", text, re.M)
    said = (causes[-1] if causes else text.strip().splitlines()[0] if text.strip() else type(error).__name__).strip()
    return re.sub(r"^(?:[a-z]\w*\.)+(?=[A-Z])", "", said)[:300].rstrip(". ")
