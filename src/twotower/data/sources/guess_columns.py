"""Guess the roles of the columns of a table of interactions, with a reason for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from twotower.data.sources.column_facts import ColumnFacts, depends_on
from twotower.data.sources.column_words import ID_WORDS, is_id, says, word_set, words
from twotower.data.sources.file_form import Sample

SETTINGS = {
    "user": "user_id",
    "item": "item_id",
    "time": "time",
    "rating": "stars",
    "event_type": "event_type",
    "quantity": "quantity",
    "weight": "weight",
    "position": "position",
    "text": "text",
    "name": "name",
    "since": "since",
}
MAX_STARS = 5
NOT_RATED_FRAC = 0.2  # if more ratings are zero, zero probably means "not rated"
NONE = "none"  # as the column of a role: the table has no such column
LATER = word_set("updated modified deleted shipped delivered ship delivery expected estimated expires due return returned")

Facts = dict[str, ColumnFacts]
Entities = Mapping[str, tuple[Facts, str]]
"""Role → statistics of the table that describes these ids, and its id column."""


@dataclass(frozen=True)
class ColumnGuess:
    """The guessed role of a column.

    Attributes
    ----------
    role
        "user", "item", "time", "rating", "event_type", "quantity", "weight", "position", "text", "name", "since", "feature",
        "shown" (kept for display and filters) or "unused".
    kind
        Kind of the feature, or of the values.
    reason
        Reason for the role, as text.
    settings
        Further settings of the table: `time_format`, `stars_scale`.
    feature
        Declaration of the feature; None without one.
    """

    name: str
    role: str
    kind: str
    reason: str
    examples: tuple[str, ...]
    missing: float
    distinct: int
    settings: dict[str, Any] = field(default_factory=dict)
    feature: dict[str, Any] | None = None

    @classmethod
    def of(cls, facts: ColumnFacts, role: str, reason: str, kind: str | None = None, **more: Any) -> ColumnGuess:
        """Make a guess from the facts of a column."""
        kind = kind or (facts.time.what if facts.time and role in ("time", "since") else facts.kind)
        return cls(facts.name, role, kind, reason, tuple(facts.examples), facts.missing, facts.distinct, **more)

    @property
    def setting(self) -> str | None:
        """Setting of the table that names this column; None without a role."""
        return SETTINGS.get(self.role)


def describe_interactions(
    sample: Sample, facts: Facts, named: Mapping[str, str], entities: Entities
) -> tuple[tuple[ColumnGuess, ...], list[str]]:
    """Return the columns of a table of interactions with their roles, and the open questions."""
    given = named.get("time_format")
    named = {role: name for role, name in named.items() if name in facts or name == NONE}
    found = {name: ColumnGuess.of(facts[name], role, "named by you") for role, name in named.items() if name in facts}
    questions: list[str] = []
    for role in ("user", "item"):
        if role not in named:
            guess, question = _key(sample, facts, role, found, entities.get(role))
            found |= {guess.name: guess} if guess else {}
            questions += [question] if question else []
    headless = bool(sample.form and sample.form.columns)
    ordered = sample.form is not None and sample.form.kind == "sequences"
    for role, pick in {} if ordered else _PICKS.items():
        left = [column for name, column in facts.items() if name not in found and column.kind != "empty"]
        if role not in named and (picked := pick(left, headless)):
            found[picked[0].name] = ColumnGuess.of(picked[0], role, picked[1])
    for name, guess in list(found.items()):
        settings, question = how_written(sample.name, facts[name], guess.role, named=guess.role in named)
        if guess.role == "time" and given:
            settings, question = {"time_format": given}, None
        found[name] = ColumnGuess.of(facts[name], guess.role, guess.reason, settings=settings)
        questions += [question] if question else []
    question = _time_question(sample, facts, found, named)
    key = next((name for name, guess in found.items() if guess.role == "item"), None)
    columns = tuple(found.get(name) or _left_over(sample.rows, column, key) for name, column in facts.items())
    return columns, questions + ([question] if question else [])


def _key(
    sample: Sample, facts: Facts, role: str, taken: Iterable[str], entity: tuple[Facts, str] | None
) -> tuple[ColumnGuess | None, str | None]:
    """Return the column of user or item ids, or a question if there is none or more than one."""
    other = "item" if role == "user" else "user"
    strength: dict[str, float] = {}
    for name, column in facts.items():
        if column.id_like and name not in taken and column.looks_like in (None, role):
            matches = _match(column, entity)
            strength[name] = 4 if column.looks_like == role else is_id(name, role)
            strength[name] += 2 * (
                matches > 0.5 and (strength[name] > 0 or (entity is not None and words(name) == words(entity[1])))
            )
            if is_id(name, other) > is_id(name, role) and column.looks_like != role:
                strength[name] = 0
    best = max(strength.values(), default=0)
    clear = [name for name in strength if best > 0 and strength[name] == best]
    clear = [name for name in clear if facts[name].distinct > 1] or clear
    if clear and all(_same(sample.rows, clear[0], name) for name in clear[1:]):
        return ColumnGuess.of(facts[clear[0]], role, _why_key(facts[clear[0]], role, _match(facts[clear[0]], entity))), None
    free = [
        name for name, column in facts.items() if column.id_like and name not in taken and not column.events and not column.time
    ]
    free = [name for name in free if is_id(name, other) < 2 or name in clear]
    free = free or [name for name, column in facts.items() if column.kind == "text" and name not in taken]
    free.sort(key=lambda name: -facts[name].distinct)
    listed = ", ".join(
        f"{name} ({facts[name].distinct:,} values, such as {facts[name].examples[0]})" for name in (clear or free)[:5]
    )
    if clear:
        return None, f"{sample.name} has several columns that may be the {role}: {listed}. Name one: {role} (--{role} COLUMN)."
    unnamed = "has no header that names" if sample.form and sample.form.columns else "has no column name for"
    return None, f"{sample.name} {unnamed} the {role}. Candidates: {listed or 'none'}. Name it: {role} (--{role} COLUMN)."


def _match(column: ColumnFacts, entity: tuple[Facts, str] | None) -> float:
    """Return the share of a column's distinct values that occur as ids of the entity's table."""
    if entity is None or not column.distinct:
        return 0.0
    known = entity[0][entity[1]].counts
    return sum(value in known for value in column.counts) / column.distinct


def _why_key(column: ColumnFacts, role: str, matches: float) -> str:
    if column.looks_like == role:
        return f"the values look like ids of {role}s"
    why = f"the name says {role}" if is_id(column.name, role) > 1 else f"the nearest to a {role}"
    return why + (f"; {matches * 100:.0f} % of its values are known {role}s" if matches > 0 else "")


def _same(rows: pa.Table, one: str, other: str) -> bool:
    """Return True if each of two columns determines the other."""
    return depends_on(rows, one, other) and depends_on(rows, other, one)


Picked = tuple[ColumnFacts, str] | None


def _best(ranked: list[tuple[float, ColumnFacts]], why: Callable[[ColumnFacts], str]) -> Picked:
    rank, column = max(ranked, key=lambda pair: pair[0], default=(0.0, None))
    return (column, why(column)) if column is not None and rank > 0 else None


def _time_rank(column: ColumnFacts) -> float:
    if column.time is None or max(is_id(column.name, "user"), is_id(column.name, "item")) == 3:
        return 0.0
    later = any(word in LATER for word in words(column.name))
    return (says(column.name, "time") + 1.0 + (column.kind == "time")) / (4 if later else 1)


def _pick_time(columns: list[ColumnFacts], headless: bool) -> Picked:
    ranked = [(_time_rank(c) if headless or c.kind == "time" or says(c.name, "time") else 0.0, c) for c in columns]
    return _best(ranked, lambda c: f"the values are {c.time.what}" if c.time else "")


def _pick_rating(columns: list[ColumnFacts], headless: bool) -> Picked:
    ranked = []
    for c in columns:
        scaled = c.kind in ("whole", "number") and c.distinct <= 201 and c.low is not None and c.high is not None and c.high <= 100
        few = headless and c.distinct <= 11 and (c.low or 0) >= 0 and (c.high or 99) <= MAX_STARS
        ranked.append((float(scaled and (says(c.name, "rating") or few)), c))
    return _best(ranked, lambda c: f"numbers from {c.low:g} to {c.high:g}")


def _pick_event(columns: list[ColumnFacts], headless: bool) -> Picked:  # noqa: ARG001
    ranked = [
        (2.0 * c.events + (says(c.name, "event_type") == 2 and c.kind == "text" and 2 <= c.distinct <= 30), c) for c in columns
    ]
    return _best(ranked, lambda c: f"{c.distinct} types: {', '.join(list(c.counts)[:4])}")


def _pick_number(role: str, *, whole: bool) -> Callable[[list[ColumnFacts], bool], Picked]:
    def pick(columns: list[ColumnFacts], headless: bool) -> Picked:  # noqa: ARG001
        kinds = ("whole",) if whole else ("whole", "number")
        ranked = [(float(c.kind in kinds and says(c.name, role) == 2 and (c.low or 0) >= 0), c) for c in columns]
        return _best(ranked, lambda c: f"numbers from {c.low:g} to {c.high:g}, and the name says {role}")

    return pick


def _pick_text(columns: list[ColumnFacts], headless: bool) -> Picked:  # noqa: ARG001
    ranked = [(c.mean_words if c.kind == "text" and c.mean_words > 3 and says(c.name, "text") else 0.0, c) for c in columns]
    return _best(ranked, lambda c: f"{c.mean_words:.0f} words on average")


_PICKS: dict[str, Callable[[list[ColumnFacts], bool], Picked]] = {
    "time": _pick_time,
    "rating": _pick_rating,
    "event_type": _pick_event,
    "quantity": _pick_number("quantity", whole=True),
    "weight": _pick_number("weight", whole=False),
    "position": _pick_number("position", whole=True),
    "text": _pick_text,
}


def how_written(table: str, column: ColumnFacts, role: str, *, named: bool = False) -> tuple[dict[str, Any], str | None]:
    """Return the settings for the format of a time or a rating, and a question if the format is ambiguous."""
    if role in ("time", "since") and column.time and column.time.formats:
        first, *more = column.time.formats
        question = (
            f"{table}: times of {column.name} such as {column.examples[0]!r} fit "
            f"{' and '.join(map(repr, column.time.formats[:3]))}. Name one: time_format (--time-format PATTERN)."
        )
        return {"time_format": first}, question if more else None
    odd = _not_rated(column) if role == "rating" and not named else ""
    if odd:
        share = column.numbers.count(float(odd)) / len(column.numbers)
        return {}, (
            f"{table}: {column.name} is {odd} in {share * 100:.0f} % of the rows, beside numbers up to {column.high:g}. "
            f"If {odd} means not rated, remove it, or leave the ratings out: rating {NONE} (--rating {NONE}). "
            "If it is a rating, name the column: rating (--rating COLUMN)."
        )
    if role == "rating" and column.low is not None and column.high is not None and not 0 <= column.low <= column.high <= MAX_STARS:
        top = next((top for top in (5, 10, 20, 100) if column.high <= top), int(column.high))
        low = min(int(column.low) - (column.low % 1 > 0), 0) if column.low < 1 else 1
        return {"stars_scale": [low, top]}, None
    return {}, None


def _not_rated(column: ColumnFacts) -> str:
    """Return "-1" or "0" if this value probably means "not rated", else ""."""
    values = sorted(set(column.numbers))
    if len(values) < 4 or values[0] not in (-1, 0) or values[1] < values[0] + 1 or values[-1] < MAX_STARS:
        return ""
    return f"{values[0]:g}" if values[0] == -1 or column.numbers.count(0.0) >= NOT_RATED_FRAC * len(column.numbers) else ""


def _time_question(sample: Sample, facts: Facts, found: Mapping[str, ColumnGuess], named: Mapping[str, str]) -> str | None:
    """Return a question if a time column has an unknown format, or if several columns have different times."""
    if "time" in named:
        return None
    chosen = next((name for name, guess in found.items() if guess.role == "time"), None)
    unread = [
        name for name, c in facts.items() if says(name, "time") == 2 and not c.time and c.kind != "empty" and name not in found
    ]
    if unread:
        example = facts[unread[0]].examples[0]
        return (
            f"{sample.name}: {unread[0]} has the name of a time, but its values such as {example!r} have no known format. "
            f"Name the column and its format: time (--time COLUMN) and time_format (--time-format PATTERN), or none to use the "
            f"order of the rows (--time {NONE})."
        )
    if chosen is None:
        return _unsaid_time(sample, [c for name, c in facts.items() if name not in found])
    rank = _time_rank(facts[chosen])
    same = (facts[chosen].time, facts[chosen].values)
    rivals = [name for name, c in facts.items() if name not in found and _time_rank(c) >= rank and (c.time, c.values) != same]
    rivals = [name for name in rivals if not depends_on(sample.rows, name, chosen)]
    return (
        f"{sample.name} has several time columns: {', '.join([chosen, *rivals])}. Name one: time (--time COLUMN)."
        if rivals
        else None
    )


def _unsaid_time(sample: Sample, left: list[ColumnFacts]) -> str | None:
    """Return a question if no column has the name of a time, and one has whole numbers that are probably times."""
    for column in left:
        if column.kind == "whole" and column.time and column.distinct > 1 and not ID_WORDS.intersection(words(column.name)):
            return (
                f"{sample.name}: the values of {column.name} are {column.time.what}, and its name does not say so. If they are the "
                f"times of the events, name it: time (--time {column.name}). If not, use the order of the rows (--time {NONE})."
            )
    return None


def _left_over(rows: pa.Table, column: ColumnFacts, item: str | None) -> ColumnGuess:
    if column.kind == "empty":
        return ColumnGuess.of(column, "unused", "no values")
    if item is not None and depends_on(rows, column.name, item):
        return ColumnGuess.of(column, "unused", "the same in all rows of an item: it describes items")
    return ColumnGuess.of(column, "unused", "no role")
