"""Test which raw rows are kept, counted, split and withheld."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import DataError

from .conftest import CUTS, EVERYTHING, LAST, business, day, listed

# --- what is kept, and the counts ----------------------------------------------------------------------------------------------


def test_every_row_read_is_kept_or_dropped_for_a_counted_reason(prepared: Any) -> None:
    rows = ["a x 1", "a x 2", "a y 3", "b x 4", "b y 5", "b gone 6", "- x 7", "c x 8", "a rare 9", f"new x {day(25)}"]
    known = [business(name) for name in ("x", "y", "rare")]
    dataset = prepared(rows, items=known, split=CUTS, duplicates="keep_first", min_user_events=2, min_item_events=2)
    counts = dataset.manifest.counts.json_values()
    assert counts["dropped"] == {
        "events": {
            "item is not in the items table": 1,
            "repeat of the same user and item": 1,
            "user has too few training events": 1,
            "item has too few training events": 1,
        },
        "users": {"too few training events": 1},
        "items": {"too few training events": 1},
    }
    assert counts["kept"] == {
        "events": 5,
        "train_events": 4,
        "valid_events": 0,
        "test_events": 1,
        "withheld_events": 0,
        "positive_events": 5,
        "anonymous_events": 1,
        "negative_events": {},
        "items": 2,
        "users": 3,
    }
    assert counts["read"] == {"interactions": len(rows)}
    assert counts["kept"]["events"] + counts["kept"]["anonymous_events"] + sum(counts["dropped"]["events"].values()) == len(rows)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a x 3", "b x 3", "b y 3"], "all 3 events have the same time, so a split by time cannot keep some for training"),
        (["a x 3"], "there is one event, and the split holds it out"),
    ],
)
def test_why_no_training_event_is_left(prepared: Any, rows: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        prepared(rows)
    assert "user with an id" not in str(error.value)


def test_the_targets_in_a_history_are_counted(prepared: Any) -> None:
    rows = ["a x 1", "a y 2", "b y 3", f"a x {day(25)}", f"a z {day(26)}", f"b y {day(26)}", f"new x {day(26)}"]
    held_out = prepared(rows, split=CUTS).held_out("test")
    assert (len(held_out.target_row), held_out.seen_targets) == (4, 2)


def test_fold_keeps_the_first_event_of_a_pair_and_leaves_anonymous_ones(prepared: Any) -> None:
    rows = ["a x 9", "a x 3 1", "a x 3 2", "b x 5", "- x 1", "- x 1"]
    dataset = prepared(rows, split=EVERYTHING, duplicates="keep_first")
    assert [row[:3] for row in listed(dataset)] == [("a", "x", 3), ("b", "x", 5)]
    assert dataset.events.stars[0] == 1 and len(dataset.item_events) == 4


def test_minimum_counts_look_at_training_alone_and_newcomers_stay(prepared: Any) -> None:
    late = [f"a late {day(25)}", f"new x {day(25)}", f"once x {day(25)}", f"a rare {day(26)}"]
    rows = ["a x 1", "a y 2", "b x 3", "b y 4", "once x 5", "a rare 6", *late]
    dataset = prepared(rows, split=CUTS, min_user_events=2, min_item_events=2)
    assert {row[0] for row in listed(dataset)} == {"a", "b", "new"}  # "once" had one training event: its later event goes too
    assert {row[1] for row in listed(dataset)} == {"x", "y", "late"}
    assert (dataset.n_train_users, dataset.n_train_items) == (2, 2)


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 3))
def test_k_core_is_the_largest_set_with_the_minimum_counts(
    prepared: Any, pairs: list[tuple[int, int]], user_least: int, item_least: int
) -> None:
    expected, size = list(pairs), -1
    while size != len(expected):
        size = len(expected)
        users, items = Counter(u for u, _ in expected), Counter(i for _, i in expected)
        expected = [(u, i) for u, i in expected if users[u] >= user_least and items[i] >= item_least]
    rows = [f"u{u} i{i} {n}" for n, (u, i) in enumerate(pairs)]
    limits = {"min_user_events": user_least, "min_item_events": item_least, "k_core": True, "split": LAST}
    if not expected:
        with pytest.raises(DataError, match="k_core True"):
            prepared(rows, **limits)
        return
    found = [row[:2] for row in listed(prepared(rows, **limits))]
    assert Counter(found) == Counter((f"u{u}", f"i{i}") for u, i in expected)


def test_without_k_core_both_minimum_counts_are_taken_once(prepared: Any) -> None:
    rows = ["a x 1", "a y 2", "b x 3"]  # b falls, and x keeps its count of two
    found = listed(prepared(rows, split=EVERYTHING, min_user_events=2, min_item_events=1))
    assert [row[:2] for row in found] == [("a", "x"), ("a", "y")]


def test_positive_means_enough_stars_or_none_and_some_weight(prepared: Any) -> None:
    rows = ["a p 1 3.9", "a q 2 4", "a r 3", "a s 4 5 tip", "a t 5 - photo"]
    dataset = prepared(rows, split=EVERYTHING, positive_min_stars=4, event_weights={"tip": 0.5, "photo": 0})
    assert dataset.events.positive.tolist() == [False, True, True, True, False]
    assert dataset.events.weight.tolist() == [1, 1, 1, 0.5, 0]
    assert dataset.item_train_count.tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert np.array_equal(dataset.events.stars, np.array([3.9, 4, np.nan, 5, np.nan], np.float32), equal_nan=True)


def test_a_type_that_training_never_saw_has_no_code_of_its_own(prepared: Any) -> None:
    dataset = prepared(["a x 1 - tip", "a x 2 - review", f"a x {day(12)} - aardvark"], split=CUTS)
    assert dataset.event_types == ["review", "tip"]
    assert dataset.events.event_type.tolist() == [2, 1, 0]


# --- splits --------------------------------------------------------------------------------------------------------------------


def test_a_time_split_cuts_at_the_first_second_of_the_named_days(prepared: Any) -> None:
    rows = [f"a x {day(10) - 1}", f"a x {day(10)}", f"a x {day(20) - 1}", f"a x {day(20)}"]
    dataset = prepared(rows, split=CUTS)
    assert [row[3] for row in listed(dataset)] == ["train", "valid", "valid", "test"]
    assert dataset.manifest.cuts_s == {"valid": day(10), "test": day(20)}


@pytest.mark.parametrize(("valid", "test", "sizes"), [(0.1, 0.2, (70, 10, 20)), (0.0, 0.2, (80, 0, 20)), (0.2, 0.0, (80, 20, 0))])
def test_a_time_split_by_shares_cuts_at_quantiles(prepared: Any, valid: float, test: float, sizes: tuple[int, ...]) -> None:
    dataset = prepared([f"a x {n * 7}" for n in range(100)], split={"valid": valid, "test": test})
    assert tuple(np.bincount(dataset.events.split, minlength=3)) == sizes
    assert np.all(np.diff(dataset.events.split) >= 0)


def test_leave_one_out_holds_out_the_last_two_positive_events(prepared: Any) -> None:
    rows = ["a p 1 5", "a q 2 5", "a r 3 5", "a s 4 1", "a t 5 5", "a u 6 1", "b p 1 5", "b q 2 5", "b r 3 1"]
    dataset = prepared(rows, split=LAST, positive_min_stars=3)
    by_item = {row[:2]: row[3] for row in listed(dataset)}
    assert [by_item["a", item] for item in "pqrstu"] == ["train", "train", "valid", "valid", "test", "test"]
    assert {by_item["b", item] for item in "pqr"} == {"train"}  # two positive events are too few to hold any out


@pytest.mark.parametrize(
    ("kind", "valid", "test", "parts"),
    [
        ("leave_one_out", 0, 0.1, ["train", "train", "train", "test"]),
        ("leave_one_out", 0.1, 0, ["train", "train", "train", "valid"]),  # a later event in training would tell of it
        ("leave_one_out", 0, 0, ["train"] * 4),
        ("predefined", 0, 0.1, ["train", "train", "train", "test"]),
        ("predefined", 0, 0, ["train"] * 4),
        ("time", 0, 0, ["train"] * 4),
        ("time", "1970-01-05", "1970-01-05", ["train", "train", "train", "test"]),
    ],
)
def test_events_of_a_part_that_is_not_wanted_are_trainings(
    prepared: Any, kind: str, valid: Any, test: Any, parts: list[str]
) -> None:
    rows = [{"user_id": "a", "item_id": f"i{n}", "time_s": day(n + 1), "part": "test" if n == 3 else "train"} for n in range(4)]
    dataset = prepared(rows, split={"kind": kind, "valid": valid, "test": test})
    assert [row[3] for row in listed(dataset)] == parts


def test_leave_one_out_breaks_ties_of_time_by_the_order_of_the_source(prepared: Any) -> None:
    splits = {row[1]: row[3] for row in listed(prepared(["a q 7", "a p 7", "a r 7"], split=LAST))}
    assert splits == {"q": "train", "p": "valid", "r": "test"}


def test_a_predefined_split_draws_validation_from_the_rest_by_seed(prepared: Any) -> None:
    rows = [
        {"user_id": user, "item_id": f"i{n}", "time_s": n % 20, "part": "test" if n >= 20 else "train"}
        for user in ("a", "b")
        for n in range(25)
    ]
    split = {"kind": "predefined", "valid": 0.25}
    first, again, other = (prepared(rows, has_time=False, split=split, seed=seed) for seed in (0, 0, 1))
    assert listed(first) == listed(again) != listed(other)
    per_user = Counter((user, part) for user, _, _, part in listed(first))
    assert per_user == {(user, part): n for user in "ab" for part, n in (("train", 15), ("valid", 5), ("test", 5))}
    assert {item for _, item, _, part in listed(first) if part == "test"} == {f"i{n}" for n in range(20, 25)}
    assert len({item for _, item, _, part in listed(first) if part == "valid"}) > 5  # each user has a draw of their own


def test_without_a_clock_time_is_the_position_in_the_users_own_sequence(prepared: Any) -> None:
    rows = [{"user_id": "a", "item_id": f"i{n}", "time_s": n % 3, "part": "test" if n >= 3 else "train"} for n in range(5)]
    dataset = prepared(rows, has_time=False, split={"kind": "predefined", "valid": 0.0})
    assert [row[1:3] for row in listed(dataset)] == [(f"i{n}", n) for n in range(5)]


def test_anonymous_visits_count_under_a_time_split_and_are_left_out_of_others(prepared: Any) -> None:
    rows = ["a x 1", "a y 2", "a z 3", f"- x {day(12)}", "- y 5", f"- w {day(30)}"]
    timed = prepared(rows, split=CUTS)
    visits = timed.item_events
    found = set(zip(timed.item_ids[visits.item_row], visits.time_s.tolist(), visits.split.tolist(), strict=True))
    assert found == {("x", 1, 0), ("x", day(12), 1), ("y", 2, 0), ("y", 5, 0), ("z", 3, 0), ("w", day(30), 2)}
    assert timed.n_user_rows == 3 and timed.event_types == ["review"]
    last = prepared(rows, split=LAST)
    assert len(last.item_events) == 3
    assert last.manifest.counts.dropped["events"]["no user; only a split by time uses it"] == 3
