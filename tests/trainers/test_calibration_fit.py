"""Test the fit of a score's weights on drawn choices, and what it is fitted on, query by query."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import RefreshedRetriever, item_points
from twotower.models.priors import GROUPS, Priors
from twotower.models.two_tower import TwoTower
from twotower.schema import DAY_S
from twotower.trainers import calibration
from twotower.trainers.calibration import (
    Block,
    _blocks,
    _distance_unit,
    _fit,
    _largest_distance_weight,
    _likelihood,
    _newton,
    _set_locations,
    calibrate,
    in_words,
    refresh_interval_days,
    refreshed_system,
)
from twotower.utils.config import Config, parse_config
from twotower.utils.documents import CalibrationRecord, HistoryRecord, RepeatsRecord, TransitionsRecord

from ..documents import with_split
from ..drawn_bundle import drawn

ITEMS = 12


def block_of(
    *, queries: int = 6, number: int = 2, seed: int = 0, located: bool = True, targets: int = 9, popularities: int = 2
) -> Block:
    """Return drawn queries, some with several targets and one with none; item 0 may not be recommended."""
    generator = torch.Generator().manual_seed(seed)
    towers = torch.randn(queries, ITEMS, generator=generator)
    towers[:, 0] = -torch.inf
    priors = Priors(1.0, (0.0, 60.0))
    places = [torch.rand(size, 3, generator=generator, dtype=torch.float64) * 5 for size in (queries, ITEMS)]
    if not located:
        places[0][:] = torch.nan
    places[1][3] = torch.nan
    return Block(
        group=number,
        towers=towers,
        popularity=torch.randn(ITEMS, popularities, generator=generator),
        user=priors.user_location(places[0]),
        item=priors.item_location(places[1]),
        query=torch.sort(torch.randint(0, queries - 1, (targets,), generator=generator)).values,
        target=torch.randint(1, ITEMS, (targets,), generator=generator),
    )


def plain_likelihood(blocks: list[Block], weights: Tensor, begin: Tensor, scale: Tensor) -> Tensor:
    """Return the penalised log likelihood by its formula, differentiable, in float64."""
    value = -5 * (weights - begin).square().sum()  # as much as ten choices tell
    for block in blocks:
        distance = (block.user @ block.item.T).clamp(max=0)
        for query, target in zip(block.query, block.target, strict=True):
            allowed = torch.isfinite(block.towers[query])
            features = torch.stack([block.towers[query].double(), *block.popularity.double().T, distance[query]], dim=1)[allowed]
            logits = features @ (weights * scale)
            value = value + logits[int(allowed[: int(target)].sum())] - torch.logsumexp(logits, 0)
    return value


@pytest.mark.parametrize("cells", [1, 2 * ITEMS + 5, 10**6])
def test_likelihood_gradient_and_hessian_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    """Whatever the size of a part, several targets of a query, and queries without a target or a location."""
    monkeypatch.setattr(calibration, "BLOCK_CELLS", cells)
    blocks = [block_of(), block_of(seed=1, located=False)]
    begin = torch.tensor([1.0, 0.5, -0.2, 0.1], dtype=torch.float64)
    scale = torch.tensor([1.0, 1.0, 1.0, 0.25], dtype=torch.float64)
    at = (begin + torch.tensor([0.3, -0.1, 0.2, 0.4])).requires_grad_()
    value = plain_likelihood(blocks, at, begin, scale)
    gradient = torch.autograd.grad(value, at, create_graph=True)[0]
    hessian = torch.stack([torch.autograd.grad(each, at, retain_graph=True)[0] for each in gradient])
    found = _likelihood(blocks, at.detach(), begin, scale)
    torch.testing.assert_close(found[0], value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], gradient.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], -hessian, rtol=1e-4, atol=1e-4)
    assert {each.dtype for each in found} == {torch.float64}


def test_parts_are_complete_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of()
    monkeypatch.setattr(calibration, "BLOCK_CELLS", 2 * ITEMS + 1)
    parts = list(block.parts())
    assert [len(features) for features, _, _, _ in parts] == [2, 2, 2]
    starts = [0, 2, 4]
    assert (
        torch.cat([query + start for start, (_, _, query, _) in zip(starts, parts, strict=True)]).tolist() == block.query.tolist()
    )
    assert torch.cat([target for _, _, _, target in parts]).tolist() == block.target.tolist()
    features, allowed = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    assert not allowed[:, 0].any() and allowed[:, 1:].all()
    assert features[:, 0, 0].tolist() == [0.0] * 6, "an item that is not allowed has a finite feature"
    assert torch.equal(features[:, 1:, 0], block.towers[:, 1:])
    assert torch.equal(features[2, :, 1:3], block.popularity)
    assert (features[..., 3] <= 0).all() and features.dtype == torch.float32
    known = torch.tensor([number != 3 for number in range(ITEMS)])
    torch.testing.assert_close(features[:, known, 3], (block.user @ block.item.T).float()[:, known])


def test_newton_finds_the_maximum() -> None:
    """At the fitted weights the gradient is zero, whatever the unit of the distance."""
    blocks = [block_of(queries=40, targets=60, seed=seed) for seed in range(2)]
    start = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for unit in (1.0, 9.0):
        fitted = _newton(blocks, start, unit)
        scale = torch.tensor([1, 1, 1, 1 / unit], dtype=torch.float64)
        _, gradient, _ = _likelihood(blocks, fitted / scale, start / scale, scale)
        assert gradient.abs().max() < 0.05 and (fitted - start).abs().max() > 0.1


def test_a_step_that_overshoots_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likelihood never falls, and steps that do not raise it end the search."""
    blocks, values = [block_of(queries=20, targets=30)], []
    start, scale = torch.tensor([30.0, -30.0, 30.0, 5.0], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    likelihood = calibration._likelihood

    def steep(*given: Any) -> Any:
        value, gradient, hessian = likelihood(*given)
        values.append(float(value))
        return value, gradient, hessian / 40  # steps become 40 times as long

    monkeypatch.setattr(calibration, "_likelihood", steep)
    fitted = _newton(blocks, start, 1.0)
    best = float(likelihood(blocks, fitted, start, scale)[0])
    assert best == pytest.approx(max(values)) and best > values[0] and min(values[1:]) < values[0]
    monkeypatch.setattr(
        calibration, "_likelihood", lambda *given: (likelihood(*given)[0], -likelihood(*given)[1], likelihood(*given)[2])
    )
    assert torch.equal(_newton(blocks, start, 1.0), start), "a wrong direction changes nothing"


def test_each_group_is_fitted_on_its_own_and_bounds_hold() -> None:
    priors = Priors(0.7, (0.0,))
    away = block_of(popularities=1, queries=60, targets=200, number=1, seed=3)
    allowed = away.towers.masked_fill(torch.isinf(away.towers), torch.inf)
    against = replace(away, target=allowed[away.query].argmin(dim=1))  # the worst by the towers
    empty = replace(
        block_of(popularities=1, number=0), query=torch.zeros(0, dtype=torch.long), target=torch.zeros(0, dtype=torch.long)
    )
    mine = block_of(popularities=1, queries=40, targets=60, number=2, seed=4)
    fitted, unit = _fit(priors, [against, empty, mine])
    assert fitted.dtype == torch.float32 and fitted.shape == (len(GROUPS), 3)
    assert fitted[0].tolist() == pytest.approx([1.0, 0.7, 0.0]), "no choice says nothing"
    assert fitted[1, 0] == 0, "towers never count less than nothing"
    alone = _newton([mine], priors.weights[2].double(), unit**2)
    torch.testing.assert_close(fitted[2, 1:2], alone[1:2].float())
    assert (fitted[:, -1] >= 0).all() and priors.weights[1].tolist() == pytest.approx([1.0, 0.7, 0.0]), "nothing is set yet"
    far = replace(mine, item=torch.cat([mine.item[:, :4], mine.item[:, 4:] * 1e9], dim=1))
    assert float(_fit(priors, [far])[0][:, -1].max()) <= _largest_distance_weight([far]) < 1e-3


def test_the_unit_is_the_median_distance_to_the_targets() -> None:
    priors = Priors(1.0, (0.0,))
    user = priors.user_location(torch.tensor([[0.0, 0, 0], [torch.nan] * 3]))
    item = priors.item_location(torch.tensor([[3.0, 4, 0], [0, 0, 1], [0, 6, 8], [torch.nan] * 3, [0.0, 0, 0.01]]))

    def unit(*pairs: tuple[int, int]) -> float:
        query, target = (torch.tensor([pair[i] for pair in pairs], dtype=torch.long) for i in (0, 1))
        block = replace(block_of(), user=user, item=item, query=query, target=target)
        return _distance_unit([block, replace(block, query=query[:0], target=target[:0])])

    assert unit((0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 2)) == pytest.approx(5)
    assert unit((0, 4), (0, 4)) == pytest.approx(0.1), "not smaller than 100 m"
    assert unit((0, 3), (1, 0)) == unit() == _distance_unit([]) == 1.0


def test_the_largest_weight_keeps_the_rounding_of_far_locations_small() -> None:
    item = torch.tensor([[0.0, 0, 0, 1, -2e6], [0, 0, 0, 1, -50.0]])
    near, far = (replace(block_of(), item=each) for each in (item[1:], item))
    spacing = float(np.spacing(np.float32(1)))
    assert _largest_distance_weight([near]) == pytest.approx(0.05 / (50 * spacing))
    assert _largest_distance_weight([near, far]) == pytest.approx(0.05 / (2e6 * spacing))
    assert _largest_distance_weight([]) == pytest.approx(0.05 / 1e-12)


def test_the_origin_is_the_mean_item_and_unlocated_ones_are_at_the_median() -> None:
    priors, nowhere = Priors(1.0, (0.0,)), [[np.nan] * 3]
    items = np.array([[6.0, 0, 0], [0, 0, 0], [0, 9, 0], *nowhere])
    users = np.array([[0.0, 0, 0], *nowhere])
    _set_locations(priors, items, users)
    assert priors.centre.tolist() == [2, 3, 0]
    assert float(priors.unlocated) == pytest.approx(np.median([36, 0, 81]) / 2)
    _set_locations(priors, np.array(nowhere), users)
    assert priors.centre.tolist() == [2, 3, 0], "no item has a location: nothing changes"
    other = Priors(1.0, (0.0,))
    _set_locations(other, items, np.array(nowhere))
    assert other.centre.tolist() == [2, 3, 0] and float(other.unlocated) == 0


def test_distances_are_sampled_from_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a large sample has evenly spaced items and the first users."""
    monkeypatch.setattr(calibration, "SAMPLE", 3)
    items = np.zeros((5, 3))
    items[:, 0] = [0, 10, 20, 30, 60]
    users = np.zeros((5, 3))
    users[3:] = 1e4
    priors = Priors(1.0, (0.0,))
    _set_locations(priors, items, users)
    assert float(priors.unlocated) == pytest.approx(20**2 / 2, rel=1e-4)


@pytest.fixture(scope="module")
def dataset(town: Any) -> Dataset:
    return Dataset.open(town.folder)


@pytest.fixture(scope="module")
def config(town: Any) -> Config:
    tower = {"embedding_dim": 8, "hidden_dims": [8]}
    made = town.config.model_dump(mode="json")
    return parse_config({"model": {"user_tower": tower, "item_tower": tower}, "data": made["data"], "prepare": made["prepare"]})


@pytest.fixture
def model(dataset: Dataset, config: Config) -> TwoTower:
    return drawn(dataset, config.model.model_dump(mode="json"))[0]


@pytest.mark.parametrize("every_days", [None, 20.0])
def test_blocks_have_the_scores_of_an_answer(dataset: Dataset, model: TwoTower, config: Config, every_days: float | None) -> None:
    """The features of a query times the weights of its group rank all items as the system does that is calibrated."""
    model.priors.recency.zero_()  # the fit begins without
    model.priors.transitions.zero_()
    held, system = dataset.held_out("valid").by_time(), refreshed_system(model, dataset, config, every_days)
    moments = system.moments(held.queries.time_s)
    assert (len(np.unique(moments)) == 1) == (every_days is None)
    groups = np.searchsorted([1, 5], held.queries.lengths, side="right")
    pairs = sorted(set(zip(moments.tolist(), groups.tolist(), strict=True)))
    blocks = list(_blocks(system, held))
    assert len(blocks) == len(pairs) > 1
    for block, (moment, number) in zip(blocks, pairs, strict=True):
        rows = np.flatnonzero((moments == moment) & (groups == number))
        assert block.group == number and block.towers.shape == (len(rows), dataset.n_item_rows)
        part = held.queries.take(rows)
        features, allowed, _, _ = (torch.cat(each) for each in zip(*block.parts(), strict=True))
        logits = (features @ model.priors.weights[number]).masked_fill(~allowed, -torch.inf) * model.temperature().detach()
        found = system.retrieve(part, 10)
        there = torch.from_numpy(np.maximum(found.items, 0))
        np.testing.assert_allclose(logits.gather(1, there).numpy(), found.scores, rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(logits.topk(10, dim=1).values.numpy(), found.scores, rtol=1e-3, atol=2e-4)
        wanted = []
        for i, row in enumerate(rows):
            targets = held.target_row[held.target_offsets[row] : held.target_offsets[row + 1]]
            wanted += [(i, int(target)) for target in targets if allowed[i, target]]
        assert list(zip(block.query.tolist(), block.target.tolist(), strict=True)) == wanted


def test_an_index_is_refreshed_at_most_twelve_times(dataset: Dataset, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    held, start = dataset.held_out("valid").by_time(), split_moment(dataset, "valid")
    span_days = (int(held.queries.time_s[-1]) - start) / DAY_S

    def days(refresh: float | None) -> float | None:
        return refresh_interval_days(
            dataset, held, config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"refresh_days": refresh})})
        )

    assert days(None) is None and days(1000.0) == 1000.0
    every = days(0.001)
    assert every is not None and span_days / 12 < every < span_days / 12 + 0.001
    refreshed = refreshed_system(*(drawn(dataset, config.model.model_dump(mode="json"))[0], dataset, config), every)
    assert isinstance(refreshed, RefreshedRetriever) and len(np.unique(refreshed.moments(held.queries.time_s))) <= 12
    monkeypatch.setattr(dataset, "manifest", with_split(dataset.manifest, kind="leave_one_out"))
    assert days(7.0) is None


def test_a_calibration_says_what_it_did(dataset: Dataset, model: TwoTower, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_CELLS", dataset.n_item_rows * 40)
    before = {name: value.clone() for name, value in model.priors.state_dict().items()}
    record = calibrate(model, dataset, config)
    assert record is not None and record.metric == config.training.eval_metric and record.queries == 40
    assert record.used == (record.after >= record.before) and 0 <= record.before <= 1
    assert list(record.weights) == ["0", "1", "5"] and record.half_lives_days == list(model.priors.half_lives)
    after = model.priors.state_dict()
    assert record.used and not torch.equal(after["weights"], before["weights"])
    np.testing.assert_allclose(after["weights"].numpy(), list(record.weights.values()), rtol=1e-5, atol=1e-9)
    assert all(value == float(f"{value:.6g}") for row in record.weights.values() for value in row)
    items = item_points(open_store(dataset, "valid", config.model))
    np.testing.assert_allclose(after["centre"].numpy(), np.nanmean(items, axis=0), rtol=1e-5)
    assert 0.1 <= record.distance_unit_km < 2000
    metric = evaluate(
        refreshed_system(model, dataset, config, refresh_interval_days(dataset, dataset.held_out("valid").by_time(), config)),
        dataset.held_out("valid"), dataset, config.evaluation, metrics=[record.metric], beyond_k=None,
    ).mean(record.metric)  # fmt: skip
    assert record.history is not None
    order = record.history.transitions
    assert order is not None and order.used and order.before == record.history.by_recency[f"{record.history.recency:g}"]
    assert metric == pytest.approx(order.after, abs=1e-4) and metric > order.before
    assert after["transitions"].tolist() == pytest.approx(order.weights, rel=1e-6)
    assert record.history.by_recency["0"] == pytest.approx(record.after, abs=1e-4)


def test_a_record_in_words() -> None:
    record = CalibrationRecord(
        metric="NDCG@10", before=0.1, after=0.12345, used=True, queries=9, half_lives_days=[0.0], distance_unit_km=1.0,
        weights={"0": [0.5, 1.0, 0.0], "1": [0.75, 1.0, 0.0], "5": [1.126, 1.0, 0.0]}, history=None,
    )  # fmt: skip
    towers = "towers 0.50 from 0 events on, 0.75 from 1, 1.13 from 5"
    assert in_words(record) == f"calibration: validation NDCG@10 0.1000 → 0.1235 with fitted weights; {towers}"
    unused = in_words(record.model_copy(update={"used": False, "after": 0.05}))
    assert "0.0500 with fitted weights, which are not used; towers" in unused
    history = HistoryRecord(recency=2.0, by_recency={"0": 0.1, "2": 0.2}, transitions=None, repeats=None)
    assert in_words(record.model_copy(update={"history": history})).endswith("1.13 from 5; weight of the last items 2")
    order = TransitionsRecord(before=0.2, after=0.25, used=True, weights=[1.0, 0.3, -0.5, -0.1])
    told = in_words(record.model_copy(update={"history": history.model_copy(update={"transitions": order})}))
    assert told.endswith("weight of the last items 2; 0.2000 → 0.2500 with weights of transitions")
    order = order.model_copy(update={"used": False, "after": 0.15})
    told = in_words(record.model_copy(update={"history": history.model_copy(update={"transitions": order})}))
    assert told.endswith("0.2000 → 0.1500 with weights of transitions, which are not used")
    again = RepeatsRecord(before=0.1, after=0.2, used=True, weights=[1.0, 0.0, -0.5])
    told = in_words(record.model_copy(update={"history": history.model_copy(update={"repeats": again})}))
    assert told.endswith("weight of the last items 2; seen items included, 0.1000 → 0.2000 with weights of repeats")
    worse = history.model_copy(update={"repeats": again.model_copy(update={"used": False, "after": 0.0})})
    told = in_words(record.model_copy(update={"history": worse}))
    assert told.endswith("0.0000 with weights of repeats, which are not used")
