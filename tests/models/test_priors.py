"""Test the columns for popularity and distance: their inner product equals the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twotower.features.geo import EARTH_KM, distances_km, median_location, on_sphere
from twotower.models.priors import GROUPS, LOCATION, Priors, group
from twotower.search.reranking import POPULARITY_SCALE

NAN = float("nan")
ITEMS = np.array([[48.13, 11.57], [48.20, 11.60], [NAN, NAN], [52.52, 13.40]])
USERS = np.array([[48.15, 11.58], [NAN, NAN]])
LOGS = torch.tensor([[0.5, 1.0, 0.3], [-1.0, -2.0, 0.0], [2.0, 0.0, 1.5], [NAN, NAN, 0.0]])  # the last column: novelty
NEW = torch.tensor([False, False, False, True])
LENGTHS = torch.tensor([3, 12])


def points(locations: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(on_sphere(locations) * EARTH_KM)


@pytest.fixture
def priors() -> Priors:
    made = Priors(1.0, (0.0, 60.0))
    made.weights.copy_(torch.tensor([[0.2, 0.3, 0.9, 0.0, 0.01], [0.6, 0.5, 0.4, 1.7, 0.02], [1.0, 1.1, -0.2, 0.8, 0.03]]))
    made.centre.copy_(points(ITEMS)[0])
    made.new_popularity.fill_(-0.5)
    made.unlocated.fill_(70.0)
    return made


def test_the_columns_give_the_formula(priors: Priors) -> None:
    """The inner product is T · (Σ weight · log popularity - weight · distance² / 2), with distances from elsewhere."""
    scale, user = priors.user_columns(LENGTHS, points(USERS), 0.1, torch.zeros(2))
    item = priors.item_columns(LOGS, NEW, points(ITEMS))
    assert item.shape == (4, priors.width) and user.shape == (2, priors.width) and priors.width == 3 + LOCATION
    logs = np.array([[0.5, 1.0, 0.3], [-1.0, -2.0, 0.0], [2.0, 0.0, 1.5], [-0.5, -0.5, 0.0]])
    for b, row in enumerate((1, 2)):
        weights = priors.weights[row].numpy()
        half = distances_km(ITEMS, USERS[b]).astype(float) ** 2 / 2 if b == 0 else np.zeros(4)  # the second user has no location
        wanted = 0.1 * (logs @ weights[1:-1] - weights[-1] * np.where(np.isnan(half), 70.0, half))
        np.testing.assert_allclose((user @ item.T)[b].numpy(), wanted, rtol=2e-3, atol=2e-3)
        assert float(scale[b]) == pytest.approx(weights[0])


def test_distances_of_a_few_hundred_metres_survive_rounding(priors: Priors) -> None:
    near = torch.from_numpy(on_sphere(np.array([[48.1300, 11.5700], [48.1327, 11.5700]])) * EARTH_KM)  # 300 m apart
    half = -(priors.user_location(near[:1]) @ priors.item_location(near).T).float()
    assert half[0].tolist() == pytest.approx([0, 0.300**2 / 2], abs=1e-3)


def test_before_the_fit_all_events_count_the_same_and_distance_does_not(priors: Priors) -> None:
    fresh = Priors(0.7, (0.0, 60.0))
    assert not fresh.located and fresh.width == 3
    scale, user = fresh.user_columns(LENGTHS, points(USERS), 0.1, torch.tensor([0.0, 1.0]))
    assert scale.flatten().tolist() == [1, 1]
    assert user.flatten().tolist() == pytest.approx([0.07, 0, 0, 0.07 + POPULARITY_SCALE, 0, 0]), (
        "the bias moves the popularity of all events"
    )
    assert fresh.item_columns(LOGS, NEW, points(ITEMS)).shape == (4, 3)
    assert priors.located


def test_a_new_item_counts_as_new_until_its_events_exceed_that(priors: Priors) -> None:
    logs = torch.tensor([[NAN, NAN, 0.0], [-3.0, -0.2, 1.2], [0.7, 0.1, -0.9], [-3.0, -3.0, 0.1]])
    new = torch.tensor([True, True, True, False])
    expected = torch.tensor([[-0.5, -0.5, 0.0], [-0.5, -0.2, 1.2], [0.7, 0.1, -0.9], [-3.0, -3.0, 0.1]])
    torch.testing.assert_close(priors.popularity(logs, new), expected)


def test_without_times_there_is_no_novelty() -> None:
    plain = Priors(1.0, (0.0,))
    assert plain.popularities == plain.width == 1 and plain.weights.shape == (len(GROUPS), 3)
    logs = torch.tensor([[0.4], [NAN]])
    assert plain.popularity(logs, torch.tensor([False, True])).tolist() == [[pytest.approx(0.4)], [0.0]]


def test_the_weights_travel_with_the_model(priors: Priors) -> None:
    other = Priors(1.0, (0.0, 60.0))
    other.load_state_dict(priors.state_dict())
    assert torch.equal(other.weights, priors.weights) and other.width == priors.width
    told = priors.as_json(0.1)
    assert told["groups"] == list(GROUPS) == [0, 1, 5] and np.allclose(told["weights"], priors.weights.numpy(), atol=1e-6)
    assert told["half_lives_days"] == [0.0, 60.0] and (told["temperature"], told["unlocated_km2"]) == (0.1, 70.0)
    assert told["centre_km"] == pytest.approx(priors.centre.tolist(), abs=1e-4)


def test_groups_are_by_number_of_events() -> None:
    assert group(torch.arange(7)).tolist() == [0, 1, 1, 1, 1, 2, 2]


def test_a_median_location_is_one_of_the_majority_and_unknown_ones_do_not_count() -> None:
    locations = np.array([[NAN, NAN], [1.0, 1.0], [1.1, 1.2], [50.0, 60.0]])
    offsets, rows = np.array([0, 4, 4, 5]), np.array([1, 2, 3, 0, 0])
    found = median_location(offsets, rows, locations)
    assert found[0].tolist() == [1.1, 1.2] and np.isnan(found[1:]).all()
    assert np.isnan(median_location(offsets, rows, np.zeros((0, 2)))).all()
