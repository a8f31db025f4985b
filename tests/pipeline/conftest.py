"""A run of a small shop, and the data that arrive after it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from twotower.data.dataset import Dataset
from twotower.pipeline.new_data import source_of_files
from twotower.pipeline.run_folder import run_dataset
from twotower.pipeline.stages import run_all
from twotower.pipeline.update import update
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import parse_config

from ..shop import FAST, shop

TOWER = {"embedding_dim": 16, "num_heads": 2}
SETTINGS: dict[str, Any] = {
    **FAST,
    "model": {"user_tower": TOWER, "tables": {"user.id": {"update": "sparse"}}},
    "training": {**FAST["training"], "max_steps": 30, "batch_size": 256, "checkpoint_every_s": 0.001},
    "evaluation": {**FAST["evaluation"], "baselines": []},
}
LAST = pd.Timedelta(days=21)


def frames() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Orders and products of the first months, and those of the last weeks: with new customers, products and a brand."""
    orders, products = shop()
    late = orders["ordered_at"] >= orders["ordered_at"].max() - LAST
    new, whole = orders[late].copy(), products.copy()
    guests = new.index[::7]
    new.loc[guests, "customer"] = "N" + new.loc[guests, "customer"]
    whole.loc[55:, "brand"] = "Darjeeling"
    new.loc[new.index[::5], "product"] = "P0060"
    old = orders[~late & ~orders["product"].isin(products["product"][55:])]
    return old, products[:55], new, whole


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its files; treat it as read-only."""
    root = tmp_path_factory.mktemp("origin")
    old, products, new, whole = frames()
    (root / "new").mkdir()
    for name, table in {"orders": old, "products": products, "new/orders": new, "new/products": whole}.items():
        table.to_csv(root / f"{name}.csv", index=False)
    columns = {"user": "customer", "item": "product", "time": "ordered_at"}
    tables: dict[str, Any] = {
        "interactions": {"path": "orders.csv", "user_id": "customer", "item_id": "product", "time": columns["time"]},
        "items": {"path": "products.csv", "item_id": "product", "name": "title"},
    }
    tables["items"]["features"] = [{"name": "brand", "kind": "categorical"}, {"name": "price", "kind": "number"}]
    data = {"source": "tables", "path": str(root), **tables}
    run_all(parse_config({**SETTINGS, "data": data}), root / "run")
    return root


@pytest.fixture
def shop_run(origin: Path, tmp_path: Path) -> Path:
    """A copy of the run with its files."""
    return copied(origin, tmp_path)


def copied(origin: Path, folder: Path) -> Path:
    shutil.copytree(origin, folder, dirs_exist_ok=True)
    return folder / "run"


def base_of(run: Path) -> Dataset:
    return run_dataset(run / "model")


def go_on(run: Path, **options: Any) -> Any:
    return update(run, source_of_files([run.parent / "new"], base_of(run)), run, **options)


def content(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file; times in the log and the paths of manifests aside."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in ("metrics.jsonl", "manifest.json", "last.pt", "best.pt"):
            found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_checkpoint(one)["model"], load_checkpoint(other)["model"]
    return all(torch.equal(value, second[name]) for name, value in first.items())
