"""Test every Yelp release, with handmade rows of each quirk and, if available, with the real files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twotower.data.sources.account import Rejects
from twotower.data.sources.yelp import read_yelp
from twotower.errors import DataError
from twotower.utils.config import DataConfig

from .yelp_rows import BUSINESS, REVIEW, TIP, Read, Rows, engine, write

MARCH_2019 = 1_551_675_967
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Read]:
    """Return `read(review=[…], business=[…], …, events=[…])`, which writes the tables and reads them."""

    def make(*, settings: dict[str, Any] | None = None, **tables: Rows) -> Read:
        for name, rows in {"business": [BUSINESS], **tables}.items():
            write(tmp_path, f"{name}.json", rows)
        return Read(tmp_path, **(settings or {}))

    return make


def test_events_of_all_tables_come_in_the_order_of_their_files(read: Callable[..., Read]) -> None:
    made = read(
        review=[REVIEW, {**REVIEW, "date": 1_551_675_967_000, "stars": 5}, {**REVIEW, "review_id": "r1", "stars": "3.5"}],
        tip=[{**TIP, "likes": 0, "type": "tip"}],
        checkin=[
            {"business_id": "b1", "date": "2012-01-01 00:00:01, 2011-06-05 04:03:02"},
            {"business_id": "b9", "date": "2010-01-01 00:00:00"},
        ],
    )
    events = made.events()
    assert [e["event_type"] for e in events] == ["review"] * 3 + ["tip"] + ["checkin"] * 3
    assert [e["time_s"] for e in events] == [MARCH_2019] * 3 + [1_388_620_800, 1_325_376_001, 1_307_246_582, 1_262_304_000]
    assert [e["stars"] for e in events] == [4, 5, 3.5, None, None, None, None]
    assert [e["user_id"] for e in events] == ["u1"] * 3 + ["u2", None, None, None]
    assert [e["item_id"] for e in events] == ["b1"] * 6 + ["b9"]
    assert [e["chars"] for e in events] == [5, 5, 5, 9, 0, 0, 0]
    assert len({e["order"] for e in events}) == 7 and not made.rejected() and made.raw.has_time
    assert made.raw.counts["review.json"] == 3 and made.raw.counts["checkin.json visits"] == 3
    assert {row["user_id"] for row in made.raw.users.to_pyarrow().to_pylist()} == {"u1", "u2"}


def test_texts_alone_are_those_of_the_interactions(read: Callable[..., Read]) -> None:
    made = read(review=[REVIEW, "{cut", {**REVIEW, "text": "Second."}], tip=[TIP])
    alone = {row["order"]: row["text"] for row in made.raw.texts.to_pyarrow().to_pylist()}
    assert {e["order"]: e["chars"] for e in made.events()}.items() <= {
        order: len(text or "") for order, text in alone.items()
    }.items()
    assert sorted(text for text in alone.values() if text) == ["Fine.", "Go early.", "Second."]


def test_events_choose_the_tables(read: Callable[..., Read]) -> None:
    made = read(review=[REVIEW], tip=[TIP], checkin=["broken"], settings={"events": ["tip", "checkin"][:1]})
    assert [e["event_type"] for e in made.events()] == ["tip"] and not made.rejected()
    again = read(review=[REVIEW], settings={"events": ["review", "tip", "checkin"]})
    assert again.raw.counts["business.json"] == 1


def test_checkins_by_weekday_and_hour_have_no_date(read: Callable[..., Read]) -> None:
    made = read(
        tip=[TIP],
        checkin=[{"business_id": "b1", "checkin_info": {"9-0": 1}, "type": "checkin"}, {"business_id": "b1", "time": ["Fri-0:2"]}],
    )
    assert [e["event_type"] for e in made.events()] == ["tip"]
    assert made.raw.counts["checkin.json undated"] == 2 and not made.rejected()


BAD_REVIEWS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "cut off": ('{"review_id":"r","user_id":"u1","business_id":"b', "not a complete JSON object with user_id, business_id, date"),
    "no user": ({k: v for k, v in REVIEW.items() if k != "user_id"}, "user_id is missing"),
    "empty business": ({**REVIEW, "business_id": ""}, "business_id is missing"),
    "null date": ({**REVIEW, "date": None}, "date is missing"),
    "no such day": ({**REVIEW, "date": "2019-02-30"}, "date is not a date: '2019-02-30'"),
    "before Yelp": ({**REVIEW, "date": "2003-12-31"}, "date is before 2004 or after 2100: '2003-12-31'"),
    "seconds taken for a year": ({**REVIEW, "date": 2019}, "date is not a date: '2019'"),
    "far future": ({**REVIEW, "date": "2100-01-02"}, "date is before 2004 or after 2100: '2100-01-02'"),
    "zero stars": ({**REVIEW, "stars": 0}, "stars must be from 1 to 5, not '0'"),
    "six stars": ({**REVIEW, "stars": 6.0}, "stars must be from 1 to 5, not '6.0'"),
    "stars in words": ({**REVIEW, "stars": "five"}, "stars must be from 1 to 5, not 'five'"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_REVIEWS.values(), ids=BAD_REVIEWS.keys())
def test_a_bad_review_is_rejected_alone(bad: dict[str, Any] | str, reason: str, read: Callable[..., Read]) -> None:
    made = read(review=[REVIEW, "", bad, {**REVIEW, "user_id": "u3"}])
    assert [(e["user_id"], e["chars"]) for e in made.events()] == [("u1", 5), ("u3", 5)]
    assert made.rejected() == [("review.json", 3, reason)]
    assert made.raw.counts["review.json"] == 3


def test_a_review_without_stars_or_text_is_an_event(read: Callable[..., Read]) -> None:
    (event,) = read(review=[{"user_id": "u1", "business_id": "b1", "date": "2019-03-04"}]).events()
    assert event["stars"] is None and event["chars"] == 0


def test_one_bad_visit_in_a_line_of_checkins_loses_only_itself(read: Callable[..., Read]) -> None:
    checkins = [
        {"business_id": "b1", "date": "2012-01-01 00:00:00, never, 2012-01-02 00:00:00,1999-01-01 00:00:00"},
        {"business_id": "b2", "date": "2012-01-03 00:00:00"},
        {"business_id": "b3"},
        {"date": "2012-01-01 00:00:00"},
    ]
    made = read(tip=[TIP], checkin=checkins)
    visits = [(e["item_id"], e["time_s"] // 86_400 % 10) for e in made.events() if e["event_type"] == "checkin"]
    assert visits == [("b1", 0), ("b1", 1), ("b2", 2)]
    assert made.rejected() == [
        ("checkin.json", 3, "date is missing"),
        ("checkin.json", 4, "business_id is missing"),
        ("checkin.json", 1, "date is not a date: 'never'"),
        ("checkin.json", 1, "date is before 2004 or after 2100: '1999-01-01 00:00:00'"),
    ]


def test_too_many_bad_rows_are_an_error(read: Callable[..., Read]) -> None:
    with pytest.raises(
        DataError, match=r"review.json has 1 unreadable rows of 2 \(50.00%\): review.json:2 not a complete JSON object"
    ):
        read(review=[REVIEW, '{"review_id": "'], settings={"max_reject_frac": 0.01})


def test_users_have_elite_years_and_a_first_day(read: Callable[..., Read]) -> None:
    elites: list[tuple[Any, Any, list[int]]] = [
        ("2013-10-08 23:11:33", "", []),
        ("2013-10-08", "2015,2016", [2015, 2016]),
        ("2009-03", "2019,20,20,2021", [2019, 2020, 2021]),
        ("2009-03", "20,20", [2020]),
        ("2009-03", [2010, 2011], [2010, 2011]),
        ("2009-03", ["None"], []),
        (None, None, []),
    ]
    users = [
        {"user_id": f"u{i}", "yelping_since": since, "elite": elite, "friends": "x" * 200_000}
        for i, (since, elite, _) in enumerate(elites)
    ]
    bad = [{"user_id": "u0", "yelping_since": "2010-01"}, {"user_id": "w", "yelping_since": "then"}, {"name": "nobody"}]
    made = read(review=[REVIEW], user=[*users, *bad])
    rows = sorted(made.raw.users.to_pyarrow().to_pylist(), key=lambda row: row["user_id"])
    assert [row["elite"] for row in rows] == [years for _, _, years in elites]
    assert [row["since_s"] for row in rows] == [1_381_273_893, 1_381_190_400, *[1_235_865_600] * 4, None]
    assert made.rejected() == [
        ("user.json", 8, "user_id repeats an earlier row: 'u0'"),
        ("user.json", 9, "yelping_since is not a date: 'then'"),
        ("user.json", 10, "not a complete JSON object with user_id"),
    ]


def test_a_business_carries_no_aggregate_of_the_dump(read: Callable[..., Read]) -> None:
    made = read(business=[{**BUSINESS, "stars": 5.0, "review_count": 9, "is_open": 1}], tip=[TIP])
    (item,) = made.raw.items.to_pyarrow().to_pylist()
    assert not {"stars", "review_count"} & item.keys() and item["is_open"] == 1
    assert {column for spec in made.raw.features for column in spec.columns} <= item.keys()
    assert (item["item_id"], item["name"], item["city"], item["state"]) == ("b1", "Blue Door", "Reno", "NV")
    assert (item["latitude"], item["longitude"]) == (39.5, -119.8)


def test_a_bad_business_is_rejected_alone(read: Callable[..., Read]) -> None:
    bad: list[dict[str, Any] | str] = [
        {**BUSINESS, "name": "again"},
        {**BUSINESS, "business_id": "b2", "latitude": 91},
        {**BUSINESS, "business_id": "b3", "longitude": "west"},
        {"name": "nameless"},
        '{"business_id": "b4", "na',
        "[1]",
        '{"business_id": "b5", "latitude": NaN}',
    ]
    made = read(business=[BUSINESS, *bad, {**BUSINESS, "business_id": "b6", "latitude": None, "longitude": ""}], tip=[TIP])
    assert [row["item_id"] for row in made.raw.items.to_pyarrow().to_pylist()] == ["b1", "b6"]
    assert made.rejected() == [
        ("business.json", 2, "business_id repeats an earlier row: 'b1'"),
        ("business.json", 3, "latitude must be from -90 to 90, not 91.0"),
        ("business.json", 4, "longitude is not a number: 'west'"),
        ("business.json", 5, "business_id is missing"),
        ("business.json", 6, "not a complete JSON object with business_id"),
        ("business.json", 7, "not a complete JSON object with business_id"),
        ("business.json", 8, "latitude must be from -90 to 90, not nan"),
    ]


def test_the_truth_of_a_town_is_handed_on(read: Callable[..., Read], tmp_path: Path) -> None:
    assert read(tip=[TIP]).raw.truth is None
    (tmp_path / "town_truth.safetensors").touch()
    assert read(tip=[TIP]).raw.truth == tmp_path / "town_truth.safetensors"


def test_reading_again_gives_the_same_rows(read: Callable[..., Read]) -> None:
    reviews = [{**REVIEW, "user_id": f"u{i % 7}", "text": "word " * (i % 50)} for i in range(2_000)]
    reviews[17] = '{"cut'
    first, second = (read(review=reviews, tip=[TIP] * 100) for _ in range(2))
    assert first.events() == second.events() == first.events()
    assert [e["order"] for e in first.events()][:20] == [i for i in range(21) if i != 17]


RELEASES = {
    "2015-boston": {"items": 2005, "tip": 5372, "join": 5372, "users": 1502, "undated": 1244, "priced": 1905, "hours": 832},
    "2017": {"items": 2000, "review": 2000, "tip": 2000, "join": 214, "undated": 2000, "priced": 1830},
    "2019-all-tables": {"items": 100, "review": 100, "tip": 100, "checkin": 13_961, "join": 0, "users": 100, "undated": 0},
    "2022": {"items": 5000, "review": 5000, "tip": 2000, "join": 1794, "users": 6405, "priced": 2899},
}


@pytest.mark.parametrize("release", RELEASES)
def test_a_real_release(release: str, real_data: Path, tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejects.jsonl", 0.0)
    raw = read_yelp(DataConfig(path=real_data / "yelp-raw" / release), engine(), rejects)
    rejects.check()
    events = raw.interactions.to_pyarrow().to_pylist()
    items = {row["item_id"]: row for row in raw.items.to_pyarrow().to_pylist()}
    expected = RELEASES[release]
    kinds = {kind: sum(e["event_type"] == kind for e in events) for kind in ("review", "tip", "checkin")}
    found = {
        "items": len(items),
        **kinds,
        "join": sum(e["item_id"] in items for e in events),
        "users": raw.users.count().to_pyarrow().as_py(),
        "undated": sum(n for name, n in raw.counts.items() if name.endswith("undated")),
        "priced": sum(item["price"] is not None for item in items.values()),
        "hours": sum(item["hours"] is not None for item in items.values()),
    }
    assert {name: found[name] for name in expected} == expected
    assert len({e["order"] for e in events}) == len(events)
    assert all(e["user_id"] for e in events if e["event_type"] != "checkin")
    assert all((e["stars"] is not None) == (e["event_type"] == "review") for e in events)
    quoted = [value for item in items.values() for value in item["attributes"] if set(value) & set("'\"{}") or "False" in value]
    assert not quoted
    names = {value.split("=")[0].split(".")[0] for item in items.values() for value in item["attributes"]}
    assert "WiFi" in names and "RestaurantsTakeOut" in names and not {name for name in names if " " in name or "-" in name}


def test_real_damaged_reviews(real_data: Path, tmp_path: Path) -> None:
    damaged = real_data / "yelp-raw" / "damaged"
    for name in ("review_epoch_ms_dates", "review_truncated_last_line"):
        folder = tmp_path / name
        write(folder, "business.json", [BUSINESS])
        shutil.copyfile(damaged / f"{name}.json", folder / "review.json")
    epoch, cut = (Read(tmp_path / name, max_reject_frac=0.01) for name in ("review_epoch_ms_dates", "review_truncated_last_line"))
    assert len(epoch.events()) == 1000 and not epoch.rejected()
    whole = json.loads((damaged / "review_epoch_ms_dates.json").read_text().splitlines()[0])
    assert epoch.events()[0]["time_s"] == whole["date"] // 1000 and epoch.events()[0]["stars"] == whole["stars"]
    assert len(cut.events()) == 529
    assert cut.rejected() == [("review.json", 530, "not a complete JSON object with user_id, business_id, date")]
