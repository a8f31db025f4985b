"""Test that what a model knows keeps its row and its numbers when it grows."""

from __future__ import annotations

import shutil
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
from twotower.pipeline import update as module
from twotower.pipeline.run_folder import run_manifest
from twotower.pipeline.stages import run_all
from twotower.retrieval.recommender import Recommender
from twotower.schema import FIRST_ROW, TRAIN, UNKNOWN, VALID
from twotower.serving.event_types import Event
from twotower.serving.sqlite_store import SQLiteStore
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import parse_config

from ..shop import NAMED
from .conftest import SETTINGS, base_of, content, copied, frames, go_on


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


def score_weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(run / "model" / "best.pt")["model"]
    return {name: state[name] for name in ("priors.weights", "priors.recency", "priors.repeats")}


def test_a_handful_of_new_events_leaves_the_weights_of_the_score(shop_run: Path) -> None:
    _, _, new, _ = frames()
    few = new[new["product"] == "P0060"].drop_duplicates("customer")[:12]
    assert len(few) == 12
    few.to_csv(shop_run.parent / "new" / "orders.csv", index=False)
    before, record = score_weights(shop_run), run_manifest(shop_run / "model").calibration
    assert go_on(shop_run).queries < 12
    after = score_weights(shop_run)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert record is not None and run_manifest(shop_run / "model").calibration == record


def test_an_update_with_as_many_queries_as_the_run_fits_the_weights_of_the_score(shop_run: Path) -> None:
    record = run_manifest(shop_run / "model").calibration
    assert record is not None
    found = go_on(shop_run, overrides=["updating.valid_frac=0.9"])
    calibration = run_manifest(shop_run / "model").calibration
    assert found.queries >= record.queries and calibration is not None and calibration.queries == found.queries


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_fitted_weights_are_taken_only_if_they_are_better_in_enough_resamples(
    shop_run: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(module, "CLEARLY_BETTER", share)
    before, record = score_weights(shop_run), run_manifest(shop_run / "model").calibration
    found = go_on(shop_run, overrides=["updating.valid_frac=0.9", "updating.max_worse_frac=1"])
    after, calibration = score_weights(shop_run), run_manifest(shop_run / "model").calibration
    if share:
        assert calibration == record and all(torch.equal(value, after[name]) for name, value in before.items())
    else:
        assert calibration is not None and calibration.queries == found.queries
        assert not torch.equal(before["priors.weights"], after["priors.weights"])


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
    assert "There are no new events for" in capsys.readouterr().out
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
