"""Test explicit negatives and impressions: kept beside the events, counted, without effect on them, and never from the future."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import twotower as tt
from twotower.data.data_loader import TrainBatch, TrainLoader
from twotower.data.dataset import NEGATIVES_FILE, Dataset
from twotower.data.dataset_features import open_store
from twotower.data.explicit_negatives import MAX_NEGATIVES, ExplicitNegatives
from twotower.data.prepare import prepare
from twotower.data.sources.account import account_table
from twotower.data.train_events import TrainEvents
from twotower.errors import ConfigError
from twotower.schema import TRAIN
from twotower.utils.config import parse_config

from .conftest import CUTS, EVERYTHING, LAST, day
from .test_data_loader import same

Prepared = Callable[..., Dataset]
DISLIKES = {"event_weights": {"dislike": -2}}


def negatives_of(dataset: Dataset) -> list[tuple[str, str, int, str, float]]:
    """User, item, time, type and weight of the negatives."""
    rows = dataset.negatives
    assert rows is not None
    users, items = dataset.user_ids[rows.user_row], dataset.item_ids[rows.item_row]
    types = [dataset.manifest.negative_types[code] for code in rows.event_type]
    return list(zip(users, items, rows.time_s.tolist(), types, rows.weight.tolist(), strict=True))


def drawn(seed: int, *, spread: int = day(18)) -> list[dict[str, Any]]:
    """Events, dislikes and impressions of 12 users at 15 items; every user and item has an event in training."""
    rng = np.random.default_rng(seed)
    rows = [{"user_id": f"u{n % 12}", "item_id": f"i{n % 15}", "time_s": int(rng.integers(1, day(9)))} for n in range(60)]
    kinds = ["review", "dislike", "impression"]
    for _ in range(300):
        row = {"user_id": f"u{rng.integers(12)}", "item_id": f"i{rng.integers(15)}", "time_s": int(rng.integers(1, spread))}
        rows.append({**row, "event_type": kinds[int(rng.integers(3))]})
    return rows


def batch_of(dataset: Dataset, **training: Any) -> TrainBatch:
    config = parse_config({"training": {"batch_size": 40, **training}})
    loader = TrainLoader(dataset, open_store(dataset, "valid", config.model), config)
    return loader.batch(loader.plan(0)[0], 0, 0)


def test_negatives_are_kept_beside_the_events_and_counted(prepared: Prepared) -> None:
    rows = ["a x 1", "a y 2 1", "a z 3 - dislike", "a z 4 - impression", "b x 5 2.5", "b y 6 5", "- y 7 1"]
    shown = {"user_id": "b", "item_id": "z", "time_s": 8, "event_type": "impression", "position": 4, "request": "r"}
    dataset = prepared([*rows, shown], split=EVERYTHING, positive_min_stars=4, negative_max_stars=2, **DISLIKES)
    assert dataset.item_ids[dataset.events.item_row].tolist() == ["x", "x", "y"]
    assert dataset.events.positive.tolist() == [True, False, True] and len(dataset.item_events) == 3
    wanted = [("a", "y", 2, "review", 1), ("a", "z", 3, "dislike", 2), ("a", "z", 4, "impression", 1)]
    assert negatives_of(dataset) == [*wanted, ("b", "z", 8, "impression", 0.25)]
    assert dataset.negatives is not None and dataset.negatives.impression.tolist() == [False, False, True, True]
    assert dataset.negatives.position.tolist() == [0, 0, 0, 4]
    counts = dataset.manifest.counts.json_values()
    assert counts["kept"]["negative_events"] == {"dislike": 1, "impression": 2, "review": 1}
    assert counts["dropped"]["events"]["negative without a user"] == 1
    assert counts["kept"]["events"] + 4 + 1 == counts["read"]["interactions"]
    assert "  kept as negatives: 1 dislike, 2 impression, 1 review" in account_table(counts)
    assert dataset.event_types == ["review"] and dataset.n_train_items == 2, "an item that was only shown is new"


@pytest.mark.parametrize("split", [CUTS, {"kind": "time", "valid": 0.2, "test": 0.2}, LAST])
@pytest.mark.parametrize("duplicates", ["keep", "keep_first"])
def test_the_events_are_the_same_to_the_byte_without_negatives(prepared: Prepared, split: dict[str, Any], duplicates: str) -> None:
    """Neither cuts, filters, repeats nor popularity count them."""
    rows = [{**row, "order": n} for n, row in enumerate(drawn(1))]
    settings = {"split": split, "duplicates": duplicates, "min_user_events": 3, "min_item_events": 3, **DISLIKES}
    plain = [row for row in rows if row.get("event_type", "review") == "review"]
    users, items = ([{name: one} for one in sorted({row[name] for row in rows})] for name in ("user_id", "item_id"))
    both = prepared(rows, users=users, items=items, **settings)
    alone = prepared(plain, users=users, items=items, **{**settings, "event_weights": {}})
    assert both.negatives is not None and alone.negatives is None
    for name, digest in alone.manifest.hashes.items():
        assert both.manifest.hashes[name] == digest, name
    assert set(both.manifest.hashes) - set(alone.manifest.hashes) == {NEGATIVES_FILE}
    kept = both.manifest.counts.kept
    assert kept.model_copy(update={"negative_events": {}}) == alone.manifest.counts.kept and sum(kept.negative_events.values())


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_a_weight_of_zero_is_the_same_as_no_negatives(prepared: Prepared, objective: str) -> None:
    rows = [{**row, "order": n} for n, row in enumerate(drawn(2))]
    plain = [row for row in rows if row.get("event_type", "review") == "review"]
    both, alone = prepared(rows, split=CUTS, **DISLIKES), prepared(plain, split=CUTS)
    zero = batch_of(both, objective=objective, negative_weight=0.0)
    assert same(zero, batch_of(alone, objective=objective, negative_weight=5.0)) and same(zero, batch_of(both, objective=objective))
    assert batch_of(both, objective=objective, negative_weight=1.0).negatives is not None


@pytest.mark.parametrize("seed", range(6))
def test_the_negatives_of_a_target_are_those_before_it(prepared: Prepared, seed: int) -> None:
    """Compare with a search by hand over all rows; the seeds draw sparse and crowded times."""
    dataset = prepared(drawn(seed, spread=[day(18), 40][seed % 2]), split=CUTS, **DISLIKES)
    config = parse_config({})
    events = TrainEvents(dataset, open_store(dataset, "valid", config.model).location)
    found = ExplicitNegatives(dataset, events, 0.5)
    targets = np.arange(events.offsets[-1])
    pairs = found.before(targets, events)
    user = np.repeat(np.arange(len(events.offsets) - 1), np.diff(events.offsets))
    item_row, time_s, _ = events.targets(targets)
    rows = dataset.negatives
    assert rows is not None and len(pairs.example)
    for event in targets.tolist():
        chosen = set(item_row[user == user[event]].tolist())
        mine = (rows.user_row == user[event]) & (rows.split == TRAIN) & (rows.time_s < time_s[event])
        kept = [at for at in np.flatnonzero(mine).tolist() if int(rows.item_row[at]) not in chosen][-MAX_NEGATIVES:]
        wanted: dict[int, float] = {}
        for at in kept:
            wanted[int(rows.item_row[at])] = wanted.get(int(rows.item_row[at]), 0.0) + 0.5 * float(rows.weight[at])
        ours = pairs.example == event
        assert dict(zip(pairs.item_row[ours].tolist(), pairs.weight[ours].tolist(), strict=True)) == pytest.approx(wanted)


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_no_later_negative_changes_a_batch(prepared: Prepared, objective: str) -> None:
    rows = [row for row in drawn(3, spread=day(5)) if row["time_s"] < day(5)]
    last = max(row["time_s"] for row in rows)
    later = [
        {"user_id": f"u{n % 12}", "item_id": f"i{n % 15}", "time_s": last + n % 3, "event_type": ["dislike", "impression"][n % 2]}
        for n in range(90)
    ]
    before, after = prepared(rows, split=CUTS, **DISLIKES), prepared([*rows, *later], split=CUTS, **DISLIKES)
    one, other = (batch_of(dataset, objective=objective, negative_weight=3.0) for dataset in (before, after))
    assert same(one, other) and one.negatives is not None and len(one.negatives.example)


def test_a_list_of_the_same_second_counts_for_the_choice_from_it_alone(prepared: Prepared) -> None:
    def row(item: str, request: str, kind: str = "impression") -> dict[str, Any]:
        return {"user_id": "a", "item_id": item, "time_s": day(2), "event_type": kind, "request": request}

    rows = ["b x 1", "b y 2", "b z 3", "b w 4", row("x", "r", "buy"), row("x", "r"), row("y", "r"), row("z", "other")]
    dataset = prepared(rows, split=EVERYTHING)
    events = TrainEvents(dataset, np.zeros((0, 2), np.float32))
    found = ExplicitNegatives.of(dataset, events, 1.0)
    assert found is not None
    pairs = found.before(np.arange(events.offsets[-1]), events)
    assert dataset.item_ids[pairs.item_row].tolist() == ["y"] and dataset.user_ids[dataset.events.user_row[pairs.example]] == ["a"]


def test_disliked_items_are_left_out_of_later_answers_and_shown_ones_are_not(prepared: Prepared) -> None:
    rows = ["a x 1", "a y 2 - dislike", "a z 3 - impression", f"a w {day(12)}", f"a v {day(13)} - dislike", f"a x {day(14)}"]
    dataset = prepared([*rows, "b v 1", "b y 2", "b z 3", "b w 4"], split=CUTS, **DISLIKES)
    queries = dataset.held_out("valid").queries
    offsets, left_out = queries.seen
    names = [sorted(dataset.item_ids[left_out[a:b]]) for a, b in pairwise(offsets)]
    assert names == [["x", "y"], ["v", "w", "x", "y"]]
    taken = queries.take(np.array([1, 0]))
    assert sorted(dataset.item_ids[taken.seen[1][: taken.seen[0][1]]]) == ["v", "w", "x", "y"]
    assert sorted(dataset.item_ids[queries.slice(0, 1).seen[1]]) == ["x", "y"]


def test_unknown_impression_types_are_named(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match=r"prepare.impression_types has the unknown event type 'vew'. Did you mean 'view'"):
        prepared(["a x 1 - view", "a y 2"], split=EVERYTHING, impression_types=["vew"])


def test_files_and_frames_give_the_same_negatives(tmp_path: Path) -> None:
    rows = [
        {"user": f"u{n % 6}", "item": f"i{n * 7 % 11}", "time": 1_600_000_000 + 86_400 * n, "kind": kind, "position": n % 5 + 1}
        for n, kind in enumerate(["buy", "dislike", "buy", "impression"] * 30)
    ]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "e.csv", index=False)
    columns = {"user_id": "user", "item_id": "item", "time": "time", "event_type": "kind", "position": "position"}
    data = {"source": "tables", "path": str(tmp_path), "interactions": {"path": "e.csv", **columns}}
    prepare(parse_config({"data": data, "prepare": DISLIKES}), tmp_path / "out")
    tower = {"embedding_dim": 8, "hidden_dims": [8]}
    settings: dict[str, Any] = {
        "model": {"user_tower": tower, "item_tower": tower},
        "training": {"max_steps": 1, "recipe": "fixed"},
    }
    model = tt.Model(seed=0, prepare=DISLIKES, evaluation={"baselines": []}, verbose=0, **settings)
    model.fit(frame, user="user", item="item", time="time", event_type="kind")
    model.save(tmp_path / "model")
    dataset = Dataset.open(tmp_path / "model" / "dataset")
    assert negatives_of(dataset) == negatives_of(Dataset.open(tmp_path / "out")) and len(negatives_of(dataset)) == 60
    disliked = {row["item"] for row in rows if row["user"] == "u1" and row["kind"] == "dislike"}
    offered = set(model.recommend(["u1"], k=11)["item"])
    assert disliked and offered and not offered & disliked


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_processes_share_the_negatives_of_a_batch(prepared: Prepared, objective: str) -> None:
    """All draw the same candidates, and each has the pairs of its own examples."""
    dataset = prepared(drawn(4), split=CUTS, **DISLIKES)
    config = parse_config({"training": {"batch_size": 40, "objective": objective, "negative_weight": 1.0}})
    store = open_store(dataset, "valid", config.model)

    def pairs(rank: int, world_size: int) -> tuple[list[float], list[tuple[int, int, float]]]:
        loader = TrainLoader(dataset, store, config, rank=rank, world_size=world_size)
        batch = loader.batch(loader.plan(0)[0], 0, 0)
        assert batch.negatives is not None
        target = batch.target[batch.negatives.example].tolist()
        kept = batch.weight[batch.negatives.example].tolist()
        columns = [target, batch.negatives.column.tolist(), batch.negatives.log_weight.tolist()]
        return batch.log_weight.tolist(), [pair for pair, weight in zip(zip(*columns, strict=True), kept, strict=True) if weight]

    whole, first, second = pairs(0, 1), pairs(0, 2), pairs(1, 2)
    assert whole[0] == first[0] == second[0] and sorted(first[1] + second[1]) == sorted(whole[1])
    assert first[1] and (second[1] or objective == "next_event"), "few windows: all of a batch may belong to one process"
