"""Raw rows → a dataset: what is kept, split, numbered and counted, and that a folder appears whole or not at all."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.config import parse_config
from twotower.data import prepare as module
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, DataError
from twotower.schema import DAY_S, SPLITS, FeatureSpec

CUTS = {"kind": "time", "valid": "1970-01-11", "test": "1970-01-21"}  # day 10 and day 20
EVERYTHING = {"kind": "time", "valid": "2100-01-01", "test": "2100-01-02"}
LAST = {"kind": "leave_one_out"}
NAMES = {code: name for name, code in SPLITS.items()}


def day(number: float) -> int:
    return int(number * DAY_S)


def listed(dataset: Dataset) -> list[tuple[str, str, int, str]]:
    """(user, item, time, split) of every event, in the order of the file."""
    events = dataset.events
    users, items = dataset.user_ids[events.user_row], dataset.item_ids[events.item_row]
    return list(zip(users, items, events.time_s.tolist(), [NAMES[code] for code in events.split.tolist()], strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def business(item_id: str, **values: Any) -> dict[str, Any]:
    return {"item_id": item_id, "name": f"The {item_id}", "city": "Town", "categories": ["Food"], "price": 2, **values}


def mixed_rows(size: int = 400) -> list[dict[str, Any]]:
    rng = random.Random(5)
    row = lambda i: {  # noqa: E731
        "user_id": rng.choice(["ann", "bob", "cleo", "dan", None]),
        "item_id": rng.choice("pqrstuvw"),
        "time_s": day(rng.randrange(30)),
        "order": i,
        "event_type": rng.choice(["review", "tip"]),
        "stars": rng.choice([None, 1.0, 3.0, 5.0]),
        "text": rng.choice([None, "good soup", "slow but kind people", "never again"]),
    }
    return [row(i) for i in range(size)]


# --- the same input, the same bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [CUTS, LAST], ids=["time", "leave_one_out"])
def test_bytes_depend_on_neither_the_run_nor_the_physical_order_of_rows(prepared: Any, split: dict[str, Any]) -> None:
    rows, items = mixed_rows(), [business(name, latitude=40.0 + i, longitude=-70.0) for i, name in enumerate("pqrstuvw")]
    shuffled = random.Random(1).sample(rows, len(rows))
    kept = {"split": split, "features": True, "min_user_events": 2, "min_item_events": 2, "k_core": True}
    first, second, third = (
        contents(prepared(given, items=some, **kept).path)
        for given, some in ((rows, items), (rows, items), (shuffled, list(reversed(items))))
    )
    assert first == second == third
    assert len(first) >= 9 and len(first["events.safetensors"]) > 1000


def test_hashes_of_the_manifest_are_those_of_the_files(prepared: Any) -> None:
    import hashlib

    dataset = prepared(["a x 1", "b y 2"], split=EVERYTHING)
    found = {name: hashlib.sha256(data).hexdigest() for name, data in contents(dataset.path).items() if name != "manifest.json"}
    assert found == dataset.manifest["hashes"]


# --- what is kept, and the counts ----------------------------------------------------------------------------------------------


def test_every_row_read_is_kept_or_dropped_for_a_counted_reason(prepared: Any) -> None:
    rows = ["a x 1", "a x 2", "a y 3", "b x 4", "b y 5", "b gone 6", "- x 7", "c x 8", "a rare 9", f"new x {day(25)}"]
    known = [business(name) for name in ("x", "y", "rare")]
    dataset = prepared(rows, items=known, split=CUTS, repeats="fold", min_user_events=2, min_item_events=2)
    counts = dataset.manifest["counts"]
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
        "items": 2,
        "users": 3,
    }
    assert counts["read"] == {"interactions": len(rows)}
    assert counts["kept"]["events"] + counts["kept"]["anonymous_events"] + sum(counts["dropped"]["events"].values()) == len(rows)


def test_fold_keeps_the_first_event_of_a_pair_and_leaves_anonymous_ones(prepared: Any) -> None:
    rows = ["a x 9", "a x 3 1", "a x 3 2", "b x 5", "- x 1", "- x 1"]
    dataset = prepared(rows, split=EVERYTHING, repeats="fold")
    assert [row[:3] for row in listed(dataset)] == [("a", "x", 3), ("b", "x", 5)]
    assert dataset.events.stars[0] == 1 and len(dataset.visits) == 4


def test_minimum_counts_look_at_training_alone_and_newcomers_stay(prepared: Any) -> None:
    late = [f"a late {day(25)}", f"new x {day(25)}", f"once x {day(25)}", f"a rare {day(26)}"]
    rows = ["a x 1", "a y 2", "b x 3", "b y 4", "once x 5", "a rare 6", *late]
    dataset = prepared(rows, split=CUTS, min_user_events=2, min_item_events=2)
    assert {row[0] for row in listed(dataset)} == {"a", "b", "new"}  # "once" had one training event: its later event goes too
    assert {row[1] for row in listed(dataset)} == {"x", "y", "late"}
    assert (dataset.n_train_users, dataset.n_train_items) == (2, 2)


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 3))
def test_k_core_is_the_largest_set_in_which_everybody_has_enough(
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
        with pytest.raises(DataError, match="k_core True left none"):
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
    assert dataset.manifest["cuts_s"] == {"valid": day(10), "test": day(20)}


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


def test_leave_one_out_breaks_ties_of_time_by_the_order_of_the_source(prepared: Any) -> None:
    splits = {row[1]: row[3] for row in listed(prepared(["a q 7", "a p 7", "a r 7"], split=LAST))}
    assert splits == {"q": "train", "p": "valid", "r": "test"}


def test_a_given_split_draws_validation_from_the_rest_by_seed(prepared: Any) -> None:
    rows = [
        {"user_id": user, "item_id": f"i{n}", "time_s": n % 20, "part": "test" if n >= 20 else "train"}
        for user in ("a", "b")
        for n in range(25)
    ]
    split = {"kind": "given", "valid": 0.25}
    first, again, other = (prepared(rows, has_time=False, split=split, seed=seed) for seed in (0, 0, 1))
    assert listed(first) == listed(again) != listed(other)
    per_user = Counter((user, part) for user, _, _, part in listed(first))
    assert per_user == {(user, part): n for user in "ab" for part, n in (("train", 15), ("valid", 5), ("test", 5))}
    assert {item for _, item, _, part in listed(first) if part == "test"} == {f"i{n}" for n in range(20, 25)}
    assert len({item for _, item, _, part in listed(first) if part == "valid"}) > 5  # each user has a draw of their own


def test_without_a_clock_time_is_the_position_in_the_users_own_sequence(prepared: Any) -> None:
    rows = [{"user_id": "a", "item_id": f"i{n}", "time_s": n % 3, "part": "test" if n >= 3 else "train"} for n in range(5)]
    dataset = prepared(rows, has_time=False, split={"kind": "given", "valid": 0.0})
    assert [row[1:3] for row in listed(dataset)] == [(f"i{n}", n) for n in range(5)]


def test_anonymous_visits_count_under_a_time_split_and_are_left_out_of_others(prepared: Any) -> None:
    rows = ["a x 1", "a y 2", "a z 3", f"- x {day(12)}", "- y 5", f"- w {day(30)}"]
    timed = prepared(rows, split=CUTS)
    visits = timed.visits
    found = set(zip(timed.item_ids[visits.item_row], visits.time_s.tolist(), visits.split.tolist(), strict=True))
    assert found == {("x", 1, 0), ("x", day(12), 1), ("y", 2, 0), ("y", 5, 0), ("z", 3, 0), ("w", day(30), 2)}
    assert timed.n_users == 3 and timed.event_types == ["review"]
    last = prepared(rows, split=LAST)
    assert len(last.visits) == 3
    assert last.manifest["counts"]["dropped"]["events"]["no user, and no split by time to place it"] == 3


# --- ids, tables, features -----------------------------------------------------------------------------------------------------


def test_rows_are_the_trained_by_id_then_the_new_by_id(prepared: Any) -> None:
    rows = ["m z 1", "b y 2", f"a x {day(12)}", f"zoe z {day(22)}"]
    items = [business(name, price=n) for n, name in enumerate("xwyz")]
    users = [{"user_id": "m", "since_s": 5, "elite": [2015]}, {"user_id": "idle", "since_s": 1}]
    dataset = prepared(rows, items=items, users=users, features=True, split=CUTS)
    assert dataset.item_ids.tolist() == ["", "", "y", "z", "w", "x"] and dataset.n_train_items == 2
    assert dataset.user_ids.tolist() == ["", "", "b", "m", "a", "zoe"] and dataset.n_train_users == 2
    assert dataset.items.column_names == ["item_id", "name", "city", "categories", "price", "latitude", "longitude"]
    assert dataset.items["price"].to_pylist() == [2, 3, 1, 0]
    assert dataset.users.to_pylist()[:2] == [
        {"user_id": "b", "since_s": None, "elite": None},
        {"user_id": "m", "since_s": 5, "elite": [2015]},
    ]
    assert all(len(values) == dataset.n_items for values in dataset.item_features.values())
    assert dataset.user_features["since_s"].tolist() == [0, 0, 0, 5, 0, 0]


def seen_text(prepared: Any, rows: list[Any], **kept: Any) -> list[str] | None:
    with mock.patch.object(module, "hash_texts", wraps=module.hash_texts) as hashed:
        prepared(rows, items=[business("x"), business("y", name=None), business("z")], features=True, split=CUTS, **kept)
    return hashed.call_args.args[0] if hashed.called else None


def test_text_is_the_name_and_what_was_written_in_training_oldest_first_capped(prepared: Any) -> None:
    said = lambda item, time_s, text: {"user_id": "a", "item_id": item, "time_s": time_s, "text": text}  # noqa: E731
    rows = [said("x", 5, "third"), said("x", 2, "first"), said("x", 2, "second"), said("x", day(12), "secret"), said("y", 1, None)]
    rows += [{**said("x", 3, "a passer-by's"), "user_id": None}, said("z", day(22), "later")]
    assert seen_text(prepared, rows) == ["The x\nfirst\nsecond\na passer-by's\nthird", "", "The z"]
    assert seen_text(prepared, rows, text_max_chars=8) == ["The x\nfirst\nse", "", "The z"]
    assert seen_text(prepared, rows, text_max_chars=0) == ["The x", "", "The z"]
    assert seen_text(prepared, rows, text_dim=0) is None
    assert seen_text(prepared, rows, exclude_features=["text"]) is None


def test_excluded_features_are_not_encoded(prepared: Any) -> None:
    kept = {"items": [business("x")], "features": True, "split": EVERYTHING}
    dataset = prepared(["a x 1"], exclude_features=["price", "text"], **kept)
    assert [spec.name for spec in dataset.specs] == ["city", "categories", "location"]
    assert not {"price", "text"} & dataset.item_features.keys()
    with pytest.raises(ConfigError, match=r"'prise'. Did you mean 'price'\?"):
        prepared(["a x 1"], exclude_features=["prise"], **kept)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("user elite",), "A feature of the users needs a name of its own; .*elite are taken. Got 'elite'. Rename it"),
        (("user since_s",), "Got 'since_s'. Rename it"),
        (("item state",), "A feature of the items needs a name of its own.*Got 'state'"),
        (("item city", "item price", "item city"), "Got 'city' twice. Rename it"),
        (("item at.place",), "must hold no dot. Got 'at.place'"),
        (("item city", "user city", "item elite"), None),
    ],
)
def test_every_feature_has_a_name_of_its_own(names: tuple[str, ...], message: str | None) -> None:
    specs = [FeatureSpec(name=n.split()[1], side=n.split()[0], kind="number", columns=("x",)) for n in names]  # type: ignore[arg-type]
    raw = mock.Mock(features=specs)
    if message is None:
        assert module._specs(parse_config({}).prepare, raw) == tuple(specs)
        return
    with pytest.raises(ConfigError, match=message):
        module._specs(parse_config({}).prepare, raw)


# --- errors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings_", "message"),
    [
        ([], {"split": CUTS}, "0 events were found, none of a known user in the training part. Move prepare.split or read more"),
        ([f"a x {day(15)}"], {"split": CUTS}, "1 events were found, none of a known user in the training part"),
        (["- x 1", "- x 2"], {"split": LAST}, r"2 dropped because no user"),
        (["a x 1", "b x 2"], {"split": CUTS, "min_user_events": 2}, "2 were found, min_user_events 2, .* left none. Lower"),
        (["a x 1"], {"split": {"kind": "time"}, "has_time": False}, "A time split needs times.*leave_one_out or given"),
        (["a x 1"], {"split": {"kind": "given", "valid": 0.1}}, "A given split needs a test part"),
        (["a x 1"], {"split": {**CUTS, "kind": "given"}}, "a share of each user's events. Got 1970-01-11"),
        (["a x 1"], {"split": CUTS, "event_weights": {"reviews": 2}}, r"'reviews'. Did you mean 'review'\?"),
    ],
)
def test_errors_say_what_was_found_and_what_to_do_in_one_line(prepared: Any, rows: Any, settings_: Any, message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message) as error:
        prepared(rows, **settings_)
    assert "\n" not in str(error.value)


def test_an_unknown_item_everywhere_is_told_apart_from_an_early_cut(prepared: Any) -> None:
    with pytest.raises(DataError, match="1 dropped because item is not in the items table"):
        prepared(["a x 1"], items=[business("y")], split=CUTS)


# --- the folder ----------------------------------------------------------------------------------------------------------------


def test_an_existing_dataset_is_replaced_and_nothing_is_left_beside_it(prepared: Any, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "set"
    prepared(["a x 1"], split=EVERYTHING, out=out)
    (out / "stray").write_text("from before")
    assert len(prepared(["a x 1", "b x 2"], split=EVERYTHING, out=out).events) == 2
    assert not (out / "stray").exists() and list(out.parent.iterdir()) == [out]


def test_a_failure_leaves_the_old_dataset_as_it_was(prepared: Any, tmp_path: Path) -> None:
    out = tmp_path / "set"
    before = contents(prepared(["a x 1"], split=EVERYTHING, out=out).path)
    with mock.patch.object(module, "encode_users", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        prepared(["b x 1"], split=EVERYTHING, out=out)
    assert contents(out) == before and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["folder of something", "other manifest", "file"])
def test_anything_but_a_dataset_is_left_alone(prepared: Any, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "precious"
    kept = out if kind == "file" else out / ("manifest.json" if kind == "other manifest" else "notes.txt")
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"kind": "bundle"}))
    with pytest.raises(DataError, match="must be a new folder or a dataset to replace"):
        prepared(["a x 1"], split=EVERYTHING, out=out)
    assert kept.read_text() == '{"kind": "bundle"}' and list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_is_filled_and_the_truth_of_a_town_comes_along(prepared: Any, tmp_path: Path) -> None:
    truth = tmp_path / "truth.safetensors"
    truth.write_bytes(b"tastes")
    out = tmp_path / "set"
    out.mkdir()
    dataset = prepared(["a x 1"], split=EVERYTHING, out=out, truth=truth)
    assert (dataset.path / "town_truth.safetensors").read_bytes() == b"tastes"
    assert "town_truth.safetensors" in dataset.manifest["hashes"]


def test_the_manifest_is_returned_as_written_with_the_settings_that_made_it(tmp_path: Path) -> None:
    data = tmp_path / "raw"
    data.mkdir()
    (data / "seq.txt").write_text("u1 i1 i2 i3 i4\nu2 i2 i3 i1\n")
    source = {"source": "sequences", "path": str(data), "sequences": {"train": "seq.txt"}}
    config = parse_config({"seed": 3, "data": source, "prepare": {"split": LAST}})
    stages: list[str] = []
    manifest = module.prepare(config, tmp_path / "out", progress=stages.append)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert parse_config(manifest["config"]) == config and manifest["seed"] == 3
    assert stages == ["read raw files", "filter and split events", "write events", "encode features"]
    assert [row[3] for row in listed(Dataset.open(tmp_path / "out"))] == [
        "train",
        "train",
        "valid",
        "test",
        "train",
        "valid",
        "test",
    ]
