"""Read Yelp's raw files, of any release from 2015 to 2022, plain or gzipped, as raw tables.

The folder holds businesses and reviews or tips, optionally users and check-ins, as Yelp ships them or as Kaggle mounts them. Names
are those of the 2022 release.

Aggregates that Yelp computes over the whole release (`stars` and `review_count` of a business, `average_stars` of a user) are never
read: they include future events. Reviews, tips, users and check-ins never become Python objects, and `friends` are not parsed.
Reading again gives the same rows with the same `order`: reviews, tips, check-ins, then impressions, each in the order of its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ibis
import ibis.expr.types as ir

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import ROW, Engine
from twotower.data.sources.raw_tables import (
    CHARS,
    POSITION,
    REQUEST,
    Check,
    RawTables,
    id_checks,
    ids_only,
    interactions,
    missing,
    quoted,
    screen,
)
from twotower.data.sources.table_files import scan_json
from twotower.data.sources.table_paths import listing
from twotower.data.sources.times import parse_time, seconds
from twotower.data.sources.values import Late, as_id, as_seconds
from twotower.data.sources.yelp_business import read_businesses
from twotower.errors import ConfigError, DataError, nearest
from twotower.schema import ITEM_ID, STARS, TEXT, TIME, TRUTH_FILE, USER_ID, FeatureSpec
from twotower.utils.config import DataConfig

TABLES = ("business", "review", "tip", "checkin", "impression", "user")
EVENTS = ("review", "tip", "checkin", "impression")
STEMS = ("yelp_academic_dataset_{}", "{}", "{}s", "yelp_{}")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
SEARCH_DEPTH = 2  # levels of folders below `data.path` that are searched
FIRST_S, LAST_S = 1_072_915_200, 4_102_444_800  # 2004, Yelp's first year, to 2100
FILE_ORDERS = 1 << 60  # room in `order` for the rows of one table
LINE_ORDERS = 1 << 24  # ... and for the events of one line of check-ins
FEATURES = (
    FeatureSpec(name="categories", side="item", kind="multi", columns=("categories",)),
    FeatureSpec(name="attributes", side="item", kind="multi", columns=("attributes",)),
    FeatureSpec(name="price", side="item", kind="categorical", columns=("price",)),
    FeatureSpec(name="city", side="item", kind="categorical", columns=("city",)),
    FeatureSpec(name="location", side="item", kind="geo", columns=("latitude", "longitude")),
    FeatureSpec(name="hours", side="item", kind="hours", columns=("hours",)),
    FeatureSpec(name="text", side="item", kind="text", columns=("name",)),
)


def read_yelp(config: DataConfig, engine: Engine, rejects: Rejects) -> RawTables:
    """Read the Yelp files under `config.path` and return the raw tables.

    Parameters
    ----------
    config
        `path` is the folder of the files or a parent of it. `events` selects among review, tip, checkin and impression;
        missing files are ignored.
    engine
        Receives the tables.
    rejects
        Receives the bad rows.

    Returns
    -------
    RawTables
        Item columns: `name`, `city`, `state`, `latitude`, `longitude`, `categories`, `attributes` ("WiFi=free",
        "Ambience.casual=True"; false and none are left out), `price` (1 to 4), `hours` (168 characters of 0 and 1 from Monday
        00:00). Check-ins are events without a user. Those of the 2015 and 2017 releases have no dates: counted, but left out.

    Raises
    ------
    DataError
        A required file is missing, exists twice, or cannot be read.
    ConfigError
        `config.events` names an unknown table.
    """
    for name in config.events:
        if name not in EVENTS:
            raise ConfigError(f"data.events has the unknown table {name!r}.{nearest(name, EVENTS)}")
    files = find_files(config.path)
    kinds = [kind for kind in EVENTS if kind in files and kind in config.events]
    if "business" not in files or not {"review", "tip"} & set(kinds):
        _refuse(config, files)
    counts: dict[str, int] = {}
    items = read_businesses(files["business"], engine, rejects, counts)
    parts, texts = [], []
    for position, kind in enumerate(kinds):
        read, base = {"checkin": _checkins, "impression": _impressions}.get(kind, _opinions), position * FILE_ORDERS
        parts.append(read(files[kind], kind, base, engine, rejects, counts))
        if kind in ("review", "tip"):
            # A scan of one key: the engine then knows the size of the file and does not hash all texts in a join.
            text = scan_json(engine, files[kind], [TEXT]).rows
            texts.append(text.select(text[TEXT], order=text[ROW] + base))
    events = _union(parts)
    users = _users(files["user"], engine, rejects, counts) if "user" in files else ids_only(engine, events, USER_ID)
    truth = files["business"].parent / TRUTH_FILE
    return RawTables(
        interactions=events,
        users=users,
        items=items,
        features=FEATURES,
        has_time=True,
        counts=counts,
        texts=_union(texts),
        described=("items", "users") if "user" in files else ("items",),
        truth=truth if truth.is_file() else None,
    )


def _union(tables: list[ir.Table]) -> ir.Table:
    return ibis.union(*tables) if len(tables) > 1 else tables[0]


def find_files(path: Path) -> dict[str, Path]:
    """Return the file of each table, in `path` or in the only folder below it with such files.

    Raises
    ------
    DataError
        Several folders have such files, or a folder has two files for one table.
    """
    found = {folder: files for folder in _folders(path) if (files := _files_in(folder))}
    if path in found:
        return found[path]
    if len(found) > 1:
        names = ", ".join(str(folder) for folder in found)
        raise DataError(f"{path} has several folders with Yelp files: {names}. Set data.path to one of them.")
    return next(iter(found.values()), {})


def _folders(path: Path) -> Iterator[Path]:
    """Yield `path`, then the folders below it, except folders that are named like a Yelp file."""
    level = [path.parent if path.is_file() else path]
    for _ in range(SEARCH_DEPTH + 1):
        yield from level
        level = sorted(
            child for folder in level if folder.is_dir() for child in folder.iterdir() if child.is_dir() and not _table(child.name)
        )


def _files_in(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by table; a plain file is preferred to its gzipped copy."""
    files: dict[str, Path] = {}
    for child in sorted(folder.iterdir()) if folder.is_dir() else []:
        table = _table(child.name)
        path = (
            child / child.name if child.is_dir() else child
        )  # Kaggle used to mount each file in a folder with the name of the file
        if not table or not path.is_file():
            continue
        other = files.setdefault(table, path)
        if other.name.removesuffix(".gz") != path.name.removesuffix(".gz"):
            both = f"{folder} has {other.name} and {path.name}"
            raise DataError(f"{both} for the table {table!r}. Only one file per table is allowed. Move one away.")
    return files


def _table(name: str) -> str | None:
    """Return the table that a file name stands for, or None."""
    suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
    stem = name.removesuffix(suffix) if suffix else None
    return next((table for table in TABLES for pattern in STEMS if stem == pattern.format(table)), None)


def _refuse(config: DataConfig, files: dict[str, Path]) -> None:
    present = ", ".join(path.name for path in files.values())
    found = f"found {present}" if present else listing(config.path)
    raise DataError(
        f"Yelp files are missing in data.path {config.path}: {found}. Required: businesses, and reviews or tips as in data.events "
        f"= {', '.join(config.events)} (yelp_academic_dataset_business.json, …_review.json, …_tip.json, also as .jsonl or .gz). "
        "Set data.path to their folder (--data-dir), or data.source to tables or sequences."
    )


def _opinions(file: Path, kind: str, base: int, engine: Engine, rejects: Rejects, counts: dict[str, int]) -> ir.Table:
    """Return reviews or tips as interactions: user, business, date, text length, and stars for reviews."""
    keys = ["user_id", "business_id", "date", "text"] + (["stars"] if kind == "review" else [])
    scan = scan_json(engine, file, keys)
    rows = scan.rows
    given = rows[STARS] if kind == "review" else ibis.null("string")
    stars, (time, late) = given.try_cast("float64"), _date(rows["date"], "date")
    checks = [
        *_required(rows, keys, "user_id", "business_id", "date"),
        _in_time(rows["date"], time, "date"),
        (given.notnull() & ~stars.between(1, 5).fill_null(False), "stars must be from 1 to 5, not " + quoted(given)),
    ]
    columns = {USER_ID: as_id(rows["user_id"]), ITEM_ID: as_id(rows["business_id"]), TIME: time, STARS: stars}
    columns[CHARS] = rows[TEXT].length().fill_null(0)
    good, read = screen(engine, scan, checks, columns, rejects=rejects, late={TIME: late})
    counts |= read
    return interactions(good, **{name: good[name] for name in columns}, order=good[ROW] + base, event_type=kind)


def _impressions(file: Path, kind: str, base: int, engine: Engine, rejects: Rejects, counts: dict[str, int]) -> ir.Table:
    """Return the items of the lists that a simulated town has shown, each with its list and position."""
    keys = ["user_id", "business_id", "date", "position", "request_id"]
    scan = scan_json(engine, file, keys)
    rows = scan.rows
    position, (time, late) = rows["position"].try_cast("int64"), _date(rows["date"], "date")
    checks = [
        *_required(rows, keys, "user_id", "business_id", "date"),
        _in_time(rows["date"], time, "date"),
        (
            rows["position"].notnull() & ~(position >= 1).fill_null(False),
            "position must be from 1, not " + quoted(rows["position"]),
        ),
    ]
    columns = {USER_ID: as_id(rows["user_id"]), ITEM_ID: as_id(rows["business_id"]), TIME: time, POSITION: position}
    columns[REQUEST] = as_id(rows["request_id"])
    good, read = screen(engine, scan, checks, columns, rejects=rejects, late={TIME: late})
    counts |= read
    return interactions(good, **{name: good[name] for name in columns}, order=good[ROW] + base, event_type=kind)


def _checkins(file: Path, kind: str, base: int, engine: Engine, rejects: Rejects, counts: dict[str, int]) -> ir.Table:
    """Return check-ins as anonymous interactions, many per line; lines of weekday-hour counts are counted as undated."""
    keys = ["business_id", "date", "time", "checkin_info"]
    scan = scan_json(engine, file, keys)
    rows = scan.rows
    undated = rows["date"].isnull() & (rows["time"].notnull() | rows["checkin_info"].notnull())
    stamps = rows["date"].replace(", ", ",").split(",")
    times = stamps.map(seconds).filter(lambda time: time.between(FIRST_S, LAST_S))  # an eighth of the memory of the events
    columns = {ITEM_ID: as_id(rows["business_id"]), "undated": undated, "times": times, "faults": stamps.length() - times.length()}
    checks = [*_required(rows, keys, "business_id"), (missing(rows["date"]) & ~undated, "date is missing")]
    lines, read = screen(engine, scan, checks, columns, rejects=rejects)
    counts |= read
    total = lines.aggregate(undated=lines["undated"].sum(), faults=lines["faults"].sum(), visits=lines["times"].length().sum())
    found = total.to_pyarrow().to_pylist()[0]
    counts |= {f"{file.name} undated": found["undated"] or 0, f"{file.name} visits": found["visits"] or 0}
    if found["faults"]:
        faulty = rows.mutate(stamps=stamps).semi_join(lines.filter(lines["faults"] > 0), ROW)
        wrong = faulty.select(ROW, "stamps").unnest("stamps")
        stamps_only = replace(scan, rows=wrong, files=tuple(replace(part, expected=None) for part in scan.files))
        screen(engine, stamps_only, _stamp_checks(wrong["stamps"]), {ROW: wrong[ROW]}, rejects=rejects)
    if found["undated"]:
        rejects.of(file.name).left_out["check-ins without dates"] = found["undated"]
    visits = lines.select(ITEM_ID, ROW, "times").unnest("times", offset="nth")
    order = base + visits[ROW] * LINE_ORDERS + visits["nth"]
    return interactions(visits, item_id=visits[ITEM_ID], time_s=visits["times"], order=order, event_type=kind)


def _users(file: Path, engine: Engine, rejects: Rejects, counts: dict[str, int]) -> ir.Table:
    """Return the sign-up time and elite years of users; years are "" or "2015,2016" (2020 may be "20,20"), or a list."""
    keys = ["user_id", "yelping_since", "elite"]
    scan = scan_json(engine, file, keys)
    rows = scan.rows
    since, late = _date(rows["yelping_since"], "yelping_since")
    checks = [*_required(rows, keys, "user_id"), _in_time(rows["yelping_since"], since, "yelping_since")]
    whole = rows["elite"].fill_null("").re_replace(r"\b20,\s*20\b", "2020").re_replace(r"[^0-9]+", ",")
    years = whole.split(",").map(lambda year: year.try_cast("int64")).filter(lambda year: year.between(2004, 2100))
    columns = {USER_ID: as_id(rows["user_id"]), "since_s": since, "elite": years}
    good, read = screen(engine, scan, checks, columns, rejects=rejects, unique=USER_ID, late={"since_s": late})
    counts |= read
    return good.drop(ROW)


def _required(rows: ir.Table, read: list[str], *keys: str) -> list[Check]:
    """Return checks for lines without any of the keys (truncated, or not JSON), and for rows without a required key."""
    nothing = ibis.and_(*(rows[key].isnull() for key in read if key != TEXT))
    names = ", ".join(keys)
    checks: list[Check] = [(nothing, f"not a complete JSON object with {names}")]
    for key in keys:
        found = rows[key] if key == "date" else as_id(rows[key])
        checks += [(missing(found), f"{key} is missing"), *([] if key == "date" else id_checks(rows[key], found, key))]
    return checks


def _date(text: ir.StringValue, name: str) -> tuple[ir.IntegerValue, Late]:
    """Return a column of dates as seconds, and what is left to Python."""
    time, late = as_seconds(text, None, name)
    return time, replace(late, parse=_parse_date)


def _parse_date(text: str) -> int:
    try:
        time = parse_time(text)
    except ValueError as error:
        time = 0 if str(error).startswith(("is before", "is after")) else -1
    if time < 0:
        raise ValueError(f"is not a date: {text[:60]!r}")
    if not FIRST_S <= time <= LAST_S:
        raise ValueError(f"is before 2004 or after 2100: {text[:60]!r}")
    return time


def _in_time(text: ir.StringValue, time: ir.IntegerValue, name: str) -> Check:
    """Return a check for dates outside 2004 to 2100."""
    return ~time.between(FIRST_S, LAST_S), f"{name} is before 2004 or after 2100: " + quoted(text)


def _stamp_checks(text: ir.StringValue) -> list[Check]:
    """Return checks for one date of a line of check-ins."""
    time = seconds(text)
    return [(text.notnull() & time.isnull(), "date is not a date: " + quoted(text)), _in_time(text, time, "date")]
