"""Find out which of several tables has the interactions, and which ones describe items and users."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.data.sources.column_facts import ColumnFacts
from twotower.data.sources.column_words import is_id, says, words
from twotower.data.sources.file_form import Sample

KEYS = ("user", "item")
TRIED_SESSIONS = 200
MAX_KEYS = 20  # columns that are tried as ids of one side


@dataclass(frozen=True, eq=False)
class Table:
    """A sample of a table, and the facts of its columns."""

    sample: Sample
    facts: dict[str, ColumnFacts]

    @property
    def name(self) -> str:
        """Name of the table."""
        return self.sample.name

    def keys(self, role: str) -> list[str]:
        """Return the columns that can be ids of this role by name or value, the clearest first."""
        strength = {
            name: 3 if facts.looks_like == role else is_id(name, role)
            for name, facts in self.facts.items()
            if facts.id_like and facts.looks_like in (None, role)
        }
        ranked = sorted((name for name in strength if strength[name] > 0), key=lambda name: -strength[name])
        return ranked[:MAX_KEYS]


def main_table(tables: list[Table], chosen: str | None, taken: set[str | None], named: dict[str, str]) -> tuple[Table | None, str]:
    """Return the table of interactions: named, the only one, or the only one with both users and items; else a question."""
    if chosen is not None:
        return next(table for table in tables if table.name == chosen), ""
    left = [table for table in tables if table.name not in taken]
    left = [table for table in left if all(named[role] in table.facts for role in KEYS if role in named)]
    ranks = {table.name: _pair_rank(table, named) for table in left}
    best = max(ranks.values(), default=0)
    pairs = [table for table in left if best and ranks[table.name] == best]
    if len(pairs) == 1:
        return pairs[0], ""
    if len(pairs) > 1:
        names = " and ".join(table.name for table in pairs)
        return None, f"{names} all have users and items. Only one table of interactions is read. Name that one, without the others."
    alone = [table for table in left if not _is_entity(table)]
    if len(alone) == 1 and all(table is alone[0] or _is_entity(table) for table in tables):
        return alone[0], ""
    listed = "; ".join(f"{table.name} has {', '.join(list(table.facts)[:8])}" for table in tables)
    return (
        None,
        f"No table has a column of users and a column of items: {listed}. Name both: user and item (--user, --item COLUMN).",
    )


def _pair_rank(table: Table, named: dict[str, str]) -> int:
    """Return 2 for a table with users and items that both repeat, 1 if the ids of one are unique, 0 if it lacks one of them."""
    if table.sample.form and table.sample.form.kind == "sequences":
        return 2
    keys = {role: [named[role]] if role in named else table.keys(role) for role in KEYS}
    pairs = [(user, item) for user in keys["user"] for item in keys["item"] if user != item]
    repeated = any(not _is_key(table.facts[user]) and not _is_key(table.facts[item]) for user, item in pairs)
    return 2 if repeated else min(len(pairs), 1)


def _is_entity(table: Table) -> bool:
    """Return True if a column of ids of items or users is unique."""
    return any(_is_key(table.facts[name]) for role in KEYS for name in table.keys(role))


def _is_key(facts: ColumnFacts) -> bool:
    """Return True if nearly every row has a value of its own: snapshots of a catalogue repeat some ids."""
    return len(facts.values) >= 0.9 * facts.rows and facts.distinct >= 0.9 * len(facts.values) and facts.rows > 1


def entity_keys(
    rest: list[Table], main: Table, chosen: dict[str, str | None], named: dict[str, str]
) -> dict[str, tuple[Table, str]]:
    """Return the tables of items and of users, each with its column of ids."""
    ranked = []
    for role in KEYS:
        partners = [named[role]] if role in named else main.keys(role)
        other = set(main.keys("user" if role == "item" else "item"))
        for table in rest:
            wanted = table.name == chosen[role]
            if wanted or (chosen[role] is None and table.name not in chosen.values()):
                same = [name for name in partners if wanted and role in named and name in table.facts]  # named in both tables
                for number, name in enumerate(same or table.facts):
                    facts = table.facts[name]
                    if same or (facts.id_like and (_is_key(facts) or (wanted and facts.distinct > 1))):
                        ranked.append(
                            (_key_rank(table, name, role, main, partners, other) + 10 * wanted, -number, role, table, name)
                        )
    found: dict[str, tuple[Table, str]] = {}
    for rank, _, role, table, name in sorted(ranked, key=lambda row: row[:2], reverse=True):
        if rank >= 2 and role not in found and all(table is not used for used, _ in found.values()):
            found[role] = (table, name)
    return found


def _key_rank(table: Table, name: str, role: str, main: Table, partners: list[str], others: set[str]) -> float:
    """Return how well a unique column of a table fits the ids of a role: by its name, the name of the table, and equal values."""
    facts = table.facts[name]
    other = "user" if role == "item" else "item"
    rank = (3.0 if facts.looks_like == role else 0.0) + (1.0 if is_id(Path(table.name).stem, role) else 0.0)
    if not (table.sample.form and table.sample.form.columns):
        same = any(words(name) == words(partner) for partner in partners)
        if not same and (is_id(name, other) > is_id(name, role) or name in others):
            return -1.0
        rank += is_id(name, role) + 2 * same
    known = set(facts.counts)
    shares = [
        sum(value in known for value in main.facts[partner].counts) / max(main.facts[partner].distinct, 1) for partner in partners
    ]
    return rank + 2 * max(shares, default=0.0)


def session_keys(table: Table) -> dict[str, str]:
    """Return the settings of `data.sessions` if a column holds lists of events with an item and a time; else nothing."""
    for name, facts in table.facts.items():
        if facts.kind != "list" or not all(text.startswith('["{') for text in facts.examples):
            continue
        events = [event for text in facts.values[:TRIED_SESSIONS] for event in map(_object, json.loads(text))]
        keys = dict.fromkeys(key for event in events for key in event)
        items = [key for key in keys if is_id(key, "item") > 1]
        times = [key for key in keys if says(key, "time") == 2]
        kinds = [key for key in keys if says(key, "event_type") == 2]
        users = table.keys("user")
        if len(items) == len(times) == 1 and users:
            found = {"user_id": users[0], "events": name, "item_id": items[0], "time": times[0]}
            return found | ({"event_type": kinds[0]} if len(kinds) == 1 else {})
    return {}


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
