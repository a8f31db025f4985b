"""Test distances on the globe against the haversine formula."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.features.geo import EARTH_KM, distances_km, medoid, on_sphere, points_km

PLACES = np.array([[0.0, 0.0], [27.95, -82.46], [27.97, -82.43], [-33.87, 151.21], [89.9, 10.0], [0.0, 179.9]])


def haversine_km(one: np.ndarray, other: np.ndarray) -> float:
    (a, b), (c, d) = np.radians(one), np.radians(other)
    half = np.sin((c - a) / 2) ** 2 + np.cos(a) * np.cos(c) * np.sin((d - b) / 2) ** 2
    return float(2 * EARTH_KM * np.arcsin(np.sqrt(half)))


@pytest.mark.parametrize("location", PLACES.tolist())
def test_distances_are_those_of_the_haversine_formula(location: list[float]) -> None:
    expected = [haversine_km(np.array(location), other) for other in PLACES]
    np.testing.assert_allclose(distances_km(PLACES, location), expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("count", [1, 2, 5, len(PLACES), 300])
def test_the_medoid_has_the_smallest_sum_of_distances(count: int) -> None:
    near = PLACES[0] + np.random.default_rng(count).normal(scale=0.01, size=(count, 2))  # a town
    for places in (PLACES[:count], near, np.repeat(near[:1], 3, axis=0)):
        sums = [float(distances_km(places, location).sum()) for location in places.tolist()]
        assert sums[medoid(places)] == pytest.approx(min(sums), abs=1e-3 * len(places))


def test_an_unknown_location_has_no_distance() -> None:
    unknown = np.array([[np.nan, 1.0], [1.0, np.nan], [np.nan, np.nan]])
    assert np.isnan(distances_km(unknown, (0.0, 0.0))).all()
    np.testing.assert_array_equal(points_km(unknown[2:]), np.zeros((1, 3), np.float32))


def test_points_lie_on_the_sphere() -> None:
    np.testing.assert_allclose(np.linalg.norm(on_sphere(PLACES), axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(points_km(PLACES), axis=1), EARTH_KM, rtol=1e-6)
    assert points_km(PLACES).dtype == np.float32
