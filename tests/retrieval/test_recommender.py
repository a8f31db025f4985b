"""Test a shop with its own column names, from tables to recommendations, with locations, categories and filters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower.bundle.bundle import Bundle
from twotower.bundle.item_arrays import item_arrays
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, resolve, split_moment
from twotower.data.prepare import prepare
from twotower.errors import RequestError
from twotower.models.build import build_model
from twotower.retrieval.recommender import Recommender
from twotower.utils.config import parse_config

from ..documents import bundle_manifest

ITEMS: list[dict[str, Any]] = [
    {
        "item_id": f"p{i}",
        "type": float(i),
        "text": ["green tea", "black tea", "coffee"][i % 3],
        "label": ["mild", "strong"][i % 2],
        "tags": [["tea", "leaf"], ["tea"], ["coffee"]][i % 3],
        "lat": 48.0 + i / 100 if i else None,
        "lon": 16.0 if i else None,
        "values": None if i == 4 else [i, 1.0],
    }
    for i in range(9)
]
FEATURES = [
    {"name": "type", "kind": "number"},
    {"name": "text", "kind": "text"},
    {"name": "label", "kind": "text"},
    {"name": "tags", "kind": "multi"},
    {"name": "shop", "kind": "geo", "columns": ["lat", "lon"]},
    {"name": "values", "kind": "vector"},
]
TOWER = {"embedding_dim": 8, "hidden_dims": [8]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """Return a recommender with an untrained model; the tests do not depend on the order of the items."""
    root: Path = tmp_path_factory.mktemp("shop")
    (root / "i.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    events = [f"u{u},p{(u + k) % 9},{k % 6},{1_600_000_000 + 86_400 * (u + 3 * k)}" for u in range(6) for k in range(6)]
    (root / "e.csv").write_text("\n".join(["user_id,item_id,stars,t", *events]))
    tables = {"interactions": {"path": "e.csv", "stars": "stars", "time": "t"}, "items": {"path": "i.jsonl", "features": FEATURES}}
    data = {"source": "tables", "path": str(root), **tables}
    config = parse_config({"data": data, "prepare": {"text_dim": 2}, "model": {"user_tower": TOWER, "item_tower": TOWER}})
    prepare(config, root / "out")
    dataset = Dataset.open(root / "out")
    torch.manual_seed(0)
    resolved = resolve(config, dataset)
    model, store = build_model(dataset, resolved).eval(), open_store(dataset, "future", config.model)
    moment = split_moment(dataset, "future")
    arrays = item_arrays(model, store, dataset, moment)
    return Recommender(Bundle(root, bundle_manifest(moment_s=moment), resolved, dataset, store, model, arrays))


def test_categories_and_distances_are_those_of_the_features(shop: Recommender) -> None:
    found = {place.item_id: place for place in shop.recommend(history=["p1"], k=20, near=(48.02, 16.0))}
    assert found.keys() == {f"p{i}" for i in range(9)} - {"p1"}
    assert found["p2"].categories == ["coffee"]
    assert found["p3"].categories == ["tea", "leaf"]
    assert found["p3"].distance_km == pytest.approx(1.11, abs=0.01)
    assert found["p0"].distance_km is None


def test_filters_know_the_shops_columns(shop: Recommender) -> None:
    found = shop.recommend(history=["p1"], k=20, filter='category == "tea" and within(3.5)')
    assert {place.item_id for place in found} == {"p3", "p4"}
    assert {place.item_id for place in shop.recommend(history=[], k=20, filter="not type <= 6")} == {"p7", "p8"}


@pytest.mark.parametrize("near", [(500.0, 500.0), (float("nan"), 16.0), (48.0, float("inf"))])
def test_a_request_comes_from_somewhere_on_earth(shop: Recommender, near: tuple[float, float]) -> None:
    with pytest.raises(RequestError, match="Latitude must be from -90 to 90"):
        shop.recommend(history=["p1"], near=near)


def test_each_text_has_vectors_of_its_own(shop: Recommender) -> None:
    arrays = shop.dataset.item_features
    same = [i for i in range(9) if ITEMS[i]["label"] == "mild"]
    rows = shop.dataset.item_rows([f"p{i}" for i in same])
    assert abs(arrays["label"][rows] - arrays["label"][rows[0]]).max() < 1e-5
    assert abs(arrays["text"][rows] - arrays["text"][rows[0]]).max() > 0.1
