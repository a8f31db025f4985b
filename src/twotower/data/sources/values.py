"""Turn raw values into ids, numbers, times and lists: one rule for each, whatever the format of the file.

The engine computes the common forms. Values that it does not know are left to a Python function, once for each distinct one
(`Late`). A column of the file is text, int64, float64, boolean, a timestamp, a date, or a list of these; see `plain_column`.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.sources.python_values import python_value
from twotower.data.sources.times import LAST_S, epoch, parse_time, seconds

MISSING = (  # in lower case; these are no ids
    *("", "nan", "-nan", "null", "none", "\\n", "na", "n/a", "n.a.", "<na>", "#n/a", "#na", "nat"),
    *("nil", "undefined", "?", "-", "--", "(null)", "[null]", "<null>", "(none)", "(not set)"),
)
NAN_WORDS = ("nan", "-nan", "<na>", "#n/a", "nat", "\\n", "null")  # which are never the label of a category
MAX_EXACT = 1 << 53  # of a float: larger whole numbers are not exact
MAX_EXACT_32 = 1 << 24  # of a float of 32 bits
_FLOAT_ID = r"^(-?[0-9]+)[.]0+$"
_SCIENTIFIC = r"^-?[0-9]([.][0-9]+[eE][+]?|[eE][+])[0-9]{1,2}$"  # as R and Spark write a float; "1e3" may be a text
NAME_KEYS = ("name", "label", "title", "value", "description", "id")  # of a list of objects, in this order
_CURRENCY = r"^\s*(?:[A-Z]{3}|[$€£¥₹])\s*|\s*(?:[A-Z]{3}|[$€£¥₹])\s*$"
_GROUPED = r"^[+-]?[0-9]{1,3}(,[0-9]{3})+([.][0-9]*)?$"
_BARE_LIST = re.compile(r"\s*\[([^\[\]'\"{}]*)\]\s*")
_BRACES = re.compile(r"\{(.*)\}", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


@dataclass(frozen=True)
class Late:
    """Values that Python reads: `text` where the engine could not, null elsewhere; `parse` raises `ValueError` with the reason."""

    text: ir.StringValue
    parse: Callable[[str], Any]
    kind: str  # Ibis type of the values
    name: str  # column, for the reason


def as_text(value: ir.Value) -> ir.StringValue:
    """Return a column as strings, null where it is empty or NaN; a float that is whole is written like an integer."""
    kind = value.type()
    if kind.is_floating():
        exact = ibis.ifelse(value.abs() < MAX_EXACT, value, ibis.null(kind)).floor().cast("int64")  # fails beyond 64 bits
        text = ibis.ifelse((value == exact).fill_null(False), exact.cast("string"), value.cast("string"))
        return ibis.ifelse(value.isnan(), ibis.null("string"), text)
    text = value if kind.is_string() else value.cast("string")
    return text.nullif("")


def is_one_of(text: ir.StringValue, words: Iterable[str]) -> ir.BooleanValue:
    """Return whether a text is one of the words. `isin` becomes a join in DuckDB, which does not keep the order of the rows."""
    return text.re_search(f"^({'|'.join(map(re.escape, words))})$")


def as_id(value: ir.Value) -> ir.StringValue:
    """Return a column as ids: text as it is, 7.0 and 1.2E7 as whole numbers, null where an id is missing in any spelling."""
    text = as_text(value)
    if value.type().is_floating():
        text = ibis.ifelse(value.abs() < max_exact(value), text, ibis.null("string"))
    elif value.type().is_string():
        text = ibis.ifelse(text.endswith("0") & text.contains("."), text.re_replace(_FLOAT_ID, r"\1"), text)
        number = _scientific(text)
        exact = ibis.ifelse(number.abs() < MAX_EXACT, number, ibis.null("float64")).floor().cast("int64")
        text = ibis.ifelse((number == exact).fill_null(False), exact.cast("string"), text)
        absent = (text.length() <= 11) & is_one_of(text.strip().lower(), MISSING)
        text = ibis.ifelse(absent, ibis.null("string"), text)
    return text


def _scientific(text: ir.StringValue) -> ir.FloatingValue:
    """Return the numbers of text such as "1.2E7" and "1e+05"; null for other text."""
    likely = (text.substr(1, 1) == ".") | (text.substr(2, 1) == ".") | text.contains("+")
    return ibis.ifelse(likely & text.re_search(_SCIENTIFIC), text, ibis.null("string")).try_cast("float64")


def inexact_id(value: ir.Value) -> ir.BooleanValue:
    """Return whether an id is a float, or the text of one, that may stand for several whole numbers."""
    if value.type().is_floating():
        return value.abs() >= max_exact(value)
    if not value.type().is_string():
        return ibis.literal(False)
    whole = ibis.ifelse(value.length() >= 18, value, ibis.null("string"))
    whole = ibis.ifelse(whole.re_search(_FLOAT_ID), whole, ibis.null("string")).try_cast("float64")
    return (whole.coalesce(_scientific(value)).abs() >= MAX_EXACT).fill_null(False)


def as_label(value: ir.Value) -> ir.StringValue:
    """Return a column as labels of a category: whole numbers are written like integers, and what programs write for NaN is null.

    Words such as "none" and "NA" may be labels.
    """
    text = as_text(value)
    text = ibis.ifelse(text.endswith("0") & text.contains("."), text.re_replace(_FLOAT_ID, r"\1"), text)
    return ibis.ifelse((text.length() <= 5) & is_one_of(text.strip().lower(), NAN_WORDS), ibis.null("string"), text)


def max_exact(value: ir.FloatingValue) -> int:
    """Return the number below which all whole numbers are exact in a column of floats."""
    return MAX_EXACT_32 if value.type().is_float32() else MAX_EXACT


def id_text(value: Any) -> str | None:
    """Return the id of a Python value by the rule of `as_id`; None if it is missing, or no single value.

    Examples
    --------
    >>> id_text(7.0), id_text("7.0"), id_text("007"), id_text("NaN"), id_text([7])
    ('7', '7', '007', None, None)
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if abs(value) < MAX_EXACT and value == int(value) else None
    if not isinstance(value, (str, int)):
        return None
    text = re.sub(_FLOAT_ID, r"\1", str(value))
    if re.search(_SCIENTIFIC, text) and float(text) == int(float(text)) and abs(float(text)) < MAX_EXACT:
        text = str(int(float(text)))
    return None if text.strip().lower() in MISSING else text


def as_number(text: ir.StringValue) -> ir.FloatingValue:
    """Return numbers, also with a currency ("$1,299.50"); null for other text, and NaN."""
    bare = text.re_replace(_CURRENCY, "")
    bare = ibis.ifelse(bare.re_search(_GROUPED), bare.replace(",", ""), bare)
    plain = text.try_cast("float64")
    number = plain.coalesce(ibis.ifelse(plain.isnull(), bare, ibis.null("string")).try_cast("float64"))
    return ibis.ifelse(number.isnan(), ibis.null("float64"), number)


def as_seconds(value: ir.Value, pattern: str | None, name: str) -> tuple[ir.IntegerValue, Late]:
    """Return a column of times as seconds since 1970, rounded down, and what is left to Python."""
    text, kind = as_text(value), value.type()
    if kind.is_temporal():
        fast = value.cast("timestamp").truncate("s").epoch_seconds().cast("int64")
    elif pattern:
        fast = ibis.null("int64")
    elif kind.is_integer():
        fast = epoch(value.cast("int64"))
    elif kind.is_floating():
        fast = epoch(ibis.ifelse(value.abs() < 1e18, value, ibis.null("float64")).floor().cast("int64"))
    else:
        fast = seconds(text)
    left = ibis.ifelse(fast.isnull(), text, ibis.null("string"))
    return fast, Late(left, partial(parse_time, pattern=pattern), "int64", name)


def as_list(value: ir.Value, separator: str, name: str, *, numbers: bool) -> tuple[ir.ArrayValue, Late]:
    """Return a column of lists as trimmed strings (or numbers), and what is left to Python: nested lists and those of Python."""
    if value.type().is_array():
        parts, left = value.cast("array<string>"), ibis.null("string")
    else:
        text = as_text(value)
        written = text.strip().re_search(r"(?s)^[\[({].*[\])}]$|^\[['\"]")
        listed = ibis.ifelse(text.re_search(r"^\s*\[[^\[{]*\]\s*$"), text, ibis.null("string"))
        parts = ibis.ifelse(written, listed.try_cast("json").try_cast("array<string>"), text.split(separator))
        left = ibis.ifelse(written & parts.isnull(), text, ibis.null("string"))
    kept = parts.map(lambda part: part.strip())
    kept = kept if numbers else kept.filter(lambda part: part != "")  # an absent number would move those after it
    kind = "array<float64>" if numbers else "array<string>"
    return kept, Late(left, partial(parse_list, separator=separator, numbers=numbers), kind, name)


def parse_list(text: str, separator: str = ",", *, numbers: bool = False) -> list[Any]:
    """Return the entries of a list as JSON, Python, pandas or NumPy writes it, flattened; of objects, their names.

    Raises
    ------
    ValueError
        The text is no list, or NumPy has shortened it.

    Examples
    --------
    >>> parse_list("['Drama', 'War']"), parse_list("[0.5 1.25]", numbers=True), parse_list('[["a", "b"], ["c"]]')
    (['Drama', 'War'], [0.5, 1.25], ['a', 'b', 'c'])
    """
    value = _literal(text.strip())
    if value is None and not numbers and not re.match(r"\s*\[['\"\[{]", text):
        braces = _BRACES.fullmatch(text.strip())
        if braces and ":" not in text:  # as PostgreSQL writes an array
            cells = next(csv.reader([braces[1]], doublequote=False, escapechar="\\"), [])
            return [entry.strip() for entry in cells if entry.strip() and entry.strip() != "NULL"]
        bare = _BARE_LIST.fullmatch(text)  # as Java and Spark write one, but not labels such as "[new];sale"
        value = re.split(rf",|{re.escape(separator)}", bare[1]) if bare else text.split(separator)
    if value is None or ("..." in text and (numbers or not _QUOTED.search(text))):
        raise ValueError(f"is not a list of {'numbers' if numbers else 'labels'}: {text[:60]!r}")
    try:
        entries = list(flat(value))
    except RecursionError:
        raise ValueError(f"is nested too deeply: {text[:60]!r}") from None
    if not numbers:
        return [entry for entry in (label(entry) for entry in entries if entry is not None) if entry]
    try:
        return [float(entry) for entry in entries]
    except (TypeError, ValueError):
        raise ValueError(f"is not a list of numbers: {text[:60]!r}") from None


def label(value: Any) -> str:
    """Return one entry of a list as a trimmed string."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def flat(value: Any) -> Iterator[Any]:
    """Yield the single values inside nested lists; of an object, its name, or else its values."""
    if isinstance(value, dict):
        found = next((value[key] for key in NAME_KEYS if key in value), None)
        yield from flat(list(value.values()) if found is None else found)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for entry in sorted(value, key=str) if isinstance(value, (set, frozenset)) else value:
            yield from flat(entry)
    else:
        yield value


def _literal(text: str) -> Any:
    """Return the value of a written list, tuple, set or dict; None if it is none."""
    numpy = _numpy(text)
    if numpy is not None:
        return numpy
    for read in (json.loads, python_value):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, (list, tuple, set, dict)) else None
    return None


def _numpy(text: str) -> list[Any] | None:
    """Return the entries of an array as NumPy prints it, without commas: "[0.5 1.25]" or "['a' 'b']"."""
    inner = text[1:-1]
    if text[:1] != "[" or text[-1:] != "]" or not inner.strip():
        return None
    if _QUOTED.search(inner):
        between = _QUOTED.sub("", inner)
        return [ast.literal_eval(found) for found in _QUOTED.findall(inner)] if between and not between.strip() else None
    words = inner.replace("[", " ").replace("]", " ").split()
    if "," in inner or not all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan", word) for word in words):
        return None
    return [None if word == "nan" else float(word) if re.search(r"[.eE]", word) else int(word) for word in words]


def plain_column(column: pa.Array) -> pa.Array | None:
    """Return a column of Parquet in one of the few types that the readers know; None if it has no such form."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_uuid(column.storage) if kind.extension_name == "arrow.uuid" else plain_column(column.storage)
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([None if value is None else value.hex() for value in column.to_pylist()], pa.string())
    if pa.types.is_dictionary(kind):
        return plain_column(column.dictionary_decode())
    if pa.types.is_null(kind):
        return column.cast(pa.string())
    if pa.types.is_nested(kind):
        return _plain_list(column) if "list" in str(kind).partition("<")[0] else None
    if "binary" in str(kind):
        return pa.array([None if value is None else _decoded(value) for value in column.to_pylist()], pa.string())
    if "string" in str(kind):
        return column.cast(pa.string())
    if pa.types.is_decimal(kind):
        text = pc.replace_substring_regex(column.cast(pa.string()), r"^-?0E-[0-9]+$", "0")  # Arrow writes 0 so
        return pc.replace_substring_regex(text, _FLOAT_ID, r"\1")
    if pa.types.is_uint64(kind):
        return column.cast(pa.string())
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind):
        return _not_nan(column if pa.types.is_float64(kind) else column.cast(pa.float32()))
    if pa.types.is_timestamp(kind):
        # A fraction is cut off after the epoch has been rounded down, also before 1970.
        return pc.floor_temporal(column, unit="second").cast(pa.timestamp("us"), safe=False)
    if pa.types.is_boolean(kind) or pa.types.is_date32(kind):
        return column
    if pa.types.is_date64(kind):
        return column.cast(pa.date32())
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        return column.cast(pa.int64()).cast(pa.string()) if pa.types.is_duration(kind) else column.cast(pa.string())
    return None


def _plain_uuid(column: pa.Array) -> pa.Array:
    return pa.array([None if value is None else str(UUID(bytes=value)) for value in column.to_pylist()], pa.string())


def _plain_list(column: pa.Array) -> pa.Array:
    inner = column.type.value_type
    if pa.types.is_integer(inner) and not pa.types.is_uint64(inner):
        return column.cast(pa.list_(pa.int64()))
    if pa.types.is_floating(inner) and not pa.types.is_float16(inner):
        return column.cast(pa.list_(pa.float64()))
    if pa.types.is_string(inner):
        return column.cast(pa.list_(pa.string()))
    return pa.array([None if row is None else _labels(flat(row)) for row in column.to_pylist()], pa.list_(pa.string()))


def _labels(values: Iterable[Any]) -> list[str]:
    return [_decoded(value) if isinstance(value, bytes) else label(value) for value in values if value is not None]


def _decoded(value: bytes) -> str:
    """Return bytes as text, or as hexadecimal digits if they are none."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.hex()
    return text if text.isprintable() else value.hex()


def _not_nan(column: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


__all__ = ["LAST_S", "Late", "as_id", "as_list", "as_number", "as_seconds", "as_text", "id_text", "parse_list", "plain_column"]
