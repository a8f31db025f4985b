"""Remove users from a bundle: their ids, histories, features, and the row of the user table that training gave them.

The folder is replaced atomically by its next revision. What the other weights have learned from many users together stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from twotower.bundle.bundle import DATASET, INDEX, INDEX_FILE, MODEL_FILE, REPORT, load_bundle
from twotower.bundle.consistency import model_of
from twotower.bundle.item_arrays import item_arrays
from twotower.bundle.revision import revise
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store
from twotower.data.forgetting import rows_to_forget, without_users
from twotower.schema import UNKNOWN
from twotower.search.registry import renew_index
from twotower.utils.array_files import arrays_of, write_arrays
from twotower.utils.manifests import BundleManifest
from twotower.utils.types import Int

USER_TABLE = "tables.user/id.weight"


def forget_users(path: Path, gone: Callable[[str], bool]) -> BundleManifest | None:
    """Remove the users for whom `gone` is True from the bundle at `path`.

    Returns
    -------
    BundleManifest
        The new manifest; None if the bundle has none of them, and nothing was written.
    """
    bundle = load_bundle(path)
    rows = rows_to_forget(bundle.dataset, gone)
    if not len(rows):
        return None
    names = {str(bundle.dataset.user_ids[row]) for row in rows}

    def write(folder: Path) -> None:
        without_users(bundle.dataset, rows, folder / DATASET)
        dataset = Dataset.open(folder / DATASET)
        weights = without_rows(load_file(path / MODEL_FILE), dataset, rows)
        (folder / MODEL_FILE).write_bytes(save(weights))
        store = open_store(dataset, "future", bundle.config.model)
        model = model_of(dataset, bundle.config, weights, store)
        arrays = item_arrays(model, store, dataset, bundle.moment_s)  # popularity does not count the events any more
        write_arrays(folder / INDEX_FILE, arrays_of(replace(arrays, offered=bundle.arrays.offered)))
        renew_index(folder / INDEX, torch.from_numpy(arrays.vectors))
        if (folder / REPORT).is_file():
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            (folder / REPORT).write_text(json.dumps(without_examples(report, names), sort_keys=True, ensure_ascii=False))

    return revise(bundle, write)


def without_rows(weights: dict[str, Tensor], dataset: Dataset, rows: Int) -> dict[str, Tensor]:
    """Return the weights with the rows of these users as that of an unknown user. A hashed table shares rows, and stays."""
    table = weights.get(USER_TABLE)
    if table is None or len(table) not in (dataset.n_user_rows, dataset.n_train_user_rows):
        return weights
    known = torch.from_numpy(rows[rows < len(table)])
    changed = table.clone()
    changed[known] = table[UNKNOWN]
    return {**weights, USER_TABLE: changed}


def without_examples(report: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return a report without the lists of these users."""
    kept = [example for example in report.get("examples", []) if str(example["user"]) not in names]
    return {**report, "examples": kept} if "examples" in report else report
