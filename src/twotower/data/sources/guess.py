"""Guess what tables hold: which one has the interactions, and which column is the user, the item, the time, a feature.

A guess uses the names of the columns and their values. Where both leave more than one answer, the guess holds a question instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from twotower.data.sources.column_facts import depends_on, facts_of
from twotower.data.sources.column_words import Role
from twotower.data.sources.file_form import Sample
from twotower.data.sources.guess_columns import NONE, ColumnGuess, describe_interactions
from twotower.data.sources.guess_features import describe_entity
from twotower.data.sources.guess_tables import KEYS, Table, entity_keys, main_table, session_keys
from twotower.data.sources.json_rows import SAMPLED_ROWS
from twotower.data.sources.times import check_pattern
from twotower.errors import DataError, nearest

TableKind = Literal["interactions", "items", "users", "other"]
SLICES = 5  # parts of a large table from which rows are sampled
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class TableGuess:
    """The guessed content of one table.

    Attributes
    ----------
    kind
        "interactions", "items" or "users"; "other": nothing that is read.
    columns
        Every column with its role, its kind and the reason.
    questions
        One line for each choice that the data leave open; empty if the guess is complete.
    within
        True if these are columns of the interactions file.
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
        file_name = self.sample.name if path is None else str(path.relative_to(base) if base else path)
        settings: dict[str, Any] = {"path": file_name, **(self.sample.form.settings() if self.sample.form else {})}
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
    """The guessed content of several tables.

    Attributes
    ----------
    interactions, items, users
        The tables; None if there is none.
    others
        Tables that are not read.
    questions
        One line for each choice that the data leave open; empty if the guess is complete.
    sessions
        Settings of `data.sessions`, if each row has a list of events.
    """

    interactions: TableGuess | None
    items: TableGuess | None = None
    users: TableGuess | None = None
    others: tuple[TableGuess, ...] = ()
    questions: tuple[str, ...] = field(default=())
    sessions: dict[str, str] = field(default_factory=dict)

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
        if self.sessions:
            file = str(paths[0].relative_to(base or Path())) if paths else self.interactions.sample.name
            return {"source": "sessions", "path": str(base), "sessions": {"path": file, "event_type": None, **self.sessions}}
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
        Columns by role, as in `guess_table`; "none" for a role without a column. `time_format`: the format of the times.

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
    tables = [Table(sample, facts_of(sample.rows)) for sample in given]
    _check_names(tables, {"interactions": interactions, "items": items, "users": users}, named)
    sessions = session_keys(tables[0]) if len(tables) == 1 and not named else {}
    if sessions:
        return DatasetGuess(_session_table(tables[0], sessions), sessions=sessions)
    main, question = main_table(tables, interactions, {items, users}, named)
    if main is None:
        others = tuple(TableGuess(table.sample, "other", _plain(table)) for table in tables)
        return DatasetGuess(None, others=others, questions=(question,))
    if not main.sample.rows.num_rows:
        raise DataError(f"{main.name} has column names and no complete row. Expected at least one event. Name another file.")
    rest = [table for table in tables if table is not main]
    entities = entity_keys(rest, main, {"item": items, "user": users}, named)
    _check_places(main, entities.get("item"), named)
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
    guess = _shared_out(guess, within)
    used = [table for table, _ in entities.values()]
    others = tuple(TableGuess(table.sample, "other", _plain(table)) for table in rest if not any(table is one for one in used))
    return DatasetGuess(guess, found.get("item"), found.get("user"), others, tuple(questions))


def _sample(table: Sample | pa.Table, name: str) -> Sample:
    if isinstance(table, Sample):
        return table
    if table.num_rows <= SAMPLED_ROWS:
        return Sample(name, table)
    part = SAMPLED_ROWS // SLICES
    starts = [number * (table.num_rows - part) // (SLICES - 1) for number in range(SLICES)]
    return Sample(name, pa.concat_tables([table.slice(start, part) for start in starts]), complete=False)


def _check_names(tables: list[Table], chosen: dict[str, str | None], named: dict[str, str]) -> None:
    names = [table.name for table in tables]
    for kind, name in chosen.items():
        if name is not None and name not in names:
            raise DataError(f"There is no table {name!r}, which was named as {kind}.{nearest(name, names)}")
    columns = list(dict.fromkeys(chain.from_iterable(table.facts for table in tables)))
    for role, column in named.items():
        if role == "time_format":
            check_pattern(column)
            continue
        if role not in ROLES:
            raise DataError(f"There is no role {role!r} of a column.{nearest(role, ROLES)}")
        if column not in columns and not (column == NONE and role not in KEYS):
            raise DataError(f"{', '.join(names)}: no column {column!r}, which was named as {role}.{nearest(column, columns)}")
    if "user" in named and named["user"] == named.get("item"):
        raise DataError(f"The column {named['user']!r} was named as user and as item. Each needs a column of its own.")


def _check_places(main: Table, items: tuple[Table, str] | None, named: dict[str, str]) -> None:
    """Raise an error if a column was named for two roles of a table, or is not in the table that its role describes."""
    seen: dict[tuple[str, str], str] = {("", items[1]): "item"} if items else {}
    for role, column in named.items():
        if role == "time_format" or column == NONE:
            continue
        table, place = (items[0], "") if role == "name" and items else (main, "events")
        if column not in table.facts:
            raise DataError(f"{table.name} has no column {column!r}, which was named as {role}.{nearest(column, table.facts)}")
        other = seen.setdefault((place, column), role)
        if other != role:
            raise DataError(f"The column {column!r} was named as {other} and as {role}. Each needs a column of its own.")


def _session_table(table: Table, keys: dict[str, str]) -> TableGuess:
    """Return the table of sessions: the id, and the list of events."""
    inner = ", ".join(f"{setting} {key}" for setting, key in keys.items() if setting not in ("user_id", "events"))
    found = {
        keys["user_id"]: ColumnGuess.of(table.facts[keys["user_id"]], "user", "a session stands for a user"),
        keys["events"]: ColumnGuess.of(table.facts[keys["events"]], "events", f"lists of events with {inner}"),
    }
    columns = tuple(found.get(name) or ColumnGuess.of(facts, "unused", "no role") for name, facts in table.facts.items())
    return TableGuess(table.sample, "interactions", columns)


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


def _shared_out(main: TableGuess, within: dict[str, TableGuess | None]) -> TableGuess:
    """Return the interactions with the role "of item" or "of user" for the columns that describe these."""
    roles = {
        column.name: f"of {role}" for role, table in within.items() if table for column in table.columns if column.role not in KEYS
    }
    columns = [replace(column, role=roles[column.name]) if column.name in roles else column for column in main.columns]
    return replace(main, columns=tuple(columns))


def _plain(table: Table) -> tuple[ColumnGuess, ...]:
    return tuple(ColumnGuess.of(facts, "unused", "the table is not read") for facts in table.facts.values())


def _common(paths: list[Path]) -> Path:
    """Return the folder that holds all files."""
    folders = [path.parent for path in paths]
    shared = folders[0]
    while not all(folder == shared or shared in folder.parents for folder in folders):
        shared = shared.parent
    return shared
