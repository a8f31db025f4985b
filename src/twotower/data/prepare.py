"""Prepare a dataset folder from raw files: read, filter, split, number and encode.

A source (`SOURCES`) reads the raw files. The folder has safetensors, Parquet and JSON files, and a `manifest.json` with the
numbers of kept and dropped rows by reason. It is written atomically, and `Dataset` opens it.

The same input and settings give the same bytes of every file. If the cuts of the split are dates, events after the first cut change
no training row, vocabulary or statistic. If they are fractions, they are quantiles of all event times, so later events move them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from twotower.data.co_visitation import co_visited, transitions
from twotower.data.dataset import ITEM_FEATURES_FILE, TRANSITIONS_FILE, USER_FEATURES_FILE
from twotower.data.event_tables import read_training, write_events
from twotower.data.selection import BY_TIME, ITEM_KEY, USER_KEY, Stage, is_training, row_count, select_events
from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import DuckDBEngine, Engine
from twotower.data.sources.raw_tables import CHARS, RawTables, Source
from twotower.data.sources.sequences import read_sequences
from twotower.data.sources.sessions import read_sessions
from twotower.data.sources.spark_engine import SparkEngine
from twotower.data.sources.tables import read_tables
from twotower.data.sources.text_files import engine_errors
from twotower.data.sources.yelp import read_yelp
from twotower.errors import ConfigError, DataError, nearest
from twotower.features.encoders import encode_items, encode_users, fit_encoders
from twotower.features.texts import read_texts
from twotower.schema import (
    EVENT_TYPE,
    FIRST_ROW,
    ITEM_ID,
    ITEM_ROW,
    NEIGHBOURS,
    ORDER,
    SPLIT,
    TEXT,
    TIME,
    TRAIN,
    USER_ID,
    USER_ROW,
    FeatureSpec,
)
from twotower.utils.array_files import arrays_of, write_arrays
from twotower.utils.atomic_files import atomic_folder
from twotower.utils.config import Config, PrepareConfig
from twotower.utils.ids import TEXT as TEXT_ID
from twotower.utils.manifests import DatasetCounts, DatasetManifest, DatasetSettings, KeptCounts
from twotower.utils.registry import Registry

SOURCES: Registry[Source] = Registry(
    "source", {"yelp": read_yelp, "tables": read_tables, "sequences": read_sequences, "sessions": read_sessions}
)
"""The readers of raw files by name; `data.source` chooses one. `register_source` adds one."""
ROW_GROUP = 1 << 20  # rows of a Parquet row group
RESERVED_FEATURES = {  # names of built-in fields and arrays
    "item": ("id", NEIGHBOURS, "state", "home", "request_location", "hour", "weekday", "month"),
    "user": ("id", "state", "home", "request_location", "hour", "weekday", "month", "since_s", "elite"),
}
TRUTH = "town_truth.safetensors"  # true preferences of a simulated town

ProgressCallback = Callable[[str], None]
"""Called with the name of a stage."""


def prepare(
    config: Config, out: Path, *, tables: Mapping[str, pa.Table] | None = None, progress: ProgressCallback | None = None
) -> DatasetManifest:
    """Prepare the dataset folder `out` from the configured source, and return its manifest.

    Parameters
    ----------
    config
        Settings; only the sections `data` and `prepare`, and `seed`, are used.
    out
        New folder, or an existing dataset to replace; other folders are refused.
    tables
        Tables in memory by name. If a `path` of the source `tables` is one of the names, this table is used instead of a file.
    progress
        Called with the name of each stage when it begins.

    Returns
    -------
    DatasetManifest
        The manifest, as written to `manifest.json`.

    Raises
    ------
    DataError
        Raw files are missing or unreadable, `out` exists and is not a dataset, or no training event is left.
    ConfigError
        The settings do not fit the data. The split needs times or parts that are missing, or a name is unknown.
    """
    report, read = progress or (lambda _: None), SOURCES[config.data.source]
    with replacing(out) as folder, engine_errors():
        spill, rejects = folder / "spill", Rejects(folder / "rejects.jsonl", config.data.max_reject_frac)
        engine = open_engine(config.prepare, spill, tables)
        try:
            report("read raw files")
            raw = read(config.data, engine, rejects)
            rejects.check()
            manifest = _build(Stage(engine, config, raw), folder, report, rejects)
        finally:
            rejects.close()
            engine.close()
        shutil.rmtree(spill, ignore_errors=True)
        return finish(folder, manifest)


def finish(folder: Path, manifest: DatasetManifest) -> DatasetManifest:
    """Write `manifest.json` with the SHA-256 of all files in `folder`, and return the manifest with these hashes."""
    manifest = manifest.model_copy(update={"hashes": {path.name: sha256_of(path) for path in sorted(folder.iterdir())}})
    text = json.dumps(manifest.json_values(), indent=1, ensure_ascii=False, sort_keys=True)
    (folder / "manifest.json").write_text(text + "\n")
    return manifest


def open_engine(config: PrepareConfig, spill: Path, tables: Mapping[str, pa.Table] | None = None) -> Engine:
    """Return the engine of the settings: DuckDB or Spark.

    Parameters
    ----------
    spill
        Folder for data that exceed the memory.
    tables
        Tables in memory by name, which the engine can read.

    Raises
    ------
    ConfigError
        `tables` are given with Spark.
    """
    if config.engine == "spark" and tables:
        raise ConfigError("prepare.engine is spark, which reads files, but the data are tables in memory. Use the engine duckdb.")
    return SparkEngine(config.spark_master, spill) if config.engine == "spark" else DuckDBEngine(spill, tables)


def _build(stage: Stage, folder: Path, report: ProgressCallback, rejects: Rejects) -> DatasetManifest:
    config, raw = stage.config, stage.raw
    specs = _specs(config.prepare, raw)
    report("filter and split events")
    chosen = select_events(stage)
    item_rows, n_train_items = _number(stage, chosen.items, chosen.events, ITEM_KEY, ITEM_ROW)
    user_rows, n_train_users = _number(stage, chosen.users, chosen.events, USER_KEY, USER_ROW)
    types = _event_types(chosen.events)
    report("write events")
    kept, negative_types = write_events(stage, chosen, item_rows, user_rows, types, folder)
    report("encode features")
    items = _entities(item_rows.join(chosen.items, ITEM_KEY).join(raw.items, ITEM_ID), ITEM_ROW, ITEM_ID)
    users = _entities(user_rows.join(chosen.users, USER_KEY).left_join(raw.users, USER_ID), USER_ROW, USER_ID)
    item_texts = _item_text(stage, specs, items, chosen.events, item_rows)
    text = None if item_texts is None else read_texts(item_texts, config.prepare.text_encoder)
    trained: dict[str, Any] = {"n_train_items": n_train_items, "n_train_users": n_train_users}
    how: dict[str, Any] = {"text_dim": config.prepare.text_dim, "text_encoder": config.prepare.text_encoder, "seed": config.seed}
    encoders = fit_encoders(specs, items, users, **trained, item_text=text, **how)
    encoders.save(folder)
    encoded = encode_items(encoders, items, text)
    if config.prepare.co_visited_items:
        report("find neighbours")
        sizes = {"n_user_rows": len(users) + FIRST_ROW, "n_item_rows": len(items) + FIRST_ROW}
        sizes["most"] = config.prepare.co_visited_items
        encoded[NEIGHBOURS] = write_neighbours(folder, sizes, ordered=config.prepare.split.kind != "predefined")
    report("write features")
    write_arrays(folder / ITEM_FEATURES_FILE, encoded)
    write_arrays(folder / USER_FEATURES_FILE, encode_users(encoders, users))
    write_table(items, folder / "items.parquet")
    write_table(users, folder / "users.parquet")
    if raw.truth is not None:
        shutil.copyfile(raw.truth, folder / TRUTH)
    return DatasetManifest(
        seed=config.seed,
        config=DatasetSettings(seed=config.seed, data=config.data, prepare=config.prepare),
        counts=_account(stage, rejects, kept),
        warnings=[*rejects.warnings(), *(note for side, match in stage.matched.items() for note in match.warnings(side))],
        event_types=types,
        negative_types=negative_types,
        has_time=raw.has_time,
        id_types={name: raw.id_types.get(name, TEXT_ID) for name in (USER_ID, ITEM_ID)},
        cuts_s=chosen.cuts_s,
        n_items=len(items),
        n_users=len(users),
        **trained,
        features=list(specs),
        hashes={},
    )


def _account(stage: Stage, rejects: Rejects, kept: KeptCounts) -> DatasetCounts:
    """Return the numbers of rows that were read, rejected, matched, kept and dropped."""
    return DatasetCounts(
        read=stage.raw.counts,
        files={name: file.as_json() for name, file in rejects.files.items()},
        matched={side: asdict(match) for side, match in stage.matched.items()},
        times_s=stage.times_s,
        kept=kept,
        dropped=stage.dropped,
    )


def _specs(config: PrepareConfig, raw: RawTables) -> tuple[FeatureSpec, ...]:
    """Return the features of the source that the settings keep, after a check of their names."""
    known = [spec.name for spec in raw.features]
    for name in config.exclude_features:
        if name not in known:
            raise ConfigError(f"prepare.exclude_features has the unknown feature {name!r}.{nearest(name, known)}")
    specs = [spec for spec in raw.features if spec.name not in config.exclude_features]
    names = [(spec.side, spec.name) for spec in specs]
    for side, name in names:
        reserved = RESERVED_FEATURES[side]
        if name in reserved or names.count((side, name)) > 1:
            raise ConfigError(
                f"The {side} feature name {name!r} is {'reserved' if name in reserved else 'used twice'}. Reserved names: "
                f"{', '.join(reserved)}. Rename the feature."
            )
        if "." in name:
            raise ConfigError(f"The feature name {name!r} contains a dot. Rename the feature and set its columns.")
    return tuple(spec for spec in specs if spec.kind != "text" or config.text_dim > 0)


def _number(stage: Stage, ids: ir.Table, events: ir.Table, key: str, row: str) -> tuple[ir.Table, int]:
    """Number the users or items. Return a table of keys and rows, and the number of keys with a training event.

    Rows start at 2. Keys with a training event come first; both groups are sorted by key. All items get a row, but only users
    with an event.
    """
    seen = events.filter(events[key].notnull()).group_by(key).aggregate(new=~is_training(events).any())
    if key == ITEM_KEY:
        seen = ids.select(key).left_join(seen, key).drop(f"{key}_right").mutate(new=ibis._.new.fill_null(True))
    rows = seen.mutate((ibis.row_number().over(order_by=["new", key]) + FIRST_ROW).cast("int64").name(row))
    numbered = stage.save(rows)
    return numbered.drop("new"), row_count(numbered.filter(~numbered.new))


def _event_types(events: ir.Table) -> list[str]:
    """Return the event types of the training part, sorted. Other types get code 0 (unknown), so they change no model."""
    # Sorted in Python: with Spark, Ibis 12 loses the selection when it sorts distinct rows.
    names = events.filter(is_training(events)).select(EVENT_TYPE).distinct().to_pyarrow()
    return sorted(names[EVENT_TYPE].to_pylist())


def write_neighbours(folder: Path, sizes: dict[str, int], *, ordered: bool) -> NDArray[np.int32]:
    """Return the co-visited items int32 [n_item_rows, most] of the training events in `folder`.

    If the events of a user have an order (`ordered`), also write the items after and before each item. `sizes` has `n_user_rows`,
    `n_item_rows` and `most`; see `co_visited`.
    """
    user, item, time_s = read_training(folder)
    if ordered:
        write_arrays(folder / TRANSITIONS_FILE, arrays_of(transitions(user, item, time_s, **sizes)))
    return co_visited(user, item, **sizes, ordered=ordered)


def _item_text(stage: Stage, specs: tuple[FeatureSpec, ...], items: pa.Table, events: ir.Table, rows: ir.Table) -> list[str] | None:
    """Return the text of each item, or None without a text feature.

    It is the value of the text column, then the training reviews, oldest first, up to `prepare.text_max_chars` characters.
    """
    columns = [spec.columns[0] for spec in specs if spec.side == "item" and spec.kind == "text"]
    if not columns:
        return None
    item_texts = [value or "" for value in items[columns[0]].to_pylist()]
    limit = stage.config.prepare.text_max_chars
    if stage.raw.texts is None or not limit:
        return item_texts
    written = events.filter((events[SPLIT] == TRAIN) & (events[CHARS] > 0))
    window = ibis.cumulative_window(group_by=ITEM_KEY, order_by=list(BY_TIME))
    # Texts are chosen by length before they are read, so that thousands of reviews of an item are never in memory.
    start = written[CHARS].sum().over(window) - written[CHARS]
    chosen = stage.save(written.mutate(start=start).filter(ibis._.start < limit).select(ITEM_KEY, TIME, ORDER, "start"))
    texts = stage.raw.texts.join(chosen, ORDER).join(rows, ITEM_KEY)
    capped = texts.mutate(text=texts[TEXT].substr(0, limit - texts["start"]))
    table = capped.order_by([ITEM_ROW, *BY_TIME]).select(ITEM_ROW, TEXT).to_pyarrow()
    reviews = table[TEXT].to_pylist()
    bounds = np.searchsorted(table[ITEM_ROW].to_numpy(), np.arange(len(item_texts) + 1) + FIRST_ROW)
    for position in np.flatnonzero(np.diff(bounds)):
        item_texts[position] += "\n" + "\n".join(reviews[bounds[position] : bounds[position + 1]])[:limit]
    return item_texts


def _entities(joined: ir.Table, row: str, name: str) -> pa.Table:
    """Return items or users in the order of their rows: the id, then the raw columns."""
    internal = {row, ITEM_KEY, USER_KEY, f"{ITEM_KEY}_right", f"{USER_KEY}_right", name, f"{name}_right"}
    columns = [name, *(column for column in joined.columns if column not in internal)]
    return joined.order_by(row).select(columns).to_pyarrow()


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table of items or users to the Parquet file `path`."""
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "empty"
    ...     path.touch()
    ...     sha256_of(path)[:16]
    'e3b0c44298fc1c14'
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `out` if the block succeeds, and is removed if it fails.

    Raises
    ------
    DataError
        `out` exists and is not a dataset.
    """
    if out.exists() and not _replaceable(out):
        raise DataError(
            f"{out} exists and is not a dataset. The output must be a new folder or a dataset to replace. Choose another folder."
        )
    with atomic_folder(out) as fresh:
        yield fresh


def _replaceable(out: Path) -> bool:
    """Return True if `out` is an empty folder or a dataset."""
    if not out.is_dir():
        return False
    try:
        return not any(out.iterdir()) or json.loads((out / "manifest.json").read_text()).get("kind") == "dataset"
    except (OSError, ValueError, AttributeError):
        return False
