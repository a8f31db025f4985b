"""Keep the columns of an items table that no feature declares. They are shown and filtered by, and no model reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import ibis
import ibis.expr.types as ir

from twotower.data.sources.engine import ROW
from twotower.schema import ITEM_ID, ITEM_ROW
from twotower.utils.console import log
from twotower.utils.open_flag import FLAGS, IS_OPEN

NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$"  # no code such as 02139
WHOLE = r"^-?(0|[1-9][0-9]*)$"
MAX_OTHER_COLUMNS = 500  # engines take long for tables of thousands of columns
MAX_NAMED = 12
MAX_CHARS = 18  # of a number that 64 bits hold; longer ones are codes
INTERNAL = (ITEM_ID, ITEM_ROW, ROW, "item_key", "user_key", "source_place", "source_first", "reject_reason")


def distinct_names(columns: Sequence[str], taken: Collection[str], file: str) -> list[str]:
    """Return the columns of a file besides `taken` that an engine can read beside them; a warning names the others.

    Engines take names that differ in case alone for one, and know no empty name.
    """
    used, kept, left = {name.lower() for name in taken} | {""}, list[str](), list[str]()
    wanted = set(taken)
    for name in (name for name in columns if name not in wanted):
        if name.lower() not in used:
            kept.append(name)
        elif name:
            left.append(name)
        used.add(name.lower())
    if left:
        log.warning(
            "columns of %s are not kept: other columns differ from them in case alone: %s%s",
            file,
            ", ".join(left[:MAX_NAMED]),
            " …" if len(left) > MAX_NAMED else "",
        )
    if len(kept) > MAX_OTHER_COLUMNS:
        log.warning(
            "%s has %s columns that no setting uses: the first %d are kept for display and filters. Name the others in "
            "data.items.features to keep them.",
            file,
            f"{len(kept):,}",
            MAX_OTHER_COLUMNS,
        )
    return kept[:MAX_OTHER_COLUMNS]


def other_columns(raw: dict[str, ir.Value], taken: Collection[str], file: str) -> dict[str, ir.Value]:
    """Return those columns that can be kept under their own names, in the form of `as_raw`; a warning names the others."""
    used = {name.lower() for name in taken} | {name for inner in INTERNAL for name in (inner, f"{inner}_right")}
    kept: dict[str, ir.Value] = {}
    left: list[str] = []
    for name in raw:
        value = None if name.lower() in used else as_raw(raw[name])
        if value is None:
            left.append(name)
        else:
            kept[name] = value
    if left:
        log.warning(
            "columns of %s are not kept, because their names are reserved or their types cannot be compared: %s",
            file,
            ", ".join(left),
        )
    return kept


def as_raw(value: ir.Value) -> ir.Value | None:
    """Return a column as a number, a text or a list of texts, null where it is empty; None where it is none of these."""
    kind = value.type()
    if kind.is_string():
        text: ir.StringValue = value.nullif("")
        return text
    if kind.is_boolean() or kind.is_temporal() or kind.is_uint64():
        return value.cast("string")
    if kind.is_integer():
        return value.cast("int64")
    if kind.is_floating() or kind.is_decimal():
        number = value.cast("float64")
        return ibis.ifelse(number.isnan() | number.isinf(), ibis.null("float64"), number)
    if kind.is_array() and (kind.value_type.is_string() or kind.value_type.is_primitive() or kind.value_type.is_temporal()):
        return value.cast("array<string>")
    return None


def union(parts: Sequence[ir.Table]) -> ir.Table:
    """Return the rows of all tables: null where a table lacks a column, text where the types differ."""
    if len(parts) == 1:
        return parts[0]
    kinds: dict[str, set[str]] = {}
    for part in parts:
        for name in part.columns:
            kinds.setdefault(name, set()).add(str(part[name].type().copy(nullable=True)))
    types = {name: next(iter(found)) if len(found) == 1 else "string" for name, found in kinds.items()}
    return ibis.union(
        *(
            part.select(**{n: part[n].cast(kind) if n in part.columns else ibis.null(kind) for n, kind in types.items()})
            for part in parts
        )
    )


def typed_by_values(rows: ir.Table, names: Sequence[str]) -> ir.Table:
    """Return the rows with text columns as numbers, or lists of texts, where every value is one."""
    texts = [name for name in names if rows[name].type().is_string()]
    if not texts:
        return rows
    checks = {"number": NUMBER, "whole": WHOLE, "list": r"^\[.*\]$"}
    named = {
        f"{index} {check}": (rows[name].re_search(pattern) & ((check == "list") | (rows[name].length() <= MAX_CHARS))).all()
        for index, name in enumerate(texts)
        for check, pattern in checks.items()
    }
    (every,) = rows.aggregate(**named).to_pyarrow().to_pylist()
    bracketed = {f"{index} list": _is_list(rows[name]).all() for index, name in enumerate(texts) if every[f"{index} list"]}
    if bracketed:
        every |= rows.aggregate(**bracketed).to_pyarrow().to_pylist()[0]
    columns: dict[str, ir.Value] = {}
    for index, name in enumerate(texts):  # a check of a column without values is null
        if every[f"{index} number"]:
            columns[name] = rows[name].try_cast("int64" if every[f"{index} whole"] else "float64")
        elif every[f"{index} list"]:
            columns[name] = _as_list(rows[name])
    return rows.mutate(**columns)


def with_open_flag(rows: ir.Table) -> ir.Table:
    """Return rows whose text column `is_open`, if there is one, is 1 or 0; if it has another word, it stays text."""
    if IS_OPEN not in rows.columns or not rows[IS_OPEN].type().is_string():
        return rows
    text = rows[IS_OPEN].strip().lower()
    flag = ibis.cases(*((text == word, value) for word, value in FLAGS.items()), else_=ibis.null("int64")).cast("int64")
    (unknown,) = rows.aggregate(n=(flag.isnull() & (text != "").fill_null(False)).sum()).to_pyarrow()["n"].to_pylist()
    return rows if unknown else rows.mutate(**{IS_OPEN: flag})


def _as_list(text: ir.StringValue) -> ir.Value:
    """Return a text as a list of texts, null where it is none."""
    return text.try_cast("json").cast("array<string>")


def _is_list(text: ir.StringValue) -> ir.BooleanValue:
    """Return whether a text is a list in JSON; null for null, which `all` ignores."""
    return ibis.ifelse(text.isnull(), ibis.null("boolean"), _as_list(text).notnull())
