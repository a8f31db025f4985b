"""Remove users from a dataset: their ids, what is known of them, and their events.

The row of a user stays, under a random id and without events, so that no other row moves. Events of items stay without a user, like
those of anonymous visitors.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.dataset import EVENTS_FILE, NEGATIVES_FILE, POSITIONS_FILE, USER_FEATURES_FILE, Dataset
from twotower.schema import FIRST_ROW, TEST, TRAIN, UNKNOWN, USER_ID, VALID, WITHHELD
from twotower.utils.array_files import arrays_of, open_arrays, write_arrays
from twotower.utils.ids import WHOLE, id_types
from twotower.utils.manifests import DatasetManifest
from twotower.utils.ragged import lengths_to_offsets
from twotower.utils.types import Array, Int, Mask

ENCODERS_FILES = ("encoders.json", "encoders.safetensors")
_ESCAPE = re.compile(r'(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]')  # of JSON
USERS_FILE, REJECTS_FILE, MANIFEST = "users.parquet", "rejects.jsonl", "manifest.json"


def rows_to_forget(dataset: Dataset, gone: Callable[[str], bool]) -> Int:
    """Return the rows of the users for whom `gone` is True."""
    return np.array([row for row in range(FIRST_ROW, dataset.n_user_rows) if gone(str(dataset.user_ids[row]))], np.int64)


def without_users(dataset: Dataset, rows: Int, folder: Path) -> None:
    """Rewrite `folder`, a copy of the dataset, without the users of `rows`, hashes included."""
    names = [str(dataset.user_ids[row]) for row in rows]
    kind = id_types(dataset.manifest)[USER_ID]
    fresh = {row: str(-secrets.randbelow(2**31)) if WHOLE.fullmatch(kind) else str(uuid4()) for row in rows.tolist()}
    dropped = np.isin(np.arange(dataset.n_user_rows), rows)
    changed: dict[str, dict[str, Array]] = {}
    kept = ~dropped[dataset.events.user_row]
    changed[EVENTS_FILE] = _taken(arrays_of(dataset.events), kept, dropped)
    if dataset.negatives is not None:
        changed[NEGATIVES_FILE] = _taken(arrays_of(dataset.negatives), ~dropped[dataset.negatives.user_row], dropped)
    if (dataset.path / POSITIONS_FILE).is_file():
        changed[POSITIONS_FILE] = {name: value[kept] for name, value in open_arrays(dataset.path / POSITIONS_FILE).items()}
    features = {name: np.array(value) for name, value in dataset.user_features.items()}
    for value in features.values():
        value[rows] = value[UNKNOWN]
    users, counts = _renamed(dataset.users, fresh), _counts(dataset, kept, changed)
    _clean_encoders(dataset, rows, folder)
    for name, arrays in {**changed, USER_FEATURES_FILE: features}.items():
        (folder / name).unlink(missing_ok=True)  # the old file may be shared with another folder, and is mapped
        write_arrays(folder / name, arrays)
    (folder / USERS_FILE).unlink()
    pq.write_table(users, folder / USERS_FILE, compression="zstd")
    if (folder / REJECTS_FILE).is_file():
        lines = (folder / REJECTS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
        left = "".join(line for line in lines if not _mentions(line, names))
        (folder / REJECTS_FILE).unlink()
        (folder / REJECTS_FILE).write_text(left, encoding="utf-8")
    _write_manifest(dataset, folder, counts, names)


def _mentions(line: str, names: list[str]) -> bool:
    r"""Return whether a rejected row, a line of JSON, has one of these texts: as it is, or as CSV or JSON writes it.

    Examples
    --------
    >>> _mentions('{"text": "\\"we\\"\\"ird\\",p1"}', ['we"ird'])
    True
    """
    text = " ".join(map(str, json.loads(line).values()))
    texts = (text, text.replace('""', '"'), _ESCAPE.sub(lambda found: json.loads(f'"{found[0]}"'), text))
    return any(name in one for name in names for one in texts)


def scrubbed(value: Any, names: list[str]) -> Any:
    """Return JSON values without these texts: they are left out of lists, and replaced by an empty text elsewhere.

    Examples
    --------
    >>> scrubbed({"examples": ["u1", "u2"], "first": "u1"}, ["u1"])
    {'examples': ['u2'], 'first': ''}
    """
    if isinstance(value, dict):
        return {name: scrubbed(one, names) for name, one in value.items() if name not in names}
    if isinstance(value, list):
        return [scrubbed(one, names) for one in value if str(one) not in names]
    return "" if isinstance(value, str) and value in names else value


def _taken(arrays: dict[str, Any], kept: Mask, dropped: Mask) -> dict[str, Array]:
    offsets = arrays.pop("offsets")
    sizes = np.where(dropped, 0, np.diff(offsets))
    taken = {name: np.array(value)[kept] for name, value in arrays.items()}
    return {"offsets": lengths_to_offsets(sizes), **taken}


def _renamed(users: pa.Table, fresh: dict[int, str]) -> pa.Table:
    """Return the users with random ids in place of some, and nothing else known of these."""
    columns = {}
    for field in users.schema:
        values = users[field.name].to_pylist()
        for row, name in fresh.items():
            values[row - FIRST_ROW] = name if field.name == USER_ID else None
        columns[field.name] = pa.array(values, field.type)
    return pa.table(columns, schema=users.schema)


def _clean_encoders(dataset: Dataset, rows: Int, folder: Path) -> None:
    """Replace the values of features that only these users have by random ones, so that no other value moves."""
    gone = np.isin(np.arange(FIRST_ROW, dataset.n_user_rows), rows)
    vocabularies = dict(dataset.encoders.vocabularies)
    for spec in dataset.specs:
        key = f"{spec.side}.{spec.name}"
        if spec.side != "user" or spec.kind not in ("categorical", "multi"):
            continue
        values = dataset.users[spec.columns[0]]
        own, others = (_values(values.filter(pa.array(mask))) for mask in (gone, ~gone))
        alone = own - others
        vocabularies[key] = [f"forgotten {uuid4()}" if str(value) in alone else value for value in vocabularies[key]]
    if vocabularies == dataset.encoders.vocabularies:
        return
    arrays = {name: np.array(value) for name, value in dataset.encoders.arrays.items()}
    for name in ENCODERS_FILES:
        (folder / name).unlink(missing_ok=True)
    replace(dataset.encoders, vocabularies=vocabularies, arrays=arrays).save(folder)


def _values(column: pa.ChunkedArray) -> set[str]:
    """Return the values of a column as texts, those of lists one by one."""
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    flat = [one for value in column.to_pylist() if value is not None for one in (value if lists else [value])]
    return {str(value) for value in flat if value is not None}


def _counts(dataset: Dataset, kept: Mask, changed: dict[str, dict[str, Array]]) -> dict[str, Any]:
    split = np.bincount(changed[EVENTS_FILE]["split"], minlength=WITHHELD + 1).tolist()
    counts: dict[str, Any] = {
        "events": int(kept.sum()),
        "train_events": split[TRAIN],
        "valid_events": split[VALID],
        "test_events": split[TEST],
        "withheld_events": split[WITHHELD],
        "positive_events": int(changed[EVENTS_FILE]["positive"].sum()),
        "anonymous_events": len(dataset.item_events) - int(kept.sum()),
    }
    if NEGATIVES_FILE in changed:
        types = dataset.manifest.negative_types
        found = np.bincount(changed[NEGATIVES_FILE]["event_type"], minlength=len(types)).tolist()
        counts["negative_events"] = dict(zip(types, found, strict=True))
    return counts


def _write_manifest(dataset: Dataset, folder: Path, kept: dict[str, Any], names: list[str]) -> None:
    old = dataset.manifest
    counts = old.counts.model_copy(update={"kept": old.counts.kept.model_copy(update=kept)})
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in old.hashes if (folder / name).is_file()}
    values = old.model_copy(update={"counts": counts, "hashes": hashes}).json_values()
    clean = DatasetManifest.model_validate({**values, "counts": scrubbed(values["counts"], names)})
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(json.dumps(clean.json_values(), indent=1, ensure_ascii=False, sort_keys=True) + "\n")
