"""Test what is known at a time: popularity, the refreshed index, and the weights of a score fitted on the validation part."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twotower.bundle.bundle import load_bundle
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import (
    HALF_LIVES_DAYS,
    NOVELTY_DAYS,
    can_refresh,
    log_popularity,
    open_store,
    resolve,
    split_moment,
)
from twotower.evaluation.verdict import refreshed, verdict
from twotower.models.build import build_model
from twotower.models.neural_retriever import NeuralRetriever, RefreshedRetriever
from twotower.models.priors import Priors
from twotower.models.two_tower import TwoTower
from twotower.pipeline.evaluate import evaluate_stage
from twotower.pipeline.refit import refit
from twotower.pipeline.stages import train_stage
from twotower.schema import DAY_S, FIRST_ROW, TEST
from twotower.trainers.calibration import Block, _fit, _likelihood, _newton, calibrate
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import Config, parse_config
from twotower.utils.documents import Interval
from twotower.utils.manifests import RunManifest, open_manifest

from ..conftest import TOWER
from ..documents import with_split


@pytest.fixture(scope="module")
def config(town: Any) -> Config:
    values = {"model": {"user_tower": TOWER, "item_tower": TOWER}, "training": {"max_steps": 5, "recipe": "fixed"}}
    made = town.config.model_dump(mode="json")
    return parse_config({**values, "data": made["data"], "prepare": made["prepare"]})


@pytest.fixture
def dataset(town: Any) -> Dataset:
    """Return the dataset of the town, opened for each test: some change it."""
    return Dataset.open(town.folder)


@pytest.fixture
def model(dataset: Dataset, config: Config) -> TwoTower:
    torch.manual_seed(1)
    built = build_model(dataset, resolve(config, dataset)).eval()
    built.priors.new_popularity.fill_(-0.5)
    built.priors.weights[:, 1:6] = torch.tensor([0.4, 0.1, 0.2, 0.1, 0.2])
    return built


def by_hand(dataset: Dataset, moment: int, half_life: float) -> np.ndarray:
    """Compute the popularity event by event."""
    count = np.zeros(dataset.n_item_rows)
    events = dataset.events
    for row, time_s, weight, positive in zip(events.item_row, events.time_s, events.weight, events.positive, strict=True):
        if positive and time_s < moment:
            count[row] += weight * (0.5 ** ((moment - time_s) / DAY_S / half_life) if half_life else 1.0)
    known = slice(FIRST_ROW, dataset.n_train_item_rows)
    logs = np.log1p(count) - np.log1p(count[known].mean())
    logs[dataset.n_train_item_rows :][count[dataset.n_train_item_rows :] == 0] = np.nan
    logs[:FIRST_ROW] = 0
    return logs


def novelty_by_hand(dataset: Dataset, moment: int) -> np.ndarray:
    events, item_events = dataset.events, dataset.item_events
    found = np.zeros(dataset.n_item_rows)
    for row in range(FIRST_ROW, dataset.n_item_rows):
        times = item_events.time_s[(item_events.item_row == row) & (item_events.time_s < moment)]
        mine = (events.item_row == row) & events.positive & (events.time_s < moment)
        count = sum(events.weight[mine] * 0.5 ** ((moment - events.time_s[mine]) / DAY_S / HALF_LIVES_DAYS[-1]))
        if len(times):
            found[row] = np.log1p(count) * 0.5 ** ((moment - times.min()) / DAY_S / NOVELTY_DAYS)
    return found


def test_popularity_at_a_time_counts_the_events_before_it(dataset: Dataset) -> None:
    for moment in (split_moment(dataset, "valid"), split_moment(dataset, "test") + 40 * DAY_S):
        found = log_popularity(dataset, moment)
        for column, half_life in enumerate(HALF_LIVES_DAYS):
            np.testing.assert_allclose(found[:, column], by_hand(dataset, moment, half_life), atol=1e-5)
        np.testing.assert_allclose(found[:, -1], novelty_by_hand(dataset, moment), atol=1e-5)
        assert found.shape[1] == len(HALF_LIVES_DAYS) + 1 and (found[:, -1] > 0.05).any()


def test_without_decay_and_at_the_end_of_training_it_is_the_popularity_of_training(dataset: Dataset) -> None:
    rows = slice(dataset.n_train_item_rows)
    at_end = log_popularity(dataset, split_moment(dataset, "valid"))
    np.testing.assert_allclose(at_end[rows, 0], log_popularity(dataset)[rows, 0], atol=1e-6)


def test_later_events_change_nothing(dataset: Dataset) -> None:
    """Leak test: changing events at or after a time does not change the popularity at that time."""
    moment = split_moment(dataset, "test") + 20 * DAY_S
    before = log_popularity(dataset, moment)
    events = dataset.events
    later = events.time_s >= moment
    rows = np.where(later, np.random.default_rng(0).integers(FIRST_ROW, dataset.n_item_rows, len(later)), events.item_row)
    dataset.__dict__["events"] = replace(events, item_row=rows, weight=np.where(later, 100.0, events.weight).astype(np.float32))
    np.testing.assert_array_equal(log_popularity(dataset, moment), before)


def retriever(dataset: Dataset, model: TwoTower, config: Config, days: float) -> RefreshedRetriever:
    return RefreshedRetriever(
        model,
        open_store(dataset, "future", config.model),
        partial(log_popularity, dataset),
        n_item_rows=dataset.n_item_rows,
        start_s=split_moment(dataset, "test"),
        every_days=days,
        name="refreshed",
    )


def test_a_refreshed_index_answers_as_one_made_for_the_moment(dataset: Dataset, model: TwoTower, config: Config) -> None:
    """Queries may have any order, and each uses the last index before it."""
    start, held_out = split_moment(dataset, "test"), dataset.held_out("test")
    system = retriever(dataset, model, config, 14.0)
    found = system.retrieve(held_out.queries, 10)
    moments = system.moments(held_out.queries.time_s)
    assert len(np.unique(moments)) > 3
    assert ((moments <= held_out.queries.time_s) & (held_out.queries.time_s < moments + 14 * DAY_S)).all()
    for moment in np.unique(moments):
        rows = np.flatnonzero(moments == moment)
        store = open_store(dataset, "future", config.model).with_popularity(log_popularity(dataset, int(moment)))
        alone = NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=int(moment))
        expected = alone.retrieve(held_out.queries.take(rows), 10)
        np.testing.assert_array_equal(found.items[rows], expected.items)
        np.testing.assert_array_equal(found.scores[rows], expected.scores)
    assert int(moments.min()) == start
    ordered = held_out.by_time()
    again = system.retrieve(ordered.queries, 10).items
    order = np.argsort(held_out.queries.time_s, kind="stable")
    np.testing.assert_array_equal(again, found.items[order])


def test_a_refreshed_index_knows_nothing_of_what_comes(dataset: Dataset, model: TwoTower, config: Config) -> None:
    """Leak test: other stars and weights of the last events do not change earlier lists."""
    held_out = dataset.held_out("test").by_time()
    before = retriever(dataset, model, config, 30.0).retrieve(held_out.queries, 10)
    moments = retriever(dataset, model, config, 30.0).moments(held_out.queries.time_s)
    last = int(np.unique(moments)[-2])
    early = np.flatnonzero(moments <= last)
    changed = Dataset.open(dataset.path)
    events, item_events = changed.events, changed.item_events
    later = (events.time_s >= last) & (events.split == TEST)
    changed.__dict__["events"] = replace(events, weight=np.where(later, 50.0, events.weight).astype(np.float32))
    stars = np.where(item_events.time_s >= last, 1.0, item_events.stars).astype(np.float32)
    changed.__dict__["item_events"] = replace(item_events, stars=stars)
    after = retriever(changed, model, config, 30.0).retrieve(held_out.queries, 10)
    np.testing.assert_array_equal(before.items[early], after.items[early])
    assert (before.items != after.items).any(), "the last index does know"


def drawn_block(weights: list[float], *, queries: int, seed: int, number: int = 2) -> Block:
    """Draw targets from a conditional logit with the weights of towers, two popularities and distance."""
    generator = torch.Generator().manual_seed(seed)
    towers = torch.randn(queries, 30, generator=generator)
    towers[:, 0] = -torch.inf  # never a target
    popularity = torch.randn(30, 2, generator=generator)
    places = torch.rand(30, 2, generator=generator) * 4  # km
    homes = torch.rand(queries, 2, generator=generator) * 4
    user = torch.cat([homes, torch.zeros(queries, 1), -homes.square().sum(1, keepdim=True) / 2, torch.ones(queries, 1)], 1).double()
    item = torch.cat([places, torch.zeros(30, 1), torch.ones(30, 1), -places.square().sum(1, keepdim=True) / 2], 1).double()
    block = Block(number, towers, popularity, user, item, torch.arange(queries), torch.zeros(queries, dtype=torch.long))
    (features, allowed, _, _) = next(block.parts())
    logits = (features @ torch.tensor(weights)).masked_fill(~allowed, -torch.inf)
    return replace(block, target=torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0])


def test_the_weights_that_drew_the_choices_are_found() -> None:
    wanted = [0.7, 1.2, -0.4, 0.5]
    start = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    found = _newton([drawn_block(wanted, queries=6000, seed=1)], start, 2.0)
    assert found.tolist() == pytest.approx(wanted, abs=0.1)


def test_gradient_and_hessian_are_those_of_the_likelihood() -> None:
    """Compared with central differences."""
    block, begin = drawn_block([0.7, 1.2, -0.4, 0.5], queries=200, seed=2), torch.tensor([1.0, 1.0, 0.0, 0.1], dtype=torch.float64)
    scale, at = torch.tensor([1.0, 1.0, 1.0, 0.5], dtype=torch.float64), begin + 0.1
    _, gradient, hessian = _likelihood([block], at, begin, scale)
    for j in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[j] = 1e-2
        up, down = (_likelihood([block], at + sign * step, begin, scale) for sign in (1, -1))
        assert float(up[0] - down[0]) / 2e-2 == pytest.approx(float(gradient[j]), rel=1e-2, abs=0.2)
        np.testing.assert_allclose(-(up[1] - down[1]).numpy() / 2e-2, hessian[j].numpy(), rtol=2e-2, atol=0.3)


def test_towers_that_learned_nothing_count_nothing_and_little_data_change_little() -> None:
    priors = Priors(1.0, (0.0, 60.0))
    noise = drawn_block([0.0, 1.0, 0.0, 0.0], queries=4000, seed=3, number=2)
    few = drawn_block([0.0, 1.0, 0.0, 0.0], queries=2, seed=4, number=1)
    without_novelty = [replace(each, popularity=torch.cat([each.popularity, torch.zeros(30, 1)], dim=1)) for each in (noise, few)]
    fitted, _ = _fit(priors, without_novelty)
    assert not fitted[:, 3].any(), "no item is new"
    assert abs(float(fitted[2, 0])) < 0.1 and float(fitted[2, 1]) == pytest.approx(1, abs=0.1)
    assert float(fitted[1, 0]) > 0.5, "two choices say little"
    assert torch.equal(fitted[0], priors.weights[0]), "no choice says nothing"


def test_the_size_of_a_block_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    block, begin = drawn_block([0.7, 1.2, -0.4, 0.5], queries=300, seed=5), torch.tensor([1.0, 1.0, 0.0, 0.1], dtype=torch.float64)
    scale = torch.ones(4, dtype=torch.float64)
    whole = _likelihood([block], begin, begin, scale)
    monkeypatch.setattr("twotower.trainers.calibration.BLOCK_CELLS", 7 * 30)
    parts = _likelihood([block], begin, begin, scale)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-3)


def test_the_fit_never_lowers_the_validation_metric(dataset: Dataset, model: TwoTower, config: Config) -> None:
    """Untrained towers: popularity alone is better, and the fit finds it."""
    record = calibrate(model, dataset, config)
    assert record is not None and record.used and record.after > record.before
    assert record.half_lives_days == list(HALF_LIVES_DAYS)
    assert float(model.priors.weights[2, 0]) < 0.5


def test_one_index_is_in_memory_at_a_time(
    dataset: Dataset, model: TwoTower, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, before = weakref.WeakSet[NeuralRetriever](), []
    begin = NeuralRetriever.__init__

    def counting(self: NeuralRetriever, *given: Any, **named: Any) -> None:
        before.append(len(built))
        begin(self, *given, **named)
        built.add(self)

    monkeypatch.setattr(NeuralRetriever, "__init__", counting)
    assert calibrate(model, dataset, config) is not None
    assert len(before) > 3 * 4 and set(before) == {0}


def test_weights_that_lower_the_metric_are_not_used(
    dataset: Dataset, model: TwoTower, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    worst = torch.tensor([[-1.0, -1.0, 0, 0, 0, 0, 0, 0.0]]).repeat(3, 1)
    monkeypatch.setattr("twotower.trainers.calibration._fit", lambda *_: (worst, 1.0))
    record = calibrate(model, dataset, config)
    assert record is not None and not record.used and record.after < record.before
    assert all(
        torch.equal(value, before[name])
        for name, value in model.state_dict().items()
        if not name.startswith(("priors.repeats", "priors.recency", "priors.transitions"))
    )


@pytest.mark.parametrize("settings", [{"model": {"popularity_prior": 0.0}}, {"prepare": {"split": {"valid": 0.0}}}])
def test_nothing_is_fitted_without_a_prior_or_a_validation_part(
    dataset: Dataset, model: TwoTower, config: Config, settings: dict[str, Any]
) -> None:
    values = config.model_dump(mode="json")
    for section, changes in settings.items():
        values[section] = {**values[section], **changes}
    assert calibrate(model, dataset, parse_config(values)) is None


def test_where_parts_do_not_follow_in_time_all_events_count_the_same(
    dataset: Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "manifest", with_split(dataset.manifest, kind="leave_one_out"))
    assert not can_refresh(dataset) and log_popularity(dataset).shape == (dataset.n_item_rows, 1)
    record = calibrate(build_model(dataset, resolve(config, dataset)).eval(), dataset, config)
    assert record is not None and record.half_lives_days == [0.0]


def test_a_validation_changes_nothing(dataset: Dataset, config: Config, tmp_path: Path) -> None:
    trainer = TwoTowerTrainer(dataset, config, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    first, second = trainer.validate(), trainer.validate()
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_run_fits_judges_and_serves_with_the_weights(town: Any, config: Config, tmp_path: Path) -> None:
    """The weights are stored in the run's manifest and checkpoint, and used by report, bundle and a refit."""
    evaluation = config.evaluation.model_copy(update={"baselines": ["popular"], "bootstrap": 20, "tune_baselines": False})
    train_stage(config.model_copy(update={"evaluation": evaluation}), town.folder, tmp_path / "run")
    record = open_manifest(RunManifest, tmp_path / "run", "").calibration
    assert record is not None
    report = evaluate_stage(tmp_path / "run", tmp_path)
    assert "two-tower, refreshed every 7 days" in report.systems and report.calibration == record
    bundle = load_bundle(tmp_path / "run" / "bundle")
    dataset, priors = bundle.dataset, bundle.model.priors
    if record.used:
        np.testing.assert_allclose(priors.weights.numpy(), list(record.weights.values()), rtol=1e-4, atol=1e-6)
    assert np.allclose(bundle.manifest.priors.weights, priors.weights.numpy(), atol=1e-6)
    logs = log_popularity(dataset, split_moment(dataset, "future"))
    known, width = slice(FIRST_ROW, dataset.n_train_item_rows), bundle.vectors.shape[1]
    np.testing.assert_allclose(bundle.arrays.vectors[known, width : width + logs.shape[1]], logs[known], atol=1e-6)
    refit(tmp_path / "run", tmp_path / "all", include_test=True)
    again = load_bundle(tmp_path / "all" / "bundle").model.priors
    assert torch.equal(again.weights, priors.weights) and torch.equal(again.centre, priors.centre)


def test_a_finished_run_that_is_resumed_stays_as_it_is(town: Any, config: Config, tmp_path: Path) -> None:
    """The weights are fitted again beginning with those of the training, not with the fitted ones."""
    train_stage(config, town.folder, tmp_path)
    files = ("manifest.json", "bundle/manifest.json")
    before = [(tmp_path / name).read_text() for name in files], torch.load(tmp_path / "best.pt", weights_only=True)
    for _ in range(2):
        train_stage(config, town.folder, tmp_path, resume=True)
        assert [(tmp_path / name).read_text() for name in files] == before[0]
        model = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
        assert all(torch.equal(value, before[1]["model"][name]) for name, value in model.items())
    fitted = open_manifest(RunManifest, tmp_path, "").calibration
    assert fitted is not None and fitted.after != fitted.before


def test_a_refreshed_model_is_no_rival_of_itself() -> None:
    name = refreshed("two-tower", 7)
    figures = {"two-tower": 0.1, name: 0.2, "popular": 0.05}
    gap = {"NDCG@10": Interval(value=0.05, low=0.04, high=0.06)}
    assert verdict(figures, {"popular": gap, name: gap}, "two-tower", "NDCG@10").startswith(
        "Better than popularity, the best baseline"
    )
