"""Guess the columns of a table of items or users: the name, the location, and the kinds of the features."""

from __future__ import annotations

import re
from typing import Any

from twotower.data.sources.column_facts import ColumnFacts, is_code
from twotower.data.sources.column_words import BEGUN, LATITUDE, LONGITUDE, says, word_set, words
from twotower.data.sources.file_form import Sample
from twotower.data.sources.guess_columns import ColumnGuess, Facts, how_written

MAX_FEATURES = 100  # that are guessed, the reserved names included
RESERVED_FEATURES = word_set("id neighbours state home request_location hour weekday month since_s elite")
RESERVED_COLUMNS = word_set("item_id user_id name since_s elite source_place source_first")


def describe_entity(sample: Sample, facts: Facts, key: str, role: str, name: str | None = None) -> tuple[ColumnGuess, ...]:
    """Return the columns of a table of items or users: the id, the name, and the features with their kinds."""
    found = {key: ColumnGuess.of(facts[key], role, f"unique: the id of the {role}")}
    left = {n: c for n, c in facts.items() if n not in found}
    if role == "item":
        display_name = name or _name(left)
        found |= (
            {display_name: ColumnGuess.of(left[display_name], "name", "named by you" if name else "the name says so")}
            if display_name
            else {}
        )
    else:
        since = next((n for n, c in left.items() if c.time and any(word in BEGUN for word in words(n))), None)
        if since:
            settings, _ = how_written(sample.name, left[since], "since")
            found[since] = ColumnGuess.of(left[since], "since", "the time of registration", settings=settings)
    pair = _location(left)
    if pair:
        geo = {"name": "location", "kind": "geo", "columns": list(pair)}
        found[pair[0]] = ColumnGuess.of(left[pair[0]], "feature", f"latitude, with {pair[1]}", "geo", feature=geo)
        found[pair[1]] = ColumnGuess.of(left[pair[1]], "feature", f"longitude, with {pair[0]}", "geo")
    taken = {*RESERVED_FEATURES, *(("location",) if pair else ())}
    for n, column in left.items():
        if n in RESERVED_COLUMNS:
            found.setdefault(n, ColumnGuess.of(column, "unused", "a reserved name: rename the column to use it"))
        elif n not in found:
            kind, reason, more = _feature_kind(column)
            if kind and len(taken) >= MAX_FEATURES:
                kind, reason = None, f"beyond {MAX_FEATURES} features: name it in the configuration to use it"
            called = _feature_name(n, taken)
            taken |= {called} if kind else set()
            spec = {"name": called, "kind": kind, **({} if called == n else {"columns": [n]}), **more}
            found[n] = ColumnGuess.of(column, "feature" if kind else "shown", reason, kind, feature=spec if kind else None)
    return tuple(found[n] for n in facts)


def _name(left: Facts) -> str | None:
    """Return the column of display names: texts of few words whose name says so."""

    def fits(n: str, c: ColumnFacts) -> bool:
        labels = c.separator and not (says(n, "name") == 2 and c.separator != "|")
        return c.kind == "text" and c.mean_words <= 30 and c.distinct > 0.3 * len(c.values) and not labels

    ranked = [
        (says(n, "name") + (words(n)[-1:] in (("name",), ("title",))), -number, n)
        for number, (n, c) in enumerate(left.items())
        if says(n, "name") and fits(n, c)
    ]
    return max(ranked)[2] if ranked else None


def _location(left: Facts) -> tuple[str, str] | None:
    def within(known: frozenset[str], limit: int) -> str | None:
        return next(
            (
                n
                for n, c in left.items()
                if c.numbers and any(word in known for word in words(n)) and -limit <= (c.low or 0) <= (c.high or 0) <= limit
            ),
            None,
        )

    latitude, longitude = within(LATITUDE, 90), within(LONGITUDE, 180)
    return (latitude, longitude) if latitude and longitude and latitude != longitude else None


def _feature_kind(c: ColumnFacts) -> tuple[str | None, str, dict[str, Any]]:
    """Return the kind of a feature (None: not one), the reason, and further settings of the feature."""
    fixed: dict[str, tuple[str | None, str]] = {
        "empty": (None, "no values"),
        "time": (None, "a time: kept for display"),
        "list": ("multi", "lists"),
        "numbers": ("vector", "lists of numbers of one length"),
        "hours": ("hours", "168 hours of a week"),
        "boolean": ("categorical", "yes or no"),
        "money": ("number", "amounts of money"),
    }
    if c.kind in fixed:
        return (*fixed[c.kind], {})
    if c.distinct == 1:
        return None, "one value in all rows: kept for display", {}
    repeated = c.distinct <= 0.5 * len(c.values) or c.distinct <= 20
    if c.kind in ("whole", "number"):
        if c.time and says(c.name, "time"):
            return None, f"{c.time.what}: kept for display", {}
        if c.coded or is_code(c.name) or c.distinct <= 2:
            return (
                ("categorical", f"{c.distinct:,} codes", {})
                if repeated
                else (None, "codes that do not repeat: kept for display", {})
            )
        return "number", f"numbers from {c.low:g} to {c.high:g}", {}
    if all(re.match(r"https?://|www\.", text) for text in list(c.counts)[:50]):
        return None, "addresses of pages: kept for display", {}
    if c.separator:
        return "multi", f"labels separated by {c.separator!r}", {"separator": c.separator}
    if c.mean_words > 5 or (c.mean_words > 2.5 and not repeated):
        return "text", f"{c.mean_words:.0f} words on average", {}
    if repeated:
        return "categorical", f"{c.distinct:,} labels that repeat", {}
    return None, "values that do not repeat: kept for display", {}


def _feature_name(column: str, taken: set[str]) -> str:
    """Return a free name of a feature: the column's own, without dots, or with a number."""
    plain = re.sub(r"[^\w ]+", "_", column.split(":")[0]).strip("_ ") or "feature"
    return next(name for name in (plain, *(f"{plain}_{n}" for n in range(2, len(taken) + 3))) if name not in taken)
