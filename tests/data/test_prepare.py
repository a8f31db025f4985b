"""Test `prepare`: rows that are kept, split, numbered and counted, and atomic writing of the folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from twotower.data import prepare as module
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, DataError
from twotower.features.texts import read_texts
from twotower.schema import FeatureSpec
from twotower.utils.config import parse_config

from .conftest import CUTS, EVERYTHING, LAST, business, day, listed


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    assert found == dataset.manifest.hashes


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
    assert all(len(values) == dataset.n_item_rows for values in dataset.item_features.values())
    assert dataset.user_features["since_s"].tolist() == [0, 0, 0, 5, 0, 0]


def seen_text(prepared: Any, rows: list[Any], **kept: Any) -> list[str] | None:
    with mock.patch.object(module, "read_texts", wraps=read_texts) as hashed:
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
        (("user elite",), "The user feature name 'elite' is reserved. Reserved names: .*elite. Rename the feature"),
        (("user since_s",), "'since_s' is reserved.*Rename the feature"),
        (("item state",), "The item feature name 'state' is reserved"),
        (("item city", "item price", "item city"), "'city' is used twice"),
        (("item at.place",), "'at.place' contains a dot"),
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
        ([], {"split": CUTS}, "none of the 0 events belongs .* training part. Change prepare.split or add raw data"),
        ([f"a x {day(15)}"], {"split": CUTS}, "there is one event, and the split holds it out"),
        (["- x 1", "- x 2"], {"split": LAST}, r"2 dropped because no user"),
        (["a x 1", "b x 2"], {"split": CUTS, "min_user_events": 2}, "all 2 were dropped by min_user_events 2, .* Lower"),
        (
            ["a x 1"],
            {"split": {"kind": "time"}, "has_time": False},
            "no times, but prepare.split.kind is time.*leave_one_out or predefined",
        ),
        (["a x 1"], {"split": {"kind": "predefined", "valid": 0.1}}, "no test part, but prepare.split.kind is predefined"),
        (["a x 1"], {"split": {**CUTS, "kind": "predefined"}}, "cannot be cut at the date 1970-01-11"),
        (["a x 1"], {"split": CUTS, "event_weights": {"reviews": 2}}, r"'reviews'. Did you mean 'review'\?"),
    ],
)
def test_errors_say_what_was_found_and_what_to_do_in_one_line(prepared: Any, rows: Any, settings_: Any, message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message) as error:
        prepared(rows, **settings_)
    assert "\n" not in str(error.value)


def test_an_error_distinguishes_unknown_items_from_an_early_cut(prepared: Any) -> None:
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
    assert "town_truth.safetensors" in dataset.manifest.hashes


def test_the_manifest_is_returned_as_written_with_the_settings_that_made_it(tmp_path: Path) -> None:
    data = tmp_path / "raw"
    data.mkdir()
    (data / "seq.txt").write_text("u1 i1 i2 i3 i4\nu2 i2 i3 i1\n")
    source = {"source": "sequences", "path": str(data), "sequences": {"train": "seq.txt"}}
    config = parse_config({"seed": 3, "data": source, "prepare": {"split": LAST}})
    stages: list[str] = []
    manifest = module.prepare(config, tmp_path / "out", progress=stages.append)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest.json_values()
    assert parse_config(manifest.config.json_values()) == config and manifest.seed == 3
    began = ["read raw files", "filter and split events", "write events", "encode features", "find neighbours", "write features"]
    assert stages == began
    assert [row[3] for row in listed(Dataset.open(tmp_path / "out"))] == [
        "train",
        "train",
        "valid",
        "test",
        "train",
        "valid",
        "test",
    ]


def test_too_little_memory_is_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    rows = "".join(f"user {n % 9_973},item {n % 4_999},{1_600_000_000 + n}\n" for n in range(300_000))
    (tmp_path / "e.csv").write_text("user_id,item_id,time\n" + rows)
    config = parse_config({"data": {"source": "tables", "path": str(tmp_path), "interactions": {"path": "e.csv", "time": "time"}}})

    def small(*given: Any) -> Any:
        engine: Any = opened(*given)
        engine.con.raw_sql("SET memory_limit = '12MB'; SET max_temp_directory_size = '0KB'")
        return engine

    opened = module.open_engine
    with mock.patch.object(module, "open_engine", small), pytest.raises(DataError, match="Too little memory to read these data"):
        module.prepare(config, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.csv"]


def test_control_c_during_a_query_is_an_interruption_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\nann,tea\n")
    config = parse_config({"data": {"source": "tables", "path": str(tmp_path), "interactions": {"path": "e.csv"}}})

    def interrupted(*given: Any) -> Any:
        engine: Any = opened(*given)
        engine.save = mock.Mock(side_effect=RuntimeError("Query interrupted"))  # as DuckDB 2.0 tells it
        return engine

    opened = module.open_engine
    with mock.patch.object(module, "open_engine", interrupted), pytest.raises(KeyboardInterrupt):
        module.prepare(config, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.csv"]
