"""Test how columns of coordinates, categories and opening hours are found."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from twotower.features.item_columns import as_lists, category_column, hours_column, location_columns, locations
from twotower.schema import FeatureSpec, Kind


def spec(name: str, kind: Kind, *columns: str) -> FeatureSpec:
    return FeatureSpec(name=name, side="item", kind=kind, columns=columns or (name,))


def test_the_location_is_the_first_geo_feature_else_the_columns_of_that_name() -> None:
    items = pa.table({"latitude": [1.0, None], "longitude": [3, 4], "lat": [5.0, 6.0], "lon": [7.0, float("nan")]})
    assert location_columns(items, ()) == ("latitude", "longitude")
    assert location_columns(items, (), learned=True) is None
    user = FeatureSpec(name="home", side="user", kind="geo", columns=("a", "b"))
    for learned in (False, True):
        assert location_columns(items, (user, spec("shop", "geo", "lat", "lon")), learned=learned) == ("lat", "lon")
    np.testing.assert_array_equal(locations(items, ("latitude", "longitude")), [[1, 3], [np.nan, np.nan]])
    np.testing.assert_array_equal(locations(items, ("lat", "lon")), [[5, 7], [np.nan, np.nan]])
    assert np.isnan(locations(items, None)).all()
    assert location_columns(pa.table({"latitude": ["north"], "longitude": [1.0]}), ()) is None


def test_categories_are_displayed_by_name_and_learned_by_id() -> None:
    lists = pa.array([["x"]])
    items = pa.table({"categories": lists, "category_ids": lists, "tags": lists, "size": [1.0]})
    ids = spec("categories", "multi", "category_ids")
    assert category_column(items, (spec("tags", "multi"), ids)) == "categories"
    assert category_column(items, (spec("tags", "multi"), ids), learned=True) == "category_ids"
    assert category_column(items, (), learned=True) == "categories"
    assert category_column(items.select(["tags", "size"]), (spec("tags", "multi"),)) == "tags"
    assert category_column(items.select(["tags", "size"]), ()) is None
    assert category_column(pa.table({"category": [1.0]}), ()) is None


def test_a_string_is_a_list_of_one() -> None:
    assert as_lists(pa.chunked_array([["a", None], ["b"]])).to_pylist() == [["a"], [], ["b"]]
    assert as_lists(pa.chunked_array([[["a", "b"], None]])).to_pylist() == [["a", "b"], None]


def test_hours_are_those_of_the_feature_or_look_so() -> None:
    items = pa.table({"hours": ["1" * 168, None], "open": ["0" * 168, None], "other": ["9 to 5", None]})
    assert hours_column(items, (spec("when", "hours", "open"),)) == "open"
    assert hours_column(items, ()) == "hours"
    assert hours_column(items.rename_columns(["x", "open", "hours"]), ()) is None
