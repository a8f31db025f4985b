"""Read Yelp's businesses as the items table. Rows are parsed one by one, because every release has another format.

Formats: 2015 (nested attributes under other names, hours as open and close), 2017 (lists of "Key: value" and "Monday 9:0-17:0"),
2019 and 2022 (all values are strings, also `u'free'` and dict literals). The names are those of 2022.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import Engine
from twotower.data.sources.json_files import open_json
from twotower.data.sources.text_files import reading
from twotower.data.sources.values import id_text
from twotower.schema import HOURS_PER_WEEK
from twotower.utils.open_flag import open_flag

SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("name", pa.string()),
        ("city", pa.string()),
        ("state", pa.string()),
        ("latitude", pa.float64()),
        ("longitude", pa.float64()),
        ("categories", pa.list_(pa.string())),
        ("attributes", pa.list_(pa.string())),
        ("price", pa.int64()),
        ("hours", pa.string()),
        ("is_open", pa.int64()),
    ]
)
PRICE = "RestaurantsPriceRange2"
RENAMED = {  # names of 2015 that later releases changed, apart from spaces
    "AcceptsCreditCards": "BusinessAcceptsCreditCards",
    "Attire": "RestaurantsAttire",
    "Delivery": "RestaurantsDelivery",
    "GoodFor": "GoodForMeal",
    "GoodForGroups": "RestaurantsGoodForGroups",
    "HairTypesSpecializedIn": "HairSpecializesIn",
    "OrderAtCounter": "RestaurantsCounterService",
    "Parking": "BusinessParking",
    "PriceRange": PRICE,
    "TakeOut": "RestaurantsTakeOut",
    "TakesReservations": "RestaurantsReservations",
    "WaiterService": "RestaurantsTableService",
}
NOTHING = {"", "false", "none", "no", "null", "{}", "[]"}  # values that mean absent
DAYS = {day: number for number, day in enumerate(("mon", "tue", "wed", "thu", "fri", "sat", "sun"))}
SMALL_WORDS = {"a", "and", "at", "aux", "by", "de", "des", "du", "in", "of", "on", "sur", "the", "upon"}
LONG_FORMS = {"st": "St.", "st.": "St.", "saint": "St.", "mt": "Mount", "mt.": "Mount", "ft": "Fort", "ft.": "Fort"}
DAY_MINUTES = 1440
_LETTERS = re.compile(r"[^\W\d_]+")
_SLIPPED_SHIFT = re.compile(r"[A-Z]{2,}[a-z]")  # "HIll"
_CLOCK = re.compile(r"(\d{1,2}):(\d{1,2})\s*-\s*(\d{1,2}):(\d{1,2})")


def read_businesses(file: Path, engine: Engine, rejects: Rejects, counts: dict[str, int]) -> ir.Table:
    """Return the businesses as a table, in the order of the file; rows with a repeated id are rejected."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    seen: set[str] = set()
    total = 0
    with reading(file):
        for number, line in open_json(file, engine.spill).lines():
            total += 1
            try:
                row = parse_business(_parse_line(line))
                if row["item_id"] in seen:
                    raise ValueError(f"business_id repeats an earlier row: {row['item_id']!r}")
            except ValueError as error:
                rejects.add(file.name, number, str(error), line.decode("utf-8", "replace").rstrip())
                continue
            seen.add(row["item_id"])
            for name, value in row.items():
                columns[name].append(value)
    rejects.total(file.name, total)
    counts[file.name] = total
    return engine.save(pa.table(columns, SCHEMA))


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not a complete JSON object with business_id") from None


def parse_business(row: Any) -> dict[str, Any]:
    """Return one business in the columns of `SCHEMA`.

    Raises
    ------
    ValueError
        The row is not an object, has no id, or has invalid coordinates.

    Examples
    --------
    >>> row = parse_business({"business_id": "b1", "city": "NASHVILLE", "attributes": {"Wi-Fi": "u'free'"}})
    >>> row["city"], row["attributes"]
    ('Nashville', ['WiFi=free'])
    """
    if not isinstance(row, dict):
        raise ValueError("not a complete JSON object with business_id")
    item_id = id_text(row.get("business_id"))
    if item_id is None:
        raise ValueError("business_id is missing")
    attributes = list(_attributes(row.get("attributes")))
    price = next((value for name, value in attributes if name == PRICE), "")
    return {
        "item_id": item_id,
        "name": _text(row.get("name")),
        "city": clean_city(_text(row.get("city")) or ""),
        "state": (_text(row.get("state")) or "").upper() or None,
        "latitude": _degrees(row, "latitude", 90),
        "longitude": _degrees(row, "longitude", 180),
        "categories": _categories(row.get("categories")),
        "attributes": sorted({f"{name}={value}" for name, value in attributes if name != PRICE}),
        "price": int(price) if price in ("1", "2", "3", "4") else None,
        "hours": _hours(row.get("hours")),
        "is_open": open_flag(row.get("is_open", row.get("open"))),
    }


def _text(value: Any) -> str | None:
    return (value.strip() or None) if isinstance(value, str) else None


def _degrees(row: dict[str, Any], name: str, limit: int) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is not a number: {str(value)[:60]!r}") from None
    if not -limit <= number <= limit:
        raise ValueError(f"{name} must be from -{limit} to {limit}, not {number}")
    return number


def _categories(value: Any) -> list[str]:
    names: Iterable[Any] = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else ()
    return list(dict.fromkeys(name.strip() for name in names if isinstance(name, str) and name.strip()))


def _attributes(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, value) pairs from a dict, or from a list of "Key: value"."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = (entry.partition(":")[::2] for entry in value if isinstance(entry, str))
    for name, content in pairs:
        yield from _flatten(name, content if isinstance(content, str) else repr(content))


@lru_cache(maxsize=1 << 16)
def _flatten(name: str, content: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs of one attribute: several if it is a dict, none if its value means absent."""
    name, content = attribute_name(name), content.strip()
    if content.startswith("{"):
        parsed = _literal(content)
        inner = parsed.items() if isinstance(parsed, dict) else ()
        return tuple((f"{name}.{key}", plain) for key, value in inner if (plain := _plain(str(value))))
    plain = _plain(content)
    return ((name, plain),) if plain else ()


def attribute_name(name: str) -> str:
    """Return the 2022 name of an attribute.

    Examples
    --------
    >>> attribute_name("Wi-Fi"), attribute_name("Good for Kids"), attribute_name("Take-out")
    ('WiFi', 'GoodForKids', 'RestaurantsTakeOut')
    """
    joined = "".join(word[:1].upper() + word[1:] for word in re.split(r"[\s/\-]+", name.strip()))
    return RENAMED.get(joined, joined)


def _plain(value: str) -> str:
    """Return a value without Python's quotes (`u'free'` → "free"); "" if it means absent."""
    value = value.strip()
    if value[-1:] in ("'", '"') and value.lstrip("u")[:1] == value[-1:]:
        value = str(_literal(value))
    return "" if value.lower() in NOTHING else value


def _literal(text: str) -> Any:
    """Return the value of a Python literal, or the text itself if it is not a literal."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _hours(value: Any) -> str | None:
    """Return 168 characters, 1 if the business is open during part of the hour; None if no day can be read."""
    days: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        days = value.items()
    elif isinstance(value, list):
        days = (entry.strip().partition(" ")[::2] for entry in value if isinstance(entry, str))
    spans = []
    for day, span in days:
        if isinstance(span, dict):
            span = f"{span.get('open')}-{span.get('close')}"
        spans.append((DAYS.get(str(day)[:3].lower()), str(span)))
    return _week(tuple(spans))


@lru_cache(maxsize=1 << 16)
def _week(spans: tuple[tuple[int | None, str], ...]) -> str | None:
    """Return opening hours as 168 characters. Equal times mean 24 hours; an earlier closing time is on the next day."""
    bits = bytearray(b"0" * HOURS_PER_WEEK)
    for day, span in spans:
        clock = _CLOCK.fullmatch(span.strip())
        if day is None or clock is None:
            continue
        start, end = (int(clock[i]) * 60 + int(clock[i + 1]) for i in (1, 3))
        if max(start, end) > DAY_MINUTES:
            continue
        end += DAY_MINUTES if end <= start else 0
        for hour in range(start // 60, -(-end // 60)):
            bits[(day * 24 + hour) % HOURS_PER_WEEK] = ord("1")
    return bits.decode() if b"1" in bits else None


@lru_cache(maxsize=1 << 14)
def clean_city(name: str) -> str | None:
    """Return a normalised city name, or None.

    It depends only on the name. Counting spellings would let a business that is added later rename an earlier city.

    Examples
    --------
    >>> clean_city("NASHVILLE"), clean_city("Saint Louis"), clean_city("ST. Louis")
    ('Nashville', 'St. Louis', 'St. Louis')
    """
    words = re.sub(r"\b([Ss][Tt]|[Mm][Tt]|[Ff][Tt])\.(?=\w)", r"\1. ", name.strip(" ,;")).split()
    if not words:
        return None
    first = LONG_FORMS.get(words[0].lower()) if len(words) > 1 else None
    return " ".join([first or _case(words[0], inside=False), *(_case(word, inside=True) for word in words[1:])])


def _case(word: str, *, inside: bool) -> str:
    """Return a word, or words joined by hyphens, with the capitals of a name; small words inside a name have none."""
    return "-".join(_capital(part, inside or number > 0) for number, part in enumerate(word.split("-")))


def _capital(word: str, inside: bool) -> str:
    if inside and word.lower() in SMALL_WORDS:
        return word.lower()
    if not (word.isupper() or word.islower() or _SLIPPED_SHIFT.match(word)):
        return word  # McCordsville, O'Fallon, DeForest
    return _LETTERS.sub(lambda run: run[0].capitalize() if run.start() == 0 or len(run[0]) > 1 else run[0].lower(), word)
