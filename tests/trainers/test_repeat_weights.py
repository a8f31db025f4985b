"""Test the fit of the weights of repeats on choices that are drawn with known weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twotower.data.dataset import Dataset, HeldOut
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import RefreshedRetriever
from twotower.retriever import Queries
from twotower.trainers.calibration import _system, calibrate
from twotower.trainers.repeat_weights import PENALTY, Choices, _choices, _likelihood, fit_repeats
from twotower.utils.config import Config, parse_config

from ..drawn_bundle import drawn

WEIGHTS = np.array([1.5, 0.8, -0.7])


@pytest.fixture
def config(dataset: Dataset) -> Config:
    made = dataset.manifest.config.model_dump(mode="json")
    return parse_config({"data": made["data"], "prepare": made["prepare"]})


@pytest.fixture
def system(dataset: Dataset, config: Config) -> RefreshedRetriever:
    model, _ = drawn(dataset, config.model.model_dump(mode="json"))
    model.priors.repeats.zero_()
    return _system(model, dataset, config, None)


def drawn_choices(system: RefreshedRetriever, dataset: Dataset, weights: np.ndarray, size: int) -> HeldOut:
    """Return queries whose targets are drawn from the scores with a bonus of repeats."""
    draw = np.random.default_rng(0)
    rows = np.arange(2, min(dataset.n_user_rows, 400))
    queries = dataset.histories(rows, np.full(len(rows), int(dataset.events.time_s.max()) + 1))
    queries = queries.take(np.resize(np.flatnonzero(queries.lengths > 2), size))
    retriever = system.at(int(system.moments(queries.time_s)[0]))
    temperature = float(system.model.temperature().detach())
    logits = (retriever.encode(queries) @ retriever.index.vectors.T / temperature).double().numpy()
    logits[:, :2] = -np.inf
    for b in range(len(queries)):
        history = queries.item_row[queries.offsets[b] : queries.offsets[b + 1]].tolist()
        for item in set(history):
            features = [1.0, np.log(history.count(item)), np.log1p(history[::-1].index(item))]
            logits[b, item] += np.dot(features, weights)
    target = (logits + draw.gumbel(size=logits.shape)).argmax(axis=1)
    return HeldOut(queries, np.arange(len(queries) + 1), target, np.zeros(len(queries), np.int64))


def test_known_weights_are_found_again(system: RefreshedRetriever, dataset: Dataset) -> None:
    found = fit_repeats(system, drawn_choices(system, dataset, WEIGHTS, 4000))
    np.testing.assert_allclose(found, WEIGHTS, atol=0.25)


def test_likelihood_gradient_and_hessian_are_those_of_the_formula(system: RefreshedRetriever, dataset: Dataset) -> None:
    choices = _choices(system, drawn_choices(system, dataset, WEIGHTS, 50))
    choices = Choices(choices.query, choices.share, choices.features, choices.targets * 2, choices.chosen)
    at = torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64, requires_grad=True)
    features, share = torch.from_numpy(choices.features), torch.from_numpy(choices.share)
    added = share * (torch.exp(features @ at) - 1)
    total = torch.ones(50, dtype=torch.float64).index_add(0, torch.from_numpy(choices.query), added)
    value = torch.from_numpy(choices.chosen) @ (features @ at) - torch.from_numpy(choices.targets) @ total.log()
    value = value - PENALTY / 2 * at.square().sum()
    (gradient,) = torch.autograd.grad(value, at, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(each, at, retain_graph=True)[0] for each in gradient])
    found = _likelihood(choices, at.detach().numpy())
    assert found[0] == pytest.approx(float(value.detach()), rel=1e-9)
    np.testing.assert_allclose(found[1], gradient.detach().numpy(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found[2], -hessian.numpy(), rtol=1e-7, atol=1e-9)


def test_users_who_never_repeat_lower_the_weight_of_seen_items(system: RefreshedRetriever, dataset: Dataset) -> None:
    held_out = drawn_choices(system, dataset, np.array([-50.0, 0.0, 0.0]), 2000)
    assert fit_repeats(system, held_out)[0] < 0


def test_queries_without_a_history_leave_the_weights_at_zero(system: RefreshedRetriever) -> None:
    queries = Queries.of([[], []], time_s=1_700_000_000)
    held_out = HeldOut(queries, np.array([0, 1, 2]), np.array([4, 5]), np.zeros(2, np.int64))
    assert fit_repeats(system, held_out).tolist() == [0.0, 0.0, 0.0]


def test_a_calibration_keeps_weights_that_do_not_lower_the_metric(dataset: Dataset, config: Config) -> None:
    settings = parse_config({"evaluation": {"exclude_seen": False, "refresh_days": None}}).evaluation
    config = config.model_copy(update={"evaluation": settings})
    model, _ = drawn(dataset, config.model.model_dump(mode="json"))
    record = calibrate(model, dataset, config)
    assert record is not None and record.repeats is not None
    repeats, kept = record.repeats, model.priors.repeats.tolist()
    assert kept == (pytest.approx(repeats.weights, rel=1e-4) if repeats.used else [0.0, 0.0, 0.0])
    assert repeats.used == (repeats.after >= repeats.before)
    metric, held_out = record.metric, dataset.held_out("valid")
    figure = evaluate(_system(model, dataset, config, None), held_out, dataset, settings, metrics=[metric], beyond_k=None)
    assert figure.mean(metric) == pytest.approx(max(repeats.after, repeats.before), abs=2e-6)


def test_nothing_is_fitted_where_each_item_is_kept_once(dataset: Dataset, config: Config) -> None:
    prepare = config.prepare.model_copy(update={"duplicates": "keep_first"})
    model, _ = drawn(dataset, config.model.model_dump(mode="json"))
    before = model.priors.repeats.clone()
    record = calibrate(model, dataset, config.model_copy(update={"prepare": prepare}))
    assert record is not None and record.repeats is None and torch.equal(model.priors.repeats, before)
