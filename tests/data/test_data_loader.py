"""Test training batches: functions of (seed, epoch, step), every example once per epoch, hidden targets, correct masks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch

from twotower.data.data_loader import TrainLoader
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store
from twotower.data.train_events import user_shares
from twotower.errors import ConfigError, DataError, TrainingError
from twotower.schema import TRAIN
from twotower.utils.config import Config, parse_config


def loader_of(dataset: Dataset, *, rank: int = 0, world_size: int = 1, **settings: object) -> tuple[TrainLoader, Config]:
    config = parse_config({"training": {"batch_size": 128, **settings}, "model": {"user_tower": {"max_history": 12}}})
    return TrainLoader(dataset, open_store(dataset, "valid", config.model), config, rank=rank, world_size=world_size), config


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__slots__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__slots__)
    return a == b


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_batches_are_a_function_of_seed_epoch_and_step(dataset, objective):
    loader, _ = loader_of(dataset, objective=objective)
    again, _ = loader_of(dataset, objective=objective)
    first = list(loader.iterate(3))
    resumed = list(again.iterate(3, start=len(first) - 2))
    assert all(same(a, b) for a, b in zip(first[-2:], resumed, strict=True))
    assert not same(first[0], next(again.iterate(4)))


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_an_epoch_has_every_positive_training_event_as_target_once(dataset, objective):
    loader, _ = loader_of(dataset, objective=objective)
    events = [loader.objective.examples(members, np.random.default_rng(0)).event for members in loader.plan(0)]
    asked, expected = np.sort(np.concatenate(events)), np.flatnonzero(loader.events.positive)
    assert len(expected) == (dataset.events.positive & (dataset.events.split == TRAIN)).sum()
    if objective == "next_event":  # what was visited before is masked in the evaluation, so it is not asked for
        pairs = list(zip(loader.events.user_row.tolist(), loader.events.history.item_row.tolist(), strict=True))
        expected = [event for event in expected if pairs[event] not in pairs[:event]]
    np.testing.assert_array_equal(asked, expected)


def test_causal_windows_show_as_much_as_evaluation_does(dataset):
    loader, _ = loader_of(dataset, objective="next_event")
    batches = [loader.objective.examples(members, np.random.default_rng(0)) for members in loader.plan(0)]
    seen = np.concatenate([batch.users.seen.numpy() for batch in batches])
    longest = np.diff(loader.events.history.offsets).max()
    assert longest > 12
    assert seen.max() == 12


def test_the_target_is_never_in_its_own_history(dataset):
    loader, _ = loader_of(dataset, objective="any_event")
    for members in loader.plan(0)[:5]:
        batch = loader.objective.examples(members, np.random.default_rng(0))
        rows = batch.users.items.row[batch.users.history].numpy()
        target = loader.events.history.item_row[batch.event]
        for i, (at, seen) in enumerate(zip(batch.users.at.tolist(), batch.users.seen.tolist(), strict=True)):
            assert seen <= 12
            assert target[i] not in rows[at - seen + 1 : at + 1]


def test_causal_batches_keep_the_token_budget(dataset):
    loader, config = loader_of(dataset, objective="next_event")
    for members in loader.plan(0):
        objective: Any = loader.objective
        width = int((objective.stop[members] - objective.start[members]).max())
        assert len(members) == 1 or len(members) * width <= config.training.batch_size


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_the_logq_counts_the_targets_of_an_epoch(dataset, objective):
    loader, _ = loader_of(dataset, objective=objective)
    asked = np.concatenate([loader.objective.target_events(members) for members in loader.plan(0)])
    found = np.bincount(loader.events.history.item_row[asked], minlength=dataset.n_item_rows)
    assert np.array_equal(found, loader.pool.count) and loader.pool.total == len(asked)


def test_masks_are_the_users_other_positives(dataset):
    loader, _ = loader_of(dataset, objective="any_event")
    members = loader.plan(0)[0]
    batch = loader.batch(members, 0, 0)
    candidates, history = batch.items[0].row.numpy(), loader.events.history
    masked = set(zip(batch.masked.example.tolist(), batch.masked.column.tolist(), strict=True))
    for example, event in enumerate(members[:20]):
        user = loader.events.user_row[event]
        mine = set(history.item_row[history.offsets[user] : history.offsets[user + 1]]) - {history.item_row[event]}
        expected = {(example, column) for column, row in enumerate(candidates) if row in mine}
        assert {pair for pair in masked if pair[0] == example} == expected


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_processes_read_the_histories_of_their_own_users_and_share_a_batch_by_them(dataset, objective):
    alone, _ = loader_of(dataset, objective=objective)
    shares = [loader_of(dataset, objective=objective, micro_batch_size=20, rank=rank, world_size=3)[0] for rank in range(3)]
    kept = [len(loader.events.history.item_row) for loader in shares]
    total = len(alone.events.history.item_row)
    assert sum(kept) == total and max(kept) < 1.1 * total / 3, "each has about a third of the events, and nobody's twice"
    assert np.concatenate([loader.events.user_row for loader in shares]).tolist() == alone.events.user_row.tolist()
    for step, members in enumerate(alone.plan(0)[:10]):
        whole, parts = alone.batch(members, 0, step), [loader.batch(members, 0, step) for loader in shares]
        assert len({len(part.users) for part in parts}) == 1, "all do the same number of micro-batches"
        assert torch.equal(torch.cat([micro.row for part in parts for micro in part.items]), whole.items[0].row)
        asked = sorted(target for part in parts for target in part.target[part.weight > 0].tolist())
        assert asked == sorted(whole.target.tolist())
        for loader, part in zip(shares, parts, strict=True):
            own = set(loader.events.user_row.tolist())
            assert {int(row) for micro in part.users for row in micro.user_row} - {0, 1} <= own
            assert same(part.weight_sum, whole.weight_sum) and part.examples == whole.examples


def test_a_process_without_a_share_of_a_small_batch_takes_part_in_it(dataset):
    shares = [loader_of(dataset, batch_size=4, negatives_per_positive=1, rank=rank, world_size=4)[0] for rank in range(4)]
    idle = 0
    for step, members in enumerate(shares[0].plan(0)[:200]):
        for loader in shares:
            batch = loader.batch(members, 0, step)
            assert len(batch.target) and (batch.target < len(batch.log_weight)).all()
            idle += not batch.weight.any()
    assert idle > 20


def test_users_are_shared_so_that_every_process_has_some():
    offsets = np.array([0, 0, 90, 90, 91, 92, 100])  # one user has nearly all, two have nothing
    assert user_shares(offsets, 1).tolist() == [0, 6]
    assert user_shares(offsets, 2).tolist() == [0, 3, 6]
    assert np.diff(offsets[user_shares(offsets, 4)]).tolist() == [90, 1, 1, 8]
    with pytest.raises(TrainingError, match=r"5 processes are more than the 4 users with training events\. .*Start fewer"):
        user_shares(offsets, 5)


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_batches_from_processes_are_those_of_the_thread(dataset, objective):
    loader, _ = loader_of(dataset, objective=objective)
    expected = list(loader.iterate(1, start=1))
    loader.processes = 2
    found = list(loader.iterate(1, start=1))
    assert len(found) == len(expected) > 1 and all(same(a, b) for a, b in zip(found, expected, strict=True))
    first: Any = loader.iterate(1)
    next(first)
    first.close()  # a reader may stop early
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [DataError("two towers"), ValueError("two towers")])
def test_an_error_in_a_process_reaches_the_reader(dataset, error):
    loader, _ = loader_of(dataset)
    loader.processes = 2

    def fail(*_):
        raise error

    loader.batch = fail
    with pytest.raises(type(error), match="two towers"):
        next(loader.iterate(0))
    loader.batch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(loader.iterate(0))


def test_the_thread_that_builds_batches_leaves_the_cores_to_the_others(dataset, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader, _ = loader_of(dataset)
        build, seen = loader.batch, []
        monkeypatch.setattr(loader, "batch", lambda *given: (seen.append(torch.get_num_threads()), build(*given))[1])
        assert len(list(loader.iterate(0))) == len(seen)
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_processes_need_linux(dataset, monkeypatch):
    monkeypatch.setattr("twotower.data.data_loader.sys.platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        loader_of(dataset, loader_processes=1)


def test_a_loader_error_reaches_the_reader(dataset):
    loader, _ = loader_of(dataset)
    loader.batch = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(loader.iterate(0))


def test_locations_of_requests_are_near_half_of_the_targets(dataset):
    config = parse_config({"model": {"request_location": True}, "training": {"batch_size": 512}})
    loader = TrainLoader(dataset, open_store(dataset, "valid", config.model), config)
    points = loader.batch(loader.plan(0)[0], 0, 0).users[0].fields["request_location.point"]
    known = (points != 0).any(dim=1)
    assert 0.4 < known.float().mean() < 0.6
    target = loader.events.history.item_row[loader.plan(0)[0]]
    distance = (points - loader.store.items(target).fields["location.point"]).norm(dim=1)[known]
    assert 0.3 < distance.median() < 3
