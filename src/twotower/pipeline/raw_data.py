"""Identify the raw data of a command: a Yelp folder, tables whose columns are guessed, or a public dataset by name."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import twotower.data.sources  # noqa: F401 - first, so that a missing extra is one line
from twotower.data.matching import count_ids, match_ids
from twotower.data.named_datasets import named_dataset, names
from twotower.data.prepare import SOURCES, open_engine
from twotower.data.sources.account import Match, Rejects, account_table
from twotower.data.sources.engine import Engine
from twotower.data.sources.file_form import Sample, read_sample
from twotower.data.sources.guess import DatasetGuess, guess_dataset
from twotower.data.sources.guess_text import one_line
from twotower.data.sources.raw_tables import RawTables
from twotower.data.sources.table_paths import FORMS, listing
from twotower.data.sources.text_files import COMPRESSED, engine_errors
from twotower.data.sources.yelp import find_files
from twotower.errors import ConfigError, DataError
from twotower.schema import ITEM_ID, TIME, USER_ID
from twotower.utils.config import Config, DataConfig, load_config, read_settings

MAX_TABLES = 12


@dataclass(frozen=True)
class RawData:
    """The raw data of a command.

    Attributes
    ----------
    settings
        Sections of a configuration that describe the data; empty if the guess has questions.
    guess
        The guess behind the settings; None for a Yelp folder and for datasets by name.
    """

    settings: dict[str, Any]
    guess: DatasetGuess | None = None
    files: tuple[Path, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def lines(self) -> list[str]:
        """Two lines about the guess, or one with the name of the dataset; empty for a Yelp folder."""
        if self.guess is None:
            return [self.note] if self.note else []
        words = [*map(str, self.files), *(word for option in role_options(self.named) for word in option), "--out", "shop.yaml"]
        return [f"Guessed: {one_line(self.guess)}", f"Check and change it: twotower inspect {shlex.join(words)}"]


def find_raw_data(paths: Sequence[Path], named: Mapping[str, str] | None = None) -> RawData:
    """Describe raw data: find Yelp files in a folder, or guess the columns of tables.

    Parameters
    ----------
    paths
        A folder, or files of tables.
    named
        Role → column, for the roles that you know, such as {"user": "customer"}.

    Raises
    ------
    DataError
        A path is missing, a folder has no tables, or is a prepared dataset.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"No file or folder at {path}: {listing(path.parent)}. Name raw data: a Yelp folder, or tables.")
    if len(paths) == 1 and paths[0].is_dir() and not named:
        found = find_files(paths[0])
        if "business" in found or (found and not [file for file in _listed(paths[0]) if file not in found.values()]):
            return RawData({"data": {"source": "yelp", "path": str(paths[0])}})
    files = [file for path in paths for file in tables_in(path)]
    guess = guess_dataset(list(_samples(files)), **(named or {}))
    settings = {} if guess.questions else {"data": guess.to_config()}
    return RawData(_with_split(settings), guess, tuple(files), named or {})


def role_options(named: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the options of the command line that name columns."""
    return [(f"--{role.replace('_', '-')}", column) for role, column in named.items()]


def _with_split(settings: dict[str, Any]) -> dict[str, Any]:
    """Add a leave-one-out split if the interactions have no times."""
    data = settings.get("data", {})
    timed = data.get("source") == "sessions" or data.get("interactions", {}).get("time")
    return settings if not data or timed else settings | {"prepare": {"split": {"kind": "leave_one_out"}}}


def _samples(files: Sequence[Path]) -> Iterator[Sample]:
    """Yield a sample of each file; files of the same name get their path as name."""
    names = [file.name for file in files]
    for file in files:
        sample = read_sample(file)
        name = str(file) if names.count(file.name) > 1 else file.name
        yield Sample(name, sample.rows, sample.form, file, sample.complete, sample.notes)


def tables_in(path: Path) -> list[Path]:
    """Return the tables in a folder, or the file itself; a folder of the parts of one table is one.

    Raises
    ------
    DataError
        The folder is a prepared dataset, or has no table or too many.
    """
    if path.is_file():
        return [path]
    if (path / "manifest.json").is_file():
        raise DataError(
            f"{path} is already prepared: it has a manifest.json. Raw data are expected here. Run: twotower train --data {path}"
        )
    files = _listed(path)
    below = [] if files else sorted(child for child in path.rglob("[!_.]*") if child.is_file() and _ending(child) in FORMS)
    if _are_parts(files or below):
        return [path]
    if not files or len(files) > MAX_TABLES:
        wanted = f"1 to {MAX_TABLES} tables ({', '.join(FORMS)}; also {', '.join(COMPRESSED)}) or Yelp's files"
        raise DataError(f"{path} has {len(files)} files of tables: {listing(path)}. Expected {wanted}. Name the files.")
    return files


def _are_parts(files: Sequence[Path]) -> bool:
    """Return True for the parts of one table: names that differ in digits alone, or Parquet files with the same columns."""
    if len(files) > 1 and len({re.sub("[0-9]+", "0", file.name) for file in files}) == 1:
        return True
    if not files or any(file.suffix != ".parquet" for file in files):
        return False
    try:
        return len({tuple(pq.read_schema(file).names) for file in files}) == 1
    except (pa.ArrowInvalid, OSError):
        return False


def _listed(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_file() and _ending(child) in FORMS)


def _ending(path: Path) -> str:
    name = path.name.lower()
    return Path(next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)).suffix


def load_raw_config(
    data: Sequence[str], named: Mapping[str, str], config_path: Path | None, overrides: Sequence[str]
) -> tuple[Config, RawData]:
    """Return the settings of a command that reads raw data, and a description of the data.

    Parameters
    ----------
    data
        A folder, files, or the name of a public dataset; empty: the configuration describes the data.
    named
        Role → column, for the roles that you know.
    config_path, overrides
        As for `load_config`; they override the guess.

    Raises
    ------
    DataError
        The guess has open questions (the message is the first one), or a public dataset has not been downloaded.
    ConfigError
        The configuration describes the tables, and `data` is not just the folder of its files.
    """
    if not data:
        return load_config(config_path, list(overrides)), RawData({})
    described = _described(read_settings(config_path, list(overrides)))
    if described:
        if len(data) > 1 or Path(data[0]).is_file() or named:
            raise ConfigError(
                f"The configuration already describes the data ({described}), so {data[0]} is not guessed. "
                "Pass only the folder of its files with --data, or leave these settings out."
            )
        return load_config(config_path, [*overrides, f"data.path={json.dumps(data[0])}"]), RawData({})
    known = named_dataset(data[0]) if len(data) == 1 and data[0] in names() else None
    raw = (
        RawData(known.settings, note=f"Dataset: {known.title}, read as in `twotower datasets config {known.name}`")
        if known
        else None
    )
    raw = raw or find_raw_data([Path(path) for path in data], named)
    if raw.guess is not None and raw.guess.questions:
        raise DataError(raw.guess.questions[0])
    config = load_config(config_path, list(overrides), base=raw.settings)
    if known and not config.data.path.is_dir():
        how = f"Run: twotower datasets get {known.name}" if known.files else f"Download it at {known.address}"
        raise DataError(f"{known.name} is missing: {config.data.path} is not a folder. {how}, or set data.path to its folder.")
    return config, raw


def _described(settings: dict[str, Any]) -> str:
    """Return the names of settings that describe the files; "" if there are none, so that the columns are guessed."""
    data = settings.get("data") or {}
    sections = [name for name in ("interactions", "items", "users") if isinstance(data.get(name), dict) and data[name].get("path")]
    return (
        ", ".join(f"data.{name}" for name in ("source", *sections, "sequences") if data.get(name)) if isinstance(data, dict) else ""
    )


def account(config: Config) -> list[str]:
    """Read the raw data of a configuration, and return the account as lines: rows and rejects by file, sizes, ids that differ."""
    with TemporaryDirectory() as folder, engine_errors():
        rejects = Rejects(Path(folder) / "rejects.jsonl", max_frac=1.0)
        engine = open_engine(config.prepare, Path(folder) / "spill")
        try:
            raw = SOURCES[config.data.source](config.data, engine, rejects)
            rejects.check()
            return _account(engine, raw, config.data, rejects)
        finally:
            rejects.close()
            engine.close()


def _account(engine: Engine, raw: RawTables, data: DataConfig, rejects: Rejects) -> list[str]:
    events = raw.interactions
    counted = {USER_ID: count_ids(engine, events, USER_ID), ITEM_ID: count_ids(engine, events, ITEM_ID)}
    separate = {"item": data.items, "user": data.users}  # a table within the interactions has all their ids
    matched: dict[str, Match] = {}
    for side, key in (("item", ITEM_ID), ("user", USER_ID)):
        table = separate[side]
        if f"{side}s" in raw.described and (table is None or table.path is not None):
            matched[side] = match_ids(engine, counted[key], getattr(raw, f"{side}s"), key)
    total = events.aggregate(n=events.count(), first=events[TIME].min(), last=events[TIME].max()).to_pyarrow().to_pylist()[0]
    sizes = [int(counted[key].count().to_pyarrow().as_py()) for key in (USER_ID, ITEM_ID)]
    counts = {
        "files": {name: file.as_json() for name, file in rejects.files.items()},
        "dropped": {},
        "matched": {side: asdict(match) for side, match in matched.items()},
        "times_s": {name: total[name] for name in ("first", "last")} if raw.has_time and total["n"] else {},
    }
    notes = [*rejects.warnings(), *(note for side, match in matched.items() for note in match.warnings(side))]
    lines = [f"{total['n']:,} events of {sizes[0]:,} users at {sizes[1]:,} items", *account_table(counts)]
    return lines + [f"  warning: {note}" for note in notes]
