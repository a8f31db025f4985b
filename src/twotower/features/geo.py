"""Compute distances on the globe. Locations are (latitude, longitude) in degrees; distances are in kilometres."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.utils.types import Array, Float, Float64, Int

EARTH_KM = 6371.0


def on_sphere(locations: Array) -> Float64:
    """Return the points float64 [n, 3] on the unit sphere of `locations` [n, 2]; NaN if a location is unknown."""
    latitude, longitude = np.radians(np.asarray(locations, np.float64)).T
    flat = np.cos(latitude)
    return np.stack([flat * np.cos(longitude), flat * np.sin(longitude), np.sin(latitude)], axis=1)


def median_location(offsets: Int, rows: Int, locations: Array) -> Float64:
    """Return float64 [B, 2]: the median latitude and longitude of each slice of item rows, in degrees; NaN if none is known.

    Parameters
    ----------
    offsets, rows
        int64 [B + 1] and [T]: slice b of the item rows is offsets[b]:offsets[b + 1].
    locations
        float [n_item_rows, 2]: latitude and longitude of each item, NaN if unknown.

    Examples
    --------
    >>> median_location(np.array([0, 3, 3]), np.array([0, 1, 2]), np.array([[1.0, 5.0], [2.0, 6.0], [9.0, 7.0]])).tolist()
    [[2.0, 6.0], [nan, nan]]
    """
    size = len(offsets) - 1
    if not len(locations):
        return np.full((size, 2), np.nan)
    query = np.repeat(np.arange(size), np.diff(offsets))
    known = ~np.isnan(locations[rows]).any(axis=1)
    query, location = query[known], locations[rows[known]]
    count = np.bincount(query, minlength=size)
    middle = np.cumsum(count) - count + count // 2
    median = np.full((size, 2), np.nan)
    for axis in (0, 1):
        median[count > 0, axis] = location[np.lexsort((location[:, axis], query)), axis][middle[count > 0]]
    return median


def points_km(locations: Array) -> Float:
    """Return the points float32 [n, 3] on the globe of `locations` [n, 2], in km; (0, 0, 0) if a location is unknown.

    The straight-line distance of two points equals their distance on the ground to 0.1 % up to 300 km, without any projection.
    """
    xyz = on_sphere(locations) * EARTH_KM
    return np.where(np.isnan(xyz), 0, xyz).astype(np.float32)


def distances_km(locations: Array, location: Sequence[float]) -> Float:
    """Return the great-circle distances float32 [n] from `location` to `locations` [n, 2]; NaN if one of the two is unknown.

    Examples
    --------
    >>> distances_km(np.array([[48.137, 11.575], [np.nan, np.nan]]), (52.52, 13.405)).round(0)
    array([504.,  nan], dtype=float32)
    >>> distances_km(np.array([[48.137, 11.575]]), (np.nan, np.nan))
    array([nan], dtype=float32)
    """
    if not np.isfinite(location).all():
        return np.full(len(locations), np.nan, np.float32)
    here = points_km(np.array([location], np.float64))[0].astype(np.float64)
    arc = _arc_km(np.linalg.norm(points_km(locations).astype(np.float64) - here, axis=1))
    return np.where(np.isfinite(locations).all(axis=1), arc, np.nan).astype(np.float32)


def medoid(locations: Array) -> int:
    """Return the position of the location [n, 2] with the smallest sum of distances to all others. All must be known.

    Examples
    --------
    >>> medoid(np.array([[48.1, 11.5], [48.2, 11.6], [52.5, 13.4]]))
    1
    """
    points = on_sphere(locations)
    chord = EARTH_KM * np.sqrt(np.clip(2 - 2 * (points @ points.T), 0, None))  # the law of cosines
    return int(np.argmin(_arc_km(chord).sum(axis=1)))


def _arc_km(chord: Float64) -> Float64:
    """Turn straight-line distances into distances on the ground. They differ beyond some 300 km only."""
    arc: Float64 = 2 * EARTH_KM * np.arcsin(np.clip(chord / (2 * EARTH_KM), 0, 1))
    return arc
