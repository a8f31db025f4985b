"""Write folders of handmade Yelp rows and read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import DuckDBEngine
from twotower.data.sources.raw_tables import RawTables
from twotower.data.sources.yelp import read_yelp
from twotower.utils.config import DataConfig

Rows = Sequence[dict[str, Any] | str]
BUSINESS = {"business_id": "b1", "name": "Blue Door", "city": "Reno", "state": "NV", "latitude": 39.5, "longitude": -119.8}
REVIEW = {"review_id": "r1", "user_id": "u1", "business_id": "b1", "stars": 4.0, "text": "Fine.", "date": "2019-03-04 05:06:07"}
TIP = {"user_id": "u2", "business_id": "b1", "text": "Go early.", "date": "2014-01-02"}


def write(folder: Path, name: str, rows: Rows) -> Path:
    """Write a file of JSON lines; strings are written unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@cache
def engine() -> DuckDBEngine:
    """Return one engine for all tests: sources must work with other tables present."""
    return DuckDBEngine(Path(mkdtemp()))


class Read:
    """Result of `read_yelp` for a folder."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.report = folder / "rejects.jsonl"
        self.rejects = Rejects(self.report, settings.get("max_reject_frac", 1.0))
        self.raw: RawTables = read_yelp(DataConfig(path=folder, **settings), engine(), self.rejects)
        self.rejects.check()

    def events(self) -> list[dict[str, Any]]:
        """Return all events by order."""
        return list(self.raw.interactions.to_pyarrow().sort_by("order").to_pylist())

    def rejected(self) -> list[tuple[str, int, str]]:
        """Return file, line and reason of the bad rows."""
        rows = [json.loads(line) for line in self.report.read_text().splitlines()] if self.report.exists() else []
        return [(row["file"], row["line"], row["reason"]) for row in rows]
