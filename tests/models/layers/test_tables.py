"""Test that tables updated by rows match the dense optimiser, and test short types and hashing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import ConfigError
from twotower.models.layers.tables import BETA, EPS, Hashing, RowTable, Table, rounded
from twotower.schema import FIRST_ROW, PAD
from twotower.utils.config import EmbeddingConfig

RATES = [0.01 * (1 + step % 3) for step in range(60)]
ONE, TAKEN = torch.ones((), dtype=torch.float64), torch.tensor(True)


def reads(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, rows, (4,), generator=generator) for _ in RATES]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 9), st.integers(1, 5))),
    kind=st.sampled_from(["dense", "sparse"]),
    times=st.integers(1, 3),
)
def test_the_gradient_of_the_rows_read_is_that_of_pytorch(data: st.DataObject, shape: tuple[int, ...], kind: str, times: int):
    """Reference: PyTorch's lookups, whose gradient has the size of the table. Whole numbers, so that order does not count."""
    config = EmbeddingConfig(update=kind, weight_decay=0.0)
    table = (RowTable if kind == "sparse" else Table)("t", 12, 3, config)
    reference = table.weight.detach().clone().requires_grad_()
    for _ in range(times):
        ids = torch.tensor(data.draw(st.lists(st.integers(0, 11), min_size=math.prod(shape), max_size=math.prod(shape))))
        ids = ids.to(torch.int64).view(shape)
        upstream = 60.0 * torch.tensor(data.draw(st.lists(st.integers(-5, 5), min_size=3, max_size=3)))
        found = table(ids) if ids.dim() == 1 else table.mean(ids)
        known = torch.nn.functional.embedding(ids, reference, padding_idx=PAD) if ids.dim() == 1 else means(ids, reference)
        torch.testing.assert_close(found, known)
        (found * upstream).sum().backward()
        (known * upstream).sum().backward()
    got = table.weight.grad
    if isinstance(table, RowTable):
        table.collect()
        row, gradient = table.merged
        got = torch.zeros(12, 3).index_add_(0, row, gradient)
    assert got is not None and (got[PAD] == 0).all()
    torch.testing.assert_close(got, reference.grad, rtol=1e-6, atol=1e-6)


def means(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding_bag(ids, weight, mode="mean", padding_idx=PAD)


def train_rows(table: RowTable, target: torch.Tensor) -> None:
    for number, (ids, rate) in enumerate(zip(reads(table.ids), RATES, strict=True), 1):
        (table(ids) * target[ids]).sin().sum().backward()
        table.collect()
        table.step(number, rate, ONE, TAKEN)


@pytest.mark.parametrize("decay", [0.3, 4.0], ids=["the factor kept apart", "the factor folded in, again and again"])
def test_one_number_a_row_is_adamw_without_momentum_exactly(decay: float):
    """With rows of one number, a moment per row equals a moment per number, so both optimisers must agree."""
    table = RowTable("t", 30, 1, EmbeddingConfig(update="sparse", weight_decay=decay)).double()
    target = torch.randn(30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = torch.nn.Parameter(table.weight.clone())
    optimizer = torch.optim.AdamW([dense], betas=(0.0, BETA), eps=EPS, weight_decay=decay)
    for ids, rate in zip(reads(30), RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (torch.nn.functional.embedding(ids, dense, padding_idx=PAD) * target[ids]).sin().sum().backward()
        optimizer.step()
    train_rows(table, target)
    torch.testing.assert_close(table.weight * table.scale, dense.detach(), rtol=1e-6, atol=1e-9)
    assert (table.weight[PAD] == 0).all()


@pytest.mark.parametrize("decay", [0.5, 5.0])
def test_what_rows_miss_is_made_up_for(decay: float):
    """Reference: the dense update with one second moment per row, for every row at every step."""
    table = RowTable("t", 12, 6, EmbeddingConfig(update="sparse", weight_decay=decay)).double()
    target = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, second = table.weight.clone(), torch.zeros(12, dtype=torch.float64)
    for number, (ids, rate) in enumerate(zip(reads(12), RATES, strict=True), 1):
        leaf = weight.clone().requires_grad_()
        (torch.nn.functional.embedding(ids, leaf, padding_idx=PAD) * target[ids]).sin().sum().backward()
        second = BETA * second + (1 - BETA) * leaf.grad.square().mean(dim=1)
        weight = weight * (1 - rate * decay) - rate * leaf.grad / ((second / (1 - BETA**number)).sqrt() + EPS)[:, None]
    train_rows(table, target)
    torch.testing.assert_close(table.weight * table.scale, weight, rtol=1e-6, atol=1e-9)


def test_unread_rows_of_a_short_type_decay_too():
    table = RowTable("t", 4000, 8, EmbeddingConfig(update="sparse", dtype="bf16", weight_decay=5.0))
    before = table.weight[100:].float()
    for number in range(1, 41):
        table(torch.tensor([5])).sum().backward()
        table.collect()
        table.step(number, 0.01, ONE, TAKEN)
    after = table.weight[100:].float() * table.scale.float()
    assert float(table.scale) > 0.5, "folded in on the way"
    assert float(after.norm() / before.norm()) == pytest.approx(0.95**40, rel=0.01), "rounding at random keeps the mean"


def test_gradients_of_several_reads_add_up():
    table = RowTable("t", 20, 4, EmbeddingConfig(update="sparse"))
    plain = torch.nn.Parameter(table.weight.clone())
    ids, bags = torch.tensor([3, 3, 7, 0]), torch.tensor([[3, 5, 0], [0, 0, 0], [7, 7, 7]])
    (table(ids).square().sum() + table.mean(bags).sin().sum()).backward()
    lookup = torch.nn.functional.embedding(ids, plain, padding_idx=PAD).square().sum()
    (lookup + torch.nn.functional.embedding_bag(bags, plain, mode="mean", padding_idx=PAD).sin().sum()).backward()
    square = table.collect()
    row, grad = table.merged
    torch.testing.assert_close(grad, plain.grad[row])
    torch.testing.assert_close(float(square), float(plain.grad.double().square().sum()))
    assert row.tolist() == [0, 3, 5, 7] and not grad[0].any()


def test_a_step_touches_only_what_was_read():
    table = RowTable("t", 1000, 4, EmbeddingConfig(update="sparse"))
    before = table.weight.clone()
    table(torch.tensor([5, 900])).sum().backward()
    table.collect()
    table.step(1, 0.1, ONE, TAKEN)
    assert (table.weight != before).any(dim=1).nonzero().flatten().tolist() == [5, 900]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_left_out_changes_no_weight_and_is_made_up_for(dtype):
    """After a step with infinite gradients, the next steps equal those of a table that was not read in it."""
    torch.manual_seed(3)
    config = EmbeddingConfig(update="sparse", weight_decay=2.0, dtype=dtype)
    tables = [RowTable("t", 50, 4, config) for _ in range(2)]
    for number in range(1, 6):
        for left_out, table in zip((False, True), tables, strict=True):
            if number == 3 and not left_out:
                continue
            before = table.weight.clone()
            (table(torch.tensor([5, 9])) * (float("inf") if number == 3 else 1.0)).sum().backward()
            table.collect()
            torch.manual_seed(number)
            table.step(number, 0.01, ONE, torch.tensor(number != 3))
            assert torch.equal(table.weight, before) == (number == 3)
    torch.testing.assert_close(*(table.weight.float() * table.scale.float() for table in tables), rtol=1e-5, atol=1e-7)
    assert float(tables[0].scale) == float(tables[1].scale) == pytest.approx(0.98**4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_is_right_on_average(dtype):
    torch.manual_seed(0)
    x = torch.tensor([1.0 + 2**-13, -0.3, 1e-3, 0.0, 1.0, -2.0, 3e-7])
    many = torch.stack([rounded(x, dtype).double() for _ in range(20_000)])
    gap = torch.tensor([(many[:, i].max() - many[:, i].min()).item() for i in range(len(x))])
    error = (many.mean(dim=0) - x.double()).abs()
    assert (error <= 0.02 * gap).all(), (error, gap)
    assert torch.equal(rounded(many[0].float(), dtype).double(), many[0])  # what fits stays as it is


def test_small_updates_are_not_lost_in_half_precision():
    """Updates are a tenth of the last digit; rounding to nearest would never change the value."""
    torch.manual_seed(0)
    table = RowTable("t", 4, 64, EmbeddingConfig(update="sparse", dtype="bf16"))
    table.weight[2] = 1.0
    for number in range(1, 201):
        table(torch.tensor([2])).sum().backward()
        table.collect()
        table.step(number, 2.0**-8 / 10, ONE, TAKEN)
    moved = 1.0 - table.weight[2].float().mean().item()
    assert moved == pytest.approx(200 * 2.0**-8 / 10, rel=0.1)


@pytest.mark.parametrize("kind", ["double", "quotient_remainder"])
@pytest.mark.parametrize("update", [Table, RowTable])
def test_a_hashed_table_sums_two_rows(kind, update):
    config = EmbeddingConfig(update="sparse" if update is RowTable else "dense", max_rows=200, hashing=kind)
    table = update("t", 5000, 8, config)
    assert len(table.weight) == 200
    ids = torch.tensor([0, 1, 2, 4999])
    pair = table.hashing.rows_of(ids)
    assert pair.tolist()[0] == [0, 0] and pair.tolist()[1] == [1, 1]
    assert (pair[2:] >= FIRST_ROW).all() and (pair < 200).all()
    torch.testing.assert_close(table(ids).detach(), table.weight[pair].sum(dim=1).detach())
    assert (table(ids)[0] == 0).all()
    torch.testing.assert_close(table.mean(torch.tensor([[2, 4999, 0]]))[0] * 2, table(ids)[2:].sum(dim=0))


def test_quotient_and_remainder_tell_all_ids_apart():
    config = EmbeddingConfig(max_rows=220, hashing="quotient_remainder")
    pairs = Hashing("t", 10_000, config).rows_of(torch.arange(10_000))
    assert len(torch.unique(pairs, dim=0)) == 10_000 and int(pairs.max()) < 220
    with pytest.raises(ConfigError, match=r"max_rows is 100.*at least 20[24] rows"):
        Hashing("t", 10_000, EmbeddingConfig(max_rows=100, hashing="quotient_remainder"))


def test_short_types_need_rows():
    with pytest.raises(ValueError, match="need update: sparse"):
        EmbeddingConfig(dtype="fp16")
