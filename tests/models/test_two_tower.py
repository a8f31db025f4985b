"""Test the complete model: vector lengths, unknown users and items, shared tables, and the range of the temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twotower.data.dataset_features import open_store, resolve
from twotower.models.build import build_model
from twotower.models.towers.head import TowerHead
from twotower.models.two_tower import NEW_LENGTH
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW, UNKNOWN
from twotower.utils.config import Config, parse_config
from twotower.utils.config_model import ResolvedItemTower

TOWERS = {"embedding_dim": 16, "hidden_dims": [32, 8], "interaction": "dcn"}


@pytest.fixture(params=["mean", "last", "attention"])
def config(request) -> Config:
    return parse_config(
        {"model": {"user_tower": {**TOWERS, "pooling": request.param}, "item_tower": TOWERS, "learn_temperature": True}}
    )


def test_both_sides_give_vectors_of_one_width_no_longer_than_one(dataset, config):
    model, store = build_model(dataset, resolve(config, dataset)).eval(), open_store(dataset, "valid", config.model)
    asked = store.users(dataset.held_out("valid").queries.slice(0, 40))
    users = model.encode_users(asked)
    rows = np.arange(UNKNOWN, dataset.n_item_rows)  # of PAD, nothing is known: it is short
    items = model.encode_items(store.items(rows, np.full(len(rows), 1_500_000_000)))
    assert users.shape == (40, 8)
    assert items.shape == (len(rows), 8)
    known = (rows != UNKNOWN) & (rows < dataset.n_train_item_rows)
    lengths = torch.where(torch.from_numpy(known), 1.0, NEW_LENGTH)
    torch.testing.assert_close(items.norm(dim=1), lengths, rtol=1e-4, atol=0)
    # A user's length is that of what the tower found, held back by the norm_shrinkage; the direction stays.
    raw = model.user_tower.head.raw(
        model.user_tower.beside_history(
            model.user_fields(asked), model.user_tower.event_embeddings(model.history_items(asked.items), asked), asked
        )
    )
    length = raw.norm(dim=1)
    torch.testing.assert_close(users.norm(dim=1), length / (length.square() + config.model.user_tower.norm_shrinkage**2).sqrt())
    torch.testing.assert_close(torch.cosine_similarity(users, raw), torch.ones(40))


@pytest.mark.parametrize("norm_shrinkage", [0.0, 1.0])
def test_nothing_known_is_a_vector_of_zeros_and_has_a_gradient(norm_shrinkage):
    head = TowerHead(2, ResolvedItemTower(**TOWERS, norm_shrinkage=norm_shrinkage))
    nothing = torch.zeros(3, 2, TOWERS["embedding_dim"], requires_grad=True)
    vectors = head(nothing.unbind(dim=1))
    vectors.sum().backward()
    assert not vectors.any() and torch.isfinite(nothing.grad).all()


def test_unknown_users_differ_by_their_histories_only(dataset, config):
    model, store = build_model(dataset, resolve(config, dataset)).eval(), open_store(dataset, "valid", config.model)
    histories = [[FIRST_ROW, FIRST_ROW + 1], [FIRST_ROW + 2, FIRST_ROW + 3], []]
    vectors = model.encode_users(store.users(Queries.of(histories, time_s=1_500_000_000)))
    assert torch.isfinite(vectors).all()
    assert (vectors @ vectors.T)[~torch.eye(3, dtype=torch.bool)].max() < 0.9999


def test_untrained_rows_read_the_unknown_embedding(dataset, config):
    store = open_store(dataset, "valid", config.model)
    trained = dataset.n_train_item_rows
    rows = store.items(np.array([trained - 1, trained, dataset.n_item_rows - 1])).row
    assert rows.tolist() == [trained - 1, UNKNOWN, UNKNOWN]


def test_id_dropout_trains_the_unknown_row(dataset, config):
    model, store = build_model(dataset, resolve(config, dataset)).train(), open_store(dataset, "valid", config.model)
    rows = np.arange(FIRST_ROW, FIRST_ROW + 100)
    vectors = model.encode_items(store.items(rows, np.full(100, 1_500_000_000)))
    (vectors @ torch.randn(8)).sum().backward()
    assert model.tables.lookup("item.id").weight.grad[UNKNOWN].abs().sum() > 0


def test_temperature_is_kept_in_range_and_can_come_back(dataset, config):
    model = build_model(dataset, resolve(config, dataset))
    with torch.no_grad():
        model.log_temperature.fill_(-20)
    model.clamp_temperature()
    assert float(model.temperature().detach()) == pytest.approx(0.01)
    model.temperature().backward()
    assert model.log_temperature.grad > 0


def test_an_item_nothing_is_known_of_does_not_drown_the_others_gradients():
    fields = torch.zeros(3, 1, 8)
    fields[1:] = torch.randn(2, 1, 8)
    fields.requires_grad_()
    TowerHead(1, ResolvedItemTower(embedding_dim=8, hidden_dims=[8]))(fields).sum().backward()
    lengths = fields.grad.norm(dim=2)
    assert lengths[0] <= 1001 * 8**0.5 and lengths.half().isfinite().all(), "it fits the shortest type"
