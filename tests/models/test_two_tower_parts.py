"""Test the parts of the model on drawn batches: what new items and users are, and what training hides of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from twotower.features.batches import FieldSpec, ItemBatch, Layout, UserBatch
from twotower.models.two_tower import HIDDEN_STATE, TwoTower
from twotower.schema import NEIGHBOURS, PAD, UNKNOWN
from twotower.utils.config import parse_config

ITEMS, USERS, DIM = 40, 30, 6
STATE = FieldSpec("state", "dense", (5,), "item.state")
LAYOUT = Layout(
    items=ITEMS,
    users=USERS,
    event_types=2,
    item_fields=(
        FieldSpec("price", "dense", (2,), "item.price"),
        FieldSpec(NEIGHBOURS, "bag", (ITEMS,), "item.id"),
        STATE,
    ),
    user_fields=(FieldSpec("state", "dense", (7,), "user.state"), FieldSpec("home", "geo", (5, 9), "item.location")),
    ordered=True,
    half_lives=(0.0, 60.0),
)
TOWERS = {"embedding_dim": DIM, "hidden_dims": [8, 4], "num_heads": 2}


def stacked(fields: list[Tensor]) -> Tensor:
    """Return fields [n, F, d]."""
    return torch.stack(fields, dim=1)


def made(
    layout: Layout = LAYOUT, *, user: dict[str, float] | None = None, item: dict[str, float] | None = None, **model: float
) -> TwoTower:
    """Return a model in evaluation mode, all its weights drawn."""
    towers = {"user_tower": {**TOWERS, **(user or {})}, "item_tower": {"embedding_dim": DIM, "hidden_dims": [8, 4], **(item or {})}}
    config = parse_config({"model": {**towers, **model}}).model.resolved(ordered=True, timed=True, events=0, ids=0)
    torch.manual_seed(0)
    built = TwoTower(layout, config, causal=True)
    with torch.no_grad():
        for name, value in built.named_parameters():
            if name != "log_temperature":
                value.normal_()
    return built.eval()


def items(rows: list[int], *, events: bool = True) -> ItemBatch:
    """Return items with drawn fields; the last number of their state says that there are no events."""
    generator = torch.Generator().manual_seed(1)
    state = torch.rand(len(rows), 5, generator=generator)
    state[:, -1] = float(not events)
    neighbours = torch.randint(2, ITEMS - 1, (len(rows), 3), generator=generator)
    fields = {"price": torch.rand(len(rows), 2, generator=generator), NEIGHBOURS: neighbours, "state": state}
    return ItemBatch(torch.tensor(rows), fields)


def users(rows: list[int]) -> UserBatch:
    """Return users with one history of two events each."""
    size, generator = len(rows), torch.Generator().manual_seed(2)
    fields = {
        "state": torch.rand(size, 7, generator=generator),
        "home": torch.randint(0, 5, (size, 2), generator=generator),
        "home.point": torch.rand(size, 3, generator=generator),
    }
    return UserBatch(
        items=items([0, 3, 4]),
        widths=((size, 2),),
        history=torch.tensor([1, 2] * size),
        event_type=torch.ones(2 * size, dtype=torch.long),
        stars=torch.ones(2 * size, dtype=torch.long),
        gap=torch.ones(2 * size, dtype=torch.long),
        at=torch.arange(size) * 2 + 1,
        seen=torch.full((size,), 2),
        user_row=torch.tensor(rows),
        fields=fields,
    )


@pytest.fixture
def model() -> TwoTower:
    return made()


def test_vectors_of_new_items_are_shorter(model: TwoTower) -> None:
    """0.85 of the length of the others, and only where popularity is part of a score; training has full lengths."""
    batch = items([5, UNKNOWN, 6, UNKNOWN])
    expected = torch.tensor([1.0, 0.85, 1.0, 0.85])
    torch.testing.assert_close(model.encode_items(batch).norm(dim=1), expected)
    torch.testing.assert_close(model.item_length(batch.row), expected[:, None])
    torch.testing.assert_close(model.train().encode_items(batch).norm(dim=1), torch.ones(4))
    torch.testing.assert_close(made(popularity_prior=0.0).encode_items(batch).norm(dim=1), torch.ones(4))


def test_the_temperature_and_its_range() -> None:
    for learned in (False, True):
        model = made(temperature=0.3, learn_temperature=learned)
        assert float(model.temperature().detach()) == pytest.approx(0.3) and model.log_temperature.requires_grad is learned
    for before, after in ((1e-9, 0.01), (0.01, 0.01), (0.4, 0.4), (1.0, 1.0), (50.0, 1.0)):
        with torch.no_grad():
            model.log_temperature.fill_(torch.tensor(before).log())
        model.clamp_temperature()
        assert float(model.temperature().detach()) == pytest.approx(after)


def test_an_item_as_if_new_has_no_id_and_no_events(model: TwoTower) -> None:
    batch = items([5, 6])
    before = batch.fields["state"].clone()
    found = model.as_if_new(batch)
    assert found.row.tolist() == [UNKNOWN, UNKNOWN] and found.row.dtype == torch.int64
    assert found.fields["state"].tolist() == [[0, 0, 0, 0, 1]] * 2
    assert torch.equal(found.fields["price"], batch.fields["price"]) and torch.equal(batch.fields["state"], before)
    torch.testing.assert_close(model.encode_items(found), model.encode_items(items([UNKNOWN, UNKNOWN], events=False)))
    plain = made(replace(LAYOUT, item_fields=LAYOUT.item_fields[:1]))
    bare = ItemBatch(batch.row, {"price": batch.fields["price"]})
    assert plain.as_if_new(bare).fields.keys() == {"price"} and plain.encode_items(bare).shape == (2, 4)


def test_fields_of_an_item_stand_in_order(model: TwoTower) -> None:
    """The id first, the state last; a history reads all but the state."""
    batch = items([5, 6])
    fields = stacked(model.offered_fields(batch))
    assert fields.shape == (2, 4, DIM)
    changes = {"id": ItemBatch(batch.row + 1, batch.fields)}
    changes |= {name: ItemBatch(batch.row, {**batch.fields, name: batch.fields[name] + 1}) for name in batch.fields}
    for place, name in enumerate(("id", "price", NEIGHBOURS, "state")):
        changed = (stacked(model.offered_fields(changes[name])) != fields).any(dim=2)
        assert changed.tolist() == [[other == place for other in range(4)]] * 2
        known = (model.history_items(changes[name]) != model.history_items(batch)).any(dim=1)
        assert known.tolist() == [name != "state"] * 2
    torch.testing.assert_close(model.history_items(batch), fields[:, :3].sum(dim=1))
    assert torch.equal(fields[:, 0], model.tables.lookup("item.id")(batch.row))


def test_only_new_items_without_events_have_no_state(model: TwoTower) -> None:
    rows = torch.tensor([UNKNOWN, UNKNOWN, 5, 5])
    state = torch.full((4, 5), 0.5)
    state[:, -1] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert model._state(state, rows).any(dim=1).tolist() == [False, True, True, True]
    torch.testing.assert_close(model._state(state, rows)[1:], state[1:])
    assert state.all(dim=1).tolist() == [True, False, True, False], "the batch stays as it is"


def share(mask: Tensor) -> float:
    return float(mask.float().mean())


def test_training_hides_the_state_of_half_the_items_without_id() -> None:
    rows, state = torch.tensor([UNKNOWN, 5]).repeat(4000), torch.full((8000, 5), 0.5)
    state[:, -1] = 0.0  # all have events
    hidden = ~made(item={"id_dropout": 0.2}).train()._state(state, rows).any(dim=1)
    assert HIDDEN_STATE == 0.5 and share(hidden[rows == UNKNOWN]) == pytest.approx(0.5, abs=0.03) and not hidden[rows == 5].any()
    assert made(item={"id_dropout": 0.0}).train()._state(state, rows).any(dim=1).all(), "without dropout, no known item is new"


def test_training_drops_ids_of_both_sides() -> None:
    model = made(item={"id_dropout": 0.2}, user={"id_dropout": 0.7})
    rows = torch.full((8000,), 7)
    for wanted in (0.2, 0.7):
        dropped = model.train()._drop(rows, wanted)
        assert share(dropped == UNKNOWN) == pytest.approx(wanted, abs=0.03) and set(dropped.tolist()) == {7, UNKNOWN}
        assert torch.equal(model.eval()._drop(rows, wanted), rows)
    assert model.train()._drop(rows, 0.0) is rows
    item = model.tables.lookup("item.id")(torch.tensor([UNKNOWN]))
    user = model.tables.lookup("user.id")(torch.tensor([UNKNOWN]))
    with torch.no_grad():
        found = (stacked(model.offered_fields(items([7] * 2000)))[:, 0] == item).all(dim=1)
        assert share(found) == pytest.approx(0.2, abs=0.04)
        found = (stacked(model.user_fields(users([7] * 2000)))[:, 0] == user).all(dim=1)
        assert share(found) == pytest.approx(0.7, abs=0.04)


def test_new_items_have_no_co_visited_items(model: TwoTower) -> None:
    batch = items([UNKNOWN, 5])
    without = ItemBatch(batch.row, {**batch.fields, NEIGHBOURS: torch.full((2, 3), PAD)})
    assert model.reads_neighbours
    same = (stacked(model.item_fields(batch)) == stacked(model.item_fields(without))).all(dim=2)
    assert same.tolist() == [[True, True, True], [True, True, False]]
    assert batch.fields[NEIGHBOURS].all(), "the batch stays as it is"
    plain = made(replace(LAYOUT, item_fields=(LAYOUT.item_fields[0], STATE)))
    assert not plain.reads_neighbours
    bare = ItemBatch(batch.row, {name: value for name, value in batch.fields.items() if name != NEIGHBOURS})
    assert [field.shape for field in plain.item_fields(bare)] == [(2, DIM)] * 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_drops_a_share_of_the_co_visited_items(dropout: float) -> None:
    """A bag is the mean of its rows: with one row it is there or not."""
    model = made(item={"neighbour_dropout": dropout, "id_dropout": 0.0})
    batch = items([5] * 4000)
    batch.fields[NEIGHBOURS] = torch.full((4000, 1), 9)
    with torch.no_grad():
        lost = [(stacked(model.train(mode).item_fields(batch))[:, 2] == 0).all(dim=1) for mode in (True, False)]
    assert share(lost[0]) == pytest.approx(dropout, abs=0.03 if dropout else 0) and not lost[1].any()


def test_fields_of_a_user_stand_in_order(model: TwoTower) -> None:
    batch = users([3, 4])
    fields = stacked(model.user_fields(batch))
    assert fields.shape == (2, 3, DIM)
    assert torch.equal(fields[:, 0], model.tables.lookup("user.id")(batch.user_row))
    moved = replace(batch, fields={**batch.fields, "home.point": batch.fields["home.point"] + 1})
    assert (stacked(model.user_fields(moved)) != fields).any(dim=2).tolist() == [[False, False, True]] * 2, "locations are embedded"
    vectors = model.encode_users(batch)
    assert vectors.shape == (2, 4) and (vectors.norm(dim=1) <= 1).all()
    expected = model.user_tower(fields.unbind(dim=1), model.history_items(batch.items), batch)
    torch.testing.assert_close(vectors, expected)


def test_what_a_model_is_built_from() -> None:
    torch.manual_seed(0)
    config = parse_config({"model": {"user_tower": TOWERS, "item_tower": {"embedding_dim": DIM}}}).model
    resolved = config.resolved(ordered=True, timed=True, events=0, ids=0)
    model = TwoTower(LAYOUT, resolved, causal=True, save_memory=True)
    assert model.geo.bias is None and model.geo.weight.shape == (DIM, model.waves.width)
    assert float(model.geo.weight.detach().std()) == pytest.approx(0.05, rel=0.1)
    assert model.priors.half_lives == (0.0, 60.0) and model.priors.prior == 1.0
    assert model.tables.lookup("item.id").ids == ITEMS and model.tables.lookup("user.id").ids == USERS
    assert len(model.user_tower.event_type) == 3
    encoder = model.user_tower.encoder
    assert encoder is not None and (encoder.causal, encoder.save_memory) == (True, True)
    other = TwoTower(LAYOUT, resolved, causal=False).user_tower.encoder
    assert other is not None and (other.causal, other.save_memory) == (False, False)
