"""Test layers against naive implementations, and histories grouped by width against full padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twotower.features.batches import FieldSpec
from twotower.models.layers.attention import HistoryEncoder
from twotower.models.layers.dropout import Dropout, dropout
from twotower.models.layers.embedding import EmbeddingTables, FieldEmbedding, GeoWaves
from twotower.models.layers.interaction import INTERACTIONS, CrossNetwork, FactorizationMachine, Flatten
from twotower.models.layers.pooling import POOLINGS
from twotower.utils.config import ModelConfig

DIM = 8


def encoder(*, causal: bool) -> HistoryEncoder:
    torch.manual_seed(0)
    built = HistoryEncoder(DIM, heads=2, blocks=2, dropout=0.0, max_length=16, gaps=4, causal=causal, save_memory=False).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


@pytest.mark.parametrize("causal", [True, False])
def test_width_classes_change_nothing(causal):
    """Encoding groups of width 4 and 8 together equals encoding each alone."""
    model = encoder(causal=causal)
    short, long = torch.randn(4, DIM), torch.randn(8, DIM)
    short_valid, long_valid = torch.arange(4) < 3, torch.arange(8) < 7
    gap = torch.zeros(12, dtype=torch.long)
    both = model(torch.cat([short, long]), gap, torch.cat([short_valid, long_valid]), ((1, 4), (1, 8)))
    alone = model(
        torch.cat([short, torch.randn(4, DIM)]), gap[:8], torch.cat([short_valid, torch.zeros(4, dtype=torch.bool)]), ((1, 8),)
    )
    torch.testing.assert_close(both[:3], alone[:3])
    torch.testing.assert_close(both[4:11], model(long, gap[:8], long_valid, ((1, 8),))[:7])


def test_causal_attention_does_not_see_the_future():
    model = encoder(causal=True)
    x, gap, valid = torch.randn(8, DIM), torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.bool)
    before = model(x, gap, valid, ((1, 8),))
    changed = x.clone()
    changed[5:] = torch.randn(3, DIM)
    after = model(changed, gap, valid, ((1, 8),))
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_empty_history_is_finite():
    model = encoder(causal=False)
    out = model(torch.zeros(4, DIM), torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool), ((1, 4),))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_pooling_of_every_prefix(name):
    torch.manual_seed(1)
    pooling = POOLINGS[name](DIM)
    torch.nn.init.normal_(pooling.empty)
    if name == "attention":
        torch.nn.init.normal_(pooling.score.weight)
    x = torch.randn(12, DIM)  # one history of width 4, one of width 8
    at, seen = torch.tensor([2, 0, 9, 4]), torch.tensor([3, 0, 6, 1])
    pooled = pooling(x, ((1, 4), (1, 8)), at, seen)
    for row, events in enumerate([x[:3], x[:0], x[4:10], x[4:5]]):
        if not len(events):
            expected = pooling.empty
        elif name == "last":
            expected = events[-1]
        elif name == "mean":
            expected = events.mean(dim=0)
        else:
            weight = torch.softmax(5 * torch.tanh(pooling.score(events) / 5), dim=0)
            expected = (weight * events).sum(dim=0)
        torch.testing.assert_close(pooled[row], expected)


def test_cross_network_is_its_formula():
    torch.manual_seed(2)
    layer = CrossNetwork(2, 3, 2)
    x = torch.randn(5, 2, 3)
    x0 = x.flatten(1)
    one = x0 * (x0 @ layer.layers[0].weight.T + layer.layers[0].bias) + x0
    two = x0 * (one @ layer.layers[1].weight.T + layer.layers[1].bias) + one
    torch.testing.assert_close(layer(x), two)


def test_factorization_machine_sums_pairs():
    x = torch.randn(4, 3, 5)
    pairs = x[:, 0] * x[:, 1] + x[:, 0] * x[:, 2] + x[:, 1] * x[:, 2]
    torch.testing.assert_close(FactorizationMachine(3, 5, 1)(x), torch.cat([x.flatten(1), pairs], dim=1))
    torch.testing.assert_close(Flatten(3, 5, 1)(x), x.flatten(1))


@pytest.mark.parametrize("name", sorted(INTERACTIONS))
def test_every_interaction_has_a_width_and_passes_gradients(name):
    layer = INTERACTIONS[name](3, 5, 2)
    x = torch.randn(4, 3, 5, requires_grad=True)
    out = layer(x)
    assert out.shape == (4, layer.width)
    out.square().sum().backward()
    assert (x.grad != 0).all()


def test_fields_share_a_table_and_ignore_padding():
    tables = EmbeddingTables(ModelConfig())
    fields = (
        FieldSpec("one", "rows", (6,), "shared"),
        FieldSpec("many", "bag", (6,), "shared"),
        FieldSpec("number", "dense", (2,), "n"),
    )
    embedding = FieldEmbedding(fields, DIM, tables)
    assert [name for name, _ in tables.named_parameters()] == ["shared.weight"]
    table = tables.lookup("shared").weight
    out = embedding(
        {"one": torch.tensor([3, 0]), "many": torch.tensor([[2, 4, 0], [0, 0, 0]]), "number": torch.ones(2, 2)}, tables, None
    )
    assert [field.shape for field in out] == [(2, DIM)] * 3
    torch.testing.assert_close(out[0][0], table[3])
    torch.testing.assert_close(out[1][0], (table[2] + table[4]) / 2)
    assert (torch.stack(out[:2])[:, 1] == 0).all()


@pytest.mark.parametrize("name", ["type", "keys", "values", "items", "pop", "a.b", "forward"])
def test_a_field_may_have_any_name(name):
    tables = EmbeddingTables(ModelConfig())
    fields = (FieldSpec(name, "dense", (2,), f"user.{name}"), FieldSpec(f"{name} too", "rows", (5,), f"user.{name}"))
    embedding = FieldEmbedding(fields, DIM, tables)
    out = embedding({name: torch.ones(3, 2), f"{name} too": torch.tensor([2, 3, 4])}, tables, None)
    torch.testing.assert_close(out[0][0], next(embedding.parameters()).sum(dim=1))
    torch.testing.assert_close(out[1][0], tables.lookup(f"user.{name}").weight[2])


def test_geo_waves_fall_with_distance_at_every_scale():
    waves = GeoWaves()
    km = np.array([0.0, 0.5, 2, 8, 30, 200])
    points = torch.tensor(np.stack([6371 * np.cos(km / 6371), 6371 * np.sin(km / 6371), 0 * km], axis=1), dtype=torch.float32)
    features = waves(points)
    similarity = features[0] @ features.T
    assert similarity[0] == pytest.approx(1, abs=1e-3)
    assert (similarity[:-1] > similarity[1:]).all()
    assert abs(float(similarity[-1])) < 0.25
    assert (waves(torch.zeros(1, 3)) == 0).all()


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    out = dropout(torch.ones(1_000, 1_000, dtype=torch.float64), p, training=True)
    kept = out > 0
    share = 1 - min(round(256 * p), 255) / 256  # what is kept: the nearest of 256 levels
    noise = 5 * (share * (1 - share) / 1e6) ** 0.5
    assert float(kept.double().mean()) == pytest.approx(share, abs=noise)
    assert float(out.mean()) == pytest.approx(1, abs=noise / share)
    assert (out[kept] == 1 / share).all()
    for along in (0, 1):  # neighbours are independent
        both = (kept.narrow(along, 0, 999) & kept.narrow(along, 1, 999)).double().mean()
        assert float(both) == pytest.approx(share**2, abs=3 * noise)


def test_dropout_follows_the_seed_and_is_off_outside_training():
    x = torch.randn(7, 5)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropout(x, 0.5, training=True))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is x
    layer = Dropout(0.5)
    torch.manual_seed(1)
    assert torch.equal(layer(x), drawn[0]) and layer.eval()(x) is x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_dropout_is_its_mask(dtype):
    x = torch.randn(6, 9).to(dtype).requires_grad_()
    out = dropout(x, 0.25, training=True)
    assert out.dtype == dtype
    upstream = torch.randn(6, 9).to(dtype)
    out.backward(upstream)
    expected = torch.where(out == 0, torch.zeros_like(upstream), upstream / 0.75)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_blocks_drop_the_same(autocast):
    """Gradient checkpointing draws dropout again and must get the same result."""
    grads = []
    for save_memory in (False, True):
        torch.manual_seed(0)
        model = HistoryEncoder(DIM, heads=2, blocks=2, dropout=0.3, max_length=8, gaps=4, causal=True, save_memory=save_memory)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        x = torch.randn(16, DIM, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(x, torch.zeros(16, dtype=torch.long), torch.ones(16, dtype=torch.bool), ((2, 8),))
        out.float().square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
