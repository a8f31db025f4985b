"""Read sequence files ("user item item …", as used in the literature) as raw tables.

Input: a training file, optionally a test file of the same format, a JSON object item → attributes, and JSON lines that describe
items. The tables have no times: `time_s` is the position in the user's line, and a test line continues the training line of its
user. Repeats are kept. Tokens are ids as they are: nothing is sorted, merged or renumbered.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import Engine
from twotower.data.sources.json_files import open_json
from twotower.data.sources.raw_tables import CHARS, INTERACTIONS, RawTables, ids_only
from twotower.data.sources.table_paths import listing
from twotower.data.sources.text_files import reading, text_blocks, unchanged
from twotower.data.sources.values import id_text
from twotower.errors import DataError
from twotower.schema import EVENT_TYPE, ITEM_ID, ORDER, PART, TIME, USER_ID, FeatureSpec
from twotower.utils.config import DataConfig
from twotower.utils.types import Int

EVENT = "interaction"  # the type of every event
DISPLAY_COLUMNS = {
    "name": pa.string(),
    "city": pa.string(),
    "state": pa.string(),
    "latitude": pa.float64(),
    "longitude": pa.float64(),
}
CATEGORIES, CATEGORY_IDS = "categories", "category_ids"


def read_sequences(config: DataConfig, engine: Engine, rejects: Rejects) -> RawTables:
    """Read the files of `config.sequences` and return the raw tables.

    Parameters
    ----------
    config
        Files are relative to `path`.
    engine
        Receives the tables.
    rejects
        Receives lines that are not UTF-8 text, and lines of the items file that are not a JSON object with an item.

    Returns
    -------
    RawTables
        Items of the sequences come first, then those that only the items file has. Attributes become the multi-valued feature
        "categories". If the items file also has category names, the column `categories` holds these for display and filters, and
        the feature reads the column `category_ids`.

    Raises
    ------
    DataError
        A file is missing, has another format, or holds no interaction.
    """
    settings = config.sequences
    counts: dict[str, int] = {}
    parts = [_sequences(_found(config.path, settings.train, "train"), rejects, counts)]
    if settings.test:
        parts.append(_sequences(_found(config.path, settings.test, "test"), rejects, counts))
    events = engine.save(_events(parts, split=settings.test is not None))
    described = _items(_found(config.path, settings.items, "items"), engine.spill, rejects, counts) if settings.items else {}
    attributes = _attributes(_found(config.path, settings.attributes, "attributes")) if settings.attributes else {}
    ids = dict.fromkeys(chain(*(items for _, items, _ in parts), described))
    table, features = _item_table(list(ids), described, attributes)
    return RawTables(
        interactions=events,
        users=ids_only(engine, events, USER_ID),
        items=engine.save(table),
        features=features,
        has_time=False,
        counts=counts,
    )


Part = tuple[list[str], list[str], Int]
"""(users, items, lengths): user [L] and number of items int64 [L] of each line; items of all lines one after another."""


def _sequences(file: Path, rejects: Rejects, counts: dict[str, int]) -> Part:
    """Return the lines of a file; a user alone on a line has no events."""
    lines: list[list[str]] = []
    with reading(file), unchanged([file]):
        for block in text_blocks(file):
            try:
                lines += [line.split() for line in block.decode().split("\n")[:-1]]
            except UnicodeDecodeError:
                lines += _readable(file, block, len(lines), rejects)
    total = len(lines)
    lines = [line for line in _with_ids(file, lines, rejects) if line]
    account = rejects.of(file.name)
    rejects.total(file.name, len(lines) + rejects.rejected.get(file.name, 0))
    account.table, account.lines, account.skipped = "interactions", total, {"blank": total - account.rows}
    counts[file.name] = len(lines)
    lengths = np.fromiter((len(line) - 1 for line in lines), np.int64, len(lines))
    if not lengths.sum():
        raise DataError(
            f"{file} has {len(lines)} lines and no item{f', the first is {lines[0][0][:60]!r}' if lines else ''}. "
            'Lines must be "user item item …", separated by blanks. Name another file in data.sequences.'
        )
    return [line[0] for line in lines], [item for line in lines for item in line[1:]], lengths


def _readable(file: Path, block: bytes, before: int, rejects: Rejects) -> list[list[str]]:
    """Return the lines of a block, empty where they are not UTF-8."""
    lines: list[list[str]] = []
    for number, line in enumerate(block[:-1].split(b"\n"), before + 1):
        try:
            lines.append(line.decode().split())
        except UnicodeDecodeError:
            rejects.add(file.name, number, "not UTF-8 text", line.decode("utf-8", "replace"))
            lines.append([])
    return lines


def _with_ids(file: Path, lines: list[list[str]], rejects: Rejects) -> list[list[str]]:
    """Return the lines with ids by the rule of all sources; a line without a user is rejected, an item without an id left out."""
    ids = {token: id_text(token) for token in set(chain.from_iterable(lines))}
    if all(token == found for token, found in ids.items()):
        return lines
    kept: list[list[str]] = []
    lost = 0
    for number, line in enumerate(lines, 1):
        if line and ids[line[0]] is None:
            rejects.add(file.name, number, f"user is missing: {line[0]!r}", " ".join(line))
            kept.append([])
            continue
        named = [found for token in line if (found := ids[token]) is not None]
        lost += len(line) - len(named)
        kept.append(named)
    if lost:
        rejects.of(file.name).left_out["item is missing"] = lost
    return kept


def _events(parts: list[Part], *, split: bool) -> pa.Table:
    """Return all events in the order of the files; positions count the events of a user over all lines."""
    users = list(chain(*(part[0] for part in parts)))
    lengths = np.concatenate([part[2] for part in parts])
    known: dict[str, int] = {}
    line_user = np.fromiter((known.setdefault(user, len(known)) for user in users), np.int64, len(users))
    event_user = np.repeat(line_user, lengths)
    size = len(event_user)
    by_user = np.argsort(event_user, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(event_user, minlength=len(known)))[:-1]])
    position = np.empty(size, np.int64)
    position[by_user] = np.arange(size) - np.repeat(starts, np.bincount(event_user, minlength=len(known)))
    sizes = [int(part[2].sum()) for part in parts]
    part = np.repeat(["train", "test"][: len(parts)], sizes) if split else None
    columns = {
        USER_ID: pa.array(list(known)).take(pa.array(event_user)),
        ITEM_ID: pa.array(list(chain(*(items for _, items, _ in parts)))),
        TIME: pa.array(position),
        ORDER: pa.array(np.arange(size)),
        EVENT_TYPE: pa.repeat(EVENT, size),
        CHARS: pa.array(np.zeros(size, np.int64)),
        PART: pa.nulls(size, pa.string()) if part is None else pa.array(part),
    }
    types = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
    return pa.table({name: columns.get(name, pa.nulls(size, types[kind])) for name, kind in INTERACTIONS.items()})


def _items(file: Path, spill: Path, rejects: Rejects, counts: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return the description of each item in the items file; later lines of the same item are rejected."""
    found: dict[str, dict[str, Any]] = {}
    total = 0
    with reading(file):
        for number, line in open_json(file, spill).lines():
            total += 1
            try:
                item, row = _item(line)
                if item in found:
                    raise ValueError(f"item {item!r} repeats an earlier line")
                found[item] = row
            except (ValueError, RecursionError) as error:
                rejects.add(file.name, number, str(error), line.decode("utf-8", "replace").rstrip())
    rejects.total(file.name, total)
    counts[file.name] = total
    return found


def _item(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
    except ValueError:
        raise ValueError("not a complete JSON object with item") from None
    item = id_text(row.get("item")) if isinstance(row, dict) else None
    if item is None:
        raise ValueError("item is missing")
    location = [_number(row.get(name), name, limit) for name, limit in (("latitude", 90), ("longitude", 180))]
    values: dict[str, Any] = {name: str(row[name]).strip() for name in ("name", "city", "state") if row.get(name)}
    categories = row.get("categories") or []
    names = categories.split(",") if isinstance(categories, str) else categories if isinstance(categories, list) else []
    return item, {
        **values,
        "latitude": location[0],
        "longitude": location[1],
        CATEGORIES: list(dict.fromkeys(str(name).strip() for name in names)),
    }


def _number(value: Any, name: str, limit: int) -> float | None:
    if value in (None, ""):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not -limit <= number <= limit:
        raise ValueError(f"{name} must be from -{limit} to {limit}, not {str(value)[:60]!r}")
    return number


def _attributes(file: Path) -> dict[str, list[str]]:
    with reading(file):
        content = b"".join(text_blocks(file))
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError(
            f"{file} is not a JSON object. data.sequences.attributes must map items to lists of attributes. Name another file."
        )
    return {item: [str(value) for value in (values if isinstance(values, list) else [values])] for item, values in found.items()}


def _item_table(
    ids: list[str], described: dict[str, dict[str, Any]], attributes: dict[str, list[str]]
) -> tuple[pa.Table, tuple[FeatureSpec, ...]]:
    rows = [described.get(item, {}) for item in ids]
    columns: dict[str, Any] = {ITEM_ID: pa.array(ids, pa.string())}
    columns |= {name: pa.array([row.get(name) for row in rows], kind) for name, kind in DISPLAY_COLUMNS.items()}
    names = [row.get(CATEGORIES, []) for row in rows]
    lists = pa.list_(pa.string())
    attribute_ids = pa.array([attributes.get(item, []) for item in ids], lists)
    columns[CATEGORIES] = pa.array(names, lists) if any(names) else attribute_ids
    if attributes and any(names):
        columns[CATEGORY_IDS] = attribute_ids
    column = CATEGORY_IDS if CATEGORY_IDS in columns else CATEGORIES
    features = (FeatureSpec(name="categories", side="item", kind="multi", columns=(column,)),) if attributes else ()
    return pa.table(columns), features


def _found(base: Path, path: Path, setting: str) -> Path:
    full = base / path
    if not full.is_file():
        raise DataError(
            f"No file at {full}: {listing(full.parent)}. data.sequences.{setting} must be a file below data.path. "
            "Correct it, or set data.path (--data-dir)."
        )
    return full
