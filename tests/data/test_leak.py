"""Test for leakage: later events change no training row, vocabulary, statistic, feature or batch.

Random raw tables are prepared as they are, with another future after the cut, and with another second half of the training period.
What belongs before the change must be the same to the byte. Then leaks are planted, and the same checks must find each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from twotower.data import prepare as preparing
from twotower.data import selection
from twotower.data.data_loader import TrainLoader
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store
from twotower.errors import DataError
from twotower.features.encoders import fit_encoders
from twotower.features.point_in_time import ItemDynamics
from twotower.schema import DAY_S, FIRST_ROW, TRAIN
from twotower.utils.config import ModelConfig, UserTowerConfig, parse_config

HALF, CUT, TEST_CUT, END = 5, 10, 15, 20  # days
SPLIT = {"kind": "time", "valid": "1970-01-11", "test": "1970-01-16"}
SHORT = ModelConfig(user_tower=UserTowerConfig(max_history=3), request_location=True)
WORDS = ["soup", "noodles", "coffee", "haircut", "tyres"]
Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Raw rows: events and items of the first half of the training period, of its second half, and after the cut."""

    early: list[Row]
    late: list[Row]
    future: list[Row]
    items: list[Row]
    shuffle: int

    def dataset(self, prepared: Any, **kept: Any) -> Dataset:
        events = list(self.early)
        # Anywhere among the others: the order of a file says nothing of time. The order among the earlier ones stays.
        for rows, rng in ((self.late, Random(0)), (self.future, Random(self.shuffle))):
            for row in rows:
                events.insert(rng.randrange(len(events) + 1), row)
        users = [
            {"user_id": user, "since_s": ord(user[-1]), "elite": [1969]} for user in {row["user_id"] for row in events} - {None}
        ]
        dataset: Dataset = prepared(events, items=self.items, users=users, features=True, split=SPLIT, text_dim=3, **kept)
        return dataset


def events(first_day: int, end_day: int, users: str, items: str, types: list[str], least: int) -> st.SearchStrategy[list[Row]]:
    """Draw events in a period; times are days, so that ties are common."""
    row = st.fixed_dictionaries(
        {
            "user_id": st.sampled_from([*users, None]),
            "item_id": st.sampled_from(list(items)),
            "time_s": st.integers(first_day, end_day - 1).map(lambda day: day * DAY_S),
            "event_type": st.sampled_from(types),
            "stars": st.sampled_from([None, 1.0, 2.0, 3.0, 4.0, 5.0]),
            "text": st.none() | st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join),
        }
    )
    return st.lists(row, min_size=least, max_size=12)


def item_rows(ids: str) -> st.SearchStrategy[list[Row]]:
    """Draw one row per item."""
    row = st.fixed_dictionaries(
        {
            "name": st.sampled_from(WORDS),
            "city": st.sampled_from(["Here", "There", "Elsewhere"]),
            "categories": st.lists(st.sampled_from(WORDS), max_size=3, unique=True),
            "price": st.sampled_from([None, 1, 2, 3, 4]),
            "latitude": st.sampled_from([None, 40.0, 40.5]),
            "longitude": st.just(-75.0),
        }
    )
    return st.tuples(*[row.map(lambda values, name=name: {"item_id": name, **values}) for name in ids]).map(list)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, World, World]:
    """Draw raw rows, the same with another future, and the same with another second half of training and future."""
    known = draw(item_rows("mnopq"))
    early = draw(events(0, HALF, "mno", "mnopq", ["review", "tip"], 4))
    late = draw(events(HALF, CUT, "mnop", "mnopq", ["review", "tip"], 0))
    made = []
    for stage in (late, late, None):
        # Newcomers sort before and after the others, so that ids of their own would shift rows if they could.
        future = draw(events(CUT, END, "amnz", "amnopz", ["review", "tip", "photo"], 0))
        second = stage if stage is not None else draw(events(HALF, CUT, "amnz", "amnopz", ["review", "tip"], 0))
        made.append(World(early, second, future, [*known, *draw(item_rows("az"))], draw(st.integers(0, 99))))
    first, other_future, other_half = made
    return first, other_future, other_half


# --- what must not change ------------------------------------------------------------------------------------------------------


def flat(value: Any) -> Any:
    """Return plain values and bytes of any object, so that NaN equals NaN and every bit is compared."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tolist() if value.dtype == object else value.tobytes())
    if isinstance(value, dict):
        return {name: flat(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(flat(each) for each in value)
    return {each.name: flat(getattr(value, each.name)) for each in fields(value)} if is_dataclass(value) else value


def training_side(dataset: Dataset) -> dict[str, Any]:
    """Return everything in a dataset that training can read."""
    items, users = dataset.n_train_item_rows, dataset.n_train_user_rows
    seen, visited = dataset.events.split == TRAIN, dataset.item_events.split == TRAIN
    side = {
        f"event {name}": getattr(dataset.events, name)[seen] for name in ("item_row", "time_s", "event_type", "stars", "user_row")
    }
    side |= {name: getattr(dataset.events, name)[seen] for name in ("weight", "positive")}
    side |= {f"visit {name}": getattr(dataset.item_events, name)[visited] for name in ("item_row", "time_s", "stars")}
    side |= {"item ids": dataset.item_ids[:items], "user ids": dataset.user_ids[:users], "count": dataset.item_train_count[:items]}
    side |= {f"item {name}": values[:items] for name, values in dataset.item_features.items()}
    side |= {f"user {name}": values[:users] for name, values in dataset.user_features.items()}
    tables = [repr(table.slice(0, n - FIRST_ROW).to_pylist()) for table, n in ((dataset.items, items), (dataset.users, users))]
    files = [(dataset.path / name).read_bytes() for name in ("encoders.json", "encoders.safetensors")]
    return flat(side) | {"tables": tables, "encoders": files, "types": dataset.event_types}  # type: ignore[no-any-return]


def batches(dataset: Dataset, objective: str) -> list[Any]:
    """Return every batch of an epoch; empty if no event may be a target."""
    config = parse_config({"training": {"objective": objective, "batch_size": 4, "negatives_per_positive": 1}})
    if not dataset.item_train_count.any():
        return []
    loader = TrainLoader(dataset, open_store(dataset, "valid", SHORT), config)
    return [flat(loader.batch(members, 0, step)) for step, members in enumerate(loader.plan(0))]


def states(dataset: Dataset, until_s: int) -> dict[Any, Any]:
    """Return the states of users and items just before each event up to a time, by ids, although later events exist."""
    chosen = np.flatnonzero(dataset.events.time_s <= until_s)
    user_row, time_s = dataset.events.user_row[chosen], dataset.events.time_s[chosen]
    queries = dataset.histories(user_row, time_s)
    store = open_store(dataset, "future", SHORT)
    users = store.users(queries).fields
    assert store.dynamics is not None
    known = [row for row in range(FIRST_ROW, dataset.n_item_rows) if dataset.item_ids[row] in "mnopq"]
    found = {}
    for b in range(len(queries)):
        user = dataset.user_ids[user_row[b]]
        own = queries.slice(b, b + 1)
        past = [dataset.item_ids[own.item_row].tolist(), own.event_time_s.tolist(), repr(own.stars.tolist())]
        now = np.full(len(known), time_s[b])
        items = dict(zip(dataset.item_ids[known], map(bytes, store.dynamics.state(np.array(known), now)), strict=True))
        dynamic = [bytes(users[name][b].numpy()) for name in ("state", "hour", "weekday", "month") if name in users]
        found[user, int(time_s[b])] = (
            past,
            items,
            dynamic,
            bytes(users["home.point"][b].numpy()) if "home.point" in users else b"",
        )
    return found


def check_cut(prepared: Any, first: World, other: World, **kept: Any) -> None:
    """Another future does not change training."""
    one, two = first.dataset(prepared, **kept), other.dataset(prepared, **kept)
    expected, found = training_side(one), training_side(two)
    assert [name for name in expected if expected[name] != found[name]] == []
    for objective in ("any_event", "next_event"):
        assert batches(one, objective) == batches(two, objective)


def check_moment(prepared: Any, first: World, other: World) -> None:
    """Another second half of training does not change earlier states."""
    expected, found = (states(world_size.dataset(prepared), HALF * DAY_S) for world_size in (first, other))
    moments = {key for key in expected if key[1] < HALF * DAY_S}  # those of the half itself differ in who is there
    assert moments and {key: expected[key] for key in moments} == {key: found[key] for key in moments}


def trains(world_size: World) -> bool:
    """Return True if a user with an id has an early event."""
    return any(row["user_id"] is not None for row in world_size.early)


LIMITS = st.fixed_dictionaries(
    {"min_user_events": st.integers(1, 2), "min_item_events": st.integers(1, 2), "k_core": st.booleans()}
)


SETTINGS = st.fixed_dictionaries(
    {
        "duplicates": st.sampled_from(["keep", "keep_first"]),
        "positive_min_stars": st.sampled_from([None, 3.0]),
        "min_user_events": st.integers(1, 2),
        "min_item_events": st.integers(1, 2),
        "k_core": st.booleans(),
    }
)


@pytest.mark.parametrize("examples", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_nothing_after_the_cut_changes_training(prepared: Any, examples: int) -> None:
    @settings(max_examples=examples)
    @given(worlds().filter(lambda made: trains(made[0])), SETTINGS)
    def search(made: tuple[World, World, World], kept: dict[str, Any]) -> None:
        try:
            check_cut(prepared, made[0], made[1], **kept)
        except DataError:  # the limits left nothing to train on: then they must leave nothing with the other future either
            with pytest.raises(DataError):
                made[1].dataset(prepared, **kept)

    search()


@pytest.mark.parametrize("examples", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_nothing_after_a_moment_changes_what_was_known_before(prepared: Any, examples: int) -> None:
    @settings(max_examples=examples)
    @given(worlds().filter(lambda made: trains(made[0])))
    def search(made: tuple[World, World, World]) -> None:
        check_moment(prepared, made[0], made[2])

    search()


# --- planted leaks -------------------------------------------------------------------------------------------------------------


def all_events(events: Any) -> Any:
    """Replace the condition for training events by one that leaks."""
    return events[selection.USER_KEY].notnull()


def fit_on_everything(specs: Any, items: Any, users: Any, **kept: Any) -> Any:
    return fit_encoders(specs, items, users, **kept | {"n_train_items": len(items), "n_train_users": len(users)})


def text_of_everything(stage: Any, specs: Any, items: Any, events: Any, rows: Any) -> Any:
    return item_text(stage, specs, items, events.mutate(split=TRAIN), rows)


def state_of_tomorrow(self: ItemDynamics, row: Any, time_s: Any, **kept: Any) -> Any:
    return item_state(self, row, time_s + END * DAY_S, **kept)


def history_of_tomorrow(self: Dataset, user_rows: Any, time_s: Any) -> Any:
    queries = histories(self, user_rows, time_s + END * DAY_S)
    return replace(queries, time_s=time_s)


item_text = preparing._item_text
item_state, histories = ItemDynamics.state, Dataset.histories
LIMITED = {"min_user_events": 2, "min_item_events": 2}


@pytest.mark.parametrize(
    ("check", "where", "name", "leak", "kept"),
    [
        # Who has enough events is decided by later ones too.
        pytest.param(check_cut, selection, "is_training", all_events, LIMITED, id="minimum counts"),
        # Users who appear later count as trained.
        pytest.param(check_cut, preparing, "is_training", all_events, {}, id="trained rows", marks=pytest.mark.slow),
        pytest.param(check_cut, preparing, "fit_encoders", fit_on_everything, {}, id="vocabularies", marks=pytest.mark.slow),
        pytest.param(check_cut, preparing, "_item_text", text_of_everything, {}, id="text", marks=pytest.mark.slow),
        # The first in the file is kept, which may be a later one.
        pytest.param(check_cut, selection, "BY_TIME", ("order",), {"duplicates": "keep_first"}, id="fold", marks=pytest.mark.slow),
        pytest.param(check_moment, ItemDynamics, "state", state_of_tomorrow, {}, id="item state"),
        pytest.param(check_moment, Dataset, "histories", history_of_tomorrow, {}, id="history", marks=pytest.mark.slow),
    ],
)
def test_a_planted_leak_is_found(prepared: Any, check: Any, where: Any, name: str, leak: Any, kept: dict[str, Any]) -> None:
    @settings(max_examples=25, phases=[Phase.generate])
    @given(worlds().filter(lambda made: trains(made[0])))
    def search(made: tuple[World, World, World]) -> None:
        try:
            check(prepared, made[0], made[1 if check is check_cut else 2], **kept)
        except DataError:  # the limits left nothing to compare
            assume(False)

    with mock.patch.object(where, name, leak), pytest.raises(AssertionError):
        search()
