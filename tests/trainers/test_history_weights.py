"""Test the weights of a history on choices that are drawn with known weights, and list by list."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import RefreshedRetriever
from twotower.retriever import Queries
from twotower.trainers.calibration import calibrate, refreshed_system
from twotower.trainers.history_weights import (
    PENALTY,
    RECENCIES,
    _clearly_likelier,
    _likelihood,
    _lists,
    _transition_choices,
    choose_history_weights,
    fit_bonus,
)
from twotower.utils.config import Config, EvaluationConfig, parse_config

from ..drawn_bundle import drawn

WEIGHTS, ONE = np.array([1.5, 0.8, -0.7, 0.4, -0.3, -0.2]), np.eye(6)[0]


@pytest.fixture
def config(dataset: Dataset) -> Config:
    made = dataset.manifest.config.model_dump(mode="json")
    return parse_config({"data": made["data"], "prepare": made["prepare"]})


@pytest.fixture
def system(dataset: Dataset, config: Config) -> RefreshedRetriever:
    model, _ = drawn(dataset, config.model.model_dump(mode="json"))
    model.priors.repeats.zero_()
    model.priors.transitions.zero_()
    model.priors.recency.zero_()
    return refreshed_system(model, dataset, config, None)


def drawn_choices(
    system: RefreshedRetriever,
    dataset: Dataset,
    weights: np.ndarray,
    size: int,
    recency: float = 0.0,
    order: np.ndarray | None = None,
) -> HeldOut:
    """Return queries whose targets are drawn from the scores with a weight of the last items, and bonuses of order and repeats."""
    draw = np.random.default_rng(0)
    rows = np.arange(2, min(dataset.n_user_rows, 400))
    queries = dataset.histories(rows, np.full(len(rows), int(dataset.events.time_s.max()) + 1))
    queries = queries.take(np.resize(np.flatnonzero(queries.lengths > 2), size))
    retriever = system.at(int(system.moments(queries.time_s)[0]))
    temperature = float(system.model.temperature().detach())
    logits = (retriever.encode(queries) @ retriever.index.vectors.T / temperature).double().numpy()
    vectors = retriever.index.vectors[:, : -system.model.priors.width].double().numpy()
    popularity = retriever.index.vectors[:, -system.model.priors.width].double().numpy()
    for b in range(len(queries)):
        for back, item in enumerate(queries.item_row[queries.offsets[b] : queries.offsets[b + 1]][::-1][:16]):
            logits[b] += recency * 0.5**back * (vectors @ vectors[item])
    logits[:, :2] = -np.inf
    plain = logits.copy()
    if order is not None:
        assert dataset.transitions is not None
        query, item_row, features = dataset.transitions.near(queries)
        logits[query, item_row] += features @ order
    for b in range(len(queries)):
        history = queries.item_row[queries.offsets[b] : queries.offsets[b + 1]].tolist()
        for item in set(history):
            repeated = len(history) - len(set(history))
            counted = [1.0, np.log(history.count(item)), np.log1p(history[::-1].index(item)), np.log1p(repeated)]
            logits[b, item] += np.dot([*counted, popularity[item], plain[b, item]], weights)
    target = (logits + draw.gumbel(size=logits.shape)).argmax(axis=1)
    return HeldOut(queries, np.arange(len(queries) + 1), target, np.zeros(len(queries), np.int64))


def test_known_weights_are_found_again(system: RefreshedRetriever, dataset: Dataset) -> None:
    held_out = drawn_choices(system, dataset, WEIGHTS, 4000)
    lists = _lists(system, held_out, False, 10)[0.0]
    found = fit_bonus(lists, np.ones(4000, np.int64))
    np.testing.assert_allclose(found[1:], WEIGHTS[1:], atol=0.25)
    likely = lists.features[lists.share > 1e-6]  # their scores hardly differ from a constant
    assert np.abs(likely @ (found - WEIGHTS)).mean() < 0.2


def test_known_weights_of_transitions_are_found_again(system: RefreshedRetriever, dataset: Dataset) -> None:
    order = np.array([2.0, 0.4, -1.5, -0.3])
    held_out = drawn_choices(system, dataset, -50 * ONE, 4000, order=order)
    choices, outside = _transition_choices(system, held_out, True, 0.0)
    found = fit_bonus(choices, outside)
    likely = choices.features[choices.share > 1e-3]
    assert len(likely) > 1000 and np.abs(likely @ (found - order)).mean() < 0.2
    assert choices.features.shape == (len(choices.query), 4) and outside.max() == 1


@pytest.mark.parametrize("repeats", [False, True])
def test_transitions_are_used_where_they_draw_the_choices(system: RefreshedRetriever, dataset: Dataset, repeats: bool) -> None:
    weights, order = (WEIGHTS if repeats else -50 * ONE), np.array([3.0, 0.4, -1.5, -0.3])
    held_out = drawn_choices(system, dataset, weights, 3000, order=order)
    given = {"metric": "NDCG@10", "exclude_seen": not repeats, "repeats": repeats}
    record = choose_history_weights(system, held_out, **given)
    assert record.transitions is not None and record.transitions.used
    assert record.transitions.after > record.transitions.before
    assert system.model.priors.transitions.tolist() == pytest.approx(record.transitions.weights, rel=1e-6)
    config = EvaluationConfig(exclude_seen=not repeats)
    system.drop()
    metric = evaluate(system, held_out, dataset, config, metrics=["NDCG@10"], beyond_k=None).mean("NDCG@10")
    assert metric == pytest.approx(record.transitions.after, abs=1e-4)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_disliked_items_are_left_out_as_in_an_answer(system: RefreshedRetriever, dataset: Dataset, exclude_seen: bool) -> None:
    held_out = drawn_choices(system, dataset, -3 * ONE, 600, recency=2.0, order=np.array([3.0, 0.4, -1.5, -0.3]))
    draw, size = np.random.default_rng(1), len(held_out.queries)
    disliked = np.concatenate([np.r_[other, target] for other, target in zip(
        draw.integers(2, dataset.n_item_rows, (size, 5)), draw.permutation(held_out.target_row), strict=True
    )])  # fmt: skip
    queries = replace(held_out.queries, disliked=(np.arange(size + 1) * 6, disliked))
    held_out = replace(held_out, queries=queries)
    record = choose_history_weights(system, held_out, metric="NDCG@10", exclude_seen=exclude_seen, repeats=True)
    system.drop()
    config = EvaluationConfig(exclude_seen=exclude_seen)
    metric = evaluate(system, held_out, dataset, config, metrics=["NDCG@10"], beyond_k=None).mean("NDCG@10")
    assert record.transitions is not None and record.transitions.used
    assert metric == pytest.approx(record.transitions.after, abs=1e-4)


def test_transitions_that_say_nothing_are_not_used(system: RefreshedRetriever, dataset: Dataset) -> None:
    held_out = drawn_choices(system, dataset, -50 * ONE, 300)
    record = choose_history_weights(system, held_out, metric="NDCG@10", exclude_seen=True, repeats=False)
    assert record.transitions is not None and not record.transitions.used
    assert not system.model.priors.transitions.any()
    assert record.by_recency[f"{record.recency:g}"] == record.transitions.before


def test_likelihood_gradient_and_hessian_are_those_of_the_formula(system: RefreshedRetriever, dataset: Dataset) -> None:
    lists, sizes = _lists(system, drawn_choices(system, dataset, WEIGHTS, 50), False, 10)[2.0], np.full(50, 2)
    at = torch.tensor([0.3, -0.5, 0.7, 0.2, -0.4, -0.1], dtype=torch.float64, requires_grad=True)
    features, share = torch.from_numpy(lists.features), torch.from_numpy(lists.share)
    added = share * (torch.exp(features @ at) - 1)
    total = torch.ones(50, dtype=torch.float64).index_add(0, torch.from_numpy(lists.query), added)
    value = torch.from_numpy(lists.chosen) @ (features @ at) - torch.from_numpy(sizes).double() @ total.log()
    value = value - PENALTY / 2 * at.square().sum()
    (gradient,) = torch.autograd.grad(value, at, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(each, at, retain_graph=True)[0] for each in gradient])
    found = _likelihood(lists, sizes, at.detach().numpy())
    assert found[0] == pytest.approx(float(value.detach()), rel=1e-9)
    np.testing.assert_allclose(found[1], gradient.detach().numpy(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found[2], -hessian.numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("every_days", [None, 20.0])
def test_lists_are_those_of_the_retriever(dataset: Dataset, config: Config, every_days: float | None) -> None:
    """For every weight of the last items, with and without the items of the histories."""
    model, _ = drawn(dataset, config.model.model_dump(mode="json"))
    model.priors.recency.zero_()
    model.priors.transitions.zero_()
    system, held_out = refreshed_system(model, dataset, config, every_days), dataset.held_out("valid").by_time()
    weights = np.array([0.4, 0.7, -0.3, 0.2, -0.3, -0.2])
    made = _lists(system, held_out, False, 10)
    assert list(made) == list(RECENCIES)
    temperature = float(model.temperature().detach())
    for recency, lists in made.items():
        model.priors.recency.fill_(recency)
        model.priors.repeats.copy_(torch.from_numpy(weights))
        masked = system.retrieve(held_out.queries, 10)
        np.testing.assert_allclose(lists.scores, masked.scores / temperature, rtol=1e-3, atol=1e-3)
        assert (lists.items == masked.items).mean() > 0.99
        unmasked = system.retrieve(held_out.queries, 10, exclude_seen=False)
        assert (lists.with_repeats(weights) == unmasked.items).mean() > 0.99
    first = int(np.flatnonzero(~np.isin(held_out.target_row[:1], held_out.queries.item_row[: held_out.queries.offsets[1]]))[0])
    model.priors.recency.zero_()
    alone = held_out.queries.take(np.array([0]))
    ranked = system.retrieve(alone, dataset.n_item_rows)
    logits = ranked.scores[0][ranked.items[0] >= 0] / temperature
    share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    at = ranked.items[0].tolist().index(int(held_out.target_row[first]))
    assert made[0.0].log_share[0] == pytest.approx(np.log(share[at]), abs=1e-3)


def test_users_who_never_repeat_lower_the_weight_of_seen_items(system: RefreshedRetriever, dataset: Dataset) -> None:
    held_out = drawn_choices(system, dataset, -50 * ONE, 2000)
    assert fit_bonus(_lists(system, held_out, False, 10)[0.0], np.ones(2000, np.int64))[0] < 0


@pytest.mark.parametrize(("true", "exclude_seen"), [(0.0, True), (3.0, True), (3.0, False)])
def test_the_weight_of_the_last_items_that_drew_the_choices_is_chosen(
    system: RefreshedRetriever, dataset: Dataset, true: float, exclude_seen: bool
) -> None:
    held_out = drawn_choices(system, dataset, (-50 if exclude_seen else 0) * ONE, 3000, true)
    record = choose_history_weights(system, held_out, metric="NDCG@10", exclude_seen=exclude_seen, repeats=not exclude_seen)
    assert float(system.model.priors.recency) == record.recency
    assert (record.recency > 0) == (true > 0)
    assert set(record.by_recency) == ({f"{weight:g}" for weight in RECENCIES} if true else {"0"})
    assert record.by_recency[f"{record.recency:g}"] == max(record.by_recency.values())
    assert (record.repeats is None) == exclude_seen


def test_a_rise_within_the_noise_is_not_clear() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    noise, base = (noise - noise.mean()) / noise.std(), np.full(400, -3.0)
    assert not _clearly_likelier(base + 0.09 + noise, base)  # a standard error is 0.05
    assert _clearly_likelier(base + 0.11 + noise, base)
    assert not _clearly_likelier(base, base) and not _clearly_likelier(base[:0], base[:0])


def test_queries_without_a_history_leave_the_weights_at_zero(system: RefreshedRetriever) -> None:
    queries = Queries.of([[], []], time_s=1_700_000_000)
    held_out = HeldOut(queries, np.array([0, 1, 2]), np.array([4, 5]), np.zeros(2, np.int64))
    record = choose_history_weights(system, held_out, metric="NDCG@10", exclude_seen=False, repeats=True)
    assert record.recency == 0 and record.repeats is not None
    assert fit_bonus(_lists(system, held_out, False, 10)[0.0], np.ones(2, np.int64)).tolist() == [0.0] * 6


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_calibration_chooses_what_the_metric_says(dataset: Dataset, config: Config, exclude_seen: bool) -> None:
    settings = parse_config({"evaluation": {"exclude_seen": exclude_seen, "refresh_days": None}}).evaluation
    config = config.model_copy(update={"evaluation": settings})
    model, _ = drawn(dataset, config.model.model_dump(mode="json"))
    record = calibrate(model, dataset, config)
    assert record is not None and record.history is not None and record.history.repeats is not None
    history, repeats = record.history, record.history.repeats
    kept = model.priors.repeats.tolist()
    assert kept == (pytest.approx(repeats.weights, rel=1e-4) if repeats.used else [0.0] * 6)
    assert repeats.used == (repeats.after >= repeats.before)

    def figure(settings: EvaluationConfig) -> float:
        system, held_out = refreshed_system(model, dataset, config, None), dataset.held_out("valid")
        return evaluate(system, held_out, dataset, settings, metrics=[record.metric], beyond_k=None).mean(record.metric)

    assert figure(settings) == pytest.approx(history.by_recency[f"{history.recency:g}"], abs=1e-4)
    unmasked = settings.model_copy(update={"exclude_seen": False})
    assert figure(unmasked) == pytest.approx(max(repeats.after, repeats.before), abs=1e-4)


def test_nothing_is_said_of_repeats_where_each_item_is_kept_once(dataset: Dataset, config: Config) -> None:
    prepare = config.prepare.model_copy(update={"duplicates": "keep_first"})
    model, _ = drawn(dataset, config.model.model_dump(mode="json"))
    record = calibrate(model, dataset, config.model_copy(update={"prepare": prepare}))
    assert record is not None and record.history is not None and record.history.repeats is None
    assert not model.priors.repeats.any()
