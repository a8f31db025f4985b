"""Write the business rows of a simulated town in the format of Yelp's 2022 release.

Attributes, price, hours and second categories follow the taste vector of the item, so content predicts who likes it. Dirty and
missing values are as frequent as in the release.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from twotower.data.simulator import vocabulary as words
from twotower.data.simulator.town import STILL_OPEN, Truth

Rng = np.random.Generator
Row = dict[str, Any]

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = {
    "meal": ("11:0-22:0", "11:0-21:0", "11:30-21:30", "10:30-23:0", "16:0-22:30"),
    "morning": ("7:0-14:0", "6:30-15:0", "6:0-18:0", "8:0-16:30"),
    "night": ("17:0-2:0", "16:0-1:0", "18:30-2:0", "15:0-0:0"),
    "shop": ("10:0-18:0", "10:0-20:0", "9:0-21:0", "10:30-19:30"),
    "service": ("8:0-17:0", "9:0-18:0", "8:0-18:30", "7:30-16:30"),
    "weekend": ("9:0-17:0", "8:0-20:0", "10:0-22:0", "6:0-21:30"),
}


def business_lines(truth: Truth, count: Any, mean: Any, rng: Rng) -> Iterator[str]:
    """Yield a JSON line for each item, with the `count` and `mean` [N] of its stars in the whole release."""
    n, leaves = len(truth.item_id), words.categories()
    null = {
        name: set(rng.permutation(n)[: max(1, round(n * share))].tolist())
        for name, share in (("attributes", 0.09), ("hours", 0.16), ("categories", 0.001))
    }
    relatives = _relatives(truth, leaves)
    town = np.unique(truth.place_town, return_index=True)[1]
    coins = rng.random((n, 64))
    for i in range(n):
        leaf, coin, t = leaves[truth.item_category[i]], coins[i], int(truth.item_town[i])
        city, state, latitude, longitude = _where(t)
        x, y = truth.item_xy[i].tolist()
        area = int(
            np.linalg.norm(truth.place_xy[town[t] :][: len(truth.place_town) // len(town)] - truth.item_xy[i], axis=1).argmin()
        )
        row: Row = {
            "business_id": truth.item_id[i].decode(),
            "name": _name(leaf, coin),
            "address": f"{int(coin[1] * 9000) + 10} {_of(words.STREETS, coin[2])}"
            + (f", Ste {int(coin[3] * 200)}" if coin[3] < 0.15 else ""),
            "city": _dirty(city, coin[4]),
            "state": state,
            "postal_code": f"{(19_000 + 211 * t + area) % 100_000:05d}" if coin[5] > 0.01 else "",
            "latitude": round(latitude + y / 110.574, 7),
            "longitude": round(longitude + x / (111.32 * np.cos(np.radians(latitude))), 7),
            "stars": round(float(np.clip(round(mean[i] * 2) / 2, 1, 5)), 1),
            "review_count": int(count[i]),
            "is_open": int(truth.item_close_s[i] == STILL_OPEN),
            "attributes": None if i in null["attributes"] else _attributes(truth, i, leaf, coin[10:]),
            "categories": None if i in null["categories"] else _categories(leaf, relatives[i].tolist(), leaves, coin[6:10]),
            "hours": None if i in null["hours"] else _hours(leaf, coin[50:]),
        }
        yield json.dumps(row, ensure_ascii=bool(i % 2)).replace("/", "\\/") + "\n"  # both ways of escaping occur in the releases


def _where(town: int) -> tuple[str, str, float, float]:
    """Return name, state, latitude and longitude of a town; towns are at least 90 km apart."""
    name = words.TOWNS[town % len(words.TOWNS)] + words.TOWN_SUFFIXES[town // len(words.TOWNS)]
    return name, words.STATES[town % len(words.STATES)], 29.0 + town // 8 * 1.1 + 0.07 * (town % 3), -118.0 + town % 8 * 5.3


def _relatives(truth: Truth, leaves: list[words.Category]) -> Any:
    """Return int [N]: for each item, the most similar other category of the same parent by mean taste."""
    category = truth.item_category
    sums = np.zeros((len(leaves), truth.item_latent.shape[1]))
    np.add.at(sums, category, truth.item_latent)
    means = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    parent = np.array([leaf.parent for leaf in leaves])
    sibling = (parent[:, None] == parent) & ~np.eye(len(leaves), dtype=bool)
    return np.concatenate(
        [
            np.where(sibling[category[a : a + 10_000]], truth.item_latent[a : a + 10_000] @ means.T, -np.inf).argmax(1)
            for a in range(0, len(category), 10_000)
        ]
    )


def _categories(leaf: words.Category, relative: int, leaves: list[words.Category], coin: Any) -> str:
    names = [leaf.name, leaf.parent]
    if coin[0] < 0.35 and leaves[relative].parent == leaf.parent:
        names.append(leaves[relative].name)
    if leaf.rhythm == "night" and coin[1] < 0.3:
        names.append("Restaurants")
    if coin[2] < 0.06:
        names.append("Event Planning & Services")
    turn = int(coin[3] * len(names))
    return ", ".join(names[turn:] + names[:turn])


def _name(leaf: words.Category, coin: Any) -> str:
    owner, adjective, noun = _of(words.FIRST_NAMES, coin[30]), _of(words.ADJECTIVES, coin[31]), _of(words.NOUNS, coin[32])
    word = _of(leaf.words, coin[33]).title()
    choice: str = _of(
        (
            f"{owner}'s {word}",
            f"{adjective} {noun}",
            f"{adjective} {word}",
            f"The {noun} & {word}",
            f"Café {noun}" if leaf.rhythm == "morning" else f"{noun} {leaf.name}",
        ),
        coin[34],
    )
    return choice


def _dirty(city: str, coin: float) -> str:
    """Return a city name, misspelt in one case of twelve."""
    variants = (city + " ", city.upper(), city.lower(), city.replace("Saint ", "St. "), city.replace("Saint ", "St "))
    return variants[int(coin * 60)] if coin < 5 / 60 else city


def _hours(leaf: words.Category, coin: Any) -> Row:
    usual = _of(HOURS[leaf.rhythm], coin[0])
    closed = {0, 6} if coin[1] < 0.1 else {6} if leaf.rhythm == "service" or coin[1] < 0.25 else set()
    odd = int(coin[2] * 40)  # one item in six has a day with other or unknown hours
    return {
        day: "0:0-0:0" if k == odd or coin[3] < 0.03 else _of(HOURS[leaf.rhythm], coin[4]) if k == odd - 7 else usual
        for k, day in enumerate(DAYS)
        if k not in closed
    }


def _attributes(truth: Truth, i: int, leaf: words.Category, coin: Any) -> Row:
    """Return attributes of an item from its taste (loud, elegant, trendy, adult; each -1 to 1) and noise."""
    loud, elegant, trendy, adult = (truth.item_latent[i] + 0.25 * (coin[:4] - 0.5)).tolist()
    prefix = "u" if coin[4] < 0.6 else ""
    price, eats = int(truth.item_price[i]), leaf.rhythm in ("meal", "morning", "night")
    found: Row = {"BusinessAcceptsCreditCards": str(bool(coin[5] < 0.95)), "BikeParking": str(trendy > -0.3)}
    if price and coin[6] < 0.93:
        found["RestaurantsPriceRange2"] = str(price)
    parking = {"garage": elegant > 0.5, "street": trendy > 0, "validated": False, "lot": adult < 0.3, "valet": elegant > 0.75}
    found["BusinessParking"] = "None" if coin[7] < 0.03 else _literal(parking, "")
    if eats:
        found |= _of_meals((loud, elegant, trendy, adult), leaf.rhythm, prefix, coin)
    if leaf.rhythm == "night":
        found["Music"] = _literal(
            {"dj": loud > 0.5, "background_music": loud < 0.2, "no_music": None, "jukebox": elegant < -0.4, "live": loud > 0.1},
            prefix,
        )
        found["HappyHour"], found["GoodForDancing"] = str(elegant < 0.3), str(loud > 0.6)
    found["GoodForKids"] = str(adult < 0)
    found["WiFi"] = f"{prefix}'{'free' if trendy > -0.1 else 'paid' if coin[11] < 0.05 else 'no'}'"
    found["DogsAllowed"] = "None" if coin[12] < 0.02 else str(trendy > 0.3 and adult < 0.3)
    if not eats:
        found["ByAppointmentOnly"] = str(leaf.rhythm == "service" and elegant > 0)
    return {name: value for k, (name, value) in enumerate(found.items()) if coin[13 + k] > 0.2}  # one in five is missing


def _of_meals(taste: tuple[float, ...], rhythm: str, prefix: str, coin: Any) -> Row:
    """Attributes of a place where people eat or drink."""
    loud, elegant, trendy, adult = taste
    noise = ("quiet", "average", "loud", "very_loud")[int(np.searchsorted([-0.45, 0.4, 0.75], loud))]
    found: Row = {"NoiseLevel": f"{prefix}'{noise}'"}
    found["RestaurantsAttire"] = f"{prefix}'{'formal' if elegant > 0.9 else 'dressy' if elegant > 0.6 else 'casual'}'"
    found["Alcohol"] = (
        f"{prefix}'{'full_bar' if adult > 0.3 or rhythm == 'night' else 'beer_and_wine' if adult > -0.2 else 'none'}'"
    )
    found["RestaurantsReservations"] = str(elegant > 0.2)
    found["RestaurantsTableService"] = str(elegant > -0.3)
    found["RestaurantsTakeOut"] = "None" if coin[8] < 0.04 else str(elegant < 0.5)
    found["RestaurantsDelivery"] = "None" if coin[9] < 0.05 else str(trendy > 0.1)
    found["HasTV"] = str(loud > 0)
    found["OutdoorSeating"] = "None" if coin[10] < 0.04 else str(trendy > 0)
    mood: dict[str, bool | None] = {
        "romantic": adult > 0.5 and loud < 0,
        "intimate": adult > 0.6 and loud < -0.2,
        "classy": elegant > 0.4,
        "hipster": trendy > 0.6,
    }
    mood |= {
        "divey": elegant < -0.6 and loud > 0,
        "touristy": False,
        "trendy": trendy > 0.4,
        "upscale": elegant > 0.7,
        "casual": elegant < 0.2,
    }
    found["Ambience"] = _literal(mood, prefix)
    meal: dict[str, bool | None] = {
        "dessert": False,
        "latenight": rhythm == "night",
        "lunch": rhythm == "meal",
        "dinner": rhythm == "meal",
        "brunch": rhythm == "morning" and trendy > 0,
        "breakfast": rhythm == "morning",
    }
    found["GoodForMeal"] = _literal(meal, "")
    return found


def _literal(values: dict[str, bool | None], prefix: str) -> str:
    """Return a dict as Python prints it, optionally with the u prefix of Python 2."""
    return "{" + ", ".join(f"{prefix}'{key}': {value}" for key, value in values.items()) + "}"


def _of(values: Any, coin: float) -> Any:
    return values[int(coin * len(values))]
