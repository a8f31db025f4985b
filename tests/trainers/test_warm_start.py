"""Test the initial item ids: iALS factors if the table supports them, random values otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from twotower.baselines import als
from twotower.baselines.als import factorise, interactions, item_vectors
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import resolve
from twotower.models.build import build_model
from twotower.models.layers.tables import INIT_STD
from twotower.trainers import warm_start
from twotower.trainers.memory.estimate import predict
from twotower.trainers.memory.sizes import dataset_sizes
from twotower.trainers.warm_start import init_item_ids_from_als
from twotower.utils.config import parse_config

from ..documents import with_split

WIDTH = 16


def begun(dataset: Dataset, item_tower: dict[str, Any] | None = None, **model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the item id table before and after the initialisation."""
    tower = {"embedding_dim": WIDTH, "hidden_dims": [WIDTH]}
    config = parse_config({"model": {"user_tower": tower, "item_tower": {**tower, **(item_tower or {})}, **model}})
    torch.manual_seed(0)
    built = build_model(dataset, resolve(config, dataset))
    table = built.tables.lookup("item.id")
    before = table.weight.detach().clone()
    init_item_ids_from_als(built, dataset, config)
    return before, table.weight.detach()


def test_ids_begin_as_factors_as_long_as_the_noise(dataset: Dataset) -> None:
    before, after = begun(dataset)
    known = torch.from_numpy(dataset.item_train_count[: len(after)] > 0)
    assert float(after[known].norm(dim=1).mean()) == pytest.approx(INIT_STD * WIDTH**0.5, rel=1e-4)
    assert not after[~known].any() and not torch.equal(before, after)
    visits = interactions(dataset)
    theirs = torch.from_numpy(factorise(visits[np.flatnonzero(np.diff(visits.indptr))], WIDTH).item_factors)[: len(after)]
    cosine = torch.nn.functional.cosine_similarity(after[known], theirs[known])
    assert float(cosine.min()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("item_tower", "model"),
    [
        ({"id_init": "random"}, {}),
        ({}, {"tables": {"item.id": {"max_rows": 50}}}),
    ],
)
def test_other_tables_keep_their_noise(dataset: Dataset, item_tower: dict[str, Any], model: dict[str, Any]) -> None:
    before, after = begun(dataset, item_tower, **model)
    assert torch.equal(before, after)


def test_a_table_of_too_many_ids_keeps_its_noise(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "MAX_ALS_ITEMS", dataset.n_train_items)
    before, after = begun(dataset)
    assert torch.equal(before, after)


def test_a_table_updated_by_rows_begins_like_a_dense_one(dataset: Dataset) -> None:
    _, dense = begun(dataset)
    _, by_rows = begun(dataset, sparse_update_from_rows=10)
    assert torch.equal(dense, by_rows)
    half = {"tables": {"item.id": {"update": "sparse", "dtype": "bf16"}}}
    assert torch.equal(begun(dataset, **half)[1], dense.to(torch.bfloat16))


@pytest.mark.parametrize("missing", ["order", "times"])
def test_attention_stays_away_where_histories_have_no_order_or_no_times(town: Any, missing: str) -> None:
    dataset = Dataset.open(town.folder)
    config, asked_for = parse_config({}), parse_config({"model": {"user_tower": {"num_blocks": 1}}})
    assert build_model(dataset, resolve(config, dataset)).user_tower.encoder is not None
    with_attention = predict(dataset_sizes(dataset, config), resolve(config, dataset))
    if missing == "order":
        dataset.manifest = with_split(dataset.manifest, kind="predefined")
    else:
        dataset.has_time = False
    assert build_model(dataset, resolve(config, dataset)).user_tower.encoder is None
    assert predict(dataset_sizes(dataset, config), resolve(config, dataset)).step < with_attention.step
    assert build_model(dataset, resolve(asked_for, dataset)).user_tower.encoder is not None


def test_items_of_the_same_users_are_near() -> None:
    """Two groups of users, each with its own items."""
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], 40)
    visits = (rng.random((80, 30)) < np.where((np.arange(30) % 2)[None] == group[:, None], 0.4, 0.0)).astype(np.float32)
    vectors = factorise(sparse.csr_matrix(visits), 8).item_factors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert likeness[::2, ::2].mean() > likeness[::2, 1::2].mean() + 0.5


def test_many_users_are_sampled(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = als.factorise

    def counted(visits: sparse.csr_matrix, *words: Any, **more: Any) -> Any:
        asked.append(visits.shape[0])
        return plain(visits, *words, **more)

    monkeypatch.setattr(als, "factorise", counted)
    monkeypatch.setattr(als, "MAX_ALS_USERS", 50)
    one, two = (item_vectors(dataset, WIDTH, length=1.0, seed=3) for _ in range(2))
    assert asked == [50, 50] and np.array_equal(one, two)
    assert not np.array_equal(one, item_vectors(dataset, WIDTH, length=1.0, seed=4))
