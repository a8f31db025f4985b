"""Test the filter language: every form, and one-line errors for malformed texts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from twotower.errors import RequestError
from twotower.features.geo import distances_km
from twotower.schema import FeatureSpec
from twotower.search.filters import item_filter
from twotower.search.filters.item_filter import ItemFilter, check_location
from twotower.search.filters.tree import hour_of_week

OPEN_FRIDAY_EVENING = "".join("1" if hour in range(114, 119) else "0" for hour in range(168))


@pytest.fixture
def catalogue() -> ItemFilter:
    return ItemFilter(
        pa.table(
            {
                "item_id": ["a", "b", "c", "d"],
                "name": ["A", "B", "C", "D"],
                "categories": [["Mexican", "Bars"], ["Mexican"], None, ["Parks"]],
                "city": ["Tampa", "Largo", "Tampa", None],
                "price": pa.array([1, 3, None, 2], pa.int64()),
                "latitude": [27.95, 27.95, None, 28.95],
                "longitude": [-82.46, -82.40, None, -82.46],
                "hours": [OPEN_FRIDAY_EVENING, "1" * 168, None, "0" * 168],
            }
        )
    )


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ('category == "mexican"', "ab"),
        ('category != "Bars"', "bd"),
        ('not category == "Bars"', "bd"),
        ("not price <= 2", "b"),
        ("not not price <= 2", "ad"),
        ("not (price <= 2 or city == 'Tampa')", "b"),
        ("not (price <= 2 and city == 'Tampa')", "b"),
        ("price == 1 or city == 'Tampa'", "ac"),
        ("not (price == 3 and city == 'Tampa')", "abd"),
        ("not within(27.95, -82.46, 5)", "bd"),
        ('not open_at("Fri 19:30")', "d"),
        ("city != 'Tampa'", "b"),
        ("price not in [1]", "bd"),
        ('category in ["Parks", "Bars"]', "ad"),
        ('city in ["Tampa"] and price <= 2', "a"),
        ("price > 1", "bd"),
        ("price == 2 or price == 3", "bd"),
        ("price in [1, 2]", "ad"),
        ("within(27.95, -82.46, 5)", "a"),
        ("within(27.95, -82.46, 7)", "ab"),
        ("within(6)", "ab"),
        ('open_at("Fri 19:30")', "ab"),
        ('open_at("Mon 03:00")', "b"),
        ('open_at("friday 19")', "ab"),
        ('id == "c"', "c"),
    ],
)
def test_forms(catalogue, text, passed):
    mask = catalogue.compile(text, home=(27.95, -82.44))
    assert mask.shape == (6,)
    assert not mask[:2].any()
    assert "".join("abcd"[i] for i in range(4) if mask[2 + i]) == passed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "category ==",
        "colour == 3",
        "price < 'x'",
        "city < 3",
        "__import__('os').system('ls')",
        "price.real == 3",
        "category == [[1]]",
        "category == city",
        "1 < price < 3",
        "within('a')",
        "within(1, 2)",
        "open_at('Someday')",
        "open_at(3)",
        "price",
        "lambda: 1",
        "price == True",
        "price == '2'",
        "price in [1, '2']",
        "price != 'x'",
        f"price == {10**400}",
        f"price < {10**400}",
        f"price < 0x{'f' * 4000}",
        "price < 1e999",
        "within(1e999)",
        "within(-1)",
        "within(91, 0, 5)",
        "within(0, 181, 5)",
        "open_at('Fri 19:99')",
        "open_at('Fri 24:00')",
        "open_at('friyay 7')",
        "open_at('Fri ²')",
        "open_at('Fri')",
        "(" * 300 + "price == 1" + ")" * 300,
        "\x00",
    ],
)
def test_malformed_is_one_line(catalogue, text):
    with pytest.raises(RequestError) as caught:
        catalogue.compile(text)
    assert "\n" not in str(caught.value)


def test_a_filter_by_distance_needs_locations():
    nowhere = ItemFilter(pa.table({"item_id": ["a"], "latitude": pa.array([None], pa.float64()), "longitude": [1.0]}))
    for text in ("within(5)", "within(1, 2, 5)", "not within(5)"):
        with pytest.raises(RequestError, match="items of this catalogue have no locations"):
            nowhere.compile(text, home=(1.0, 2.0))


def spec(name: str, kind: str, *columns: str) -> FeatureSpec:
    return FeatureSpec(name=name, side="item", kind=kind, columns=columns or (name,))


def test_columns_are_those_of_the_features():
    items = pa.table(
        {
            "item_id": ["a", "b", "c"],
            "lat": [1.0, None, 1.0],
            "lon": [2.0, 2.0, 3.0],
            "latitude": ["north", "south", None],
            "longitude": [0.0, 0.0, 0.0],
            "tags": [["tea"], [], None],
            "open": ["1" * 168, None, "0" * 168],
        }
    )
    specs = (spec("at", "geo", "lat", "lon"), spec("tags", "multi"), spec("open", "hours"))
    shop = ItemFilter(items, specs)
    assert shop.compile("within(1, 2, 5)").tolist() == [False, False, True, False, False]
    assert shop.compile('category == "Tea"').tolist() == [False, False, True, False, False]
    assert shop.compile('not categories == "Tea"').tolist() == [False, False, False, True, False]
    assert shop.compile('not open_at("Mon 0")').tolist() == [False, False, False, False, True]
    assert ItemFilter(items).category is None
    with pytest.raises(RequestError, match="items of this catalogue have no locations"):
        ItemFilter(items).compile("within(1, 2, 5)")


def test_a_column_called_category_is_itself():
    shop = ItemFilter(
        pa.table({"item_id": ["a", "b"], "category": ["Tea", None], "tags": [["x"], ["y"]]}), (spec("tags", "multi"),)
    )
    assert shop.category == "category"
    assert shop.compile('category == "tea"').tolist() == [False, False, True, False]
    assert shop.compile('categories != "tea"').tolist() == [False, False, False, False]


@pytest.mark.parametrize("place", [(500.0, 500.0), (91.0, 0.0), (0.0, -180.5), (float("nan"), 0.0), (0.0, float("inf"))])
def test_a_location_is_on_the_earth(place):
    with pytest.raises(RequestError, match="Latitude must be from -90 to 90"):
        check_location(place)
    assert check_location((-90, 180)) == (-90.0, 180.0)


def test_within_needs_a_home(catalogue):
    with pytest.raises(RequestError, match="Add a point"):
        catalogue.compile("within(5)")


def test_distances():
    found = distances_km(np.array([[0.0, 1.0], [90.0, 0.0], [np.nan, 0.0]]), (0.0, 0.0))
    assert found[0] == pytest.approx(111.19, abs=0.05)
    assert found[1] == pytest.approx(10007.5, abs=1)
    assert np.isnan(found[2])


def test_hour_of_week():
    assert hour_of_week("Mon 00:10") == 0
    assert hour_of_week("friday 19:30") == 115
    assert hour_of_week("Sun 23:59") == 167


def test_what_was_seen(catalogue):
    seen = np.array([3, 4, 3])
    assert catalogue.compile("seen", seen=seen).tolist() == [False, False, False, True, True, False]
    assert catalogue.compile("not seen and price <= 2", seen=seen).tolist() == [False, False, True, False, False, True]
    assert catalogue.compile({"seen": False}).tolist() == [False, False, True, True, True, True], "no history: nothing was seen"
    assert catalogue.compile({"seen": True}, seen=np.array([1, 0])).sum() == 0, "what is unknown is not of the catalogue"


FRIDAY_1930 = 1_700_249_400  # 2023-11-17 19:30, a Friday


def test_open_now_is_on_the_clock_of_the_data(catalogue):
    assert catalogue.compile("open_now", now=FRIDAY_1930).tolist() == catalogue.compile('open_at("Fri 19:30")').tolist()
    assert catalogue.compile({"open": "now"}, now=FRIDAY_1930 - 6 * 3600).tolist() == [False] * 3 + [True, False, False]
    assert catalogue.compile("not open_now", now=0).tolist() == [False, False, True, False, False, True]
    assert catalogue.compile("open_now", now=253_402_300_799).shape == (6,), "the last second of the year 9999"
    for now in (None, -1, 253_402_300_800, 10**15):
        with pytest.raises(RequestError, match="seconds since 1970"):
            catalogue.compile("price == 1 and open_now", now=now)


def test_open_now_uses_the_local_time_of_each_item():
    """All items are open on Fridays from 19 to 20. The time is 19:30 in New York, 18:30 in Chicago and Saturday in India."""
    hours = "".join("1" if hour == 115 else "0" for hour in range(168))
    zones = ["America/New_York", "America/Chicago", "Asia/Kolkata", "Nowhere/Else", None, "America/New_York", "../etc"]
    items = pa.table({"item_id": list("abcdefg"), "hours": [hours] * 5 + [None, hours], "timezone": zones})
    world = ItemFilter(items)
    assert world.zoned and not ItemFilter(items.drop_columns("timezone")).zoned
    backwards = ItemFilter(items.take([6, 3, 4, 2]))  # names that are no zones come first
    assert backwards.compile("open_now", now=FRIDAY_1930 - 5 * 3600 - 1800).tolist()[2:] == [False, False, False, True]
    utc = FRIDAY_1930 + 5 * 3600
    assert world.compile("open_now", now=utc).tolist()[2:] == [True] + [False] * 6
    assert world.compile("not open_now", now=utc).tolist()[2:] == [False, True, True] + [False] * 4
    assert world.compile("open_now", now=utc + 3600).tolist()[2:] == [False, True] + [False] * 5
    india = FRIDAY_1930 - 5 * 3600 - 1800  # 19:30 there, half an hour off whole ones
    for shift, open_ in ((-1801, False), (-1800, True), (1799, True), (1800, False)):
        assert world.compile("open_now", now=india + shift).tolist()[2:] == [False, False, open_] + [False] * 4
    assert world.compile('open_at("Fri 19:30")').tolist()[2:] == [True] * 5 + [False, True], "an hour of the week needs no zone"


@pytest.mark.parametrize("asked", ["ΠΕΙΡΑΙΑΣ", "İstanbul", "TAMPA"])
def test_texts_are_found_by_their_own_spelling_in_any_script(asked: str) -> None:
    cities = ItemFilter(pa.table({"item_id": list("abc"), "city": ["ΠΕΙΡΑΙΑΣ", "İstanbul", "Tampa"]}))
    assert cities.compile(f'city == "{asked}"').sum() == 1


def test_what_is_not_offered_passes_no_filter() -> None:
    offered = np.array([False, False, True, False, True])
    shop = ItemFilter(pa.table({"item_id": list("abc"), "price": [1, 1, 2]}), offered=offered)
    assert shop.compile("price == 1").tolist() == [False, False, True, False, False]
    assert shop.compile("not price == 1").tolist() == [False, False, False, False, True]


def test_masks_are_kept_by_what_they_refer_to(catalogue):
    assert catalogue.compile("price <= 2", home=(1, 2)) is catalogue.compile("price <= 2", home=(3, 4), now=5)
    assert catalogue.compile("within(5)", home=(27.95, -82.46)) is catalogue.compile("within(5)", home=(27.95, -82.46))
    assert catalogue.compile("within(5)", home=(27.95, -82.46)) is not catalogue.compile("within(5)", home=(27.95, -82.40))
    assert (
        catalogue.compile({"within": 5}, home=(27.95, -82.40)).tolist()
        == catalogue.compile("within(5)", home=(27.95, -82.40)).tolist()
    )
    with pytest.raises(ValueError, match="read-only"):
        catalogue.compile("price <= 2")[3] = True


def test_not_a_number_is_unknown_and_values_beyond_all_others_match_nothing() -> None:
    nan = float("nan")
    prices = pa.array([1.0, nan, None, 7.0], pa.float64())
    sizes = pa.array([[1.0, nan], [nan], None, []], pa.list_(pa.float64()))
    shop = ItemFilter(pa.table({"item_id": list("abcd"), "price": prices, "sizes": sizes}))

    def passed(text: str) -> str:
        return "".join(name for name, passes in zip("abcd", shop.compile(text)[2:], strict=True) if passes)

    assert [passed(text) for text in ("price > 5", "price < 5", "price != 1", "not price <= 2", "price >= -1")] == [
        "d", "a", "d", "d", "ad",
    ]  # fmt: skip
    assert [passed(text) for text in ("price in [1, 99]", "price == 99", "price == -9", "price not in [99]")] == ["a", "", "", "ad"]
    cheap = ItemFilter(pa.table({"item_id": list("abcde"), "price": [1.0, 2.0, 3.0, nan, 7.0]}))  # most are below the bound
    assert cheap.compile("price > 5").tolist()[2:] == [False] * 4 + [True]
    assert [passed(text) for text in ("sizes == 1", "sizes != 2", "sizes == 99")] == ["a", "abd", ""]


def test_masks_are_kept_up_to_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of three items and the text of its filter are counted as the longest that is kept."""
    items = pa.table({"item_id": ["a", "b", "c"], "price": [1, 2, 3]})
    monkeypatch.setattr(item_filter, "CACHE_BYTES", 10 * (5 + item_filter.KEY_BYTES))
    for number, kept in ((10, True), (11, False)):
        shop = ItemFilter(items)
        first = shop.compile("price == 0")
        for price in range(1, number):
            shop.compile(f"price == {price}")
        assert (shop.compile("price == 0") is first) == kept
    long = f"price in [{'1, ' * 1500}1]"
    assert len(long) > item_filter.CACHE_CHARS and shop.compile(long) is not shop.compile(long)


def test_json_in_a_text_is_no_filter() -> None:
    shop = ItemFilter(pa.table({"item_id": ["a"], "price": [1]}))
    assert shop.compile({"price": 1}).any()
    with pytest.raises(RequestError):
        shop.compile('{"price": 1}')
    with pytest.raises(RequestError, match="The filter is not JSON") as caught:
        shop.compile({"price": {1, 2}})
    assert caught.value.location == ""


def test_common_columns_are_prepared_when_it_is_warmed() -> None:
    values = {"item_id": ["a"], "categories": [["x"]], "city": ["y"], "price": [1], "stars": [4.5], "other": [1]}
    shop = ItemFilter(pa.table(values))
    assert not shop._columns
    shop.warm()
    assert set(shop._columns) == set(values) - {"other"} and {"_geo_index", "_hours", "_zones"} <= set(vars(shop))


def test_columns_that_cannot_be_compared_say_so():
    odd = ItemFilter(
        pa.table(
            {"item_id": ["a"], "facts": [{"x": 1}], "sizes": [[1, 2]], "big": [2**60], "kind": pa.array(["X"]).dictionary_encode()}
        )
    )
    with pytest.raises(RequestError, match=r"Column 'facts' in .* cannot be compared: its type is struct") as caught:
        odd.compile("big > 5 and facts == 1")
    assert caught.value.location == 13
    with pytest.raises(RequestError, match=r"column 'sizes' is list<.*int64>; only numbers can be compared"):
        odd.compile("sizes < 3")
    for passes in ("sizes == 2", "sizes == 2 and sizes == 1", f"big == {2**60}", "big > 5", 'kind == "x"'):
        assert odd.compile(passes).tolist() == [False, False, True]
    odd.warm()


def test_only_columns_are_named_as_columns(catalogue: ItemFilter) -> None:
    known = "Known: categories, category, city, hours, item_id, latitude, longitude, name, price."
    for wrong in ('xyzzy == "tea"', {"xyzzy": "tea"}, {"column": "xyzzy", "any": ["tea"]}):
        with pytest.raises(RequestError, match=known):
            catalogue.compile(wrong)
    with pytest.raises(RequestError, match=r"Unknown column 'columns' .*Known: categories"):
        catalogue.compile("columns == 1")
    with pytest.raises(RequestError, match="Did you mean 'price'"):
        catalogue.compile("prise <= 2")


def test_a_mistyped_key_of_json_gets_the_key_that_is_meant(catalogue: ItemFilter) -> None:
    with pytest.raises(RequestError, match="Did you mean 'within'"):
        catalogue.compile({"witin": 5})
    with pytest.raises(RequestError, match="Did you mean 'open'"):
        catalogue.compile({"open_now": 1})
