"""Test times: the same moment in every form, and refused where the meaning is not certain."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.sources.engine import DuckDBEngine
from twotower.data.sources.times import parse_time, seconds
from twotower.errors import ConfigError, DataError

from .table_rows import Read, engine

NEW_YEAR = 1_577_836_800  # of 2020, in seconds

SAME_TIME = {
    "2020-01-01 13:42": 49_320,
    "2020-01-01 01:42 PM": 49_320,
    "2020-01-01 1:42:00 pm": 49_320,
    "2020-01-01T12:42:00 AM": 2_520,
    "2020-01-01 08:42:00 EST": 49_320,
    "2020-01-01 08:42:00 America/New_York": 49_320,
    "2020-01-01T08:42 UTC-05:00": 49_320,
    "2020-01-01 14:42:00 GMT+1": 49_320,
    "2020-01-01 13:42:00 UTC": 49_320,
    "2020-01-01 13:42:00Z": 49_320,
    "2020-01-01T13:42:00.999999999Z": 49_320,
    "2020-01-01T19:12:00+0530": 49_320,
    "2020-01-01T19:12:00+05:30[Asia/Kolkata]": 49_320,
    "2020-01-01T19:12:00[Asia/Kolkata]": 49_320,
    "Wed Jan 01 2020 14:42:00 GMT+0100 (Central European Standard Time)": 49_320,
    "2020/01/01 13:42": 49_320,
    "20200101T134200": 49_320,
    "Wed Jan 01 13:42:00 +0000 2020": 49_320,
    "Wed Jan  1 13:42:00 2020": 49_320,
    "Wed, 01 Jan 2020 13:42:00 GMT": 49_320,
    "Jan 01, 2020 1:42 PM": 49_320,
    "1 January 2020": 0,
    "20200101": 0,
    "20200101.0": 0,
    "2020010113": 46_800,
    "202001011342": 49_320,
    "20200101134200": 49_320,
    "1577886120": 49_320,
    "1577886120.9": 49_320,
    "1577886120999": 49_320,
    "1577886120999999": 49_320,
    "1577886120999999999": 49_320,
    "1.57788612e9": 49_320,
    "2020-01": 0,
    "2020-01-01": 0,
}


@pytest.mark.parametrize("name", ["e.csv", "e.jsonl"])
def test_a_time_is_the_same_in_every_form(name: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id;item_id;t\n" + "".join(f'u;i;"{text}"\n' for text in SAME_TIME))
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps({"user_id": "u", "item_id": "i", "t": text}) for text in SAME_TIME))
    found = Read(tmp_path, interactions={"path": name, "time": "t"}).rows("interactions", "time_s")
    assert {text: row[0] - NEW_YEAR for text, row in zip(SAME_TIME, found, strict=True)} == SAME_TIME


REFUSED = {
    "2020-01-01 13:42:00 garbage": "is not a time",
    "2020-01-01 13:42:00 XST": "is not a time",
    "2020-01-01 13:42:00 Mars/Base": "is not a time",
    "2020-01-01 13:42 PM": "is not a time",
    "2020-02-30": "is not a time",
    "2020-01-01 25:00": "is not a time",
    "1/3/2020 8:26": "is not a time",
    "01.02.2020": "is not a time",
    "soon": "is not a time",
    "202001": "is not a plausible time",
    "43831.57": "is not a plausible time",
    "0": "is not a plausible time",
    "1577": "is not a plausible time",
    "-5": "is before 1970",
    "1969-12-31 23:59:59": "is before 1970",
    "2200-01-01": "is after 2100",
    "99999999999": "is after 2100",
    "9999999999": "is after 2100",
    "inf": "is not a time",
}


def test_other_times_are_refused_with_the_value(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,t\n" + "".join(f'u,i,"{text}"\n' for text in REFUSED))
    made = Read(tmp_path, interactions={"path": "e.csv", "time": "t"})
    assert not made.rows("interactions", "time_s")
    for (_, _, why), (text, expected) in zip(made.rejected(), REFUSED.items(), strict=True):
        assert why.startswith(f"t {expected}") and text in why
    made.rejects.max_frac = 0.0
    with pytest.raises(DataError, match=r"Set time_format to the form of the times"):
        made.rejects.check()


PATTERNS = [
    ("01.02.2020", "%d.%m.%Y", date(2020, 2, 1)),
    ("1/3/2020 8:26", "%m/%d/%Y %H:%M", datetime(2020, 1, 3, 8, 26)),
    ("3/1/20 08:26 PM", "%d/%m/%y %I:%M %p", datetime(2020, 1, 3, 20, 26)),
    ("Tue Apr 03 18:00:09 +0200 2012", "%a %b %d %H:%M:%S %z %Y", datetime(2012, 4, 3, 16, 0, 9)),
    ("2020-01-03T10:15:00.123Z", "%Y-%m-%dT%H:%M:%S.%fZ", datetime(2020, 1, 3, 10, 15)),
    ("202001", "%Y%m", date(2020, 1, 1)),
    ("2020 032", "%Y %j", date(2020, 2, 1)),
    ("2020-07-03 06:15 America/New_York", "%F %R %Z", datetime(2020, 7, 3, 10, 15)),
    ("17", "%s", datetime(1970, 1, 1, 0, 0, 17)),
]


@pytest.mark.parametrize(("text", "pattern", "expected"), PATTERNS, ids=[each[1] for each in PATTERNS])
def test_time_format_reads_the_rest(text: str, pattern: str, expected: date, tmp_path: Path) -> None:
    moment = expected if isinstance(expected, datetime) else datetime(expected.year, expected.month, expected.day)
    (tmp_path / "e.csv").write_text(f"user_id,item_id,t\nu,i,{text}\n")
    made = Read(tmp_path, interactions={"path": "e.csv", "time": "t", "time_format": pattern})
    assert made.rows("interactions", "time_s") == [(int(moment.replace(tzinfo=UTC).timestamp()),)]


@pytest.mark.parametrize(("pattern", "why"), [("%d.%m", "no year"), ("%Y %Q", "unknown directive '%Q'"), ("%Y %Y", "twice")])
def test_an_invalid_time_format_is_named(pattern: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,t\nu,i,1\n")
    with pytest.raises(ConfigError, match=why):
        Read(tmp_path, interactions={"path": "e.csv", "time": "t", "time_format": pattern})


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Asia/Tokyo"])
def test_fractions_are_rounded_down_in_every_type(unit: str, zone: str | None, tmp_path: Path) -> None:
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    column = pa.array([NEW_YEAR * scale + scale - 1], pa.int64()).cast(pa.timestamp(unit, zone))
    numbers = pa.array([NEW_YEAR * scale + scale - 1])
    for each in (column, numbers, *([pa.array([NEW_YEAR + 0.999])] if unit == "s" else [])):
        pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"], "t": each}), tmp_path / "e.parquet")
        assert Read(tmp_path, interactions={"path": "e.parquet", "time": "t"}).rows("interactions", "time_s") == [(NEW_YEAR,)]


@settings(max_examples=200, deadline=None)
@given(
    st.datetimes(datetime(1981, 1, 1), datetime(2031, 1, 1)),
    st.sampled_from(
        ["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%a %b %d %H:%M:%S %Y", "%d %B %Y %H:%M:%S", "%Y-%m-%d %I:%M:%S %p"]
    ),
    st.sampled_from(["", "UTC", "Europe/Berlin", "America/New_York", "+05:30", "-0800"]),
)
def test_written_times_are_read_back(moment: datetime, pattern: str, zone: str) -> None:
    moment = moment.replace(microsecond=0, fold=0)
    if zone and pattern.endswith("%Y"):
        return
    offset = zone[:1] in "+-" and bool(zone)
    there = datetime.strptime(zone, "%z").tzinfo if offset else ZoneInfo(zone or "UTC")
    text = f"{moment.strftime(pattern)} {zone}".strip()
    assert parse_time(text) == int(moment.replace(tzinfo=there).timestamp())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.datetimes(datetime(1981, 1, 1), datetime(2031, 1, 1)), min_size=1, max_size=20),
    st.sampled_from(["", "Z", "+02:00", "-0530"]),
)
def test_the_engine_and_python_read_the_same_seconds(moments: list[datetime], zone: str) -> None:
    texts = [moment.isoformat() + zone for moment in moments] + [
        str(int(moment.replace(tzinfo=UTC).timestamp())) for moment in moments
    ]
    con: DuckDBEngine = engine()
    table = con.save(pa.table({"text": texts, "at": range(len(texts))}))
    found = table.mutate(s=seconds(table["text"])).order_by("at").to_pyarrow()["s"].to_pylist()
    assert [value for value in found if value is not None] == [
        parse_time(text) for text, value in zip(texts, found, strict=True) if value is not None
    ]
    assert all(value is not None for value in found[: len(moments)])
