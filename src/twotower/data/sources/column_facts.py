"""Measure the values of a column and find their kind: ids, numbers, times, labels, lists, texts, coordinates."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.sources.column_words import CODES, is_id, says, word_set, words
from twotower.data.sources.time_formats import TimeFormat, time_format_of_numbers, time_format_of_texts
from twotower.schema import HOURS_PER_WEEK

NULLS = frozenset(["", "nan", "null", "none", "na", "n/a", "\\n", "<na>", "nat"])  # lower case
NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
MONEY = re.compile(r"^([$€£¥]|USD |EUR )\s?\d[\d,]*(\.\d+)?$|^\d[\d,.]*\s?[$€£¥]$")
CODE = re.compile(r"^0\d+$")  # a number with a leading zero is a code, such as a postcode
ITEM_IDS = re.compile(r"^(B0[0-9A-Z]{8}|97[89]\d{10}|spotify:track:\w+|tt\d{7,})$")  # ASIN, ISBN, IMDb
ISBN = re.compile(r"^\d{9}[\dX]$")  # where some end with X; else it is any number
USER_IDS = re.compile(r"^(A[0-9A-Z]{11,13}|7656119\d{10}|A[EFGH][0-9A-Z]{26}|[^@\s]+@[^@\s]+\.\w+)$")  # Amazon, Steam, e-mail
EVENT_VALUES = word_set(
    """view views click clicks clicked cart carts addtocart add_to_cart buy purchase purchased order orders transaction
    impression like dislike fav favourite favorite wishlist play skip share download remove_from_cart rate watch read pv
    finish install follow save bookmark checkout"""
)

ValueKind = Literal["empty", "boolean", "whole", "number", "money", "time", "list", "numbers", "hours", "text"]


@dataclass(frozen=True)
class ColumnFacts:
    """Statistics of the sampled values of a column.

    Attributes
    ----------
    name, rows
        Name of the column, and number of sampled rows.
    values
        Sampled values that are not missing, as texts; a list is a JSON text.
    native
        True if the values are lists in the file.
    temporal
        True if the values are dates or timestamps in the file.
    """

    name: str
    rows: int
    values: list[str]
    native: bool
    temporal: bool

    @classmethod
    def of(cls, name: str, column: pa.ChunkedArray) -> ColumnFacts:
        """Measure a column of an Arrow table."""
        kind = column.type
        native = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        temporal = pa.types.is_temporal(kind)
        if pa.types.is_dictionary(kind):
            column = column.cast(kind.value_type)
            kind = kind.value_type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            texts = [value.strip() for value in column.drop_null().to_pylist()]
        else:
            texts = [_as_text(value) for value in column.drop_null().to_pylist()]
        return cls(name, len(column), [text for text in texts if text.lower() not in NULLS], native, temporal)

    @cached_property
    def counts(self) -> Counter[str]:
        """Number of rows with each value."""
        return Counter(self.values)

    @property
    def distinct(self) -> int:
        """Number of distinct values."""
        return len(self.counts)

    @property
    def missing(self) -> float:
        """Share of rows without a value."""
        return 1 - len(self.values) / self.rows if self.rows else 0.0

    @property
    def unique(self) -> bool:
        """True if every row has a value, and no value repeats."""
        return bool(self.values) and len(self.values) == self.rows and self.distinct == self.rows

    @property
    def examples(self) -> list[str]:
        """First distinct values."""
        return list(self.counts)[:3]

    @cached_property
    def kind(self) -> ValueKind:
        """Kind of the values."""
        some = list(self.counts)[:2000]
        if not some:
            return "empty"
        if self.temporal:
            return "time"
        if self.native or _most(text.startswith("[") and text.endswith("]") for text in some):
            lists = [_listed(text) for text in some]
            return "numbers" if _is_vector(lists) else "list"
        if {text.lower() for text in some} <= {"true", "false", "t", "f", "yes", "no", "y", "n"}:
            return "boolean"
        if _most(re.fullmatch(f"[01]{{{HOURS_PER_WEEK}}}", text) for text in some):
            return "hours"
        if _most(NUMBER.match(text) for text in some):
            return "whole" if all(_is_whole(text) for text in some if NUMBER.match(text)) else "number"
        if _most(MONEY.match(text) for text in some):
            return "money"
        return "time" if time_format_of_texts(some) else "text"

    @cached_property
    def time(self) -> TimeFormat | None:
        """Format of the values as times; None if they are not times."""
        if self.temporal:
            return TimeFormat("timestamps")
        if self.kind == "time":
            return time_format_of_texts(list(self.counts))
        if self.kind in ("whole", "number") and self.low is not None and self.high is not None and not self.coded:
            return time_format_of_numbers(self.numbers, named=says(self.name, "time") > 0)
        return None

    @cached_property
    def numbers(self) -> list[float]:
        """Numeric values."""
        return [float(text) for text in self.values if NUMBER.match(text)] if self.kind in ("whole", "number") else []

    @property
    def low(self) -> float | None:
        """Smallest number."""
        return min(self.numbers, default=None)

    @property
    def high(self) -> float | None:
        """Largest number."""
        return max(self.numbers, default=None)

    @cached_property
    def coded(self) -> bool:
        """True if the numbers are codes: some have leading zeros."""
        return any(CODE.match(text) for text in list(self.counts)[:2000])

    @cached_property
    def mean_words(self) -> float:
        """Mean number of words of a value."""
        some = list(self.counts)[:2000]
        return sum(len(text.split()) for text in some) / len(some) if some else 0.0

    @cached_property
    def looks_like(self) -> Literal["user", "item"] | None:
        """Side whose ids the values resemble (Amazon, Steam, ISBN, e-mail addresses); None for other values."""
        some = list(self.counts)[:500]
        if self.kind in ("text", "whole") and some:
            if _most(USER_IDS.match(text) for text in some):
                return "user"
            if _most(ITEM_IDS.match(text) for text in some) or (self.kind == "text" and _most(map(ISBN.match, some))):
                return "item"
        return None

    @cached_property
    def id_like(self) -> bool:
        """True if the values can be ids: whole numbers, or short texts of few words; any texts if the name says so."""
        if self.kind not in ("text", "whole"):
            return False
        if all(text.startswith("{") for text in self.examples):  # a JSON object is no id
            return False
        if max(is_id(self.name, "user"), is_id(self.name, "item")) > 1:
            return True
        return self.mean_words < 3 and sum(map(len, list(self.counts)[:2000])) / min(self.distinct, 2000) <= 64

    @cached_property
    def events(self) -> bool:
        """True if the values are event types, such as view and purchase."""
        return 1 < self.distinct <= 30 and sum(text.lower() in EVENT_VALUES for text in self.counts) * 2 >= self.distinct

    @cached_property
    def separator(self) -> str | None:
        """Separator of labels within a text, if labels repeat or bars separate them; else None."""
        if self.kind != "text":
            return None
        some = list(self.counts)[:5000]
        for separator in ("|", ";", ",", "/", " ") if self.name.endswith("_seq") else ("|", ";", ","):
            parts = [[part.strip() for part in text.split(separator)] for text in some]
            several = sum(len(part) > 1 for part in parts)
            labels = Counter(label for part in parts for label in part if label)
            longest = max((len(label.split()) for label in labels), default=0)
            if several >= 0.15 * len(some) and longest <= 6 and (separator == "|" or len(labels) <= 0.6 * sum(labels.values())):
                return separator
        return None


def facts_of(rows: pa.Table) -> dict[str, ColumnFacts]:
    """Measure all columns of a table, by name."""
    return {name: ColumnFacts.of(name, rows.column(name)) for name in rows.column_names}


def depends_on(rows: pa.Table, name: str, key: str) -> bool:
    """Return True if rows with the same `key` have the same value of `name`, except for at most one key in twenty."""
    try:
        pairs = (
            pa.table({"key": rows.column(key), "value": rows.column(name)}).group_by("key").aggregate([("value", "count_distinct")])
        )
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return False
    repeated = rows.num_rows > 1.2 * pairs.num_rows
    return bool(repeated and pc.sum(pc.less_equal(pairs["value_count_distinct"], 1)).as_py() >= 0.95 * pairs.num_rows)


def is_code(name: str) -> bool:
    """Return True for names of codes, whose numbers are labels: "postal_code", "department_no"."""
    return any(word in CODES for word in words(name))


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


def _listed(text: str) -> list[object]:
    """Return the elements of a list written as JSON, Python or NumPy."""
    for load in (json.loads, ast.literal_eval):
        try:
            found = load(text)
            return list(found) if isinstance(found, list | tuple) else []
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return list(text.strip("[]").split())


def _is_vector(lists: list[list[object]]) -> bool:
    widths = {len(some) for some in lists if some}
    numeric = all(isinstance(part, int | float) or NUMBER.match(str(part)) for some in lists[:50] for part in some)
    fractions = any("." in str(part) for some in lists[:50] for part in some)
    return len(widths) == 1 and min(widths) > 1 and numeric and fractions


def _is_whole(text: str) -> bool:
    return float(text).is_integer() and "e" not in text.lower()


def _most(flags: object) -> bool:
    found = [bool(flag) for flag in flags]  # type: ignore[attr-defined]
    return bool(found) and sum(found) >= 0.97 * len(found)
