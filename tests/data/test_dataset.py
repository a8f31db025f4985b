"""Test opening a dataset and its held-out queries: small examples, and a simple second implementation."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import log_popularity
from twotower.errors import DataError
from twotower.retriever import Queries
from twotower.schema import DAY_S, SPLITS, TRAIN, UNKNOWN, WITHHELD

CUTS = {"kind": "time", "valid": "1970-01-11", "test": "1970-01-21"}  # day 10 and day 20
LAST = {"kind": "leave_one_out"}
Question = tuple[str, int, list[str], list[str]]  # user, moment, history, targets


def days(*rows: str) -> list[str]:
    """Return rows "user item day [stars]" with the day converted to seconds."""
    return [" ".join([user, item, str(int(float(at) * DAY_S)), *rest]) for user, item, at, *rest in map(str.split, rows)]


def histories(dataset: Dataset, queries: Queries) -> list[list[str]]:
    return [dataset.item_ids[queries.slice(b, b + 1).item_row].tolist() for b in range(len(queries))]


def questions(dataset: Dataset, split: str, **sample: Any) -> list[Question]:
    held = dataset.held_out(split, **sample)
    users, queries = dataset.user_ids[held.queries.user_row], held.queries
    targets = np.split(dataset.item_ids[held.target_row], held.target_offsets[1:-1])
    past = histories(dataset, queries)
    return [(users[b], int(queries.time_s[b]), past[b], targets[b].tolist()) for b in range(len(queries))]


# --- users and items that training never sees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [{"kind": "leave_one_out"}, {"kind": "time", "valid": "1970-01-11", "test": "1970-01-21"}])
def test_new_users_and_items_are_history_and_targets_and_never_training(prepared: Any, split: dict[str, Any]) -> None:
    rows = [f"u{u} i{(7 * u + 3 * n) % 40} {4 * n + u / 200}" for u in range(60) for n in range(6)]
    dataset = prepared(days(*rows), split={**split, "withhold_user_frac": 0.3, "withhold_item_frac": 0.2})
    whole = prepared(days(*rows), split=split)
    events, known_items, known_users = dataset.events, dataset.n_train_item_rows, dataset.n_train_user_rows
    aside, trained = events.split == WITHHELD, events.split == TRAIN
    assert (events.item_row[trained] < known_items).all() and (events.user_row[trained] < known_users).all()
    assert ((events.item_row >= known_items) | (events.user_row >= known_users))[aside].all()
    lost_users, lost_items = whole.n_train_users - dataset.n_train_users, whole.n_train_items - dataset.n_train_items
    assert 0.15 < lost_users / whole.n_train_users < 0.45 and 0.05 < lost_items / whole.n_train_items < 0.4
    assert dataset.manifest.counts.kept.withheld_events == aside.sum() > 0
    for part in ("valid", "test"):  # the questions, and what was known of who asks, are those of the whole
        assert sorted(questions(dataset, part)) == sorted(questions(whole, part))


# --- time split ----------------------------------------------------------------------------------------------------------------


def test_under_a_time_split_history_is_everything_strictly_before_the_moment(prepared: Any) -> None:
    dataset = prepared(days("a p 1", "a q 2", "a r 12", "a s 13", "a t 25", "b p 3", "b q 22"), split=CUTS)
    assert questions(dataset, "valid") == [("a", 12 * DAY_S, ["p", "q"], ["r"]), ("a", 13 * DAY_S, ["p", "q", "r"], ["s"])]
    assert questions(dataset, "test") == [
        ("a", 25 * DAY_S, ["p", "q", "r", "s"], ["t"]),  # earlier held-out events are known by then
        ("b", 22 * DAY_S, ["p"], ["q"]),
    ]


def test_where_times_are_days_nothing_of_the_same_day_is_history(prepared: Any) -> None:
    dataset = prepared(days("a p 1", "a z 12", "a y 12", "a x 12", "a w 21"), split=CUTS)
    assert questions(dataset, "valid") == [("a", 12 * DAY_S, ["p"], ["x", "y", "z"])]
    assert questions(dataset, "test") == [("a", 21 * DAY_S, ["p", "z", "y", "x"], ["w"])]


def test_repeats_stay_in_history_and_a_target_is_named_once_per_moment(prepared: Any) -> None:
    dataset = prepared(days("a p 1", "a p 2", "a p 12", "a q 12", "a p 12", "a p 13"), split=CUTS)
    assert questions(dataset, "valid") == [
        ("a", 12 * DAY_S, ["p", "p"], ["p", "q"]),
        ("a", 13 * DAY_S, ["p", "p", "p", "q", "p"], ["p"]),
    ]
    assert dataset.held_out("valid").event_index.tolist() == [2, 3, 5]


def test_new_users_have_empty_histories_and_new_items_are_targets(prepared: Any) -> None:
    dataset = prepared(days("a p 1", "new q 12", "new p 13"), split=CUTS)
    assert questions(dataset, "valid") == [("new", 12 * DAY_S, [], ["q"]), ("new", 13 * DAY_S, ["q"], ["p"])]
    held = dataset.held_out("valid")
    assert (held.queries.user_row >= dataset.n_train_user_rows).all()
    assert held.target_row[0] == dataset.n_train_item_rows
    assert len(dataset.held_out("test").queries) == 0 and dataset.held_out("test").target_offsets.tolist() == [0]


def test_events_with_few_stars_are_history_and_never_targets(prepared: Any) -> None:
    rows = days("a p 1 1", "a q 12 1", "a r 12 5", "a s 13 1", "b p 1 5", "b q 14 2")
    dataset = prepared(rows, split=CUTS, positive_min_stars=4)
    assert questions(dataset, "valid") == [("a", 12 * DAY_S, ["p"], ["r"])]
    held = dataset.held_out("valid")
    assert held.queries.stars.tolist() == [1] and held.queries.event_type.tolist() == [1]
    assert held.queries.event_time_s.tolist() == [DAY_S] and np.isnan(held.queries.location).all()


# --- leave-one-out -------------------------------------------------------------------------------------------------------------


def test_leave_one_out_history_is_every_earlier_event_in_the_users_order(prepared: Any) -> None:
    dataset = prepared(["a p 1", "a q 2", "a r 2", "a s 2", "b p 1", "b q 1", "c r 5", "c q 6", "c p 7"], split=LAST)
    assert questions(dataset, "valid") == [("a", 2, ["p", "q"], ["r"]), ("c", 6, ["r"], ["q"])]
    assert questions(dataset, "test") == [("a", 2, ["p", "q", "r"], ["s"]), ("c", 7, ["r", "q"], ["p"])]


def test_leave_one_out_keeps_what_lies_between_the_held_out_events_for_test_alone(prepared: Any) -> None:
    dataset = prepared(["a p 1 5", "a q 2 5", "a r 3 1", "a s 4 5", "a t 5 1"], split=LAST, positive_min_stars=3)
    assert questions(dataset, "valid") == [("a", 2, ["p"], ["q"])]
    assert questions(dataset, "test") == [("a", 4, ["p", "q", "r"], ["s"])]


def test_log_popularity_is_that_of_what_training_knows(prepared: Any) -> None:
    """Popularity is weighted and relative to the mean; items with bad ratings only are unpopular, later items are not counted."""
    rows = days("u a 1 5", "v a 2 5", "w a 3 5", "u b 4 5", "v bad 5 1", "w new 12 5")
    dataset = prepared(rows, split=CUTS, positive_min_stars=4)
    count = dict(zip(dataset.item_ids, dataset.item_train_count, strict=True))
    assert count["a"] == 3 and count["b"] == 1 and count["bad"] == 0 and dataset.n_train_items == 3
    logs = dict(zip(dataset.item_ids, log_popularity(dataset)[:, 0].tolist(), strict=True))
    mean = sum(count[name] for name in ("a", "b", "bad")) / 3
    for name in ("a", "b", "bad"):
        assert logs[name] == pytest.approx(float(np.log1p(count[name]) - np.log1p(mean)), abs=1e-6)
    assert np.isnan(logs["new"]) and (log_popularity(dataset)[:2] == 0).all()


# --- given split ---------------------------------------------------------------------------------------------------------------


def test_a_predefined_split_has_one_query_per_user_after_all_earlier_events(prepared: Any) -> None:
    part = lambda user, item, n, name: {"user_id": user, "item_id": item, "time_s": n, "part": name}  # noqa: E731
    rows = [part("a", f"i{n}", n, "train") for n in range(8)] + [part("a", "t1", 0, "test"), part("a", "t0", 1, "test")]
    rows += [part("b", "i1", 0, "train"), part("new", "i1", 0, "test"), part("new", "i1", 1, "test")]
    dataset = prepared(rows, has_time=False, split={"kind": "predefined", "valid": 0.25})
    events, held = dataset.events, questions(dataset, "valid")
    of_a = slice(*dataset.events.offsets[dataset.user_rows(["a"])[0] :][:2].tolist())
    names, splits = dataset.item_ids[events.item_row[of_a]], events.split[of_a]
    train = names[splits == TRAIN].tolist()
    assert len(train) == 6 and held == [("a", held[0][1], train, sorted(names[splits == SPLITS["valid"]].tolist()))]
    assert questions(dataset, "test") == [("a", 8, [f"i{n}" for n in range(8)], ["t0", "t1"]), ("new", 0, [], ["i1"])]


# --- any split, restated plainly -----------------------------------------------------------------------------------------------


def restated(dataset: Dataset, split: str, kind: str) -> list[Question]:
    """Return the same queries, by loops over rows."""
    events, code = dataset.events, SPLITS[split]
    rows = list(zip(events.user_row.tolist(), events.time_s.tolist(), events.item_row.tolist(), events.split, strict=True))
    asked: dict[tuple[int, int], set[int]] = defaultdict(set)
    for n, (user, at, item, part) in enumerate(rows):
        if part == code and events.positive[n]:
            asked[user, at].add(item)
    found = []
    for (user, at), targets in sorted(asked.items()):
        own = [(n, t, item) for n, (u, t, item, _) in enumerate(rows) if u == user]
        first = min(n for n, t, item in own if t == at and rows[n][3] == code and events.positive[n])
        past = [item for n, t, item in own if (t < at if kind == "time" else n < first)]
        found.append((dataset.user_ids[user], at, dataset.item_ids[past].tolist(), dataset.item_ids[sorted(targets)].tolist()))
    return found


@settings(max_examples=6)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 25), st.sampled_from(["-", "1", "5"])), min_size=1
    ),
    kind=st.sampled_from(["time", "leave_one_out"]),
)
def test_questions_are_those_of_a_plain_restatement(prepared: Any, rows: list[tuple[int, int, int, str]], kind: str) -> None:
    lines = [*days(*(f"u{u} i{i} {at} {stars}" for u, i, at, stars in rows)), "u0 i0 0 5"]
    dataset = prepared(lines, split=CUTS if kind == "time" else LAST, positive_min_stars=3)
    for split in ("valid", "test"):
        assert questions(dataset, split) == restated(dataset, split, kind)
        queries = dataset.held_out(split).queries
        asked_at = np.repeat(queries.time_s, queries.lengths)
        assert (queries.event_time_s < asked_at).all() if kind == "time" else (queries.event_time_s <= asked_at).all()


# --- the rest of the opened folder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(prepared: Any) -> Dataset:
    rows = days(
        *(f"u{u} i{(u + n) % 7} {12 + n}" for u in range(20) for n in range(3)), "u0 i0 1 4", "u1 i0 2 2", "u1 i3 3", "- i3 4"
    )
    dataset: Dataset = prepared(rows, split=CUTS)
    return dataset


def test_a_sample_of_the_questions_is_some_of_them_and_the_seed_chooses(plain: Dataset) -> None:
    every = questions(plain, "valid")
    some, again, other = (questions(plain, "valid", max_queries=15, seed=seed) for seed in (1, 1, 2))
    assert len(every) == 60 and len(some) == 15 and some == again != other
    assert [question for question in every if question in some] == some
    assert questions(plain, "valid", max_queries=1000) == every and questions(plain, "valid", max_queries=0) == []


def test_histories_of_known_users_end_strictly_before_the_moment(plain: Dataset) -> None:
    rows = np.append(plain.user_rows(["u1", "u1", "u1", "u1", "nobody"]), 0)
    queries = plain.histories(rows, np.array([2, 2.5, 13, 1000, 1000, 1000]).__mul__(DAY_S).astype(np.int64))
    assert histories(plain, queries) == [[], ["i0"], ["i0", "i3", "i1"], ["i0", "i3", "i1", "i2", "i3"], [], []]
    assert queries.user_row.tolist() == rows.tolist() and rows[-2] == UNKNOWN


def test_ids_and_rows_answer_each_other(plain: Dataset) -> None:
    assert plain.item_rows(plain.item_ids[2:].tolist()).tolist() == list(range(2, plain.n_item_rows))
    assert plain.user_rows(plain.user_ids[2:].tolist()).tolist() == list(range(2, plain.n_user_rows))
    assert plain.item_rows(["i0", "no such", ""]).tolist() == [2, UNKNOWN, UNKNOWN]
    assert plain.item_rows([]).dtype == np.int64 and len(plain.item_rows([])) == 0


def test_arrays_have_the_promised_types_and_agree_with_each_other(plain: Dataset) -> None:
    events, item_events = plain.events, plain.item_events
    for name in ("offsets", "item_row", "time_s", "event_type"):
        assert getattr(events, name).dtype == np.int64
    assert (events.stars.dtype, events.weight.dtype) == (np.float32, np.float32)
    assert (events.positive.dtype, events.split.dtype, item_events.split.dtype) == (np.bool_, np.int8, np.int8)
    assert len(events.offsets) == plain.n_user_rows + 1 and len(item_events.offsets) == plain.n_item_rows + 1
    assert events.offsets[-1] == len(events) == len(item_events) - 1
    assert plain.item_train_count.tolist() == [0, 0, 2, 1] + [0] * 5 and plain.item_train_count.dtype == np.int64
    pairs = sorted(zip(events.item_row.tolist(), events.time_s.tolist(), strict=True))
    seen = sorted(zip(item_events.item_row.tolist(), item_events.time_s.tolist(), strict=True))
    assert [pair for pair in seen if pair != (3, 4 * DAY_S)] == pairs and len(seen) == len(pairs) + 1


def test_held_out_accepts_only_splits_with_held_out_events(plain: Dataset) -> None:
    with pytest.raises(DataError, match=r"Unknown split 'train'"):
        plain.held_out("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"kind": "bundle"}'), "has kind 'bundle', expected 'dataset'"),
        (lambda folder: (folder / "manifest.json").write_text('{"kind": "dataset", "format": 99}'), "has format 99"),
        (lambda folder: (folder / "item_events.safetensors").unlink(), "item_events.safetensors missing"),
    ],
)
def test_an_incomplete_dataset_folder_is_refused_in_one_line(plain: Dataset, tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(plain.path, folder)
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "dataset"
    change(folder)
    with pytest.raises(DataError, match=message) as error:
        Dataset.open(folder)
    assert "\n" not in str(error.value)
