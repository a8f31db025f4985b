"""Add items to a bundle and remove items from it, without training.

The folder is replaced atomically by its next revision. A running server uses it after a reload.

No weight changes, and an item keeps its row, so histories stay valid. The vector of a new item comes from its features, with the id
UNKNOWN and no events: for example its category, location and text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from twotower.bundle.bundle import DATASET, INDEX, INDEX_FILE, Bundle, load_bundle
from twotower.bundle.item_arrays import ItemArrays, encode_items
from twotower.bundle.item_file import read_items
from twotower.bundle.sealed_folder import MANIFEST, atomic_replace, read_manifest, sha256, write_manifest
from twotower.data.dataset import ITEM_EVENTS_FILE, ITEM_FEATURES_FILE, Dataset
from twotower.data.dataset_features import open_store
from twotower.errors import DataError
from twotower.features.encoders import encode_items as encode_item_features
from twotower.schema import FIRST_ROW, ITEM_ID, NEIGHBOURS, PAD, UNKNOWN, FeatureSpec
from twotower.search.registry import renew_index
from twotower.utils.array_files import arrays_of, write_arrays
from twotower.utils.manifests import BundleManifest, IndexRecord
from twotower.utils.types import Int, Mask

ITEMS_FILE = "items.parquet"


def add_items(path: Path, file: Path) -> BundleManifest:
    """Add the items of `file` (JSON lines, CSV or Parquet, with columns of the catalogue) to the bundle. Return its new manifest.

    An item that was removed before is offered again, with the columns of the file.

    Raises
    ------
    DataError
        The bundle or the file cannot be read, or an item is already in the catalogue.
    """
    bundle = load_bundle(path)
    new = read_items(file, bundle.dataset.items.schema, bundle.dataset.specs)
    rows = bundle.dataset.item_rows(new[ITEM_ID].to_pylist())
    there = (rows != UNKNOWN) & bundle.arrays.offered[rows]
    if there.any():
        name = new[ITEM_ID][int(np.argmax(there))].as_py()
        raise DataError(f"Item {name!r} of {file} is already in the catalogue. Remove it from the file.")

    def write(folder: Path) -> None:
        fresh = with_items(bundle, new)
        _write_items(fresh.dataset, folder / DATASET)
        write_arrays(folder / INDEX_FILE, arrays_of(fresh.arrays))
        renew_index(folder / INDEX, torch.from_numpy(fresh.arrays.vectors))

    return revise(bundle, write)


def with_items(bundle: Bundle, new: pa.Table) -> Bundle:
    """Return the bundle, in memory, with new or changed items, which are offered. Its built index is still that of before.

    Parameters
    ----------
    new
        Items with all columns of the catalogue.
    """
    known, old = bundle.dataset.n_item_rows, arrays_of(bundle.arrays)
    rows = bundle.dataset.item_rows(new[ITEM_ID].to_pylist())
    fresh = rows == UNKNOWN
    rows[fresh] = known + np.arange(fresh.sum())
    dataset = _with_rows(bundle.dataset, new, rows)
    store = open_store(dataset, "future", bundle.config.model)
    vectors, tokens = encode_items(bundle.model, store, rows, bundle.moment_s)
    added = ItemArrays(
        vectors=vectors,
        tokens=tokens,
        recent_event_count=np.where(
            rows < known, old["recent_event_count"][np.minimum(rows, known - 1)], 0
        ),  # an item that returns keeps its earlier events
        offered=np.ones(len(rows), np.bool_),
    )
    arrays = ItemArrays(**{name: _extended(old[name], value, rows) for name, value in arrays_of(added).items()})
    tower = None if bundle.tower is None else bundle.tower.with_items(arrays.tokens)
    return replace(bundle, dataset=dataset, store=store, arrays=arrays, tower=tower)


def remove_items(path: Path, ids: Sequence[str]) -> BundleManifest:
    """Remove items from the recommendations of the bundle. They still count in histories. Return the new manifest.

    Raises
    ------
    DataError
        The bundle cannot be read, or an item is not in its catalogue.
    """
    bundle = load_bundle(path)
    rows = bundle.dataset.item_rows(list(ids))
    if (rows == UNKNOWN).any():
        name = list(ids)[int(np.argmax(rows == UNKNOWN))]
        raise DataError(f"Cannot remove item {name!r}: it is not in the catalogue of {path}. Check the id.")
    offered = bundle.arrays.offered.copy()
    offered[rows] = False
    changed = arrays_of(replace(bundle.arrays, offered=offered))
    return revise(bundle, lambda folder: write_arrays(folder / INDEX_FILE, changed))


def take_over(path: Path, old: Path) -> BundleManifest:
    """Give a bundle what belongs to the bundle `old` alone: removed items stay removed, and an index of the same kind is built.

    Nothing is written if there is nothing of that. Return the manifest.
    """
    bundle, before = load_bundle(path), load_bundle(old)
    rows = bundle.dataset.item_rows([str(name) for name in before.dataset.item_ids[FIRST_ROW:][~before.arrays.offered[FIRST_ROW:]]])
    offered = bundle.arrays.offered.copy()
    offered[rows] = False
    if before.built is None and (offered == bundle.arrays.offered).all():
        return bundle.manifest

    def write(folder: Path) -> None:
        write_arrays(folder / INDEX_FILE, arrays_of(replace(bundle.arrays, offered=offered)))
        if before.built is not None:
            shutil.copytree(old / INDEX, folder / INDEX)
            renew_index(folder / INDEX, torch.from_numpy(bundle.arrays.vectors))

    return revise(bundle, write, before.manifest.index)


def revise(bundle: Bundle, write: Callable[[Path], None], index: IndexRecord | None = None) -> BundleManifest:
    """Replace the bundle by a copy that `write` has changed. Return the new manifest; `index` is that of a new index."""
    with atomic_replace(bundle.path) as folder:
        shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
        write(folder)
        old = bundle.manifest
        index = index or old.index
        index = index and IndexRecord(kind=index.kind, settings=index.settings)  # measured with other vectors
        manifest = write_manifest(folder, old.model_copy(update={"index": index, "revision": old.revision + 1}))
        if read_manifest(bundle.path).get("seal") != old.seal:
            raise DataError(f"{bundle.path} was changed by another process meanwhile. Nothing was written. Run the command again.")
        return manifest


def _with_rows(dataset: Dataset, new: pa.Table, rows: Int) -> Dataset:
    """Return the dataset, in memory, with the items `new` at `rows`.

    Features of a known item whose columns have not changed stay as they are, and so does the text of a trained item, which holds
    reviews beside the columns.
    """
    encoded = {name: value[FIRST_ROW:] for name, value in encode_item_features(dataset.encoders, new).items()}
    near = dataset.item_features.get(NEIGHBOURS)
    if near is not None:  # an item that returns has its training neighbours; a new item has none
        encoded[NEIGHBOURS] = np.where((rows < len(near))[:, None], near[np.minimum(rows, len(near) - 1)], PAD)
    for spec in (one for one in dataset.specs if one.side == "item"):
        stays = _unchanged(dataset, new, rows, spec)
        for name in encoded:
            if name == spec.name or name.startswith(f"{spec.name}."):
                encoded[name][stays] = dataset.item_features[name][rows[stays]]
    features = {name: _extended(value, encoded[name], rows) for name, value in dataset.item_features.items()}
    position = np.arange(max(dataset.n_item_rows, int(rows.max()) + 1)) - FIRST_ROW
    position[rows] = len(dataset.items) + np.arange(len(rows))
    items = pa.concat_tables([dataset.items, new]).take(position[FIRST_ROW:])
    offsets = dataset.item_events.offsets
    more = np.full(len(position) - dataset.n_item_rows, offsets[-1])
    return dataset.with_items(items, features, replace(dataset.item_events, offsets=np.concatenate([offsets, more])))


def _write_items(dataset: Dataset, folder: Path) -> None:
    """Write the items of a dataset into its copy at `folder`."""
    pq.write_table(dataset.items, folder / ITEMS_FILE, compression="zstd")
    write_arrays(folder / ITEM_FEATURES_FILE, dataset.item_features)
    write_arrays(folder / ITEM_EVENTS_FILE, arrays_of(dataset.item_events))
    hashes = {name: sha256(folder / name) for name in dataset.manifest.hashes}
    manifest = dataset.manifest.model_copy(update={"hashes": hashes})
    (folder / MANIFEST).write_text(json.dumps(manifest.json_values(), indent=1, sort_keys=True))


def _unchanged(dataset: Dataset, new: pa.Table, rows: Int, spec: FeatureSpec) -> Mask:
    """Return whether the feature of each new row stays as it is."""
    known = rows < dataset.n_item_rows
    if spec.kind == "text":
        known &= rows < dataset.n_train_item_rows
        return known
    before = dataset.items.select(list(spec.columns)).take(np.where(known, rows, FIRST_ROW) - FIRST_ROW).to_pylist()
    after = new.select(list(spec.columns)).to_pylist()
    return known & np.array([one == other for one, other in zip(before, after, strict=True)], np.bool_)


def _extended(old: Any, new: Any, rows: Int) -> Any:
    """Return `old` [n, …] with `new` written at `rows`, extended if rows lie beyond its end."""
    missing = max(int(rows.max()) + 1 - len(old), 0)
    extended = np.concatenate([old, np.zeros((missing, *old.shape[1:]), old.dtype)])
    extended[rows] = new
    return extended
