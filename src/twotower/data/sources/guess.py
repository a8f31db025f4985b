"""Guess what tables hold: which one has the interactions, and which column is the user, the item, the time, a feature.

A guess uses the names of the columns and their values. Where both leave more than one answer, the guess holds a question instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from twotower.data.sources.column_facts import ColumnFacts, depends_on, facts_of
from twotower.data.sources.column_words import Role, is_id, words
from twotower.data.sources.file_form import Sample
from twotower.data.sources.guess_columns import NONE, ColumnGuess, describe_interactions
from twotower.data.sources.guess_features import describe_entity
from twotower.errors import DataError, nearest

TableKind = Literal["interactions", "items", "users", "other"]
KEYS = ("user", "item")
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class TableGuess:
    """What one table holds.

    Attributes
    ----------
    kind
        "interactions", "items" or "users"; "other": nothing that is read.
    columns
        Every column with its role, its kind and the reason.
    questions
        One line for each choice that the data leave open; empty if the guess is complete.
    within
        Whether these are columns of the interactions file.
    """

    sample: Sample
    kind: TableKind
    columns: tuple[ColumnGuess, ...]
    questions: tuple[str, ...] = ()
    within: bool = False

    def column(self, role: str) -> str | None:
        """Return the name of the column with a role, or None."""
        return next((column.name for column in self.columns if column.role == role), None)

    def to_config(self, base: Path | None = None) -> dict[str, Any]:
        """Return the section of this table in `data:`, with paths relative to `base`."""
        path = self.sample.path
        shown = self.sample.name if path is None else str(path.relative_to(base) if base else path)
        settings: dict[str, Any] = {"path": shown, **(self.sample.form.settings() if self.sample.form else {})}
        if self.within:
            settings = {"from": "interactions"}
        features: list[dict[str, Any]] = []
        for column in self.columns:
            settings |= {column.setting: column.name} if column.setting else {}
            settings |= column.settings
            features += [column.feature] if column.feature else []
        return settings | ({"features": features} if features else {})


@dataclass(frozen=True)
class DatasetGuess:
    """What several tables hold together.

    Attributes
    ----------
    interactions, items, users
        The tables; None if there is none.
    others
        Tables that are not read.
    questions
        One line for each choice that the data leave open; empty if the guess is complete.
    """

    interactions: TableGuess | None
    items: TableGuess | None = None
    users: TableGuess | None = None
    others: tuple[TableGuess, ...] = ()
    questions: tuple[str, ...] = field(default=())

    @property
    def tables(self) -> list[TableGuess]:
        """All tables."""
        return [*(table for table in (self.interactions, self.items, self.users) if table), *self.others]

    def to_config(self) -> dict[str, Any]:
        """Return the section `data:` of a configuration.

        Raises
        ------
        DataError
            The guess has questions; the message is the first one.
        """
        if self.questions or self.interactions is None:
            raise DataError(self.questions[0] if self.questions else "No table of interactions was given. Name one.")
        paths = [table.sample.path for table in (self.interactions, self.items, self.users) if table and table.sample.path]
        base = _common(paths) if paths else None
        form = self.interactions.sample.form
        if form and form.kind == "sequences":
            return {"source": "sequences", "path": str(base), "sequences": {"train": str(paths[0].relative_to(base or Path()))}}
        found: dict[str, Any] = {"source": "tables", **({"path": str(base)} if base else {})}
        sections = {"interactions": self.interactions, "items": self.items, "users": self.users}
        return found | {name: table.to_config(base) for name, table in sections.items() if table}


def guess_table(sample: Sample | pa.Table, *, name: str = "table", **named: str) -> TableGuess:
    """Guess what one table holds.

    Parameters
    ----------
    sample
        A sample of a file (`read_sample`), or an Arrow table.
    name
        Name of an Arrow table, for messages.
    **named
        Columns by role, where you know them: `user="customer"`, `item=`, `time=`, `rating=`, `event_type=`, `quantity=`,
        `weight=`, `position=`, `text=`, `name=`.

    Returns
    -------
    TableGuess
        A table with a column of users and one of items is a table of interactions.

    Raises
    ------
    DataError
        A named column does not exist.

    Examples
    --------
    >>> orders = pa.table({"klant": ["a", "a"], "artikel": ["x", "y"], "datum": ["2024-01-03", "2024-01-04"]})
    >>> guess = guess_table(orders)
    >>> guess.kind, guess.column("user"), guess.column("item"), guess.column("time")
    ('interactions', 'klant', 'artikel', 'datum')
    """
    found = guess_dataset([_sample(sample, name)], **named)
    return found.tables[0]


def guess_dataset(
    samples: Sequence[Sample] | Mapping[str, pa.Table],
    *,
    interactions: str | None = None,
    items: str | None = None,
    users: str | None = None,
    **named: str,
) -> DatasetGuess:
    """Guess what several tables hold together: which one has the interactions, and which describe items and users.

    Parameters
    ----------
    samples
        Samples of files, or Arrow tables by name.
    interactions, items, users
        Names of the tables, where you know them.
    **named
        Columns by role, as in `guess_table`.

    Raises
    ------
    DataError
        A named table or column does not exist.

    Examples
    --------
    >>> orders = pa.table({"customer": ["a", "b", "a"], "product": ["x", "x", "y"]})
    >>> products = pa.table({"product": ["x", "y"], "title": ["Green tea", "Black tea"]})
    >>> guess = guess_dataset({"orders": orders, "products": products})
    >>> guess.interactions.sample.name, guess.items.column("name")
    ('orders', 'title')
    """
    given = [_sample(table, name) for name, table in samples.items()] if isinstance(samples, Mapping) else list(samples)
    tables = [_Table(sample, facts_of(sample.rows)) for sample in given]
    _check_names(tables, {"interactions": interactions, "items": items, "users": users}, named)
    main, question = _main_table(tables, interactions, {items, users}, named)
    if main is None:
        others = tuple(TableGuess(table.sample, "other", _plain(table)) for table in tables)
        return DatasetGuess(None, others=others, questions=(question,))
    rest = [table for table in tables if table is not main]
    entities = _entity_keys(rest, main, {"item": items, "user": users}, named)
    columns, questions = describe_interactions(
        main.sample, main.facts, named, {role: (t.facts, key) for role, (t, key) in entities.items()}
    )
    guess = TableGuess(main.sample, "interactions", columns, tuple(questions))
    found: dict[str, TableGuess] = {}
    for role, (table, key) in entities.items():
        described = describe_entity(table.sample, table.facts, key, role, named.get("name") if role == "item" else None)
        found[role] = TableGuess(table.sample, "items" if role == "item" else "users", described)
    within = {role: _within(guess, role, named.get("name")) for role in KEYS if role not in found}
    found |= {role: columns for role, columns in within.items() if columns}
    used = [table for table, _ in entities.values()]
    others = tuple(TableGuess(table.sample, "other", _plain(table)) for table in rest if not any(table is one for one in used))
    return DatasetGuess(guess, found.get("item"), found.get("user"), others, tuple(questions))


@dataclass(frozen=True, eq=False)
class _Table:
    sample: Sample
    facts: dict[str, ColumnFacts]

    @property
    def name(self) -> str:
        return self.sample.name

    def keys(self, role: str) -> list[str]:
        """Return the columns that can be ids of this role by name or value, the clearest first."""
        strength = {
            name: 3 if facts.looks_like == role else is_id(name, role)
            for name, facts in self.facts.items()
            if facts.id_like and facts.looks_like in (None, role)
        }
        return sorted((name for name in strength if strength[name] > 0), key=lambda name: -strength[name])


def _sample(table: Sample | pa.Table, name: str) -> Sample:
    return table if isinstance(table, Sample) else Sample(name, table)


def _check_names(tables: list[_Table], chosen: dict[str, str | None], named: dict[str, str]) -> None:
    names = [table.name for table in tables]
    for kind, name in chosen.items():
        if name is not None and name not in names:
            raise DataError(f"There is no table {name!r}, which was named as {kind}.{nearest(name, names)}")
    columns = list(chain.from_iterable(table.facts for table in tables))
    for role, column in named.items():
        if role not in ROLES:
            raise DataError(f"There is no role {role!r} of a column.{nearest(role, ROLES)}")
        if column not in columns and not (column == NONE and role not in KEYS):
            raise DataError(f"{', '.join(names)}: no column {column!r}, which was named as {role}.{nearest(column, columns)}")


def _main_table(
    tables: list[_Table], chosen: str | None, taken: set[str | None], named: dict[str, str]
) -> tuple[_Table | None, str]:
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


def _pair_rank(table: _Table, named: dict[str, str]) -> int:
    """Return 2 for a table with users and items that both repeat, 1 if the ids of one are unique, 0 if it lacks one of them."""
    if table.sample.form and table.sample.form.kind == "sequences":
        return 2
    keys = {role: [named[role]] if role in named else table.keys(role) for role in KEYS}
    pairs = [(user, item) for user in keys["user"] for item in keys["item"] if user != item]
    repeated = any(not _is_key(table.facts[user]) and not _is_key(table.facts[item]) for user, item in pairs)
    return 2 if repeated else min(len(pairs), 1)


def _is_entity(table: _Table) -> bool:
    """Return True if a column of ids of items or users is unique."""
    return any(_is_key(table.facts[name]) for role in KEYS for name in table.keys(role))


def _is_key(facts: ColumnFacts) -> bool:
    """Return True if nearly every row has a value of its own: snapshots of a catalogue repeat some ids."""
    return len(facts.values) >= 0.9 * facts.rows and facts.distinct >= 0.9 * len(facts.values) and facts.rows > 1


def _entity_keys(
    rest: list[_Table], main: _Table, chosen: dict[str, str | None], named: dict[str, str]
) -> dict[str, tuple[_Table, str]]:
    """Return the tables of items and of users, each with its column of ids."""
    ranked = []
    for role in KEYS:
        for table in rest:
            wanted = table.name == chosen[role]
            if wanted or (chosen[role] is None and table.name not in chosen.values()):
                for place, (name, facts) in enumerate(table.facts.items()):
                    if facts.id_like and (_is_key(facts) or (wanted and facts.distinct > 1)):
                        ranked.append((_key_rank(table, name, role, main, named) + 10 * wanted, -place, role, table, name))
    found: dict[str, tuple[_Table, str]] = {}
    for rank, _, role, table, name in sorted(ranked, key=lambda row: row[:2], reverse=True):
        if rank >= 2 and role not in found and all(table is not used for used, _ in found.values()):
            found[role] = (table, name)
    return found


def _key_rank(table: _Table, name: str, role: str, main: _Table, named: dict[str, str]) -> float:
    """Return how well a unique column of a table fits the ids of a role: by its name, the name of the table, and equal values."""
    facts = table.facts[name]
    other = "user" if role == "item" else "item"
    partners = [named[role]] if role in named else main.keys(role)
    rank = (3.0 if facts.looks_like == role else 0.0) + (1.0 if is_id(Path(table.name).stem, role) else 0.0)
    if not (table.sample.form and table.sample.form.columns):
        same = any(words(name) == words(partner) for partner in partners)
        if not same and (is_id(name, other) > is_id(name, role) or name in main.keys(other)):
            return -1.0
        rank += is_id(name, role) + 2 * same
    known = set(facts.counts)
    shares = [sum(value in known for value in main.facts[partner].counts) / main.facts[partner].distinct for partner in partners]
    return rank + 2 * max(shares, default=0.0)


def _within(main: TableGuess, role: str, name: str | None) -> TableGuess | None:
    """Return the table of items or users in the interactions file: its columns that are the same in all rows of an id."""
    key, other = main.column(role), main.column("user" if role == "item" else "item")
    if key is None or other is None or (main.sample.form and main.sample.form.kind == "sequences"):
        return None
    rows = main.sample.rows
    free = [column.name for column in main.columns if column.role == "unused" and column.kind != "empty"]
    same = [column for column in free if depends_on(rows, column, key) and not depends_on(rows, column, other)]
    if not same:
        return None
    firsts = rows.select([key, *same]).group_by(key, use_threads=False).aggregate([(column, "first") for column in same])
    described = Sample(main.sample.name, firsts.rename_columns([key, *same]), main.sample.form, main.sample.path)
    columns = describe_entity(described, facts_of(described.rows), key, role, name if role == "item" and name in same else None)
    if not any(column.role in ("name", "since", "feature") for column in columns):
        return None
    return TableGuess(described, "items" if role == "item" else "users", columns, within=True)


def _plain(table: _Table) -> tuple[ColumnGuess, ...]:
    return tuple(ColumnGuess.of(facts, "unused", "the table is not read") for facts in table.facts.values())


def _common(paths: list[Path]) -> Path:
    """Return the folder that holds all files."""
    folders = [path.parent for path in paths]
    shared = folders[0]
    while not all(folder == shared or shared in folder.parents for folder in folders):
        shared = shared.parent
    return shared
