"""Test popularity over time: the value at a time, the refreshed index, and the half-life chosen on the validation part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import can_refresh, log_popularity, open_store, popularity_before, resolve, split_moment
from twotower.evaluation.verdict import refreshed, verdict
from twotower.models.build import build_model
from twotower.models.neural_retriever import NeuralRetriever, RefreshedRetriever
from twotower.models.two_tower import TwoTower
from twotower.pipeline.evaluate import evaluate_stage
from twotower.pipeline.stages import train_stage
from twotower.schema import DAY_S, FIRST_ROW, TEST
from twotower.trainers.popularity_half_life import HALF_LIVES_DAYS, choose_half_life
from twotower.utils.config import Config, parse_config

TOWER = {"embedding_dim": 16, "hidden_dims": [16]}


@pytest.fixture(scope="module")
def config(town: Any) -> Config:
    values = {"model": {"user_tower": TOWER, "item_tower": TOWER}, "training": {"max_steps": 5, "recipe": "fixed"}}
    made = town.config.model_dump(mode="json")
    return parse_config({**values, "data": made["data"], "prepare": made["prepare"]})


@pytest.fixture
def dataset(town: Any) -> Dataset:
    return Dataset.open(town.folder)


@pytest.fixture
def model(dataset: Dataset, config: Config) -> TwoTower:
    torch.manual_seed(1)
    built = build_model(dataset, resolve(config, dataset)).eval()
    built.new_popularity.fill_(-0.5)
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


@pytest.mark.parametrize("half_life", [0.0, 45.0])
def test_popularity_before_a_moment_counts_the_events_before_it(dataset: Dataset, half_life: float) -> None:
    for moment in (split_moment(dataset, "valid"), split_moment(dataset, "test") + 40 * DAY_S):
        found = popularity_before(dataset, moment, half_life)
        np.testing.assert_allclose(found, by_hand(dataset, moment, half_life), atol=1e-5)


def test_without_decay_and_at_the_end_of_training_it_is_the_popularity_of_training(dataset: Dataset) -> None:
    np.testing.assert_allclose(
        popularity_before(dataset, split_moment(dataset, "valid"), 0.0)[: dataset.n_train_item_rows],
        log_popularity(dataset)[: dataset.n_train_item_rows],
        atol=1e-6,
    )


def test_later_events_change_nothing(dataset: Dataset) -> None:
    """Leak test: changing events at or after a time does not change the popularity at that time."""
    moment = split_moment(dataset, "test") + 20 * DAY_S
    before = popularity_before(dataset, moment, 60.0)
    events = dataset.events
    later = events.time_s >= moment
    rows = np.where(later, np.random.default_rng(0).integers(FIRST_ROW, dataset.n_item_rows, len(later)), events.item_row)
    dataset.__dict__["events"] = replace(events, item_row=rows, weight=np.where(later, 100.0, events.weight).astype(np.float32))
    np.testing.assert_array_equal(popularity_before(dataset, moment, 60.0), before)


def test_a_new_item_counts_as_new_until_its_events_exceed_that(model: TwoTower) -> None:
    logs = torch.tensor([float("nan"), -3.0, 0.7, -3.0])
    new = torch.tensor([True, True, True, False])
    torch.testing.assert_close(model.popularity(logs, new), torch.tensor([-0.5, -0.5, 0.7, -3.0]))


def retriever(dataset: Dataset, model: TwoTower, config: Config, days: float) -> RefreshedRetriever:
    return RefreshedRetriever(
        model,
        open_store(dataset, "future", config.model),
        lambda moment: popularity_before(dataset, moment, 90.0),
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
        store = open_store(dataset, "future", config.model).with_popularity(popularity_before(dataset, int(moment), 90.0))
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


def test_the_best_half_life_of_the_validation_part_is_chosen(dataset: Dataset, model: TwoTower, config: Config) -> None:
    chosen, tried = choose_half_life(model, dataset, config)
    assert [row["half_life_days"] for row in tried] == list(HALF_LIVES_DAYS)
    figures = [row["NDCG@10"] for row in tried]
    assert len(set(figures)) > 1 and chosen == HALF_LIVES_DAYS[int(np.argmax(figures))]


def test_nothing_is_chosen_where_parts_do_not_follow_in_time(
    dataset: Dataset, model: TwoTower, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dataset.manifest["config"]["prepare"]["split"], "kind", "leave_one_out")
    assert not can_refresh(dataset) and choose_half_life(model, dataset, config) == (None, [])


def test_a_run_chooses_judges_and_serves_with_it(town: Any, config: Config, tmp_path: Path) -> None:
    """The half-life is stored in the run's settings and checkpoint, and used by report and bundle."""
    evaluation = config.evaluation.model_copy(update={"baselines": ["popular"], "bootstrap": 20, "tune_baselines": False})
    train_stage(config.model_copy(update={"evaluation": evaluation}), town.folder, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    half_life = manifest["config"]["model"]["popularity_half_life_days"]
    assert half_life in HALF_LIVES_DAYS and len(manifest["popularity_half_life"]) == len(HALF_LIVES_DAYS)
    report = evaluate_stage(tmp_path / "run", tmp_path)
    assert "two-tower, refreshed every 7 days" in report["systems"]
    from twotower.bundle.bundle import load_bundle

    bundle = load_bundle(tmp_path / "run" / "bundle")
    dataset = bundle.dataset
    logs = popularity_before(dataset, split_moment(dataset, "future"), half_life)
    known = slice(FIRST_ROW, dataset.n_train_item_rows)
    np.testing.assert_allclose(bundle.arrays.vectors[known, -1], logs[known], atol=1e-6)


def test_a_refreshed_model_is_no_rival_of_itself() -> None:
    name = refreshed("two-tower", 7)
    figures = {"two-tower": 0.1, name: 0.2, "popular": 0.05}
    gap = {"NDCG@10": {"value": 0.05, "low": 0.04, "high": 0.06}}
    assert verdict(figures, {"popular": gap, name: gap}, "two-tower", "NDCG@10").startswith(
        "Better than popularity, the best baseline"
    )
