"""Show a guess: the columns of each table in 80 characters, one line about the whole, and a configuration with comments."""

from __future__ import annotations

import textwrap
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import yaml

from twotower.data.sources.guess import DatasetGuess, TableGuess
from twotower.errors import escaped
from twotower.utils.nouns import counted

WIDTH = 80
PLAIN = ("feature", "shown", "unused", "of item", "of user")  # roles that the table of columns explains well enough
WIDTHS = (20, 11, 13, 8)  # of the first columns: name, role, kind, missing


def describe(guess: DatasetGuess) -> str:
    """Return the tables and their columns as text of at most 80 columns, and the reason of each role.

    Examples
    --------
    >>> import pyarrow as pa
    >>> from twotower.data.sources.guess import guess_dataset
    >>> print(describe(guess_dataset({"orders": pa.table({"customer": ["a", "b"], "product": ["x", "x"]})})))
    orders: interactions, 2 rows
    column              role       kind         missing examples
    customer            user       text             0 % a, b
    product             item       text             0 % x
    Why: customer (user): the name says user
         product (item): the name says item
    """
    return "\n\n".join("\n".join(_table(table)) for table in guess.tables)


def one_line(guess: DatasetGuess) -> str:
    """Return what each table is, with the columns of its roles.

    Examples
    --------
    >>> import pyarrow as pa
    >>> from twotower.data.sources.guess import guess_dataset
    >>> one_line(guess_dataset({"orders": pa.table({"customer": ["a", "b"], "product": ["x", "x"]})}))
    'orders is interactions (user customer, item product)'
    """
    parts = []
    for table in guess.tables:
        named = [f"{column.role} {column.name}" for column in table.columns if column.role not in PLAIN]
        features = sum(column.feature is not None for column in table.columns)
        named += [f"{features} feature{'s' * (features != 1)}"] if features else []
        what = "not read" if table.kind == "other" else f"{table.kind} ({', '.join(named)})"
        parts.append(f"{table.sample.name} is {what}")
    return "; ".join(parts)


def as_yaml(settings: dict[str, Any], guess: DatasetGuess | None = None) -> str:
    """Return sections of a configuration as YAML; with a guess, the reason of each feature is a comment.

    Examples
    --------
    >>> print(as_yaml({"data": {"source": "tables", "interactions": {"path": "orders.csv"}}}))
    data:
      source: tables
      interactions:
        path: orders.csv
    <BLANKLINE>
    """
    tables = guess.tables if guess else []
    reasons = {(str(table.kind), column.name): column.reason for table in tables for column in table.columns}
    return "\n".join(_section(settings, "", "", reasons)) + "\n"


def _section(values: dict[str, Any], indent: str, section: str, reasons: dict[tuple[str, str], str]) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _section(value, indent + "  ", key, reasons)
        elif key == "features":
            yield f"{indent}{key}:"
            for feature in value:
                reason = reasons.get((section, (feature.get("columns") or [feature["name"]])[0]))
                yield f"{indent}  - {_flow(feature)}" + (f"  # {escaped(reason)}" if reason else "")
        else:
            yield f"{indent}{key}: {_flow(value)}"


def _flow(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6)
        .removesuffix("...\n")
        .strip()
    )


def _table(table: TableGuess) -> list[str]:
    sample = table.sample
    rows = counted(sample.rows.num_rows, "row") if sample.complete else f"a sample of {sample.rows.num_rows:,} rows"
    what = "not read" if table.kind == "other" else table.kind
    lines = wrapped([f"{sample.name}: {what}", *([str(sample.form)] if sample.form else []), rows], ", ")
    lines.append(_row(["column", "role", "kind", "missing", "examples"]))
    for column in table.columns:
        examples = ", ".join(" ".join(text.split()) for text in column.examples)
        lines.append(_row([column.name, column.role, column.kind, f"{column.missing:.0%}".replace("%", " %"), examples]))
    reasons = [f"{c.name} ({c.role}): {c.reason}" for c in table.columns if c.role not in PLAIN]
    for number, reason in enumerate(reasons):
        first = "Why: " if number == 0 else "     "
        lines += textwrap.wrap(reason, WIDTH, initial_indent=first, subsequent_indent="       ") or [first]
    return [escaped(line) for line in lines]


def _row(cells: Sequence[str]) -> str:
    """Return one line: padded cells, the fourth to the right, and as much of the last as fits."""
    first = "".join(padded(cell, width) for cell, width in zip(cells[:3], WIDTHS, strict=False))
    line = first + cells[3].rjust(WIDTHS[3] - 1) + " "
    return (line + cut(cells[4], WIDTH - sum(WIDTHS))).rstrip()


def columns_of(text: str) -> int:
    """Return the width of a text on a terminal: Chinese and Japanese characters take two columns."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    return 0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """Return the text, cut with "…" if it is wider than `width` columns of a terminal."""
    ends = list(accumulate(map(_columns, text)))
    return text if not ends or ends[-1] <= width else text[: bisect_right(ends, width - 1)] + "…"


def padded(text: str, width: int) -> str:
    """Return the text with blanks up to `width` columns, at least one."""
    short = cut("".join(c if c.isprintable() else "�" for c in text), width - 1)
    return short + " " * (width - columns_of(short))


def wrapped(parts: Sequence[str], between: str) -> list[str]:
    """Return the parts joined, in lines of at most 80 columns; further lines are indented."""
    lines: list[str] = []
    for part in parts:
        if lines and columns_of(lines[-1] + between + part) <= WIDTH:
            lines[-1] += between + part
        elif lines:
            lines[-1] += between.rstrip()
            lines.append(cut("  " + part, WIDTH))
        else:
            lines.append(cut(part, WIDTH))
    return lines
