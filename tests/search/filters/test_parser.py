"""Test both notations of filters: equal trees, errors with a position, and no other result for any input."""

from __future__ import annotations

import json
import os
import string
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twotower.errors import RequestError
from twotower.search.filters.item_filter import ItemFilter
from twotower.search.filters.parser import MAX_DEPTH, MAX_PARTS, parse_filter
from twotower.search.filters.tree import Part, check_location, hour_of_week

SAME: list[tuple[str, Any]] = [
    ('category == "Mexican"', {"category": "Mexican"}),
    ('category in ["Mexican", "Thai"]', {"category": {"any": ["Mexican", "Thai"]}}),
    ('category in ["Mexican", "Thai"]', {"category": ["Mexican", "Thai"]}),
    ('category == "a" and category == "b"', {"category": {"all": ["a", "b"]}}),
    ('category not in ["a", "b"]', {"category": {"none": ["a", "b"]}}),
    ('category != "a"', {"not": {"category": "a"}}),
    ("stars >= 4 and price > 1 and price < 4", {"stars": {"min": 4}, "price": {"above": 1, "below": 4}}),
    ("price <= 2", {"and": [{"price": {"max": 2}}]}),
    ('id in ["a"] and id not in ["b"]', {"id": {"any": ["a"], "none": "b"}}),
    ("within(5)", {"within": 5}),
    ("within(5)", {"within": {"km": 5}}),
    ("within(27.95, -82.46, 5)", {"within": {"km": 5, "near": [27.95, -82.46]}}),
    ('open_at("Fri 19:30") or open_now', {"or": [{"open": "Fri 19:30"}, {"open": "now"}]}),
    ("seen", {"seen": True}),
    ("not seen", {"seen": False}),
    ("(a == 1 and b == 2) and c == 3", {"and": [{"a": 1}, {"and": [{"b": 2}, {"c": 3}]}]}),
    ("a == 1 or (b == 2 or not c == 3)", {"or": [{"a": 1}, {"b": 2}, {"not": {"c": 3}}]}),
    ("open == 1 and within == 2", {"and": [{"column": "open", "any": 1}, {"column": "within", "any": [2]}]}),
]


@pytest.mark.parametrize(("text", "json_"), SAME, ids=[text for text, _ in SAME])
def test_both_notations_are_one_tree(text: str, json_: Any) -> None:
    assert parse_filter(text) == parse_filter(json_) == parse_filter(json.loads(json.dumps(json_)))


@pytest.mark.parametrize(
    ("where", "at"),
    [
        ("price <= 2 and colour == 3", 16),
        ("  price <= 2 and colour == 3", 18),
        ('city == "Zürich" and colour == 3', 22),
        ("(price <= 2 and\r\n colour == 3)", 19),
        ("price <= 2 and\n", 15),
        ("price <= 2 and within('x')", 16),
        ("price <= 2 and (1 < 2)", 17),
        ("price in [1, None]", 10),
        ("price < 'x'", 1),
        ("price <= 2 and open_at('Someday')", 16),
        ("price = 2", 7),
        ({"and": [{"price": {"max": 2}}, {"within": {"km": -5}}]}, "and[1].within.km"),
        ({"and": [{"price": {"max": 2}}, {"within": {"km": 5, "near": [91, 0]}}]}, "and[1].within.near"),
        ({"within": {"km": 5, "near": [1]}}, "within.near"),
        ({"within": {"km": 5, "around": [1, 2]}}, "within.around"),
        ({"within": {"near": [1, 2]}}, "within.km"),
        ({"within": "5"}, "within"),
        ({"or": [{"price": {"max": 2}}, {"colour": "x"}]}, "or[1].colour"),
        ({"or": {"price": 1}}, "or"),
        ({"not": [{"price": 1}]}, "not"),
        ({"not": {"price": {"mx": 1}}}, "not.price.mx"),
        ({"price": {"max": "2"}}, "price.max"),
        ({"price": {"max": 10**400}}, "price.max"),
        ({"price": {"any": [1, None]}}, "price.any[1]"),
        ({"price": [1, [2]]}, "price[1]"),
        ({"price": "x"}, "price"),
        ({"price": True}, "price"),
        ({"price": {}}, "price"),
        ({"city": {"min": 3}}, "city.min"),
        ({"open": "Someday"}, "open"),
        ({"open": 7}, "open"),
        ({"seen": 1}, "seen"),
        ({"column": 3, "any": 1}, "column"),
        ({"column": "price"}, ""),
        ({"odd key\n": 1}, "['odd key\\n']"),
        ({"and": [3]}, "and[0]"),
    ],
)
def test_an_error_points_at_the_part(where: Any, at: str | int) -> None:
    catalogue = ItemFilter(
        pa.table({"item_id": ["a"], "price": [1], "city": ["x"], "latitude": [1.0], "longitude": [1.0], "hours": ["1" * 168]})
    )
    with pytest.raises(RequestError) as caught:
        catalogue.compile(where)
    assert caught.value.location == at
    assert "\n" not in str(caught.value)
    if at:
        assert str(at) in str(caught.value)


def test_what_is_no_filter_at_all() -> None:
    for where in ([{"price": 1}], 3, None, {"price": {1, 2}}, {"price": b"x"}):
        with pytest.raises(RequestError):
            ItemFilter(pa.table({"item_id": ["a"], "price": [1]})).compile(where)  # type: ignore[arg-type]


def test_size_is_bounded() -> None:
    few = {"and": [{"price": number} for number in range(MAX_PARTS - 1)]}
    assert len(parse_filter(few).parts) == MAX_PARTS - 1  # type: ignore[union-attr]
    deep: Any = {"price": 1}
    for _ in range(5000):
        deep = {"not": deep}
    for where in (
        {"and": [{"price": number} for number in range(MAX_PARTS)]},
        deep,
        "not " * (MAX_DEPTH + 1) + "price == 1",
        "not " * 4000 + "price == 1",
        "price == " + "-" * 15_000 + "1",
        "price == " + "+".join("1" * 9000),
        "price" + ".x" * 9000,
        "price in [" + "1," * 20_000 + "]",
        " or ".join(["price == 1"] * 300),
    ):
        with pytest.raises(RequestError, match=r"at most|cannot|Cannot|A value|Allowed") as caught:
            parse_filter(where)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("limit", [MAX_DEPTH, MAX_DEPTH + 1])
def test_the_depth_is_bounded_to_the_last_part(limit: int) -> None:
    turned: Any = {"price": 1}
    for number in range(limit):
        turned = {"not": turned} if number % 3 == 0 else {("and", "or")[number % 3 - 1]: [turned, {"price": 2}]}
    for deep in ("not " * limit + "price == 1", turned):
        if limit <= MAX_DEPTH:
            parse_filter(deep)
        else:
            with pytest.raises(RequestError, match=f"at most {MAX_DEPTH} deep") as caught:
                parse_filter(deep)
            assert caught.value.location == ""


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"or": 3}, "Got 3 at or. or must be a list of filters."),
        ({"and": {"a": 1}}, "Got a dict at and. and must be a list of filters."),
        ({"within": {"km": 5, "near": [1]}}, "Got a list at within.near. near must be a list of latitude and longitude."),
        ({"within": {"km": 5, "near": "here"}}, "Got 'here' at within.near. near must be a list of latitude and longitude."),
        ({"within": {"km": True}}, "Got True at within.km. The distance of within must be in km, 0 or more."),
        ({"not": {"seen": 0.5}}, "Got 0.5 at not.seen. seen must be true or false."),
        ({"open": None}, 'Got None at open. open must be "now" or a time such as "Fri 19:30".'),
        ({"price": {"max": "x" * 200}}, f"Got 'x{'x' * 78} at price.max. max must be a number."),
        ({"price": [1, [2]]}, "Got a list at price[1]. A value must be a text, a number or a list of them."),
        ([], 'Got a list at the whole filter. A JSON filter must be an object such as {"price": {"max": 2}}.'),
    ],
)
def test_an_error_says_what_was_found(where: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_filter(where)
    assert str(caught.value) == said


def test_parts_in_words() -> None:
    """Check error positions: a character of a text, a path of JSON, and an empty path for the root."""
    assert str(Part(16, "price <")) == "'price <' at character 16"
    assert str(Part("and[1].price", "price")) == "and[1].price" and str(Part("", "x")) == "the whole filter"


def test_times_of_the_week() -> None:
    for text, hour in (("Mon 0:00", 0), ("monday 0", 0), (" TUE 01:59 ", 25), ("Fri 19:30", 115), ("sunday 23:59", 167)):
        assert hour_of_week(text) == hour
    for text in ("Mo 3", "Montag 3", "Mon 24", "Mon 3:60", "Mon3", "Mon", "3", "Fri 19:30 " * 20):
        with pytest.raises(RequestError) as caught:
            hour_of_week(text)
        assert str(caught.value) == f'Cannot read time {text[:80]!r}. Write it like "Fri 19:30".'
        assert caught.value.location is None
    with pytest.raises(RequestError, match="Cannot read time 'x' in open") as named:
        hour_of_week("x", Part("open", "x"))
    assert named.value.location == "open"


@pytest.mark.parametrize(
    ("location", "quoted"),
    [
        (["north", 2], "['north', 2]"),
        ((1.0,), "(1.0,)"),
        ((1, 2, 3), "(1, 2, 3)"),
        (["x\n  y", "z" * 100], "['x\\n y', '" + "z" * 49),
        (None, "None"),
    ],
)
def test_what_is_no_location_is_quoted(location: Any, quoted: str) -> None:
    assert len(quoted) <= 60
    rest = "A location is latitude and longitude in degrees, such as (42.36, -71.06)."
    with pytest.raises(RequestError) as caught:
        check_location(location)
    assert str(caught.value) == f"Got location {quoted}. {rest}" and caught.value.location is None
    with pytest.raises(RequestError) as named:
        check_location(location, Part("near", ""))
    assert str(named.value) == f"Got location {quoted} in near. {rest}" and named.value.location == "near"


def test_locations_are_within_the_globe() -> None:
    assert check_location([-90, 180]) == (-90.0, 180.0) and check_location((90, -180)) == (90.0, -180.0)
    for at in ((90.1, 0), (-90.1, 0), (0, 180.1), (0, -180.1), (float("nan"), 0), (0, float("inf"))):
        with pytest.raises(RequestError, match=r"Got location .*\. Latitude must be from -90 to 90") as caught:
            check_location(at)
        assert caught.value.location is None and " in " not in str(caught.value)
        with pytest.raises(RequestError, match=r"in near\. Latitude") as named:
            check_location(at, Part("near", ""))
        assert named.value.location == "near"


WORDS = [
    "price",
    "category",
    "city",
    "seen",
    "open_now",
    "within(5)",
    "and",
    "or",
    "not",
    "==",
    "<=",
    "in",
    "(",
    ")",
    "[",
    "]",
    ",",
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["now", "Fri 19:30", "Tea"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["and", "or", "not", "within", "km", "near", "open", "seen", "column", "price", "tags", "any", "max", "x"]
            )
            | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
CATALOGUE = ItemFilter(
    pa.table(
        {
            "item_id": ["a", "b", "c"],
            "price": pa.array([1, None, 3]),
            "tags": [["tea"], None, []],
            "latitude": [1.0, None, 2.0],
            "longitude": [1.0, None, 2.0],
            "hours": ["1" * 168, None, "0" * 168],
            "facts": [{"x": 1}, None, {"x": 2}],
        }
    )
)


CASES = settings(max_examples=int(os.environ.get("TWOTOWER_FUZZ_CASES", "100")))


def answered(where: Any) -> None:
    try:
        mask = CATALOGUE.compile(where, home=(1.0, 1.0), now=0, seen=np.array([2]))
    except RequestError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        assert mask.shape == (5,) and mask.dtype == np.bool_ and not mask[:2].any() and not mask.flags.writeable


@given(
    st.text(max_size=30) | st.lists(st.sampled_from([*WORDS, *string.punctuation, "1", '"x"', "'\\"]), max_size=12).map(" ".join)
)
@example('price == "\\d"')
@example("price == 1if 2else 3")
@example("facts == 1")
@CASES
def test_any_text_gives_a_mask_or_an_error(text: str) -> None:
    answered(text)


@given(json_values)
@example({"facts": 1})
@example({"price": float("nan")})
@CASES
def test_any_json_gives_a_mask_or_an_error(where: Any) -> None:
    answered(where)
