"""Test point-in-time states against brute force, and the features of users by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.features.encoders import ELITE_BASE_YEAR
from twotower.features.point_in_time import History, HistoryState, ItemDynamics, user_state
from twotower.schema import DAY_S

event = st.tuples(st.integers(2, 6), st.integers(0, 40), st.sampled_from([float("nan"), 1.0, 3.0, 5.0]))
PLACE = np.array([[np.nan, np.nan]] * 3 + [[10.0, 20.0], [11.0, 21.0], [12.0, 25.0], [0.0, 0.0]])


def history_of(users: list[list[tuple[int, int, float]]]) -> History:
    """Return ragged histories, with times in days."""
    ordered = [sorted(events, key=lambda one: one[1]) for events in users]
    flat = [one for events in ordered for one in events]
    offsets = np.concatenate([[0], np.cumsum([len(events) for events in ordered])]).astype(np.int64)
    rows, days, stars = (np.array([one[i] for one in flat]) for i in range(3))
    return History(
        offsets, rows.astype(np.int64), days.astype(np.int64) * DAY_S, np.ones(len(flat), np.int64), stars.astype(np.float32), PLACE
    )


def by_hand(events: list[tuple[int, int, float]]) -> dict[str, Any]:
    """Return the state after `events`, computed event by event."""
    rated = [stars for _, _, stars in events if np.isfinite(stars)]
    locations = [PLACE[row] for row, _, _ in events if np.isfinite(PLACE[row]).all()]
    return {
        "count": len(events),
        "stars_sum": sum(rated),
        "stars_n": len(rated),
        "location": np.sum(locations, axis=0) if locations else np.zeros(2),
        "location_n": len(locations),
        "first_s": events[0][1] * DAY_S if events else 0,
        "last_s": events[-1][1] * DAY_S if events else 0,
    }


def check(state: HistoryState, row: int, expected: dict[str, Any]) -> None:
    for field in fields(state):
        np.testing.assert_allclose(getattr(state, field.name)[row], expected[field.name], err_msg=field.name)


@given(st.lists(st.lists(event, max_size=6), min_size=1, max_size=4))
def test_history_state_is_brute_force(users: list[list[tuple[int, int, float]]]) -> None:
    history = history_of(users)
    for row, events in enumerate(users):
        ordered = sorted(events, key=lambda one: one[1])
        for pos in range(len(ordered) + 1):
            check(history.state(np.array([row]), np.array([pos])), 0, by_hand(ordered[:pos]))


@given(st.lists(st.lists(event, min_size=1, max_size=6), min_size=1, max_size=4))
def test_state_without_one_event_is_brute_force(users: list[list[tuple[int, int, float]]]) -> None:
    history = history_of(users)
    for row, events in enumerate(users):
        ordered = sorted(events, key=lambda one: one[1])
        for i in range(len(ordered)):
            expected = by_hand(ordered[:i] + ordered[i + 1 :])
            expected["last_s"] = ordered[i - 1][1] * DAY_S if i else 0
            check(history.state_without(np.array([row]), history.offsets[[row]] + i), 0, expected)


@given(
    st.lists(st.tuples(st.integers(2, 5), st.integers(0, 100), st.sampled_from([float("nan"), 2.0, 5.0])), max_size=20),
    st.integers(2, 6),
    st.integers(0, 120),
)
def test_item_state_is_brute_force_and_strictly_before(visits: list[tuple[int, int, float]], row: int, day: int) -> None:
    visits = sorted(visits, key=lambda one: one[:2])
    columns = [np.array([one[i] for one in visits]) for i in range(3)]
    dynamics = ItemDynamics(columns[0].astype(np.int64), columns[1].astype(np.int64) * DAY_S, columns[2].astype(np.float32))
    found = dynamics.state(np.array([row]), np.array([day * DAY_S]))[0]
    before = [one for one in visits if one[0] == row and one[1] < day]
    rated = [stars for _, _, stars in before if np.isfinite(stars)]
    recent = sum(one[1] >= day - 30 for one in before)
    age = day - before[0][1] if before else 0
    expected = [
        np.log1p(len(before)) / 3,
        (sum(rated) - 3.75 * len(rated)) / (len(rated) + 5),
        np.log1p(recent) / 2,
        np.log1p(age) / 5,
        not before,
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_items_of_one_second_and_the_largest_rows_and_times_do_not_mix() -> None:
    """An event at the very time of a query does not count, nor does one of the next item."""
    rows, times = np.array([2, 3, 3, 90_000_000]), np.array([0, 5, 2**36 - 1, 7])
    dynamics = ItemDynamics(rows, times, np.array([5.0, np.nan, 1.0, 2.0], np.float32))
    asked = [(2, 0, 0), (2, 1, 1), (3, 5, 0), (3, 6, 1), (3, 2**36 - 1, 1), (4, 10, 0), (90_000_000, 7, 0), (90_000_000, 8, 1)]
    found = dynamics.state(np.array([row for row, _, _ in asked]), np.array([time_s for _, time_s, _ in asked]))
    assert np.rint(np.expm1(found[:, 0] * 3)).tolist() == [count for _, _, count in asked]
    assert found.dtype == np.float32 and found[:, 4].tolist() == [float(count == 0) for _, _, count in asked]


def test_items_without_any_event() -> None:
    nothing = ItemDynamics(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert nothing.state(np.array([2, 3]), np.array([-5, 100])).tolist() == [[0, 0, 0, 0, 1]] * 2


def test_histories_without_any_event_or_location() -> None:
    none = np.zeros(0, np.int64)
    empty = History(np.array([0, 0]), none, none, none, np.zeros(0, np.float32), np.zeros((0, 2)))
    check(empty.state(np.array([0]), np.array([0])), 0, by_hand([]))
    one = History(np.array([0, 1]), np.array([3]), np.array([7]), np.array([1]), np.array([4.0], np.float32), np.zeros((0, 2)))
    state = one.state(np.array([0]), np.array([1]))
    assert (state.location_n[0], state.stars_sum[0], state.last_s[0]) == (0, 4.0, 7)
    counts, sums = (state.count, state.stars_n, state.location_n), (state.stars_sum, state.location)
    assert {each.dtype for each in counts} == {np.dtype(np.int64)} and {each.dtype for each in sums} == {np.dtype(np.float64)}


def test_an_item_counts_as_located_only_with_both_coordinates() -> None:
    half = np.array([[np.nan, np.nan], [1.0, np.nan], [1.0, 2.0]])
    history = History(np.array([0, 2]), np.array([1, 2]), np.array([1, 2]), np.array([1, 1]), np.full(2, np.nan, np.float32), half)
    state = history.state(np.array([0]), np.array([2]))
    assert state.location_n.tolist() == [1] and state.location.tolist() == [[1.0, 2.0]]


def test_sums_of_many_stars_are_exact() -> None:
    """After a large sum, float32 would lose the stars of the next item."""
    stars = np.array([2.0**24, 1, 1], np.float32)
    dynamics = ItemDynamics(np.array([2, 3, 3]), np.zeros(3, np.int64), stars)
    assert dynamics.state(np.array([3]), np.array([1]))[0, 1] == pytest.approx((2 - 3.75 * 2) / 7)


def moment(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def years(*marked: int) -> int:
    return sum(1 << (year - ELITE_BASE_YEAR) for year in marked)


NOW = moment("2015-06-15T12:00")
STATE = HistoryState(
    count=np.array([3, 0, 1]),
    stars_sum=np.array([9.0, 0.0, 0.0]),
    stars_n=np.array([2, 0, 0]),
    location=np.zeros((3, 2)),
    location_n=np.zeros(3, np.int64),
    first_s=np.array([NOW - 100 * DAY_S, 0, NOW]),
    last_s=np.array([NOW - 5 * DAY_S, 0, 0]),
)
SINCE = np.array([NOW - 1000 * DAY_S, 0, NOW + DAY_S])
ELITE = np.array([years(2010, 2014, 2015, 2016), 0, years(2004)])


def test_features_of_users_by_hand() -> None:
    """The second user is unknown. The third has one event now, no time of the last one, and signs up tomorrow."""
    found = user_state(STATE, np.full(3, NOW), SINCE, ELITE, True)
    logs = np.log1p
    expected = [
        [logs(3) / 3, (9 - 3.75 * 2) / 3, logs(100) / 5, logs(5) / 5, logs(1000) / 5, logs(2), 0],
        [0, 0, 0, 0, 0, 0, 1],
        [logs(1) / 3, 0, 0, 0, 0, logs(1), 0],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32


def test_a_time_of_zero_is_none_and_of_one_second_is_one() -> None:
    known = replace(STATE, count=np.array([1, 1, 1]), last_s=np.array([0, 1, 2]))
    found = user_state(known, np.full(3, NOW), np.array([0, 1, 2]), ELITE, True)
    days = np.log1p([0, (NOW - 1) / DAY_S, (NOW - 2) / DAY_S]) / 5
    np.testing.assert_allclose(found[:, 3], days, rtol=1e-6)
    np.testing.assert_allclose(found[:, 4], days, rtol=1e-6)


def test_features_of_users_without_times() -> None:
    timed, found = (user_state(STATE, np.full(3, NOW), SINCE, ELITE, flag) for flag in (True, False))
    np.testing.assert_array_equal(found[:, [0, 1, 6]], timed[:, [0, 1, 6]])
    assert found.shape == (3, 7) and not found[:, 2:6].any()


def test_features_of_users_never_look_ahead() -> None:
    """Times after the query count as now."""
    later = replace(STATE, first_s=np.full(3, NOW + 9), last_s=np.full(3, NOW + 9))
    assert not user_state(later, np.full(3, NOW), np.full(3, NOW + 9), ELITE, True)[:, 2:5].any()


@pytest.mark.parametrize(
    ("now", "marked", "past"),
    [
        ("2015-01-01T00:00:00", (2014,), 1),
        ("2014-12-31T23:59:59", (2014,), 0),
        ("1999-05-05T00:00:00", (2000,), 0),
        ("2001-05-05T00:00:00", (2000, 2001), 1),
        ("2061-05-05T00:00:00", (2000, 2030, 2060, 2061), 3),
        ("2500-01-01T00:00:00", (2000, 2061), 2),
    ],
)
def test_only_elite_years_that_are_over_count(now: str, marked: tuple[int, ...], past: int) -> None:
    one = replace(STATE, **{field.name: getattr(STATE, field.name)[:1] for field in fields(STATE)})
    found = user_state(one, np.array([moment(now)]), np.zeros(1, np.int64), np.array([years(*marked)]), True)
    assert found[0, 5] == pytest.approx(np.log1p(past))
