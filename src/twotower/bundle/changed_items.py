"""Change items of an opened bundle in memory: add, change and remove them, without training and without a new folder.

A server does it with the changes of its event store. Weights, histories and encoders are shared with the bundle as it was opened.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from twotower.bundle.bundle import INDEX, Bundle
from twotower.bundle.item_file import ItemReader
from twotower.bundle.revision import with_items
from twotower.schema import FIRST_ROW, ITEM_ID, UNKNOWN
from twotower.search.index import Index
from twotower.search.registry import load_index, renew_index


@dataclass(frozen=True, slots=True)
class ItemChange:
    """What has become of an item.

    Attributes
    ----------
    columns
        New values of columns; the other columns stay, and are null for a new item.
    removed
        True: the item is not recommended any more, but still counts in histories. False: it is offered again. None: as before.
    """

    columns: Mapping[str, Any]
    removed: bool | None = None


def changed_row(before: Mapping[str, Any], item_id: str, change: ItemChange, read: ItemReader) -> dict[str, Any]:
    """Return all columns of an item after a change. Raise a ValueError that says why a changed column cannot be so.

    Parameters
    ----------
    before
        Columns of the item before; {} for a new one.
    read
        Reader of the columns of the catalogue.
    """
    sent = read({**change.columns, ITEM_ID: item_id})
    return {**sent, **before, **{name: sent[name] for name in (*change.columns, ITEM_ID)}}


def changed(bundle: Bundle, changes: Mapping[str, ItemChange]) -> tuple[Bundle, list[str]]:
    """Return the bundle with changed items, and why changes were passed over.

    A change whose columns the catalogue of this bundle does not have is passed over: it may have been made for another bundle.

    Parameters
    ----------
    changes
        By item id.
    """
    dataset, read = bundle.dataset, ItemReader(bundle.dataset.items.schema, bundle.dataset.specs)
    problems, rows = list[str](), list[dict[str, Any]]()
    at = dataset.item_rows(list(changes))
    known = iter(dataset.items.take(at[at != UNKNOWN] - FIRST_ROW).to_pylist())
    for (item_id, change), row in zip(changes.items(), at.tolist(), strict=True):
        before = {} if row == UNKNOWN else next(known)
        if not change.columns and (before or change.removed):
            continue
        try:
            rows.append(changed_row(before, item_id, change, read))
        except ValueError as error:
            problems.append(f"{item_id!r}: {error}")
    fresh = bundle
    if rows:
        fresh = with_items(bundle, pa.Table.from_pylist(rows, dataset.items.schema))
    if rows and bundle.built is not None:
        fresh = replace(fresh, built=_built_again(bundle.path / INDEX, torch.from_numpy(fresh.arrays.vectors)))
    offered = fresh.arrays.offered.copy()
    offered[: dataset.n_item_rows] = bundle.arrays.offered
    at = fresh.dataset.item_rows(list(changes))
    for removed in (True, False):
        said = np.array([change.removed is removed for change in changes.values()], np.bool_)
        offered[at[said & (at != UNKNOWN)]] = not removed
    return replace(fresh, arrays=replace(fresh.arrays, offered=offered)), problems


def _built_again(folder: Path, vectors: Tensor) -> Index:
    """Return an index of the same kind and settings for other vectors."""
    with tempfile.TemporaryDirectory(prefix="twotower-") as copied:
        made = Path(copied) / INDEX
        shutil.copytree(folder, made)
        renew_index(made, vectors)
        return load_index(made, vectors)
