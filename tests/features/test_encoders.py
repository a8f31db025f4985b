"""Test encoding of static features: several text features, vectors of wrong width, few texts, and unknown values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.errors import DataError
from twotower.features.encoders import MAX_VALUES, Encoders, encode_items, encode_users, fit_encoders, grow_encoders
from twotower.schema import PAD, UNKNOWN, FeatureSpec, Kind

WORDS = ["green tea leaves", "black coffee beans", "roasted coffee", "mint tea", "espresso machine", "tea pot"]
NOBODY = pa.table({"user_id": pa.array([], pa.string())})


def spec(name: str, kind: Kind, *columns: str) -> FeatureSpec:
    return FeatureSpec(name=name, side="item", kind=kind, columns=columns or (name,))


def fitted(items: pa.Table, *specs: FeatureSpec, n_train: int | None = None, **settings: Any) -> tuple[Encoders, dict[str, Any]]:
    """Return encoders and the arrays of all items."""
    trained = {"n_train_items": len(items) if n_train is None else n_train, "n_train_users": 0}
    encoders = fit_encoders(specs, items, NOBODY, **trained, **settings)
    return encoders, encode_items(encoders, items, settings.get("item_text"))


def test_only_the_first_text_of_the_items_takes_what_was_gathered() -> None:
    items = pa.table({"item_id": list("abcdef"), "about": WORDS[::-1], "label": WORDS})
    gathered = [f"{text} and reviews" for text in WORDS[::-1]]
    two = (spec("about", "text"), spec("label", "text"))
    _, arrays = fitted(items, *two, item_text=gathered, text_dim=4)
    _, about = fitted(items, two[0], item_text=gathered, text_dim=4)
    _, label = fitted(items, two[1], text_dim=4)
    np.testing.assert_array_equal(arrays["about"], about["about"])
    np.testing.assert_array_equal(arrays["label"], label["label"])
    assert not np.allclose(arrays["about"], arrays["label"])


def test_a_users_text_reads_its_own_column() -> None:
    users = pa.table({"user_id": list("abcdef"), "bio": WORDS})
    own = FeatureSpec(name="bio", side="user", kind="text", columns=("bio",))
    no_items = pa.table({"item_id": pa.array([], pa.string())})
    encoders = fit_encoders((own,), no_items, users, n_train_items=0, n_train_users=6, item_text=[], text_dim=3)
    assert np.linalg.norm(encode_users(encoders, users)["bio"][2:], axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("n_items", "dim"), [(6, 1), (2, 4), (1, 4)])
def test_a_single_direction_of_text_is_one(n_items: int, dim: int) -> None:
    items = pa.table({"item_id": list("abcdef")[:n_items], "about": WORDS[:n_items]})
    _, arrays = fitted(items, spec("about", "text"), text_dim=dim)
    assert arrays["about"].shape == (2 + n_items, dim)
    assert np.abs(arrays["about"][2]).max() > 0.1


def vectors(*values: Any) -> pa.Table:
    return pa.table({"item_id": [str(i) for i in range(len(values))], "vec": pa.array(values, pa.list_(pa.float64()))})


def test_a_missing_vector_is_zeros() -> None:
    _, arrays = fitted(vectors([1.0, 2.0], None, [], [3.0, 4.0]), spec("vec", "vector"))
    assert arrays["vec"].tolist() == [[0, 0], [0, 0], [1, 2], [0, 0], [0, 0], [3, 4]]
    assert arrays["vec"].dtype == np.float32


def test_vectors_that_training_never_saw_are_one_zero() -> None:
    _, arrays = fitted(vectors(None, None, [3.0, 4.0]), spec("vec", "vector"), n_train=2)
    assert arrays["vec"].tolist() == [[0]] * 5


@pytest.mark.parametrize("n_train", [1, 3])
def test_vectors_of_several_widths_are_refused_by_name(n_train: int) -> None:
    with pytest.raises(DataError, match=r"'vec' of the items has vectors of 1, 2 numbers. .* Correct the column 'vec'") as error:
        fitted(vectors([1.0], [1.0, 2.0], None), spec("vec", "vector"), n_train=n_train)
    assert "\n" not in str(error.value)


def test_the_unknown_row_is_that_of_an_item_nothing_is_known_of() -> None:
    items = pa.table(
        {
            "item_id": ["a", "b"],
            "price": [3.0, None],
            "city": ["Rome", None],
            "tags": [["x", "y"], None],
            "lat": [1.0, None],
            "lon": [2.0, None],
            "open": ["1" * 168, None],
            "about": ["tea", None],
            "vec": [[1.0], None],
        }
    )
    specs = (spec("price", "number"), spec("city", "categorical"), spec("at", "geo", "lat", "lon"), spec("open", "hours"))
    _, arrays = fitted(items, *specs, spec("about", "text"), spec("vec", "vector"), spec("tags", "multi"))
    tags = arrays.pop("tags")
    assert tags[UNKNOWN].tolist() == [UNKNOWN, PAD]
    assert not tags[PAD].any()
    for name, values in arrays.items():
        np.testing.assert_array_equal(values[UNKNOWN], values[3], err_msg=name)
        if name != "at.degrees":
            assert not values[PAD].any(), name
    assert np.isnan(arrays["at.degrees"][:2]).all()
    assert arrays["price"][UNKNOWN].tolist() == [0, 1]
    assert arrays["city"][UNKNOWN] == UNKNOWN


def test_a_bag_holds_up_to_64_values() -> None:
    items = pa.table({"item_id": ["a"], "tags": [[f"{i:03}" for i in range(100)]]})
    _, arrays = fitted(items, spec("tags", "multi"))
    assert MAX_VALUES == 64
    assert arrays["tags"][2].tolist() == list(range(2, 66))


def test_grown_encoders_keep_the_rows_of_known_values_and_know_new_ones() -> None:
    specs = (spec("brand", "categorical"), spec("tags", "multi"), spec("at", "geo", "lat", "lon"), spec("price", "number"))
    old = {"brand": ["Uji", "Yame"], "tags": [["b"], ["c"]], "lat": [50.0, 51.0], "lon": [8.0, 9.0], "price": [1.0, 3.0]}
    new = {"brand": ["Assam", None], "tags": [["a", "b"], []], "lat": [10.0, None], "lon": [8.0, 9.0], "price": [100.0, 2.0]}
    both = pa.table({name: [*values, *new[name]] for name, values in old.items()})
    before, arrays = fitted(pa.table(old), *specs)
    after = grow_encoders(before, both, NOBODY, n_train_items=4, n_train_users=0)
    encoded = encode_items(after, both)
    for name, value in arrays.items():
        np.testing.assert_array_equal(encoded[name][: len(value)], value)
    assert after.vocabularies["item.brand"] == ["Uji", "Yame", "Assam"] and after.vocabularies["item.tags"] == ["b", "c", "a"]
    assert encoded["brand"].tolist() == [PAD, UNKNOWN, 2, 3, 4, UNKNOWN]
    assert after.vocabularies["item.at.0"][2] < after.vocabularies["item.at.0"][0], "a cell in the south is appended too"
    assert encoded["at"][4].tolist() == [4, 4] and encoded["at"][5].tolist() == [UNKNOWN, UNKNOWN]
    assert after.statistics == before.statistics
    untrained = grow_encoders(before, both, NOBODY, n_train_items=2, n_train_users=0)
    assert untrained.vocabularies == before.vocabularies
