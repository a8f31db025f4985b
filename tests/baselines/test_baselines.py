"""Test properties of all baselines, each baseline on small examples, and all against published results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.baselines.baselines import (
    BASELINES,
    GRIDS,
    IALS,
    ItemKNN,
    Nearby,
    Oracle,
    Popular,
    RecentPopularity,
    Repeat,
    unavailable,
)
from twotower.baselines.transitions import Transitions
from twotower.data.dataset import Dataset
from twotower.data.event_arrays import Events
from twotower.errors import DataError
from twotower.evaluation.evaluator import evaluate
from twotower.retriever import Queries, Recommendations
from twotower.schema import DAY_S, FIRST_ROW, TRAIN, UNKNOWN, FeatureSpec
from twotower.utils.config import DataConfig, EvaluationConfig, PrepareConfig
from twotower.utils.manifests import DatasetCounts, DatasetManifest, DatasetSettings, KeptCounts

from ..documents import with_split

Settings = dict[str, dict[str, Any]]
CHEAP: Settings = {"ials": {"factors": 8, "iterations": 3}}
DAY = 20_000  # the day of the questions


def dataset_of(events: list[tuple[int, int, int, int]], *, n_item_rows: int, n_user_rows: int, locations: Any = None) -> Dataset:
    """Return a dataset in memory from (user row, item row, day, split) rows; all events are positive."""
    lines = sorted(events, key=lambda e: (e[0], e[2]))
    user, item, day, split = np.array(lines, np.int64).reshape(-1, 4).T
    columns = ("latitude", "longitude")
    specs = [] if locations is None else [FeatureSpec(name="location", side="item", kind="geo", columns=columns)]
    none = dict.fromkeys(KeptCounts.model_fields, 0) | {"negative_events": {}}
    manifest = DatasetManifest(
        seed=0,
        config=DatasetSettings(seed=0, data=DataConfig(), prepare=PrepareConfig()),
        counts=DatasetCounts(read={}, kept=KeptCounts(**none), dropped={}),
        event_types=["review"],
        has_time=True,
        cuts_s={},
        n_items=n_item_rows - FIRST_ROW,
        n_users=n_user_rows - FIRST_ROW,
        n_train_items=len(np.unique(item[split == TRAIN])),
        n_train_users=len(np.unique(user[split == TRAIN])),
        features=specs,
        hashes={},
    )
    dataset = Dataset(Path("nowhere"), manifest)
    size = len(lines)
    offsets = np.append(0, np.cumsum(np.bincount(user, minlength=n_user_rows))).astype(np.int64)
    ones, unrated = np.ones(size, np.float32), np.full(size, np.nan, np.float32)
    dataset.__dict__["events"] = Events(
        offsets, item, day * DAY_S, np.ones(size, np.int64), unrated, ones, np.ones(size, bool), split.astype(np.int8)
    )
    table = {"item_id": [f"i{row}" for row in range(2, n_item_rows)]}
    if locations is not None:
        table |= {"latitude": [p[0] for p in locations], "longitude": [p[1] for p in locations]}
    dataset.__dict__["items"] = pa.table(table)
    return dataset


def ask(*histories: list[int], location: tuple[float, float] | None = None) -> Queries:
    return Queries.of(list(histories), time_s=DAY * DAY_S, location=location)


@pytest.fixture(scope="module", params=sorted(BASELINES))
def baseline(request: pytest.FixtureRequest, dataset: Dataset) -> Any:
    return BASELINES[request.param](dataset, **CHEAP.get(request.param, {}))


@pytest.fixture(scope="module")
def queries(dataset: Dataset) -> Queries:
    return dataset.held_out("test", max_queries=60, seed=1).queries


def lists(recommended: Recommendations) -> list[list[int]]:
    return [[row for row in line if row >= 0] for line in recommended.items.tolist()]


def test_lists_are_distinct_real_items_best_first(baseline: Any, queries: Queries, dataset: Dataset) -> None:
    found = baseline.retrieve(queries, 20)
    assert found.items.shape == found.scores.shape == (60, 20) and found.items.dtype == np.int64
    assert (found.items >= 2).all() and (found.items < dataset.n_item_rows).all()
    assert (np.diff(found.scores) <= 0).all() and all(len(set(line)) == 20 for line in found.items.tolist())


def test_exclude_seen_leaves_seen_items_out(baseline: Any, queries: Queries) -> None:
    histories = [set(queries.item_row[a:b].tolist()) for a, b in zip(queries.offsets, queries.offsets[1:], strict=False)]
    assert all(not seen & set(line) for seen, line in zip(histories, lists(baseline.retrieve(queries, 50)), strict=True))
    assert any(
        seen & set(line) for seen, line in zip(histories, lists(baseline.retrieve(queries, 150, exclude_seen=False)), strict=True)
    )


def test_only_allowed_items(baseline: Any, queries: Queries, dataset: Dataset) -> None:
    rng = np.random.default_rng(0)
    few = np.zeros(dataset.n_item_rows, bool)
    few[[5, 9, 70]] = True
    assert all(set(line) <= {5, 9, 70} for line in lists(baseline.retrieve(queries, 5, allow=few)))
    own = rng.random((len(queries), dataset.n_item_rows)) < 0.1
    assert all(own[b, line].all() for b, line in enumerate(lists(baseline.retrieve(queries, 5, allow=own))))


def test_a_query_is_answered_alone_as_among_others(baseline: Any, queries: Queries, monkeypatch: pytest.MonkeyPatch) -> None:
    together = baseline.retrieve(queries, 10)
    monkeypatch.setattr("twotower.baselines.base._SCORES_AT_ONCE", 1)
    for one in (together, baseline.retrieve(queries, 10)):
        alone = [baseline.retrieve(queries.slice(b, b + 1), 10).items[0] for b in (0, 7, 59)]
        np.testing.assert_array_equal(one.items[[0, 7, 59]], alone)
    assert baseline.retrieve(queries.slice(0, 0), 3).items.shape == (0, 3)


def test_unknown_users_are_served(baseline: Any, dataset: Dataset) -> None:
    if baseline.name == "oracle":
        pytest.skip("the oracle knows the people of its town only")
    time_s = int(dataset.events.time_s.max())
    found = baseline.retrieve(Queries.of([[], [5, 9], [UNKNOWN], [5, UNKNOWN]], time_s=time_s), 8)
    assert (found.items >= 2).all()
    if baseline.name != "recent":
        expected = Popular(dataset).retrieve(Queries.of([[]], time_s=time_s), 8).items[0]
        np.testing.assert_array_equal(found.items[[0, 2]], [expected, expected])


def test_fitted_on_training_events_alone(baseline: Any, dataset: Dataset, queries: Queries) -> None:
    """Other held-out events change nothing (for `recent` and the oracle: only those from the time of the query on)."""
    events = dataset.events
    later = (
        events.split != TRAIN
        if baseline.name != "recent"
        else events.time_s // DAY_S * DAY_S >= queries.time_s.max() // DAY_S * DAY_S
    )
    moved = np.where(later, 2 + (events.item_row * 7 + 3) % (dataset.n_items), events.item_row)
    assert (moved != events.item_row).any()
    changed = Dataset(dataset.path, dataset.manifest)
    changed.__dict__["events"] = Events(**{name: getattr(events, name) for name in Events.__slots__} | {"item_row": moved})
    again = type(baseline)(changed, **baseline.settings)
    np.testing.assert_array_equal(again.retrieve(queries, 10).items, baseline.retrieve(queries, 10).items)


def test_fitting_twice_gives_the_same(baseline: Any, dataset: Dataset, queries: Queries) -> None:
    again = type(baseline)(dataset, **baseline.settings).retrieve(queries, 10)
    np.testing.assert_array_equal(again.items, baseline.retrieve(queries, 10).items)


def test_grids_name_settings_that_exist(dataset: Dataset) -> None:
    assert set(GRIDS) <= set(BASELINES) and set(EvaluationConfig().baselines) == set(BASELINES) - {"oracle"}
    for name, grid in GRIDS.items():
        assert len({tuple(choice.items()) for choice in grid}) == len(grid) > 1
        assert set(grid[0]) <= set(BASELINES[name](dataset, **CHEAP.get(name, {})).settings)


def test_popular_counts_training_events() -> None:
    events = [(2, 4, 1, 0), (3, 4, 2, 0), (2, 3, 3, 0), (3, 5, 4, 1), (2, 5, 5, 1), (4, 5, 6, 2)]
    assert lists(Popular(dataset_of(events, n_item_rows=6, n_user_rows=5)).retrieve(ask([], [4]), 4)) == [[4, 3, 2, 5], [3, 2, 5]]


def test_recent_ends_at_midnight_before_the_question() -> None:
    events = [
        (2, 2, DAY - 90, 0),
        (3, 2, DAY - 80, 0),
        (2, 3, DAY - 30, 0),
        (3, 4, DAY - 1, 1),
        (4, 4, DAY - 5, 1),
        (2, 5, DAY, 2),
        (3, 5, DAY, 2),
    ]
    recent = RecentPopularity(dataset_of(events, n_item_rows=7, n_user_rows=5), days=30)
    assert lists(recent.retrieve(ask([]), 4)) == [[4, 3, 2, 5]]  # then popularity: 2 has two training events; 5 and 6 none
    assert lists(RecentPopularity(dataset_of(events, n_item_rows=7, n_user_rows=5), days=29).retrieve(ask([]), 2)) == [[4, 2]]


def test_nearby_weighs_popularity_by_distance_from_home() -> None:
    locations = [
        (36.0, -115.0),
        (36.0, -115.1),
        (36.0, -114.0),
        (None, None),
        (36.0, -115.0),
    ]  # items 2 … 6; one tenth is about 9 km
    events = [(2, 4, 1, 0)] * 6 + [(3, 3, 1, 0)] * 2 + [(3, 2, 1, 0)]
    nearby = Nearby(dataset_of(events, n_item_rows=7, n_user_rows=4, locations=locations), scale_km=3)
    assert lists(nearby.retrieve(ask([2]), 9)) == [[6, 3, 5, 4]]  # log 1, log 3 - 3, log 1 - 10, log 7 - 30
    assert lists(nearby.retrieve(ask([6, 6, 4], []), 2, exclude_seen=False)) == [[2, 6], [4, 3]]
    assert lists(nearby.retrieve(ask([2], location=(36.0, -114.0)), 1)) == [[4]]  # where the request comes from wins
    assert lists(nearby.retrieve(ask([5]), 2)) == [[4, 3]]  # a history without coordinates


def test_repeat_gives_the_newest_first() -> None:
    repeat = Repeat(dataset_of([(2, 5, 1, 0), (3, 5, 1, 0), (3, 6, 1, 0)], n_item_rows=7, n_user_rows=4))
    assert lists(repeat.retrieve(ask([3, 4, 3, 2, 4]), 5, exclude_seen=False)) == [[4, 2, 3, 5, 6]]
    assert lists(repeat.retrieve(ask([3]), 2)) == [[5, 6]]


def test_transitions_count_what_came_next() -> None:
    """Users did 2 3 4, 2 3, 2 4 and 5 4; item 6 was done alone and often."""
    events = [(2, 2, 1), (2, 3, 2), (2, 4, 3), (3, 2, 1), (3, 3, 2), (4, 2, 1), (4, 4, 2), (5, 5, 1), (5, 4, 2)]
    events += [(user, 6, 1) for user in range(6, 12)]
    dataset = dataset_of([(user, item, day, TRAIN) for user, item, day in events], n_item_rows=7, n_user_rows=12)
    first = Transitions(dataset)
    scores = first.scores(ask([2], [4, 3], [6]))
    assert scores[0, [3, 4]].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert lists(first.retrieve(ask([2]), 4)) == [[3, 4, 6, 5]], "back-off by popularity"
    assert scores[1, 4] == pytest.approx(1.0), "only the last item counts"
    assert lists(first.retrieve(ask([6], []), 2)) == [[2, 4], [6, 2]], "nothing followed: by popularity"
    wide = Transitions(dataset, steps=2, last=2)
    counted = {3: 2.0, 4: 1 + 0.5}  # after 2: item 3 twice next, item 4 once next and once two later
    found = wide.scores(ask([2, 3]))[0]
    assert found[4] == pytest.approx(1.0 + 0.5 * counted[4] / sum(counted.values()))


def test_content_knn_compares_features(dataset: Dataset) -> None:
    """Check that the item that shares the rarer categories ranks first."""
    model = BASELINES["content_knn"](dataset)
    scores = model.scores(ask([5], [5, 9]))
    assert int(scores[0].argmax()) == 5 and scores[0, 5] == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(scores[1], (scores[0] + model.scores(ask([9]))[0]) / 2, atol=1e-5)
    shared = [
        len(set(a) & set(b))
        for a, b in [
            (dataset.items["categories"][3].as_py(), dataset.items["categories"][r].as_py()) for r in range(len(dataset.items))
        ]
    ]
    most, none = np.array(shared) >= 3, np.array(shared) == 0
    assert most.sum() > 1 and none.sum() > 1 and scores[0, 2:][most].mean() > scores[0, 2:][none].mean() + 0.1


@pytest.mark.parametrize("neighbours", [0, 100])
def test_item_knn_is_the_cosine(neighbours: int) -> None:
    rng = np.random.default_rng(0)
    events = [(int(u), int(i), 1, 0) for u, i in zip(rng.integers(2, 22, 200), rng.integers(2, 32, 200), strict=True)]
    users = np.zeros((22, 32))
    for u, i, _, _ in events:
        users[u, i] = 1
    norm = np.maximum(np.linalg.norm(users, axis=0), 1e-9)
    cosine = users.T @ users / norm / norm[:, None]
    scores = ItemKNN(dataset_of(events, n_item_rows=32, n_user_rows=22), neighbours=neighbours).scores(ask([4, 9, 4, 30]))[0]
    expected = cosine[[4, 9, 30]].sum(0)
    np.testing.assert_allclose(scores[expected > 0], expected[expected > 0], rtol=1e-5)
    assert (scores[expected == 0] < 0).all()


def test_ease_is_ridge_regression_of_each_item_on_the_others() -> None:
    rng = np.random.default_rng(1)
    pairs = sorted({(int(u), int(i)) for u, i in zip(rng.integers(2, 42, 300), rng.integers(2, 14, 300), strict=True)})
    x = np.zeros((42, 14))
    for u, i in pairs:
        x[u, i] = 1
    weights = BASELINES["ease"](dataset_of([(u, i, 1, 0) for u, i in pairs], n_item_rows=14, n_user_rows=42), l2=5.0).weights  # type: ignore[attr-defined]
    for j in range(2, 14):
        others = [i for i in range(2, 14) if i != j]
        a = x[:, others]
        solved = np.linalg.solve(a.T @ a + 5 * np.eye(11), a.T @ x[:, j])
        np.testing.assert_allclose(weights[[i - 2 for i in others], j - 2], solved, atol=1e-5)
        assert weights[j - 2, j - 2] == 0


def test_ease_refuses_a_matrix_it_cannot_invert() -> None:
    pairs = [(u, i) for u in (2, 3) for i in (2, 3, 4)]  # everybody went everywhere
    with pytest.raises(DataError, match="l2 = 0"):
        BASELINES["ease"](dataset_of([(u, i, 1, 0) for u, i in pairs], n_item_rows=5, n_user_rows=4), l2=0.0)


@pytest.mark.parametrize("name", ["ease", "ials", "item_knn"])
def test_a_history_of_items_that_training_did_not_know_is_answered_by_popularity(dataset: Dataset, name: str) -> None:
    new = dataset.n_train_item_rows
    assert new < dataset.n_item_rows
    popular, found = (BASELINES[one](dataset).retrieve(ask([new]), 5).items[0] for one in ("popular", name))
    assert found.tolist() == popular.tolist()


def test_ials_solves_the_query_by_weighted_least_squares(dataset: Dataset) -> None:
    ials = IALS(dataset, factors=8, iterations=3, l2=2.0, alpha=5.0)
    y = ials.model.item_factors.astype(np.float64)
    weight = np.ones(dataset.n_item_rows)
    weight[[5, 9]] = 5 * np.array([2, 1])  # item 5 twice
    liked = np.isin(np.arange(dataset.n_item_rows), [5, 9])
    user = np.linalg.solve((y.T * weight) @ y + 2 * np.eye(8), (y.T * weight) @ liked)
    np.testing.assert_allclose(ials.scores(ask([5, 9, 5]))[0], y @ user, atol=1e-4)


def test_the_oracle_beats_everything(dataset: Dataset) -> None:
    held_out = dataset.held_out("test")
    figures = {
        name: evaluate(BASELINES[name](dataset), held_out, dataset, EvaluationConfig()).mean("NDCG@10") for name in BASELINES
    }
    assert figures.pop("oracle") > 1.5 * max(figures.values())
    assert not np.isfinite(Oracle(dataset).scores(held_out.queries.slice(0, 9))[:, :2]).any()


def test_who_has_nothing_to_say() -> None:
    bare = dataset_of([(2, 2, 1, 0), (2, 3, 1, 0)], n_item_rows=5, n_user_rows=3)
    bare.has_time = False
    reasons = {name: unavailable(name, bare, max_ease_items=1) for name in BASELINES}
    assert {name for name, reason in reasons.items() if reason} == {"recent", "nearby", "content_knn", "ease", "oracle"}
    assert "2 items" in str(reasons["ease"]) and unavailable("ease", bare, max_ease_items=2) is None
    popular = Popular(bare).retrieve(ask([], [3]), 3).items  # they still answer, by popularity
    for name in ("recent", "nearby"):
        np.testing.assert_array_equal(BASELINES[name](bare).retrieve(ask([], [3]), 3).items, popular)
    located = dataset_of([(2, 2, 1, 0)], n_item_rows=4, n_user_rows=3, locations=[(1.0, 2.0), (None, None)])
    assert unavailable("nearby", located, max_ease_items=1) is None and isinstance(located.specs[0], FeatureSpec)


@pytest.mark.slow
def test_published_figures_on_the_s3rec_split(real_data: Path) -> None:
    """Leave-one-out, masked protocol, all items; item-kNN is fitted on training and validation events, as published."""
    events = []
    for u, line in enumerate((real_data / "s3rec-yelp" / "Yelp.txt").read_text().splitlines(), 2):
        items = [int(word) + 1 for word in line.split()[1:]]
        events += [(u, item, j, max(0, j - len(items) + 3)) for j, item in enumerate(items)]
    n_item_rows, n_user_rows = max(e[1] for e in events) + 1, max(e[0] for e in events) + 1
    train = dataset_of(events, n_item_rows=n_item_rows, n_user_rows=n_user_rows)
    train.manifest = with_split(train.manifest, kind="leave_one_out")
    both = dataset_of([(u, i, d, 2 * (s == 2)) for u, i, d, s in events], n_item_rows=n_item_rows, n_user_rows=n_user_rows)
    held_out, settings = train.held_out("test"), EvaluationConfig(ks=[10])
    assert len(held_out.queries) == 30_431
    published = {
        Popular(train): (0.0097, 0.0049, 0.0003),
        ItemKNN(both): (0.0307, 0.0152, 0.0003),
        IALS(train): (0.0483, 0.0247, 0.0012),
    }
    for system, (hit_rate, ndcg, tolerance) in published.items():
        judged = evaluate(system, held_out, train, settings, beyond_k=None)
        assert judged.mean("HitRate@10") == pytest.approx(hit_rate, abs=tolerance), system.name
        assert judged.mean("NDCG@10") == pytest.approx(ndcg, abs=tolerance), system.name
