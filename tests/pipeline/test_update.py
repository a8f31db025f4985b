"""Test updates: what a model knows keeps its row and its numbers, and nothing is published that does not fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import twotower as tt
from twotower.bundle.bundle import load_bundle
from twotower.bundle.revision import add_items, remove_items
from twotower.cli import main
from twotower.client import Client
from twotower.data.dataset import Dataset
from twotower.errors import UnreachableError
from twotower.pipeline import update as module
from twotower.pipeline.evaluate import run_manifest
from twotower.pipeline.new_data import NewSource, source_of_files
from twotower.pipeline.stages import Watch, run_all
from twotower.pipeline.update import update
from twotower.retrieval.recommender import Recommender
from twotower.schema import FIRST_ROW, TRAIN, UNKNOWN, VALID
from twotower.serving.event_types import Event
from twotower.serving.sqlite_store import SQLiteStore
from twotower.trainers.callbacks import Callback, Training
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import parse_config

from ..shop import FAST, NAMED, shop

TOWER = {"embedding_dim": 16, "num_heads": 2}
SETTINGS: dict[str, Any] = {
    **FAST,
    "model": {"user_tower": TOWER, "tables": {"user.id": {"update": "sparse"}}},
    "training": {**FAST["training"], "max_steps": 30, "batch_size": 256, "checkpoint_every_s": 0.001},
    "evaluation": {**FAST["evaluation"], "baselines": []},
}
LAST = pd.Timedelta(days=21)


def frames() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Orders and products of the first months, and those of the last weeks: with new customers, products and a brand."""
    orders, products = shop()
    late = orders["ordered_at"] >= orders["ordered_at"].max() - LAST
    new, whole = orders[late].copy(), products.copy()
    guests = new.index[::7]
    new.loc[guests, "customer"] = "N" + new.loc[guests, "customer"]
    whole.loc[55:, "brand"] = "Darjeeling"
    new.loc[new.index[::5], "product"] = "P0060"
    old = orders[~late & ~orders["product"].isin(products["product"][55:])]
    return old, products[:55], new, whole


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its files; treat it as read-only."""
    root = tmp_path_factory.mktemp("origin")
    old, products, new, whole = frames()
    (root / "new").mkdir()
    for name, table in {"orders": old, "products": products, "new/orders": new, "new/products": whole}.items():
        table.to_csv(root / f"{name}.csv", index=False)
    columns = {"user": "customer", "item": "product", "time": "ordered_at"}
    tables: dict[str, Any] = {
        "interactions": {"path": "orders.csv", "user_id": "customer", "item_id": "product", "time": columns["time"]},
        "items": {"path": "products.csv", "item_id": "product", "name": "title"},
    }
    tables["items"]["features"] = [{"name": "brand", "kind": "categorical"}, {"name": "price", "kind": "number"}]
    data = {"source": "tables", "path": str(root), **tables}
    run_all(parse_config({**SETTINGS, "data": data}), root / "run")
    return root


@pytest.fixture
def shop_run(origin: Path, tmp_path: Path) -> Path:
    """A copy of the run with its files."""
    return copied(origin, tmp_path)


def copied(origin: Path, folder: Path) -> Path:
    shutil.copytree(origin, folder, dirs_exist_ok=True)
    file = folder / "run" / "model" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dataset": str(folder / "run" / "dataset")}))
    return folder / "run"


def base_of(run: Path) -> Dataset:
    return Dataset.open(Path(run_manifest(run / "model").dataset))


def go_on(run: Path, **options: Any) -> Any:
    return update(run, source_of_files([run.parent / "new"], base_of(run)), run, **options)


def content(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file; times in the log and the paths of manifests aside."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in ("metrics.jsonl", "manifest.json", "last.pt", "best.pt"):
            found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_checkpoint(one)["model"], load_checkpoint(other)["model"]
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_the_model_knows_keeps_its_rows_and_numbers_to_the_bit(shop_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, old = base_of(shop_run), load_checkpoint(shop_run / "model" / "best.pt")
    begun: dict[str, Any] = {}

    def kept(*arguments: Any) -> Any:
        begun.update(load_checkpoint(arguments[3] / "start.pt"))
        return train(*arguments)

    train = module._train
    monkeypatch.setattr(module, "_train", kept)
    vocabulary, features = list(base.encoders.vocabularies["item.brand"]), {k: np.array(v) for k, v in base.item_features.items()}
    items, users, known = base.item_ids.tolist(), base.user_ids.tolist(), (base.n_train_item_rows, base.n_train_user_rows)
    record = go_on(shop_run)
    grown = base_of(shop_run)
    assert (record.new_items, record.number) == (5, 1) and record.new_users == grown.n_users - base.n_users > 10
    assert grown.item_ids[: known[0]].tolist() == items[: known[0]]
    assert grown.user_ids[: known[1]].tolist() == users[: known[1]]
    assert grown.encoders.vocabularies["item.brand"] == [*vocabulary, "Darjeeling"]
    for name, value in features.items():
        if name != "neighbours":
            np.testing.assert_array_equal(grown.item_features[name][: known[0]], value[: known[0]])
    grew = []
    for name, value in old["model"].items():
        new = begun["model"][name]
        assert torch.equal(new[: len(value)] if value.ndim else new, value), name
        if value.ndim and len(new) > len(value):
            grew.append(name)
            assert torch.equal(new[len(value) :], value[UNKNOWN].expand(len(new) - len(value), -1)), name
    assert {"tables.item/id.weight", "tables.user/id.weight", "tables.item/brand.weight"} <= set(grew)
    for number, moments in old["optimizer"]["state"].items():
        for key, value in moments.items():
            new = begun["optimizer"]["state"][number][key]
            assert torch.equal(new[: len(value)] if value.ndim else new, value)
            assert not value.ndim or not new[len(value) :].any()
    moments = begun["rows"]["tables.user/id"]["moments"]
    assert torch.equal(moments[: known[1]], old["rows"]["tables.user/id"]["moments"]) and not moments[known[1] :].any()
    reached = load_checkpoint(shop_run / "model" / "best.pt")
    assert reached["progress"]["earlier_steps"] == old["progress"]["step"] > 0
    assert not torch.equal(reached["model"]["tables.item/id.weight"], begun["model"]["tables.item/id.weight"])


def test_the_newest_events_validate_and_all_others_are_trained_on(shop_run: Path) -> None:
    base = base_of(shop_run)
    before = len(base.events)
    last = int(base.item_events.time_s.max())
    go_on(shop_run)
    grown = base_of(shop_run)
    _, _, new, _ = frames()
    assert len(grown.events) == before + len(new)
    held = grown.events.split == VALID
    assert grown.events.time_s[held].min() >= grown.manifest.cuts_s["valid"] > last
    assert (grown.events.split[~held] == TRAIN).all()
    assert 0.4 < held.sum() / len(new) < 0.6


def test_a_handful_of_new_events_leaves_the_weights_of_the_score(shop_run: Path) -> None:
    def weights() -> dict[str, torch.Tensor]:
        state = load_checkpoint(shop_run / "model" / "best.pt")["model"]
        return {name: state[name] for name in ("priors.weights", "priors.recency", "priors.repeats")}

    _, _, new, _ = frames()
    few = new[new["product"] == "P0060"].drop_duplicates("customer")[:12]
    assert len(few) == 12
    few.to_csv(shop_run.parent / "new" / "orders.csv", index=False)
    before, record = weights(), run_manifest(shop_run / "model").calibration
    assert go_on(shop_run).queries < 12
    after = weights()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert record is not None and run_manifest(shop_run / "model").calibration == record


def test_an_update_with_as_many_queries_as_the_run_fits_the_weights_of_the_score(shop_run: Path) -> None:
    record = run_manifest(shop_run / "model").calibration
    assert record is not None
    found = go_on(shop_run, overrides=["updating.valid_frac=0.9"])
    calibration = run_manifest(shop_run / "model").calibration
    assert found.queries >= record.queries and calibration is not None and calibration.queries == found.queries


def test_new_users_and_new_items_get_lists(shop_run: Path) -> None:
    go_on(shop_run)
    recommender = Recommender.load(shop_run / "bundle")
    guest = next(str(name) for name in recommender.dataset.user_ids if str(name).startswith("NC"))
    found = recommender.recommend(user=guest)
    assert len(found) == 10
    every = recommender.recommend(user="C0001", k=60, exclude_seen=False)
    assert {"P0056", "P0060"} <= {item.item_id for item in every}
    assert recommender.dataset.item_rows(["P0060"])[0] < recommender.dataset.n_train_item_rows  # it has events now


def test_the_same_events_again_change_nothing(shop_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = shop_run.parent / "new"
    assert main(["update", str(shop_run / "model"), "--data", str(new)]) == 0  # the part stands for the run
    before = content(shop_run)
    assert load_bundle(shop_run / "bundle").dataset.n_items == 60
    assert "new events" in capsys.readouterr().out
    assert main(["update", str(shop_run), "--data", str(new)]) == 0
    assert "has all of these events already" in capsys.readouterr().out
    (new / "orders.csv").write_text("customer,product,ordered_at\n")
    assert main(["update", str(shop_run), "--data", str(new)]) == 0
    assert content(shop_run) == before
    assert not list(shop_run.parent.glob(".*.update"))


def test_events_that_the_run_has_do_not_count_twice(shop_run: Path, origin: Path) -> None:
    old, _, new, _ = frames()
    pd.concat([old[-300:], new]).to_csv(shop_run.parent / "new" / "orders.csv", index=False)
    twice = go_on(shop_run)
    assert twice.new_events == len(new)
    other = copied(origin, shop_run.parent / "other")
    go_on(other)
    assert content(shop_run / "bundle") == content(other / "bundle")


def older(root: Path) -> None:
    orders = pd.read_csv(root / "orders.csv")
    orders["ordered_at"] = pd.to_datetime(orders["ordered_at"], format="mixed") - pd.Timedelta(days=400)
    orders.to_csv(root / "new" / "orders.csv", index=False)


def another_schema(root: Path) -> None:
    new = pd.read_csv(root / "new" / "orders.csv")
    new.rename(columns={"ordered_at": "when"}).to_csv(root / "new" / "orders.csv", index=False)


def another_kind_of_file(root: Path) -> None:
    pd.DataFrame({"city": ["a", "b"], "rain": [1, 2]}).to_csv(root / "new" / "weather.csv", index=False)


def another_type(root: Path) -> None:
    items = pd.read_csv(root / "new" / "products.csv")
    items.assign(price="cheap").to_csv(root / "new" / "products.csv", index=False)


def half_the_catalogue(root: Path) -> None:
    pd.read_csv(root / "new" / "products.csv")[:20].to_csv(root / "new" / "products.csv", index=False)


def other_items(root: Path) -> None:
    (root / "new" / "products.csv").unlink()
    new = pd.read_csv(root / "new" / "orders.csv")
    new.assign(product=[f"X{at % 40}" for at in range(len(new))]).to_csv(root / "new" / "orders.csv", index=False)


def from_the_future(root: Path) -> None:
    new = pd.read_csv(root / "new" / "orders.csv")
    new.assign(ordered_at="2090-01-01").to_csv(root / "new" / "orders.csv", index=False)


def nothing_there(root: Path) -> None:
    shutil.rmtree(root / "new")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (older, "is older than the run"),
        (another_schema, "ordered_at"),
        (another_kind_of_file, "another schema"),
        (another_type, "price"),
        (half_the_catalogue, "has 20 of the 55 items"),
        (other_items, "is about other items"),
        (from_the_future, "later than this machine's clock"),
        (nothing_there, "No file or folder"),
    ],
)
def test_wrong_data_get_one_sentence_and_change_nothing(
    shop_run: Path, spoil: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(shop_run.parent)
    before = content(shop_run)
    assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("twotower: error: ") and said in lines[-1]
    assert content(shop_run) == before
    assert not list(shop_run.parent.glob(".*.update"))


def test_a_clock_that_has_gone_back_is_told(
    shop_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_600_000_000.0)  # 2020
    assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new")]) == 2
    assert "it has gone back" in capsys.readouterr().err


def test_a_worse_model_is_not_published(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The towers alone rank here, so that ruined ones are not saved by popularity."""
    data = run_manifest(origin / "run" / "model").config.data.model_dump(mode="json")
    training = {**SETTINGS["training"], "max_steps": 80}
    alone = {**SETTINGS, "data": data, "training": training, "model": {**SETTINGS["model"], "popularity_prior": 0.0}}
    run = tmp_path / "run"
    run_all(parse_config(alone), run)
    before = content(run)
    ruin = ["--set", "updating.learning_rate=1.0", "--set", "updating.replay=0", "--set", "updating.num_epochs=6"]
    assert main(["update", str(run), "--data", str(origin / "new"), *ruin]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "The new model is worse on the newest events" in said and "not published" in said
    assert content(run) == before and not list(tmp_path.glob(".*.update"))
    assert main(["update", str(run), "--data", str(origin / "new")]) == 0


class Stop(Callback):
    """Ends the process's work at a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, training: Training) -> None:
        if training.step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_update_ends_as_the_uninterrupted_one_to_the_bit(shop_run: Path, origin: Path, tmp_path: Path) -> None:
    before = content(shop_run)
    with pytest.raises(KeyboardInterrupt):
        go_on(shop_run, watch=Watch(callbacks=[Stop(2)]))
    assert content(shop_run) == before
    steps = go_on(shop_run).steps
    whole = copied(origin, tmp_path / "whole")
    assert go_on(whole).steps == steps > 2
    assert content(shop_run / "bundle") == content(whole / "bundle")
    assert content(shop_run / "dataset") == content(whole / "dataset")
    assert same_weights(shop_run / "model" / "best.pt", whole / "model" / "best.pt")


def test_one_update_at_a_time(shop_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with module._locked(shop_run):
        assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new")]) == 2
    assert "Another update of" in capsys.readouterr().err
    go_on(shop_run)


def test_another_folder_leaves_the_run_as_it_is(shop_run: Path, tmp_path: Path) -> None:
    before = content(shop_run)
    assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new"), "--out", str(tmp_path / "next")]) == 0
    assert content(shop_run) == before
    assert load_bundle(tmp_path / "next" / "bundle").dataset.n_items == 60
    assert base_of(tmp_path / "next").path == tmp_path / "next" / "dataset"


def test_what_belongs_to_the_bundle_alone_is_taken_over(shop_run: Path, tmp_path: Path) -> None:
    late_item = {"item_id": ["P9999"], "name": ["Late tea"], "brand": ["Uji"], "price": [5.0]}
    pd.DataFrame(late_item).to_csv(tmp_path / "late.csv", index=False)
    add_items(shop_run / "bundle", tmp_path / "late.csv")
    remove_items(shop_run / "bundle", ["P0002"])
    (shop_run / "notes.txt").write_text("mine")
    go_on(shop_run)
    bundle = load_bundle(shop_run / "bundle")
    assert not bundle.arrays.offered[bundle.dataset.item_rows(["P0002"])[0]]
    late = bundle.dataset.item_rows(["P9999"])[0]
    assert late >= FIRST_ROW and bundle.arrays.offered[late]
    assert (shop_run / "notes.txt").read_text() == "mine"


def test_events_of_a_store(shop_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, new, _ = frames()
    known = new[~new["product"].isin([f"P00{at}" for at in range(56, 61)])]
    seconds = known["ordered_at"].astype("datetime64[s]").astype("int64")
    rows = zip(known["customer"], known["product"], seconds, strict=True)
    events = [Event(str(at), user, item, int(moment)) for at, (user, item, moment) in enumerate(rows)]
    store = SQLiteStore(tmp_path / "events.sqlite")
    store.append(events)
    store.close()
    assert main(["update", str(shop_run), "--events", f"sqlite:{tmp_path / 'events.sqlite'}"]) == 0
    assert f"{len(events):,} new events" in capsys.readouterr().out
    other = SQLiteStore(tmp_path / "other.sqlite")
    other.append([replace(event, item_id=f"of another bundle {at}") for at, event in enumerate(events)])
    other.close()
    assert main(["update", str(shop_run), "--events", f"sqlite:{tmp_path / 'other.sqlite'}"]) == 2
    assert "is about other items" in capsys.readouterr().err
    assert main(["update", str(shop_run), "--events", f"sqlite:{tmp_path / 'none.sqlite'}"]) == 2
    assert "No event store" in capsys.readouterr().err and not (tmp_path / "none.sqlite").exists()


def test_a_model_in_python_is_updated_as_on_the_command_line(tmp_path: Path) -> None:
    old, products, new, whole = frames()
    model = tt.Model(seed=0, verbose=0, **SETTINGS).fit(old, items=products, folder=tmp_path / "one", **NAMED)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    file = tmp_path / "other" / "model" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dataset": str(tmp_path / "other" / "dataset")}))
    before = model.recommend(["C0001"])
    assert model.update(new, items=whole) is model
    (tmp_path / "new").mkdir()
    new.to_csv(tmp_path / "new" / "orders.csv", index=False)
    whole.to_csv(tmp_path / "new" / "products.csv", index=False)
    assert main(["update", str(tmp_path / "other"), "--data", str(tmp_path / "new")]) == 0
    assert content(tmp_path / "one" / "bundle") == content(tmp_path / "other" / "bundle")
    after = model.recommend(["C0001"])
    assert isinstance(after, pd.DataFrame) and not after.equals(before)
    pd.testing.assert_frame_equal(after, tt.load(tmp_path / "other").recommend(["C0001"]))


def test_a_model_without_a_folder_of_its_own_stays_usable_after_an_update() -> None:
    old, products, new, whole = frames()
    model = tt.Model(seed=0, verbose=0, **SETTINGS).fit(old, items=products, **NAMED)
    model.update(new, items=whole)
    import gc

    gc.collect()
    assert len(model.recommend(["C0001"])) == 10 and model.folder is not None and model.folder.is_dir()


KILLING = """
import json, os, random, signal, sys, time
from pathlib import Path
import twotower.pipeline.update
from twotower.cli import main
from twotower.client import Client
from twotower.bundle.bundle import load_bundle

run, whole, new = sys.argv[1:]
sys.stdout = open(os.devnull, "w")

def start(folder):
    child = os.fork()
    if child == 0:
        os._exit(main(["--quiet", "update", folder, "--data", new]))
    return child

began = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
needed, moments, stages, killed = time.monotonic() - began, random.Random(0), [], 0
while killed < 30:
    child = start(run)
    time.sleep(moments.uniform(0.02, needed / 4))
    if os.waitpid(child, os.WNOHANG)[0]:
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed += 1
    work = Path(run).with_name(".run.update")
    stages.append(sorted(str(file.relative_to(work)) for file in work.glob("*/*.pt")) if work.is_dir() else None)
    load_bundle(Path(run) / "bundle")
code = os.waitpid(start(run), 0)[1]
sys.stderr.write(json.dumps({"killed": killed, "stages": stages, "code": code}))
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_run_stays_whole_and_the_update_goes_on(shop_run: Path, origin: Path, tmp_path: Path) -> None:
    whole = copied(origin, tmp_path / "whole")
    command = [sys.executable, "-c", KILLING, str(shop_run), str(whole), str(origin / "new")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["code"] == 0 and told["killed"] >= 3
    assert content(shop_run / "bundle") == content(whole / "bundle")
    assert content(shop_run / "dataset") == content(whole / "dataset")
    assert same_weights(shop_run / "model" / "best.pt", whole / "model" / "best.pt")
    assert not list(tmp_path.glob(".run.update"))


def test_a_source_without_an_identity_is_never_resumed(shop_run: Path) -> None:
    source = replace(source_of_files([shop_run.parent / "new"], base_of(shop_run)), identity=())
    assert isinstance(source, NewSource)
    with pytest.raises(KeyboardInterrupt):
        update(shop_run, source, shop_run, watch=Watch(callbacks=[Stop(2)]))
    assert update(shop_run, source, shop_run).new_items == 5


def with_lists(orders: pd.DataFrame, products: pd.DataFrame) -> pd.DataFrame:
    """Each order with the two products that were shown beside it, and every eleventh product sent back a day later."""
    table = orders.assign(kind="order", list=[f"L{at}" for at in orders.index], place=1)
    others = products["product"].tolist()
    shown = [table.assign(kind="shown", place=2 + by, product=[others[(at * 7 + by) % 50] for at in orders.index]) for by in (0, 1)]
    back = table[::11].assign(kind="returned", list=None, place=None, ordered_at=table["ordered_at"][::11] + pd.Timedelta(days=1))
    return pd.concat([table, *shown, back]).sort_values("ordered_at", kind="stable")


def test_negatives_and_lists_of_a_run_are_kept_and_those_of_the_new_data_are_added(tmp_path: Path) -> None:
    old, products, new, whole = frames()
    before, after = with_lists(old, products), with_lists(new, whole)
    (tmp_path / "new").mkdir()
    before.to_csv(tmp_path / "orders.csv", index=False)
    pd.concat([before[-200:], after]).to_csv(tmp_path / "new" / "orders.csv", index=False)
    products.to_csv(tmp_path / "products.csv", index=False)
    whole.to_csv(tmp_path / "new" / "products.csv", index=False)
    columns = {"user_id": "customer", "item_id": "product", "time": "ordered_at", "event_type": "kind"}
    interactions = {"path": "orders.csv", **columns, "request": "list", "position": "place"}
    tables = {"interactions": interactions, "items": {"path": "products.csv", "item_id": "product", "name": "title"}}
    prepare = {**SETTINGS["prepare"], "impression_types": ["shown"], "event_weights": {"returned": -1.0}}
    training = {**SETTINGS["training"], "negative_weight": 0.5}
    data = {"source": "tables", "path": str(tmp_path), **tables}
    run = tmp_path / "run"
    run_all(parse_config({**SETTINGS, "data": data, "prepare": prepare, "training": training}), run)
    base = base_of(run)
    assert base.negatives is not None and base.events.request is not None
    n_events, n_negatives = len(base.events), len(base.negatives)
    last = max(base.events.request.max(), base.negatives.request.max())
    assert go_on(run).new_events == len(new)
    grown = base_of(run)
    assert grown.negatives is not None and grown.events.request is not None
    assert len(grown.events) == n_events + len(new)
    assert n_negatives == (before["kind"] != "order").sum()
    assert len(grown.negatives) == n_negatives + (after["kind"] != "order").sum()
    counts = grown.manifest.counts.kept.negative_events
    assert counts == {kind: int((before["kind"] == kind).sum() + (after["kind"] == kind).sum()) for kind in ("returned", "shown")}

    expected = pd.concat([before, after])
    negative = expected[expected["kind"] != "order"]
    rows = grown.negatives
    found = zip(grown.user_ids[rows.user_row], grown.item_ids[rows.item_row], rows.time_s.tolist(), rows.impression, strict=True)
    seconds = negative["ordered_at"].astype("datetime64[s]").astype("int64")
    wanted = zip(negative["customer"], negative["product"], seconds, negative["kind"] == "shown", strict=True)
    assert sorted(found) == sorted(wanted)
    assert ((rows.position >= 2) == rows.impression).all()
    assert (rows.split[rows.time_s >= grown.manifest.cuts_s["valid"]] == VALID).all() and (np.diff(rows.offsets) >= 0).all()

    events, lists = grown.events, dict[int, list[tuple[str, int]]]()
    assert (events.request > 0).all() and len(set(events.request.tolist())) == len(events)
    for user, request, time_s in zip(grown.user_ids[rows.user_row], rows.request, rows.time_s, strict=True):
        if request:
            lists.setdefault(int(request), []).append((str(user), int(time_s)))
    for user, request, time_s in zip(grown.user_ids[events.user_row], events.request, events.time_s, strict=True):
        assert lists[int(request)] == [(str(user), int(time_s))] * 2
    fresh = events.time_s >= grown.manifest.cuts_s["valid"]
    assert (events.request[fresh] > last).all()


def test_a_table_in_long_form_changes_the_properties_that_it_tells(tmp_path: Path) -> None:
    old, products, new, _ = frames()
    (tmp_path / "new").mkdir()
    old.to_csv(tmp_path / "orders.csv", index=False)
    new.to_csv(tmp_path / "new" / "orders.csv", index=False)
    long = products.astype(str).melt(id_vars="product", var_name="property")
    long.to_csv(tmp_path / "properties.csv", index=False)
    told = pd.DataFrame({"product": ["P0001", "P0060"], "property": ["price", "brand"], "value": ["39.5", "Darjeeling"]})
    told.to_csv(tmp_path / "new" / "properties.csv", index=False)
    items: dict[str, Any] = {"path": "properties.csv", "item_id": "product", "name": "title", "long_form": {}}
    items["features"] = [{"name": "brand", "kind": "categorical"}, {"name": "price", "kind": "number"}]
    interactions = {"path": "orders.csv", "user_id": "customer", "item_id": "product", "time": "ordered_at"}
    data = {"source": "tables", "path": str(tmp_path), "interactions": interactions, "items": {**items, "noun": "tea"}}
    run = tmp_path / "run"
    run_all(parse_config({**SETTINGS, "data": data}), run)
    before = {row["item_id"]: row for row in base_of(run).items.to_pylist()}
    go_on(run)
    grown = base_of(run)
    after = {row["item_id"]: row for row in grown.items.to_pylist()}
    assert after["P0001"] == {**before["P0001"], "price": 39.5} and after["P0002"] == before["P0002"]
    assert after["P0060"]["brand"] == "Darjeeling" and grown.noun == "tea"


KEY = "a-key-for-these-tests"
ENVIRONMENT = {**os.environ, "TWOTOWER_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}


def command(*parts: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "twotower", "--quiet", *map(str, parts)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


def ready(client: Client) -> bool:
    try:
        return client.check_ready()["status"] == "ready"
    except UnreachableError:
        return False


def test_updates_at_intervals_reload_a_server_and_outlive_a_failure(shop_run: Path, origin: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    new = tmp_path / "arrives"  # later than the first update
    server = command("serve", shop_run / "bundle", "--port", url.rpartition(":")[2])
    updates = command("update", shop_run, "--data", new, "--every", "0.0003", "--reload", url)
    assert server.stdout and updates.stdout and updates.stderr
    try:
        with Client(url, key=KEY) as client:
            while not ready(client):
                time.sleep(0.1)
            first = client.get_about()["version"]
        assert "No file or folder" in updates.stderr.readline()
        shutil.copytree(origin / "new", tmp_path / "arriving")
        (tmp_path / "arriving").rename(new)
        told = iter(updates.stdout.readline, "")
        assert any(line == f"Bundle: {shop_run / 'bundle'}\n" for line in told)
        served = next(line for line in told if line.startswith("Serving: version "))
        with Client(url, key=KEY) as client:
            assert first not in served and client.get_about()["version"] in served
        assert "Nothing was changed." in next(told)
    finally:
        for child in (updates, server):
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=60)
    assert updates.returncode == 130


def test_a_server_that_is_not_there_is_told_after_the_update(shop_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, nowhere = str(shop_run.parent / "new"), "http://127.0.0.1:1"
    assert main(["update", str(shop_run), "--data", new, "--reload", nowhere]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bundle is ready, but no server loaded it. No answer from http://127.0.0.1:1" in said
    assert main(["update", str(shop_run), "--data", new, "--reload", "localhost:8000"]) == 2
    assert "is not the address of a server" in capsys.readouterr().err
    assert main(["update", str(shop_run), "--data", new, "--every", "1", "--out", "elsewhere"]) == 2
    assert "Leave out --out." in capsys.readouterr().err
