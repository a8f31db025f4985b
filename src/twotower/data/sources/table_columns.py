"""Type the columns of one file of a table, and collect the checks for its bad rows."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

from twotower.data.sources.raw_tables import Check, Columns, id_checks, missing, quoted
from twotower.data.sources.values import (
    LAST_S,
    MAX_EXACT,
    Late,
    as_id,
    as_label,
    as_list,
    as_number,
    as_seconds,
    as_text,
    is_one_of,
)
from twotower.schema import HOURS_PER_WEEK, STARS
from twotower.utils.config import ColumnConfig

MAX_STARS = 5
MAX_COMPARED = 8  # columns of a row that are compared with the header


class Fields:
    """Typed columns of one scanned file, whose own columns are named "raw NAME", and the checks for bad rows.

    Attributes
    ----------
    columns
        Columns to keep.
    late
        Of them, values that the engine leaves to Python.
    checks
        Conditions of bad rows and their reasons.
    used
        Names of the columns that were read.
    """

    def __init__(self, rows: ir.Table, *, is_json: bool = False) -> None:
        self._rows, self._is_json = rows, is_json
        self.columns: Columns = {}
        self.late: dict[str, Late] = {}
        self.used: set[str] = set()
        self.checks: list[Check] = []

    def raw(self, name: str) -> ir.Value:
        """Return a column as it is in the file."""
        self.used.add(name)
        return self._rows[f"raw {name}"]

    @property
    def names(self) -> list[str]:
        """Its own columns."""
        return [name.removeprefix("raw ") for name in self._rows.columns if name.startswith("raw ")]

    def text(self, name: str) -> ir.StringValue:
        """Return a column as strings; empty ones are null."""
        return as_text(self.raw(name))

    def header_again(self, columns: Sequence[str]) -> list[Check]:
        """Return a check for rows that repeat the header of `columns`, as where files with headers were joined."""
        names = columns[:MAX_COMPARED]
        if self._is_json or len(names) < 2 or not all(self._rows[f"raw {name}"].type().is_string() for name in names):
            return []
        return [(ibis.and_(*((self._rows[f"raw {name}"] == name).fill_null(False) for name in names)), "repeats the header")]

    def required(self, ours: str, name: str) -> None:
        """Add column `name` as the required id `ours`."""
        value = self.raw(name)
        self.columns[ours] = found = as_id(value)
        if value.type().is_array():
            self.checks.append((value.notnull(), f"{name} is a list, not an id"))
        self.checks += id_checks(value, found, name, is_json=self._is_json)
        self.checks.append((missing(found), f"{name} is missing"))

    def number(self, name: str, limit: float | None = None) -> ir.FloatingValue:
        """Return a column as float64; NaN counts as missing. Values beyond ±limit are bad, if it is given."""
        text = self.text(name)
        value = as_number(text)
        said_so = is_one_of(text.lower(), ["nan", "null", "none", "na"])
        self.checks.append((text.notnull() & ~said_so & value.isnull(), f"{name} is not a number: " + quoted(text)))
        out = value.isinf() if limit is None else value.abs() > limit
        self.checks.append((out, f"{name} is out of range: " + quoted(text)))
        return value

    def weight(self, name: str, *, pieces: bool = False) -> ir.FloatingValue:
        """Return a column of weights, or of numbers of pieces as the weight 1 + ln(pieces); 0 stays 0."""
        value = self.number(name)
        self.checks.append((value < 0, f"{name} is below 0: " + quoted(self.text(name))))
        if not pieces:
            return value
        safe = ibis.ifelse(value > 0, value, ibis.literal(1.0))
        return ibis.ifelse(value < 1, value, 1 + safe.ln())

    def count(self, name: str) -> ir.IntegerValue:
        """Return a column of positions from 1."""
        value = self.number(name, limit=MAX_EXACT)
        whole = ibis.ifelse(value.abs() < MAX_EXACT, value, ibis.null("float64")).floor().cast("int64")
        self.checks.append(((value < 1) | (value != whole), f"{name} is not a position from 1: " + quoted(self.text(name))))
        return whole

    def stars(self, name: str, scale: list[float] | None) -> None:
        """Add a column of ratings: 0 to 5, or rescaled from `scale` to 1 to 5."""
        value = self.number(name)
        low, high = scale or (0, MAX_STARS)
        outside = f"{name} is not on the {low:g}-{high:g} scale: " + quoted(self.text(name))
        self.checks.append((~value.between(low, high), outside))
        self.columns[STARS] = 1 + (value - low) * ((MAX_STARS - 1) / (high - low)) if scale else value

    def time(self, ours: str, name: str, pattern: str | None, *, required: bool) -> None:
        """Add a column of times as seconds since 1970."""
        text = self.text(name)
        time, late = as_seconds(self.raw(name), pattern, name)
        self.columns[ours], self.late[ours] = time, late
        self.checks.append((time < 0, f"{name} is before 1970: " + quoted(text)))
        self.checks.append((time > LAST_S, f"{name} is after 2100: " + quoted(text)))
        if required:
            self.checks.append((text.isnull(), f"{name} is missing"))

    def feature(self, feature: ColumnConfig, columns: list[str]) -> None:
        """Add the columns of one feature."""
        for axis, name in enumerate(columns):
            if feature.kind == "number":
                self.columns[name] = self.number(name)
            elif feature.kind == "geo":
                self.columns[name] = self.number(name, limit=(90, 180)[axis])
            elif feature.kind in ("multi", "vector"):
                self._many(name, feature.separator, numbers=feature.kind == "vector")
            else:
                self.columns[name] = text = as_label(self.raw(name)) if feature.kind == "categorical" else self.text(name)
                if feature.kind == "hours":
                    bad = text.notnull() & ~text.re_search(f"^[01]{{{HOURS_PER_WEEK}}}$")
                    self.checks.append((bad, f"{name} is not {HOURS_PER_WEEK} characters of 0 and 1: " + quoted(text)))

    def _many(self, name: str, separator: str, *, numbers: bool) -> None:
        """Add a list of labels or numbers: a native list, a written one, or a string split by `separator`."""
        parts, self.late[name] = as_list(self.raw(name), separator, name, numbers=numbers)
        if not numbers:
            self.columns[name] = parts
            return
        vector = parts.map(lambda part: part.try_cast("float64"))
        bad = parts.length() != vector.filter(lambda number: number.abs() < float("inf")).length()
        self.checks.append((bad, f"{name} is not a list of numbers: " + quoted(self.raw(name).cast("string"))))
        self.columns[name] = vector
