"""Write small tables and read them through the real reader."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import DuckDBEngine
from twotower.data.sources.raw_tables import RawTables
from twotower.data.sources.tables import read_tables
from twotower.utils.config import parse_config


@cache
def engine() -> DuckDBEngine:
    """Return one engine for all tests: sources must work with other tables present."""
    return DuckDBEngine(Path(mkdtemp()))


class Read:
    """Result of `read_tables` for a folder; sections as in the configuration."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.report = folder / "rejects.jsonl"
        self.report.unlink(missing_ok=True)
        rejects = self.rejects = Rejects(self.report, 1.0)
        config = parse_config({"data": {"source": "tables", "path": str(folder), **sections}}).data
        self.raw: RawTables = read_tables(config, engine(), rejects)
        rejects.check()

    def rows(self, table: str, *columns: str) -> list[tuple[Any, ...]]:
        """Return columns of a table; events by order."""
        found = getattr(self.raw, table).to_pyarrow()
        found = found.sort_by("order") if table == "interactions" else found
        return [tuple(row[column] for column in columns) for row in found.to_pylist()]

    def rejected(self) -> list[tuple[str, int, str]]:
        """Return file, line and reason of the bad rows."""
        lines = self.report.read_text().splitlines() if self.report.exists() else []
        return [(row["file"], row["line"], row["reason"]) for row in map(json.loads, lines)]

    def kept(self) -> list[dict[str, Any]]:
        """Return all events by order, without columns that are null everywhere."""
        found = self.raw.interactions.to_pyarrow().sort_by("order").to_pylist()
        return [{name: value for name, value in row.items() if value is not None} for row in found]
