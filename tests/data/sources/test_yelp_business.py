"""Test that businesses of every release get the same names: attributes, hours, cities, categories."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twotower.data.sources.yelp_business import attribute_name, clean_city, parse_business

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def open_hours(hours: Any) -> dict[str, list[int]]:
    """Return the open hours by day of a business."""
    bits = parse_business({"business_id": "b", "hours": hours})["hours"]
    assert bits is not None and len(bits) == 168 and set(bits) <= {"0", "1"}
    found = {day: [hour for hour in range(24) if bits[24 * number + hour] == "1"] for number, day in enumerate(DAYS)}
    return {day: open_at for day, open_at in found.items() if open_at}


def test_attributes_of_every_release_have_one_naming() -> None:
    strings = {
        "WiFi": "u'free'",
        "Alcohol": "'beer_and_wine'",
        "NoiseLevel": "u'average'",
        "RestaurantsPriceRange2": "2",
        "RestaurantsTakeOut": "True",
        "GoodForKids": "None",
        "Smoking": "u'no'",
        "BusinessParking": "{'garage': False, 'street': True, 'lot': None}",
        "Ambience": "{u'casual': True, 'divey': False}",
        "GoodForMeal": "None",
        "Music": "{'dj': False",
        "Caters": "False",
    }
    listed = [f"{name}: {value.removeprefix('u').strip(chr(39))}" for name, value in strings.items()]
    nested = {
        "Wi-Fi": "free",
        "Alcohol": "beer_and_wine",
        "Noise Level": "average",
        "Price Range": 2,
        "Take-out": True,
        "Good for Kids": False,
        "Smoking": "no",
        "Parking": {"garage": False, "street": True},
        "Ambience": {"casual": True, "divey": False},
        "Payment Types": {},
    }
    expected = [
        "Alcohol=beer_and_wine",
        "Ambience.casual=True",
        "BusinessParking.street=True",
        "NoiseLevel=average",
        "RestaurantsTakeOut=True",
        "WiFi=free",
    ]
    for attributes in (strings, listed, nested):
        made = parse_business({"business_id": "b", "attributes": attributes})
        assert made["attributes"] == expected and made["price"] == 2
    for nothing in (None, {}, [], "x", {"RestaurantsPriceRange2": "None"}, {"Price Range": 9}):
        made = parse_business({"business_id": "b", "attributes": nothing})
        assert made["attributes"] == [] and made["price"] is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Accepts Credit Cards", "BusinessAcceptsCreditCards"),
        ("BYOB/Corkage", "BYOBCorkage"),
        ("By Appointment Only", "ByAppointmentOnly"),
        ("Drive-Thru", "DriveThru"),
        ("Good For", "GoodForMeal"),
        ("Good For Groups", "RestaurantsGoodForGroups"),
        ("Good For Kids", "GoodForKids"),
        ("Has TV", "HasTV"),
        ("Order at Counter", "RestaurantsCounterService"),
        ("Takes Reservations", "RestaurantsReservations"),
        ("Waiter Service", "RestaurantsTableService"),
        ("RestaurantsTableService", "RestaurantsTableService"),
    ],
)
def test_old_attribute_names(old: str, new: str) -> None:
    assert attribute_name(old) == new


def test_hours_of_every_release_are_the_same_bits() -> None:
    expected = {"mon": list(range(8, 19)), "fri": [*range(17, 24)], "sat": [0, 1]}
    assert open_hours({"Monday": "8:0-18:30", "Friday": "17:0-2:0"}) == expected
    assert open_hours(["Monday 8:0-18:30", "Friday 17:0-2:0"]) == expected
    assert open_hours({"Monday": {"open": "08:00", "close": "18:30"}, "Friday": {"open": "17:00", "close": "02:00"}}) == expected


def test_hours_wrap_and_full_days_are_open() -> None:
    assert open_hours({"Wednesday": "0:0-0:0"}) == {"wed": list(range(24))}
    assert open_hours({"Sunday": "22:30-1:15"}) == {"sun": [22, 23], "mon": [0, 1]}
    assert open_hours({"Monday": "11:0-0:0"}) == {"mon": list(range(11, 24))}
    assert open_hours({"Monday": "9:59-10:1", "Tuesday": "noon-late", "Someday": "1:0-2:0", "Thursday": "9:0-31:0"}) == {
        "mon": [9, 10]
    }
    for unknown in (None, {}, [], {"Monday": None}, "x"):
        assert parse_business({"business_id": "b", "hours": unknown})["hours"] is None


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("Audubon ", "Audubon"),
        ("NASHVILLE", "Nashville"),
        ("abington", "Abington"),
        ("Las  Vegas", "Las Vegas"),
        ("Saint Louis", "St. Louis"),
        ("ST. Louis", "St. Louis"),
        ("st louis", "St. Louis"),
        ("St.Ann", "St. Ann"),
        ("Stowe", "Stowe"),
        ("Mt Juliet", "Mount Juliet"),
        ("King Of Prussia", "King of Prussia"),
        ("Land o lakes", "Land O Lakes"),
        ("Land O'Lakes", "Land O'Lakes"),
        ("o'fallon", "O'Fallon"),
        ("McCordsville", "McCordsville"),
        ("Spring HIll", "Spring Hill"),
        ("Dollard-Des-Ormeaux", "Dollard-des-Ormeaux"),
        ("Montréal", "Montréal"),
        ("MONTRÉAL", "Montréal"),
        ("Town 'n' Country", "Town 'n' Country"),
        ("The Villages", "The Villages"),
        (" ", None),
    ],
)
def test_cities_have_one_spelling(dirty: str, clean: str | None) -> None:
    assert clean_city(dirty) == clean
    assert clean_city(clean or "") == clean


def test_categories_are_a_string_or_a_list() -> None:
    string = json.loads('{"business_id": "b", "categories": "Caf\\u00e9s, Bars\\/Pubs ,Bars\\/Pubs, "}')
    assert parse_business(string)["categories"] == ["Cafés", "Bars/Pubs"]
    assert parse_business({"business_id": "b", "categories": ["Cafés", "Bars/Pubs"]})["categories"] == ["Cafés", "Bars/Pubs"]
    assert parse_business({"business_id": "b", "categories": None})["categories"] == []


@pytest.mark.parametrize(
    ("key", "value", "flag"), [("is_open", "FALSE", 0), ("open", "no", 0), ("is_open", 0.0, 0), ("open", True, 1)]
)
def test_is_open_in_any_spelling(key: str, value: Any, flag: int) -> None:
    assert parse_business({"business_id": "b1", key: value})["is_open"] == flag
