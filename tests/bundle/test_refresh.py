"""Test refreshed items: equal to an index made offline, the same on every server, and never from the future."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twotower.bundle.bundle import Bundle, load_bundle
from twotower.bundle.item_arrays import item_arrays
from twotower.bundle.refresh import Refresher
from twotower.data.dataset import EVENTS_FILE, ITEM_EVENTS_FILE, Dataset
from twotower.data.dataset_features import log_popularity, open_store
from twotower.data.event_arrays import Events, ItemEvents
from twotower.models.neural_retriever import NeuralRetriever
from twotower.schema import DAY_S, FIRST_ROW, TEST
from twotower.search.registry import INDEXES
from twotower.utils.array_files import write_arrays
from twotower.utils.ragged import lengths_to_offsets

Columns = dict[str, list[Any]]


def new_events(dataset: Dataset, n: int, *, seed: int = 5, days: float = 40) -> Columns:
    """Events of known and unknown users after the end of the data, as a store would hold them."""
    drawn = np.random.default_rng(seed)
    end = int(dataset.item_events.time_s.max()) + 1
    popular = FIRST_ROW + (drawn.random(n) ** 2 * dataset.n_items).astype(np.int64)
    users = [str(dataset.user_ids[row]) for row in drawn.integers(FIRST_ROW, dataset.n_user_rows, n)]
    return {
        "users": [f"new-{at % 7}" if at % 5 == 0 else user for at, user in enumerate(users)],
        "item_ids": [str(dataset.item_ids[row]) for row in popular],
        "time_s": (end + drawn.integers(0, int(days * DAY_S), n)).tolist(),
        "event_types": [None] * n,
        "stars": [None if at % 3 == 0 else float(drawn.integers(1, 6)) for at in range(n)],
    }


def some(columns: Columns, chosen: Any) -> Columns:
    return {name: [values[at] for at in chosen] for name, values in columns.items()}


def with_events(dataset: Dataset, columns: Columns, folder: Path) -> Dataset:
    """The dataset, written to `folder`, as if the events had been in its raw data; those of unknown users are anonymous."""
    shutil.copytree(dataset.path, folder)
    old, all_items = dataset.events, dataset.item_events
    user, item = dataset.user_rows(columns["users"]), dataset.item_rows(columns["item_ids"])
    stars = np.array([np.nan if one is None else one for one in columns["stars"]], np.float32)
    time_s, known = np.array(columns["time_s"]), user >= FIRST_ROW
    n = int(known.sum())
    added = {
        "item_row": item[known],
        "time_s": time_s[known],
        "event_type": np.ones(n, np.int64),
        "stars": stars[known],
        "weight": np.ones(n, np.float32),
        "positive": np.ones(n, np.bool_),
        "split": np.full(n, TEST, np.int8),
    }
    owner = np.concatenate([old.user_row, user[known]])
    joined = {name: np.concatenate([getattr(old, name), value.astype(getattr(old, name).dtype)]) for name, value in added.items()}
    order = np.lexsort((joined["time_s"], owner))
    offsets = lengths_to_offsets(np.bincount(owner, minlength=dataset.n_user_rows))
    together = asdict(Events(offsets=offsets, **{name: value[order] for name, value in joined.items()}))
    write_arrays(folder / EVENTS_FILE, {name: value for name, value in together.items() if value is not None})
    row = np.concatenate([all_items.item_row, item])
    every_time = np.concatenate([all_items.time_s, time_s])
    order = np.lexsort((every_time, row))
    write_arrays(
        folder / ITEM_EVENTS_FILE,
        asdict(
            ItemEvents(
                offsets=lengths_to_offsets(np.bincount(row, minlength=dataset.n_item_rows)),
                time_s=every_time[order],
                stars=np.concatenate([all_items.stars, stars])[order],
                split=np.concatenate([all_items.split, np.full(len(item), TEST, np.int8)])[order],
            )
        ),
    )
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def bundle(town_bundle: Path) -> Bundle:
    return load_bundle(town_bundle)


def test_lists_equal_those_of_an_index_made_offline_from_the_same_events(bundle: Bundle, tmp_path: Path) -> None:
    columns = new_events(bundle.dataset, 600)
    known = [at for at, user in enumerate(columns["users"]) if not user.startswith("new-")]
    columns = some(columns, known)  # users that the dataset knows, so that popularity counts them offline too
    refresher, fresh = Refresher(bundle), bundle
    for start in range(0, len(known), 100):  # in parts, refreshed in between, as a server does
        part = some(columns, range(start, min(start + 100, len(known))))
        refresher.add(**part)
        fresh = refresher.bundle_at(max(columns["time_s"])) or fresh
    moment = fresh.moment_s
    assert moment == max(columns["time_s"]) + 1
    offline = with_events(bundle.dataset, columns, tmp_path / "later")
    store = open_store(offline, "future", bundle.config.model).with_popularity(log_popularity(offline, moment))
    system = NeuralRetriever(bundle.model, store, n_item_rows=offline.n_item_rows, time_s=moment)
    expected = item_arrays(bundle.model, store, offline, moment)
    np.testing.assert_allclose(fresh.arrays.vectors, expected.vectors, atol=1e-5)
    np.testing.assert_array_equal(fresh.arrays.recent_event_count, expected.recent_event_count)
    users = np.arange(FIRST_ROW, offline.n_user_rows)
    queries = offline.histories(users, np.full(len(users), moment))
    wanted = system.retrieve(queries, 20, allow=bundle.arrays.offered)  # not closed businesses
    found = fresh.retrieve(queries, 20)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    swapped = found.items != wanted.items
    gaps = np.abs(np.diff(wanted.scores, axis=1, append=wanted.scores[:, -1:]))
    assert swapped.mean() < 0.001 or gaps[swapped].max() < 1e-5  # only items with the same score may change places
    before = bundle.retrieve(queries, 20)
    assert (before.items != found.items).mean() > 0.2  # the events do change the lists


def test_servers_with_the_same_events_agree_whenever_they_refreshed(bundle: Bundle) -> None:
    columns = new_events(bundle.dataset, 300)
    now, one, other = max(columns["time_s"]), Refresher(bundle), Refresher(bundle)
    for at in range(300):
        one.add(**some(columns, [at]))
        if at % 60 == 0:
            one.bundle_at(now)
    other.add(**columns)
    first, second = one.bundle_at(now), other.bundle_at(now + 5000)  # another clock
    assert first is not None and second is not None and first.moment_s == second.moment_s
    np.testing.assert_array_equal(first.store.log_popularity, second.store.log_popularity)
    np.testing.assert_array_equal(first.arrays.recent_event_count, second.arrays.recent_event_count)
    np.testing.assert_allclose(first.arrays.vectors, second.arrays.vectors, atol=2e-6)  # products of blocks of other sizes


def test_without_new_events_nothing_changes(bundle: Bundle) -> None:
    refresher = Refresher(bundle)
    assert refresher.bundle_at(bundle.moment_s + 10**9) is None
    columns = new_events(bundle.dataset, 10)
    refresher.add(**columns)
    assert refresher.bundle_at(max(columns["time_s"])) is not None
    assert refresher.bundle_at(max(columns["time_s"]) + 10**6) is None


def test_events_of_the_future_wait_and_a_clock_that_goes_back_changes_nothing(bundle: Bundle) -> None:
    columns = new_events(bundle.dataset, 100)
    order = np.argsort(columns["time_s"], kind="stable")
    columns = some(columns, order)
    middle = columns["time_s"][49]
    early, whole = Refresher(bundle), Refresher(bundle)
    early.add(**some(columns, range(50)))
    whole.add(**columns)
    expected, fresh = early.bundle_at(middle), whole.bundle_at(middle)
    assert expected is not None and fresh is not None and fresh.moment_s == middle + 1
    assert whole.counts.counted == 50 and whole.counts.future == 50
    np.testing.assert_array_equal(fresh.arrays.vectors, expected.arrays.vectors)
    assert whole.bundle_at(middle - 10 * DAY_S) is None
    later = whole.bundle_at(max(columns["time_s"]))
    assert later is not None and later.moment_s == max(columns["time_s"]) + 1 and whole.counts.future == 0


def test_events_of_unknown_items_and_of_the_bundle_do_not_count(bundle: Bundle) -> None:
    dataset, events = bundle.dataset, bundle.dataset.events
    columns = new_events(dataset, 20)
    held = np.flatnonzero(events.split <= TEST)[:30]
    again = {
        "users": [str(dataset.user_ids[row]) for row in events.user_row[held]],
        "item_ids": [str(dataset.item_ids[row]) for row in events.item_row[held]],
        "time_s": events.time_s[held].tolist(),
        "event_types": [None] * 30,
        "stars": [None] * 30,
    }
    plain, mixed = Refresher(bundle), Refresher(bundle)
    plain.add(**columns)
    mixed.add(**again)
    mixed.add(**(columns | {"item_ids": [f"unknown-{at}" for at in range(20)]}))
    assert mixed.bundle_at(bundle.moment_s + 10**9) is None
    mixed.add(**columns)
    wanted, found = plain.bundle_at(max(columns["time_s"])), mixed.bundle_at(max(columns["time_s"]))
    assert wanted is not None and found is not None
    assert (mixed.counts.counted, mixed.counts.in_bundle, mixed.counts.unknown_item) == (20, 30, 20)
    np.testing.assert_array_equal(found.arrays.vectors, wanted.arrays.vectors)
    np.testing.assert_array_equal(found.arrays.recent_event_count, wanted.arrays.recent_event_count)


def with_setting(bundle: Bundle, folder: Path, **prepare: Any) -> Bundle:
    """The bundle as if its dataset had been prepared with other settings; its events stay."""
    shutil.copytree(bundle.dataset.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["prepare"] |= prepare
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return replace(bundle, dataset=Dataset.open(folder))


def test_few_stars_and_types_of_weight_zero_change_the_state_but_not_the_popularity(bundle: Bundle, tmp_path: Path) -> None:
    strict = with_setting(bundle, tmp_path / "strict", positive_min_stars=3, event_weights={"tip": 0.0, "review": 2.0})
    base, end = Refresher(strict), bundle.moment_s
    item = str(bundle.dataset.item_ids[FIRST_ROW])
    popularity, state = [], []
    for stars, kind in ((5.0, "review"), (None, "review"), (2.0, "review"), (5.0, "tip")):
        refresher = base.emptied()
        refresher.add(["u"] * 9, [item] * 9, [end] * 9, [kind] * 9, [stars] * 9)
        fresh = refresher.bundle_at(end)
        assert fresh is not None and fresh.store.dynamics is not None
        popularity.append(float(fresh.store.log_popularity[FIRST_ROW, 0]))
        state.append(fresh.store.dynamics.state(np.array([FIRST_ROW]), np.array([end + 1]))[0].tolist())
    assert popularity[0] == popularity[1] > popularity[2] == popularity[3]
    assert {one[0] for one in state} == {state[0][0]} and state[0][1] > state[2][1]


def test_where_repeats_are_left_out_only_the_first_event_of_a_pair_counts(bundle: Bundle, tmp_path: Path) -> None:
    folded = with_setting(bundle, tmp_path / "folded", duplicates="keep_first")
    dataset, end, events = bundle.dataset, bundle.moment_s, bundle.dataset.events
    at = int(np.flatnonzero(events.split <= TEST)[0])
    old_user, old_item = str(dataset.user_ids[events.user_row[at]]), str(dataset.item_ids[events.item_row[at]])
    refresher = Refresher(folded)
    refresher.add(["new", "new", "newer", old_user], [old_item] * 4, [end + 9, end + 3, end + 5, end + 1], [None] * 4, [None] * 4)
    fresh = refresher.bundle_at(end + 100)
    assert fresh is not None and fresh.moment_s == end + 6
    assert (refresher.counts.counted, refresher.counts.in_bundle) == (2, 2)


def test_a_refresh_after_a_failed_one_is_complete(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = new_events(bundle.dataset, 40)
    plain, broken = Refresher(bundle), Refresher(bundle)
    for refresher in (plain, broken):
        refresher.add(**some(columns, range(20)))
        refresher.bundle_at(max(columns["time_s"]))
        refresher.add(**some(columns, range(20, 40)))
    with monkeypatch.context() as patch:
        patch.setattr("twotower.bundle.refresh.item_columns", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken.bundle_at(max(columns["time_s"]))
    wanted, found = plain.bundle_at(max(columns["time_s"])), broken.bundle_at(max(columns["time_s"]))
    assert wanted is not None and found is not None
    np.testing.assert_array_equal(found.arrays.vectors, wanted.arrays.vectors)


def test_an_approximate_index_scores_its_candidates_and_what_is_new_exactly(bundle: Bundle) -> None:
    dataset, end, model = bundle.dataset, bundle.moment_s, deepcopy(bundle.model)
    model.priors.weights[:, 1] = 5.0  # popularity decides
    bundle = replace(bundle, model=model)
    built = INDEXES["int8"].build(torch.from_numpy(bundle.arrays.vectors), rescore_factor=1.0, exact_scan_below=0)
    order = np.argsort(bundle.store.log_popularity[:, 0])
    rare = order[bundle.arrays.offered[order]][:20]  # what the structure ranks last
    exact, approximate = Refresher(bundle), Refresher(replace(bundle, built=built))
    for refresher in (exact, approximate):
        items = [str(dataset.item_ids[row]) for row in rare for _ in range(400)]
        refresher.add([f"new-{at}" for at in range(8000)], items, [end] * 8000, [None] * 8000, [None] * 8000)
    wanted, found = exact.bundle_at(end), approximate.bundle_at(end)
    assert wanted is not None and found is not None and found.index.kind == "int8"
    users = np.arange(FIRST_ROW, dataset.n_user_rows)
    queries = dataset.histories(users, np.full(len(users), end + 1))
    best, close = wanted.retrieve(queries, 10), found.retrieve(queries, 10)
    assert np.isin(best.items, rare).mean() > 2 * np.isin(bundle.retrieve(queries, 10).items, rare).mean()
    same = best.items == close.items
    assert same.mean() > 0.95
    np.testing.assert_allclose(close.scores[same], best.scores[same], atol=1e-5)
    old = built.with_vectors(torch.from_numpy(found.arrays.vectors), rare[:0])
    vectors = found.query_vectors(queries, np.zeros(len(users), np.float32))
    missed = old.search(vectors, 10, exclude=(queries.offsets, queries.item_row), allow=bundle.offered).items
    assert np.isin(missed, rare).mean() < np.isin(best.items, rare).mean()  # the structure alone does not know
