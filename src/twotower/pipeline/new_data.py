"""Find out what new data an update was given: files, an event store, or tables in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import twotower.data.sources  # noqa: F401 - first, so that a missing extra is one line
from twotower.data.dataset import Dataset
from twotower.data.sources.file_form import read_sample
from twotower.data.sources.tables import DEFAULT_EVENT
from twotower.errors import DataError
from twotower.pipeline.raw_data import tables_in
from twotower.utils.config import DataConfig, InteractionTableConfig

STORED = "events"  # name of the table with the events of a store
ROLES = ("interactions", "items", "users")


@dataclass(frozen=True)
class NewSource:
    """The location of the new data of an update.

    Attributes
    ----------
    what
        Name in messages.
    data
        Settings that read them.
    tables
        Tables in memory by name.
    identity
        Files with size and time, or the address of a store. An interrupted update of the same source goes on; empty: never.
    """

    what: str
    data: DataConfig
    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    identity: tuple[str, ...] = ()


def source_of_files(paths: Sequence[Path], base: Dataset) -> NewSource:
    """Return the source of files with the columns of the run: events, and items and users if there are any.

    Raises
    ------
    DataError
        A path is missing, or a file has the columns of no table of the run.
    """
    from twotower.serving.event_export import EVENTS, kind_of

    data = base.manifest.config.data
    for path in paths:
        if not path.exists():
            raise DataError(f"No file or folder at {path}. Name the new events: files or a folder like those of the run.")
    if len(paths) == 1 and paths[0].is_file() and kind_of(paths[0]) == EVENTS:
        return source_of_store(str(paths[0]), base)
    what, identity = ", ".join(map(str, paths)), tuple(_identity(file) for path in paths for file in _files(path))
    if data.source == "tables":
        return NewSource(what, _tables(data, paths), identity=identity)
    if len(paths) > 1 or (paths[0].is_file() and data.source != "sessions"):
        raise DataError(f"{what} cannot be read like the run, whose source is {data.source}. Give one folder of such files.")
    if paths[0].is_file():
        sessions = data.sessions.model_copy(update={"path": paths[0].resolve()})
        return NewSource(what, data.model_copy(update={"sessions": sessions}), identity=identity)
    return NewSource(what, data.model_copy(update={"path": paths[0].resolve()}), identity=identity)


def source_of_store(store: str, base: Dataset) -> NewSource:
    """Return the source of all events in an event store, or in an export of one; those that the run has do not count again.

    Parameters
    ----------
    store
        sqlite:PATH or redis://…, which servers may go on using, or the Parquet file of `twotower events export`.

    Raises
    ------
    DataError
        There is no store, or it cannot be read.
    """
    from twotower.serving.event_export import EVENTS, event_table, kind_of
    from twotower.serving.redis_store import without_password
    from twotower.serving.stored_rows import every_event, reading

    if ":" not in store and Path(store).is_file():
        if kind_of(Path(store)) != EVENTS:
            text = "Expected a file of `twotower events export`, or the address of a store."
            raise DataError(f"{store} is not an export of events. {text}")
        return _of_events(store, pq.read_table(store), base, (_identity(Path(store)),))
    with reading(store) as opened:
        found = pa.concat_tables([event_table([]), *(event_table(page) for page in every_event(opened))])
    printed_store = store if store.startswith("sqlite:") else without_password(store)
    return _of_events(printed_store, found, base, (printed_store,))


def _of_events(what: str, found: pa.Table, base: Dataset, identity: tuple[str, ...]) -> NewSource:
    default = next(iter(base.event_types), DEFAULT_EVENT)
    at = found.column_names.index("event_type")
    found = found.set_column(at, "event_type", pc.fill_null(found["event_type"], default)).replace_schema_metadata()
    columns = {name: name for name in ("time", "event_type", "stars", "position", "request")}
    about = InteractionTableConfig(path=Path(STORED), time_format="%s", **columns)
    return NewSource(what, DataConfig(source="tables", interactions=about), {STORED: found}, identity)


def source_of_tables(tables: Mapping[str, pa.Table], base: Dataset) -> NewSource:
    """Return the source of tables in memory, named as those that the run was made of ("events", "items", "users")."""
    data, names = base.manifest.config.data, {"interactions": "events", "items": "items", "users": "users"}
    return NewSource(
        "the new events", _with_paths(data, {role: Path(name) for role, name in names.items() if name in tables}), tables
    )


def _tables(data: DataConfig, paths: Sequence[Path]) -> DataConfig:
    """Return the settings with the new files in place of those of the run."""
    files = [file.resolve() for path in paths for file in tables_in(path)]
    if len(files) == 1:
        return _with_paths(data, {"interactions": files[0]})
    found: dict[str, Path] = {}
    for file in files:
        role = _role(file, data)
        if role in found:
            raise DataError(f"{found[role]} and {file} both have the columns of {role}. Give one file of each table.")
        found[role] = file
    if "interactions" not in found:
        raise DataError(f"None of {', '.join(map(str, files))} has the events: expected {_wanted(data)['interactions']}.")
    return _with_paths(data, found)


def _with_paths(data: DataConfig, found: Mapping[str, Path]) -> DataConfig:
    """Return the settings with these paths. A table that is taken from the events stays; one without a path is left out."""
    changed: dict[str, Any] = {}
    for role in ROLES:
        table = getattr(data, role)
        if table is not None and role in found:
            changed[role] = table.model_copy(update={"path": found[role]})
        elif table is not None and table.path is not None:
            changed[role] = None
    return data.model_copy(update={"path": Path(), **changed})


def _wanted(data: DataConfig) -> dict[str, list[str]]:
    """Return the columns without which a file is none of a table."""
    keys = {}
    if data.interactions is not None:
        keys["interactions"] = [data.interactions.user_id, data.interactions.item_id]
    if data.items is not None and data.items.path is not None:
        keys["items"] = [data.items.item_id]
    if data.users is not None and data.users.path is not None:
        keys["users"] = [data.users.user_id]
    return keys


def _role(file: Path, data: DataConfig) -> str:
    """Return the table of the run that a file belongs to: by its name, else by its columns."""
    for role in _wanted(data):
        if Path(getattr(data, role).path).name == file.name:
            return role
    names = set(read_sample(file).rows.column_names)
    for role, columns in _wanted(data).items():
        if names >= set(columns):
            return role
    printed_url = "; ".join(f"{role}: {', '.join(columns)}" for role, columns in _wanted(data).items())
    raise DataError(
        f"{file} has another schema than the run: its columns are {', '.join(sorted(names))[:200]}. Expected those of one of its "
        f"tables ({printed_url}). Nothing was changed. Write the columns as before."
    )


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _identity(file: Path) -> str:
    about = file.stat()
    return f"{file.resolve()} {about.st_size} {about.st_mtime_ns}"
