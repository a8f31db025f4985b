"""Test that the ONNX graphs give the same vectors as PyTorch for all tower types, batch sizes and history lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from twotower.bundle.onnx_towers import ITEM_FILE, USER_FILE, OnnxUserTower, export_towers, item_input
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.retriever import Queries

from ..drawn_bundle import drawn

BY_ROWS = {"update": "sparse", "dtype": "bf16"}
TOWERS: dict[str, tuple[dict[str, Any], str]] = {
    "mean of the items, straight": ({"num_blocks": 0, "hidden_dims": [16]}, "any_event"),
    "projected": ({"num_blocks": 0, "hidden_dims": [12]}, "any_event"),
    "set, dcn": ({"num_blocks": 1}, "any_event"),
    "set, last": ({"num_blocks": 2, "pooling": "last", "interaction": "fm"}, "any_event"),
    "causal": ({"num_blocks": 1, "pooling": "attention", "interaction": "none"}, "next_event"),
    "causal, last": ({"num_blocks": 2, "pooling": "last", "interaction": "fm"}, "next_event"),
    "deep": ({"hidden_dims": [20, 24, 16], "cross_layers": 3, "num_heads": 2}, "next_event"),
    "hashed": ({"tables": {"item.id": {"max_rows": 60}, "item.categories": {"max_rows": 24}}}, "any_event"),
    "quotients": ({"tables": {"user.id": {"max_rows": 60, "hashing": "quotient_remainder"}}}, "any_event"),
    "without some fields": ({"exclude_features": ["item.state", "item.categories", "user.hour", "user.home"]}, "any_event"),
    "by rows": ({"tables": {"item.id": {**BY_ROWS, "max_rows": 60}, "user.id": BY_ROWS, "item.attributes": BY_ROWS}}, "any_event"),
}


OFTEN = (
    "mean of the items, straight",
    "set, last",
    "causal",
    "hashed",
    "without some fields",
    "by rows",
)  # together they have every part


@pytest.mark.parametrize("name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in TOWERS])
def test_it_is_the_same_vector(town: Any, tmp_path: Path, name: str) -> None:
    settings, objective = TOWERS[name]
    both = {"embedding_dim": 16, "hidden_dims": [24, 16]} | {
        k: v for k, v in settings.items() if k in ("hidden_dims", "interaction")
    }
    whole = {k: v for k, v in settings.items() if k in ("tables", "exclude_features")}
    user = {k: v for k, v in settings.items() if k not in whole}
    towers = {"user_tower": {**both, "max_history": 20, **user}, "item_tower": both}
    dataset = Dataset.open(town.folder)
    model, config = drawn(dataset, {**towers, "request_location": len(name) % 2 == 0, **whole}, objective=objective)
    store, moment = open_store(dataset, "future", config.model), split_moment(dataset, "future")
    export_towers(model, store, tmp_path / "towers")

    items = store.items(np.arange(dataset.n_item_rows), np.full(dataset.n_item_rows, moment))
    with torch.inference_mode():
        vectors, tokens = model.encode_items(items).numpy(), model.history_items(items).numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "towers" / ITEM_FILE))
    given = item_input(items)
    read = {value.name: given[value.name] for value in session.get_inputs()}  # fields that the towers do without are no inputs
    for found, wanted in zip(session.run(None, read), (vectors, tokens), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)

    stored = [tuple(one.dims) for file in (USER_FILE, ITEM_FILE) for one in onnx.load(tmp_path / "towers" / file).graph.initializer]
    assert stored and all(shape[:1] != (model.tables.lookup("user.id").rows,) for shape in stored), "no graph has the users"
    tower = OnnxUserTower(tmp_path / "towers" / USER_FILE, model, tokens)
    everybody = dataset.histories(np.arange(1, dataset.n_user_rows), np.full(dataset.n_user_rows - 1, moment))
    for queries in (
        everybody,
        everybody.slice(7, 8),
        Queries.of([[], [5], [6, 7, 8]], time_s=moment, location=(28.0, -82.0)),
        Queries.of([[]], time_s=moment),
    ):
        with torch.inference_mode():
            wanted = model.encode_users(store.users(queries)).numpy()
        np.testing.assert_allclose(tower(store.padded(queries)), wanted, atol=2e-6)
