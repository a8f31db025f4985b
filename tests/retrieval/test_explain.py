"""Test contributions: for a linear tower they add up to the score; for others they match the effect of a small change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from twotower.bundle.bundle import Bundle
from twotower.bundle.item_arrays import item_arrays
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.models.history_terms import recent_sum
from twotower.models.priors import group
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import HistoryEvent, Request

from ..conftest import TOWER, Town
from ..documents import bundle_manifest
from ..drawn_bundle import drawn


@pytest.fixture(scope="module")
def straight(town: Town, dataset: Dataset) -> Recommender:
    """Return a recommender whose towers have neither MLP nor attention."""
    model, config = drawn(dataset, {"user_tower": {**TOWER, "num_blocks": 0}, "item_tower": TOWER})
    store, moment = open_store(dataset, "future", config.model), split_moment(dataset, "future")
    arrays = item_arrays(model, store, dataset, moment)
    return Recommender(Bundle(town.folder, bundle_manifest(moment_s=moment), config, dataset, store, model, arrays))


def test_contributions_of_linear_towers_add_up_to_the_score(straight: Recommender) -> None:
    rows = np.arange(2, 40)
    for events in (
        (),
        (HistoryEvent(str(straight.dataset.item_ids[9])),),
        tuple(HistoryEvent(str(i)) for i in straight.dataset.item_ids[[3, 9, 3, 50]]),
    ):
        history = straight.reader.read(Request(user=str(straight.dataset.user_ids[4]), history=events)).history
        contributions = straight.explainer.contributions(history, rows)
        factor = float(straight.bundle.model.priors.weights[group(torch.from_numpy(history.lengths)), 0])
        vectors, priors = straight.bundle.vectors, straight.bundle.model.priors
        temperature = float(straight.bundle.model.temperature().detach())
        recent = float(priors.recency) * temperature * recent_sum(history, vectors)[0].numpy()
        cosines = (vectors.numpy() @ (factor * straight.bundle.encode(history)[0] + recent))[rows]
        np.testing.assert_allclose(contributions.events.sum(axis=1) + contributions.user.sum(axis=1), cosines, atol=1e-5)
        np.testing.assert_allclose(contributions.item.sum(axis=1), cosines, atol=1e-5)
        assert len(contributions.event_items) == len(set(history.item_row.tolist()))
        assert not contributions.repeat.any()
        again = straight.explainer.contributions(history, rows, again=True)
        fitted, scores = priors.repeats.tolist(), cosines + contributions.popularity + contributions.distance
        items = history.item_row.tolist()
        for row, contribution in zip(rows.tolist(), again.repeat.tolist(), strict=True):
            since = items[::-1].index(row) if row in items else 0
            counted = [1.0, np.log(max(items.count(row), 1)), np.log1p(since), np.log1p(len(items) - len(set(items)))]
            features = [*counted, straight.bundle.arrays.vectors[row, vectors.shape[1]], scores[row - 2] / temperature]
            assert contribution == pytest.approx(temperature * np.dot(features, fitted) if row in items else 0.0, abs=1e-6)
        np.testing.assert_array_equal(again.events, contributions.events)


def test_a_contribution_is_the_effect_of_a_small_change(recommender: Recommender) -> None:
    """Check that scaling the vector of a seen item by 1.001 changes the raw score by 0.001 times its contribution."""
    dataset, model, store = recommender.dataset, recommender.bundle.model, recommender.bundle.store
    history = recommender.reader.read(Request(history=tuple(HistoryEvent(str(i)) for i in dataset.item_ids[[3, 9, 50]]))).history
    target = 77
    contributions = recommender.explainer.contributions(history, np.array([target]))
    batch = store.users(history)
    with torch.inference_mode():
        tower, fields = model.user_tower, model.user_fields(batch)
        tokens = tower.event_embeddings(model.history_items(batch.items), batch).double().float()
        raw = tower.head.raw(tower.beside_history(fields, tokens, batch))
        longer = tokens.clone()
        longer[1] *= 1.001
        moved = tower.head.raw(tower.beside_history(fields, longer, batch)) - raw
        change = float((moved / tower.head.divisor(raw) * recommender.bundle.vectors[target]).sum())
    change *= float(model.priors.weights[1, 0])  # of histories with one to four events
    both = float(recommender.bundle.vectors[9] @ recommender.bundle.vectors[target])
    recent = 0.5 * float(model.priors.recency * model.temperature()) * both  # the last item but one
    assert change * 1000 + recent == pytest.approx(
        float(contributions.events[0, list(contributions.event_items).index(9)]), rel=0.02, abs=2e-4
    )


def test_a_seen_item_says_so(recommender: Recommender) -> None:
    dataset = recommender.dataset
    history = tuple(HistoryEvent(str(i)) for i in dataset.item_ids[[3, 9, 50]])
    for exclude_seen in (True, False):
        request = Request(history=history, k=dataset.n_items, exclude_seen=exclude_seen, explain=True)
        explained = {
            one.item_id: [reason.label for reason in one.reasons if reason.name == "repeat"]
            for one in recommender.answer([request])[0].items
        }
        wanted = set() if exclude_seen else {one.item_id for one in history}
        assert {item for item, labels in explained.items() if labels == ["seen before"]} == wanted


def test_reasons_are_in_words(recommender: Recommender) -> None:
    dataset = recommender.dataset
    events = tuple(HistoryEvent(str(i)) for i in dataset.item_ids[[3, 9, 50]])
    plain, explained = (recommender.answer([Request(history=events, k=4, explain=explain)])[0] for explain in (False, True))
    assert [replace(item, reasons=()) for item in explained.items] == plain.items
    assert all(item.reasons == () for item in plain.items)
    for item in explained.items:
        contributions = [abs(reason.contribution) for reason in item.reasons]
        assert contributions == sorted(contributions, reverse=True) and 1 <= len(contributions) <= 10
        assert {reason.kind for reason in item.reasons} <= {"event", "user", "item"}
    names = {reason.label for item in explained.items for reason in item.reasons if reason.kind == "event"}
    assert names and names <= {recommender.details.describe(row)["name"] for row in (3, 9, 50)}
    columns = recommender.details.describe(9)
    label = recommender.explainer.item_label
    assert label("categories", columns) == f"categories: {', '.join(columns['categories'])}"
    spec = recommender.explainer._columns["categories"]
    recommender.explainer._columns["categories"] = replace(spec, columns=("ids",))  # learned from ids, shown by names
    assert label("categories", {**columns, "ids": ["7"]}) == f"categories: {', '.join(columns['categories'])}"
    recommender.explainer._columns["categories"] = spec
    assert [label(name, columns) for name in ("hours", "id", "text")] == ["hours", "item id", "text"]
    assert recommender.answer([Request(explain=True, k=2)])[0].items[0].reasons == ()
