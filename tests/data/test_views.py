"""Test training examples against brute force: who may be a target, what each example sees, and how processes share users."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.dataset import Dataset
from twotower.data.event_arrays import Events
from twotower.data.train_events import Replay, TrainEvents, user_shares
from twotower.data.views import (
    OBJECTIVES,
    AnyEventObjective,
    Examples,
    NextEventObjective,
    Objective,
    request_locations,
)
from twotower.errors import TrainingError
from twotower.features.feature_store import FeatureStore
from twotower.features.point_in_time import HistoryState, ItemDynamics, user_state
from twotower.schema import DAY_S, TEST, TRAIN, VALID
from twotower.utils.config import Config, parse_config

ITEMS = 9  # rows, with the two reserved ones
LOCATION = np.stack([np.linspace(10, 18, ITEMS), np.linspace(20, 28, ITEMS)], axis=1).astype(np.float32)
LOCATION[4] = np.nan


@dataclass(frozen=True)
class Row:
    """An event of a user, with its time in days."""

    item: int
    day: int
    split: int = TRAIN
    positive: bool = True
    weight: float = 1.0
    stars: float = 4.0
    kind: int = 1

    @property
    def is_target(self) -> bool:
        """Return whether it may be a target."""
        return self.positive and self.weight > 0


Users = list[list[Row]]


def opened(users: Users, **process: Any) -> TrainEvents:
    """Return the training events of users; the two reserved users have none."""
    ordered = [[], [], *(sorted(rows, key=lambda row: row.day) for rows in users)]
    flat = [row for rows in ordered for row in rows]
    events = Events(
        offsets=np.cumsum([0, *map(len, ordered)]),
        item_row=np.array([row.item for row in flat], np.int64),
        time_s=np.array([row.day * DAY_S for row in flat], np.int64),
        event_type=np.array([row.kind for row in flat], np.int64),
        stars=np.array([row.stars for row in flat], np.float32),
        weight=np.array([row.weight for row in flat], np.float32),
        positive=np.array([row.positive for row in flat], np.bool_),
        split=np.array([row.split for row in flat], np.int8),
    )
    return TrainEvents(cast(Dataset, SimpleNamespace(events=events, n_item_rows=ITEMS)), LOCATION, **process)


def trained(users: Users) -> list[list[Row]]:
    """Return the training events of each user row, oldest first."""
    return [[], [], *([row for row in sorted(rows, key=lambda row: row.day) if row.split == TRAIN] for rows in users)]


def store_of(max_history: int) -> FeatureStore:
    nothing = np.zeros(0, np.int64)
    return FeatureStore(
        {"location.degrees": LOCATION},
        {},
        dynamics=ItemDynamics(nothing, nothing, np.zeros(0, np.float32)),
        n_train_item_rows=ITEMS,
        n_train_user_rows=100,
        cells=None,
        max_history=max_history,
        log_popularity=np.zeros((ITEMS, 1), np.float32),
    )


def config_of(*, batch_size: int = 8, exclude_seen: bool = True, history_dropout: float = 0.0) -> Config:
    return parse_config(
        {
            "training": {"batch_size": batch_size},
            "model": {"user_tower": {"history_dropout": history_dropout}},
            "evaluation": {"exclude_seen": exclude_seen},
        }
    )


rows = st.builds(
    Row,
    item=st.integers(2, ITEMS - 1),
    day=st.integers(0, 9),
    split=st.sampled_from([TRAIN, TRAIN, TRAIN, VALID, TEST]),
    positive=st.sampled_from([True, True, False]),
    weight=st.sampled_from([1.0, 0.5, 0.0]),
    stars=st.sampled_from([float("nan"), 1.0, 5.0]),
    kind=st.integers(1, 3),
)
many_users = st.lists(st.lists(rows, max_size=9), min_size=1, max_size=5).filter(lambda users: any(map(len, trained(users))))


@settings(max_examples=40)
@given(many_users, st.integers(1, 3))
def test_the_events_of_processes_are_the_training_events(users: Users, world_size: int) -> None:
    expected = trained(users)
    active = sum(map(bool, expected))
    flat = [(row, user) for user, events in enumerate(expected) for row in events]
    parts = [opened(users, rank=rank, world_size=world_size) for rank in range(world_size)] if world_size <= active else []
    position = 0
    for rank, part in enumerate(parts):
        assert part.offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
        assert part.positive.tolist() == [row.is_target for row, _ in flat]
        assert part.first == position == part.shares[rank]
        own = flat[part.shares[rank] : part.shares[rank + 1]]
        assert own, "every process has events"
        position += len(own)
        history = part.history
        assert history.item_row.tolist() == [row.item for row, _ in own]
        assert history.time_s.tolist() == [row.day * DAY_S for row, _ in own]
        assert history.event_type.tolist() == [row.kind for row, _ in own]
        np.testing.assert_array_equal(history.stars, np.array([row.stars for row, _ in own], np.float32))
        np.testing.assert_array_equal(history._item_location, LOCATION[[row.item for row, _ in own]])
        assert part.weight.tolist() == [row.weight for row, _ in own]
        assert part.user_row.tolist() == [user for _, user in own]
        for local in range(len(history.offsets) - 1):
            mine = expected[part.first_user + local]
            assert history.offsets[local + 1] - history.offsets[local] == len(mine)
            liked = part.positive_items[part.positive_offsets[local] : part.positive_offsets[local + 1]]
            assert liked.tolist() == sorted({row.item for row in mine if row.is_target})
        where = np.arange(len(flat))
        items, times, weights = part.targets(where)
        assert items.tolist() == [row.item for row, _ in flat] and weights.tolist() == [row.weight for row, _ in flat]
        assert times.tolist() == [row.day * DAY_S for row, _ in flat]
        assert part.owner(where[part.shares[rank] : part.shares[rank + 1]]).tolist() == [rank] * len(own)
    assert not parts or position == len(flat)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 5))
def test_users_are_shared_evenly_and_each_process_has_some(sizes: list[int], world_size: int) -> None:
    offsets = np.cumsum([0, *sizes])
    active = int(np.count_nonzero(sizes))
    if world_size > max(active, 1):
        with pytest.raises(TrainingError, match=f"{world_size} processes are more than the {active} users"):
            user_shares(offsets, world_size)
        return
    users = user_shares(offsets, world_size)
    assert users[0] == 0 and users[-1] == len(sizes) and len(users) == world_size + 1
    shares = np.diff(offsets[users])
    assert not active or shares.min() > 0
    if world_size == 2 and active:  # no other cut with users on both sides begins the second share nearer to the half
        cuts = [offsets[u] for u in np.flatnonzero(sizes) if offsets[u] > 0]
        wanted = next((cut for cut in cuts if cut >= offsets[-1] / 2), cuts[-1])
        assert shares[0] == wanted


def visible(examples: Examples, i: int) -> list[tuple[int, int, float]]:
    """Return item, type and stars (bucket) of the events that example i sees, oldest first."""
    batch = examples.users
    at, seen = int(batch.at[i]), int(batch.seen[i])
    slots = slice(at - seen + 1, at + 1) if seen else slice(0)
    found = zip(batch.items.row[batch.history[slots]], batch.event_type[slots], batch.stars[slots], strict=True)
    return [(int(item), int(kind), int(stars)) for item, kind, stars in found]


def as_seen(events: list[Row]) -> list[tuple[int, int, float]]:
    return [(row.item, row.kind, 1 if np.isnan(row.stars) else int(row.stars) + 2) for row in events]


def state_of(events: list[Row], last_day: int | None) -> HistoryState:
    rated = [row.stars for row in events if not np.isnan(row.stars)]
    one = {"count": len(events), "stars_sum": sum(rated), "stars_n": len(rated), "location_n": 0}
    one |= {"first_s": events[0].day * DAY_S if events else 0, "last_s": 0 if last_day is None else last_day * DAY_S}
    return HistoryState(location=np.zeros((1, 2)), **{name: np.array([value]) for name, value in one.items()})


def check_state(examples: Examples, i: int, now: int, state: HistoryState) -> None:
    none = np.zeros(1, np.int64)
    expected = user_state(state, np.array([now * DAY_S]), none, none, True)
    np.testing.assert_allclose(examples.users.fields["state"][i : i + 1].numpy(), expected, atol=1e-6)


@settings(max_examples=40)
@given(many_users, st.booleans(), st.integers(1, 4))
def test_any_event_is_predicted_from_all_others(users: Users, exclude_seen: bool, max_history: int) -> None:
    expected = trained(users)
    flat = [(row, user, i) for user, events in enumerate(expected) for i, row in enumerate(events)]
    events, store = opened(users), store_of(max_history)
    objective = AnyEventObjective(events, store, config_of(exclude_seen=exclude_seen))
    assert objective.targets.tolist() == [at for at, (row, _, _) in enumerate(flat) if row.is_target]
    members = objective.targets[::-1].copy()  # any order
    if not len(members):
        return
    found = objective.examples(members, np.random.default_rng(0))
    assert found.event.tolist() == members.tolist() == objective.target_events(members).tolist()
    assert objective.size(members) == len(members) and objective.owner(members).tolist() == [0] * len(members)
    for i, at in enumerate(members):
        row, user, number = flat[at]
        others = [other for j, other in enumerate(expected[user]) if j != number]
        before = expected[user][number - 1].day if number else None
        shown = [other for other in others if not (exclude_seen and other.item == row.item)]
        assert visible(found, i) == as_seen(shown[-max_history:])
        assert found.user_row[i] == user == found.users.user_row[i]
        check_state(found, i, row.day, state_of(others, before))


@settings(max_examples=60)
@given(many_users, st.booleans(), st.integers(1, 4))
def test_the_next_event_is_predicted_from_those_strictly_before(users: Users, exclude_seen: bool, max_history: int) -> None:
    expected = trained(users)
    events, store = opened(users), store_of(max_history)
    objective = NextEventObjective(events, store, config_of(exclude_seen=exclude_seen))
    flat = [(row, user, i) for user, own in enumerate(expected) for i, row in enumerate(own)]

    def asked(row: Row, user: int, number: int) -> bool:
        return row.is_target and not (exclude_seen and row.item in [other.item for other in expected[user][:number]])

    wanted = [at for at, one in enumerate(flat) if asked(*one)]
    assert objective.targets.tolist() == wanted
    members = np.arange(len(objective.start))
    assert sorted(objective.target_events(members).tolist()) == wanted, "each once"
    if not wanted:
        assert objective.plan(np.random.default_rng(0)) == []
        return
    found = objective.examples(members, np.random.default_rng(0))
    assert found.event.tolist() == objective.target_events(members).tolist()
    assert objective.owner(members).tolist() == [0] * len(members)
    for i, at in enumerate(found.event):
        row, user, _ = flat[at]
        past = [other for other in expected[user] if other.day < row.day]
        seen = visible(found, i)
        assert seen == as_seen(past)[len(past) - len(seen) :] and len(seen) <= max_history
        first_day = sum(other.day < row.day for other in expected[user])
        assert len(seen) >= min(first_day, max_history - max(max_history // 2, 1) + 1) or first_day < flat[at][2]
        assert found.user_row[i] == user == found.users.user_row[i]
        check_state(found, i, row.day, state_of(past, past[-1].day if past else None))


def test_windows_by_hand() -> None:
    """With four visible events, a window has five; the next begins two later, and only its last two are targets."""
    objective = NextEventObjective(
        opened([[Row(2 + day % 7, day) for day in range(10)], [], [Row(3, 1)]]), store_of(4), config_of()
    )
    assert list(zip(objective.user.tolist(), objective.start.tolist(), objective.stop.tolist(), strict=True)) == [
        (2, 0, 5), (2, 2, 7), (2, 4, 9), (2, 6, 10), (4, 10, 11),
    ]  # fmt: skip
    assert objective.first_target.tolist() == [0, 5, 7, 9, 10]
    assert objective.size(np.array([0, 4])) == 10 and objective.size(np.array([4])) == 1
    assert objective.size(np.zeros(0, np.int64)) == 0, "a process may have no window of a batch"
    whole = NextEventObjective(opened([[Row(2, day) for day in range(5)]]), store_of(4), config_of(exclude_seen=False))
    assert whole.stop.tolist() == [5] and whole.targets.tolist() == [0, 1, 2, 3, 4]


def epoch(objective: Objective, seed: int = 0) -> list[list[int]]:
    return [members.tolist() for members in objective.plan(np.random.default_rng(seed))]


@pytest.mark.parametrize(("events", "batch_size", "sizes"), [(23, 5, [5, 6, 6, 6]), (4, 5, [4]), (10, 5, [5, 5]), (9, 5, [9])])
def test_batches_of_any_event_have_nearly_one_size(events: int, batch_size: int, sizes: list[int]) -> None:
    objective = AnyEventObjective(opened([[Row(2, day) for day in range(events)]]), store_of(4), config_of(batch_size=batch_size))
    batches = epoch(objective)
    assert sorted(map(len, batches)) == sizes and sorted(list(chain(*batches))) == list(range(events))
    assert list(chain(*batches)) != list(range(events)) and epoch(objective, 1) != batches


def test_batches_of_windows_fill_the_budget_with_windows_of_one_length() -> None:
    lengths = [1, 1, 1, 2, 2, 3, 5, 5, 4, 0]
    users = [[Row(2 + day, day) for day in range(length)] for length in lengths]
    objective = NextEventObjective(opened(users), store_of(4), config_of(batch_size=6))
    batches = epoch(objective)
    length = objective.stop - objective.start
    assert sorted(list(chain(*batches))) == list(range(9))
    assert sorted(sorted(length[batch].tolist()) for batch in batches) == [[1, 1, 1], [2, 2], [3], [4], [5], [5]]
    assert len({str(epoch(objective, seed)) for seed in range(5)}) > 1, "in random order"
    alone = NextEventObjective(opened([[Row(2 + day, day) for day in range(5)]]), store_of(4), config_of(batch_size=2))
    assert epoch(alone) == [[0]], "a window longer than the budget is a batch"


def test_batches_without_a_target_are_left_out() -> None:
    users = [[Row(2, 1, positive=False)], [Row(3, day) for day in range(3)]]
    assert epoch(NextEventObjective(opened(users), store_of(4), config_of(batch_size=3))) == [[1]]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_process_has_a_member_of_its_own_for_a_batch_without_its_users(name: str) -> None:
    users = [[Row(2 + day, day) for day in range(5)] for _ in range(4)]
    for rank in range(2):
        events = opened(users, rank=rank, world_size=2)
        objective = OBJECTIVES[name](events, store_of(4), config_of())
        assert objective.owner(np.array([objective.idle])).tolist() == [rank]
        assert len(objective.examples(np.array([objective.idle]), np.random.default_rng(0)).event)
        members = np.concatenate(objective.plan(np.random.default_rng(0)))
        mine = members[objective.owner(members) == rank]
        found = objective.examples(mine, np.random.default_rng(0))
        assert set(found.user_row.tolist()) == ({2, 3} if rank == 0 else {4, 5})
        assert (found.event + events.first).tolist() == objective.target_events(mine).tolist()
        days = objective.events.history.time_s[found.event] // DAY_S  # type: ignore[attr-defined]
        assert found.users.fields["weekday"].tolist() == ((days + 3) % 7 + 2).tolist()


def test_a_share_of_the_other_events_is_hidden() -> None:
    users = [[Row(2 + day % 2, day) for day in range(100)]]
    events, store = opened(users), store_of(200)
    members = np.array([0, 50])
    config = config_of(history_dropout=0.3, exclude_seen=False)
    found = AnyEventObjective(events, store, config).examples(members, np.random.default_rng(0))
    assert 55 < found.users.seen[0] < 83 and 55 < found.users.seen[1] < 83
    again = AnyEventObjective(events, store, config).examples(members, np.random.default_rng(0))
    assert visible(found, 0) == visible(again, 0) != visible(found, 1)
    most = AnyEventObjective(events, store, config_of(history_dropout=0.999_999)).examples(members, np.random.default_rng(0))
    assert most.users.seen.tolist() == [0, 0], "all of it may be hidden"


def test_half_of_the_requests_are_near_their_targets() -> None:
    store = store_of(4)
    assert request_locations(store, np.array([2]), np.random.default_rng(0)) is None
    store.use_location = True
    target = np.full(4000, 5)
    found = request_locations(store, target, np.random.default_rng(0))
    assert found is not None and found.dtype == np.float32 and found.shape == (4000, 2)
    known = np.isfinite(found).all(axis=1)
    assert np.isnan(found[~known]).all() and known.mean() == pytest.approx(0.5, abs=0.03)
    away = found[known] - LOCATION[5]
    np.testing.assert_allclose(away.std(axis=0), 0.01, rtol=0.06)
    np.testing.assert_allclose(away.mean(axis=0), 0, atol=1e-3)
    unknown = request_locations(store, np.full(50, 4), np.random.default_rng(0))
    assert unknown is not None and np.isnan(unknown).all(), "the target has no location"


def test_examples_have_the_location_of_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(FeatureStore, "user_batch", lambda *_, **kept: seen.append(kept["request_location"]))
    store, users = store_of(4), [[Row(2 + day, day) for day in range(5)]]
    store.use_location = True
    for name, kind in OBJECTIVES.items():
        members = np.array([1, 3]) if name == "any_event" else np.array([0])
        found = kind(opened(users), store, config_of()).examples(members, np.random.default_rng(7))
        near, asked = seen.pop(), LOCATION[2 + found.event]
        known = np.isfinite(near).all(axis=1) & np.isfinite(asked).all(axis=1)
        assert len(near) == len(found.event) and np.abs(near - asked)[known].max(initial=0) < 0.06


def _few_new(events: int = 40) -> Users:
    """Three users whose last days are new; the fourth has none."""
    return [[Row(2 + day % 5, day) for day in range(events)] for _ in range(3)] + [[Row(3, day) for day in range(20)]]


@pytest.mark.parametrize("old_frac", [0.0, 0.1, 1.0])
def test_an_update_trains_on_every_new_event_and_a_sample_of_the_old_ones(old_frac: float) -> None:
    events = opened(_few_new(), replay=Replay(36 * DAY_S, old_frac))
    view = AnyEventObjective(events, store_of(8), config_of())
    epochs = [np.concatenate(view.plan(np.random.default_rng(seed))) for seed in (0, 1)]
    for members in epochs:
        assert len(set(members.tolist())) == len(members), "no event twice in an epoch"
        assert events.fresh[members].sum() == events.fresh.sum() == 12
        assert (~events.fresh[members]).sum() == round(128 * old_frac)
    if old_frac == 0.1:
        assert set(epochs[0].tolist()) != set(epochs[1].tolist()), "each epoch draws other old events"


def test_an_update_of_windows_takes_every_window_with_a_new_event() -> None:
    events = opened(_few_new(), replay=Replay(36 * DAY_S, 0.0))
    view = NextEventObjective(events, store_of(8), config_of(batch_size=64, exclude_seen=False))
    chosen = np.concatenate(view.plan(np.random.default_rng(0)))
    targets = view.target_events(chosen)
    assert events.fresh[targets].sum() == 12
    assert all(events.fresh[view.target_events(np.array([window]))].any() for window in chosen)
    more = opened(_few_new(), replay=Replay(36 * DAY_S, 0.5))
    again = NextEventObjective(more, store_of(8), config_of(batch_size=64, exclude_seen=False))
    windows = len(np.concatenate(again.plan(np.random.default_rng(0))))
    assert windows == len(chosen) + round(0.5 * (len(again.start) - len(chosen)))
