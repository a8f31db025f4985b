"""Test the simulated town: format of the files, equal bytes for equal seeds, and events that follow the true probabilities."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.data.simulator.simulate import simulate
from twotower.data.simulator.town import NEVER, START_S, STILL_OPEN, Truth, hour_of_week
from twotower.data.simulator.visits import Sampler
from twotower.data.simulator.vocabulary import categories
from twotower.errors import ConfigError, DataError
from twotower.schema import DAY_S, TRUTH_FILE

COMPLIMENTS = ("hot", "more", "profile", "cute", "list", "note", "plain", "cool", "funny", "writer", "photos")
KEYS = {
    "business": "business_id name address city state postal_code latitude longitude stars review_count is_open "
    "attributes categories hours",
    "review": "review_id user_id business_id stars useful funny cool text date",
    "tip": "user_id business_id text date compliment_count",
    "checkin": "business_id date",
    "user": "user_id name review_count yelping_since useful funny cool elite friends fans average_stars "
    + " ".join(f"compliment_{kind}" for kind in COMPLIMENTS),
}
SIZES = {"users": 400, "businesses": 150, "events": 8_000, "seed": 3}
Row = dict[str, Any]


@dataclass(frozen=True)
class Town:
    folder: Path
    counts: dict[str, int]
    truth: Truth
    rows: dict[str, list[Row]]


@dataclass(frozen=True)
class Choices:
    """Return all events of a town, sorted by (user, time), as arguments of `Truth.scores`."""

    user_ids: list[str]
    time_s: np.ndarray
    item: np.ndarray
    offsets: np.ndarray
    visited: np.ndarray

    def ask(self, truth: Truth) -> np.ndarray:
        return truth.scores(self.user_ids, self.time_s, None, (self.offsets, self.visited))


def read(folder: Path) -> dict[str, list[Row]]:
    return {
        kind: [
            json.loads(line)
            for line in (folder / f"yelp_academic_dataset_{kind}.json").read_text(encoding="utf-8").split("\n")[:-1]
        ]
        for kind in KEYS
    }


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Town:
    folder = tmp_path_factory.mktemp("town")
    counts = simulate(folder, **SIZES)
    return Town(folder, counts, Truth.load(folder / TRUTH_FILE), read(folder))


@pytest.fixture(scope="module")
def choices(town: Town) -> Choices:
    item_row = {key.decode(): row for row, key in enumerate(town.truth.item_id)}
    events = sorted(
        (row["user_id"], row["date"], item_row[row["business_id"]]) for kind in ("review", "tip") for row in town.rows[kind]
    )
    users = [event[0] for event in events]
    item = np.array([event[2] for event in events])
    start = np.maximum.accumulate([i if i == 0 or users[i] != users[i - 1] else 0 for i in range(len(users))])
    lengths = np.arange(len(users)) - start
    visited = np.concatenate([item[a:b] for a, b in zip(start, start + lengths, strict=True)])
    times = np.array([event[1] for event in events], "M8[s]").astype(np.int64)
    return Choices(users, times, item, np.r_[0, np.cumsum(lengths)], visited)


def test_every_file_has_the_keys_of_the_2022_release_and_the_promised_rows(town: Town) -> None:
    for kind, keys in KEYS.items():
        assert {tuple(row) for row in town.rows[kind]} == {tuple(keys.split())}
    sizes = {kind: len(rows) for kind, rows in town.rows.items()}
    visits = sum(len(row["date"].split(", ")) for row in town.rows["checkin"])
    plural = {"business": "businesses", "user": "users", "review": "reviews", "tip": "tips"}
    assert town.counts == {**{plural[kind]: sizes[kind] for kind in plural}, "checkins": visits}
    assert (sizes["business"], sizes["user"], sizes["review"] + sizes["tip"]) == (150, 400, 8_000)
    assert {row["user_id"] for kind in ("review", "tip") for row in town.rows[kind]} == {
        row["user_id"] for row in town.rows["user"]
    }


def test_businesses_have_the_quirks_of_the_release(town: Town) -> None:
    rows = town.rows["business"]
    for column in ("attributes", "hours", "categories"):
        assert any(row[column] is None for row in rows)
        assert any(row[column] is not None for row in rows)
    values = [value for row in rows for value in (row["attributes"] or {}).values()]
    assert all(isinstance(value, str) for value in values)
    assert {"True", "False", "None"} <= set(values)
    assert any(value.startswith("u'") for value in values)
    assert any(re.match(r"\{u?'\w+': (True|False|None)", value) for value in values)
    cities = {row["city"] for row in rows}
    assert len({city.strip().title() for city in cities}) < len(cities)
    hours = [span for row in rows for span in (row["hours"] or {}).values()]
    assert all(re.fullmatch(r"\d{1,2}:\d{1,2}-\d{1,2}:\d{1,2}", span) for span in hours)
    assert "0:0-0:0" in hours
    assert any(span.endswith(":0") for span in hours)
    assert {row["is_open"] for row in rows} == {0, 1}
    text = (town.folder / "yelp_academic_dataset_business.json").read_text(encoding="utf-8")
    assert "\\/" in text or not any("/" in (row["categories"] or "") for row in rows)


def test_users_reviews_and_checkins_have_the_quirks_of_the_release(town: Town) -> None:
    users, reviews = town.rows["user"], town.rows["review"]
    friends = [row["friends"] for row in users]
    assert friends.count("None") > 40
    assert max(map(len, friends)) > 2_000
    for row in users[:50]:
        listed = [] if row["friends"] == "None" else row["friends"].split(", ")
        assert len(set(listed)) == len(listed)
        assert row["user_id"] not in listed
    assert "" in {row["elite"] for row in users}
    assert any("20,20" in row["elite"] for row in users)
    assert not any("2020" in row["elite"] for row in users)
    dates = [row["date"] for row in reviews]
    assert dates != sorted(dates)
    assert all(re.fullmatch(r"20[12]\d-\d\d-\d\d \d\d:\d\d:\d\d", date) for date in dates)
    assert {row["stars"] for row in reviews} == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert any("\n\n" in row["text"] for row in reviews)
    assert len({row["text"] for row in reviews}) > 0.9 * len(reviews)
    checkins = {row["business_id"]: row["date"].split(", ") for row in town.rows["checkin"]}
    assert all(stamps == sorted(stamps) for stamps in checkins.values())
    pairs = [(row["user_id"], row["business_id"]) for row in reviews]
    assert len(set(pairs)) < len(pairs)


def test_aggregates_are_those_of_the_full_release(town: Town) -> None:
    given: dict[str, list[float]] = {}
    for row in town.rows["review"]:
        given.setdefault(row["business_id"], []).append(row["stars"])
    for row in town.rows["business"]:
        stars = given.get(row["business_id"], [])
        assert row["review_count"] == len(stars)
        assert not stars or abs(row["stars"] - np.mean(stars)) <= 0.26


def test_no_event_is_before_opening_or_joining_or_after_closing(town: Town, choices: Choices) -> None:
    truth = town.truth
    assert (choices.time_s >= truth.item_open_s[choices.item]).all()
    assert (choices.time_s < truth.item_close_s[choices.item]).all()
    since = {row["user_id"]: row["yelping_since"] for row in town.rows["user"]}
    assert all(
        np.datetime64(since[user], "s").astype(np.int64) <= time
        for user, time in zip(choices.user_ids, choices.time_s, strict=True)
    )
    closed = {row["business_id"] for row in town.rows["business"] if row["is_open"] == 0}
    assert closed == {key.decode() for key in truth.item_id[truth.item_close_s != STILL_OPEN]}


def test_the_words_of_a_review_follow_its_category_and_the_stars_its_business(town: Town) -> None:
    leaf = {key.decode(): categories()[c] for key, c in zip(town.truth.item_id, town.truth.item_category, strict=True)}
    assert all(any(word in row["text"] for word in leaf[row["business_id"]].words) for row in town.rows["review"])
    quality = dict(zip((key.decode() for key in town.truth.item_id), town.truth.item_quality, strict=True))
    stars = [row["stars"] for row in town.rows["review"]]
    assert np.corrcoef(stars, [quality[row["business_id"]] for row in town.rows["review"]])[0, 1] > 0.2


def z_scores(truth: Truth, choices: Choices) -> dict[str, float]:
    """Return the deviation of functions of the chosen items from their expectation under `truth`, in standard errors."""
    logs = choices.ask(truth).astype(np.float64)
    p = np.where(logs > NEVER / 2, np.exp(logs), 0)
    b, n = p.shape
    rows = {key.decode(): row for row, key in enumerate(truth.user_id)}
    users = np.array([rows[user] for user in choices.user_ids])
    home, truth_xy = truth.user_place[users, 0], truth.item_xy
    same = truth.place_town[home][:, None] == truth.item_town
    km = np.linalg.norm(truth.place_xy[home][:, None] - truth_xy[None], axis=2)
    event = np.repeat(np.arange(b), np.diff(choices.offsets))
    seen, last = np.zeros((b, n)), np.zeros((b, n))
    seen[event, choices.visited] = 1
    some = np.diff(choices.offsets) > 0
    last[some, choices.visited[choices.offsets[1:][some] - 1]] = 1
    latent, favour = truth.drifted(users, choices.time_s)
    favourite = np.zeros((b, len(truth.rhythm)))
    np.put_along_axis(favourite, truth.user_favourite[users], np.log1p(favour), 1)
    functions = {
        "log p": np.where(p > 0, logs, 0),
        "near": np.exp(-km) * same,
        "same town": same.astype(float),
        "seen": seen,
        "last": last,
        "taste": latent @ truth.item_latent.T,
        "favourite": favourite[:, truth.item_category],
        "price": np.where(truth.item_price > 0, np.abs(truth.item_price - truth.user_budget[users][:, None]), 0),
        "rhythm": truth.rhythm[:, hour_of_week(choices.time_s)].T[:, truth.item_category],
        "popular": np.broadcast_to(truth.item_log_pop, (b, n)),
        "new": (choices.time_s[:, None] - truth.item_open_s < truth.tastes.hype_s).astype(float),
        "popular, first visit": np.where(some[:, None], 0, truth.item_log_pop),
    }
    z = {}
    for name, f in functions.items():
        mean = (p * f).sum(1)
        variance = (p * f**2).sum(1) - mean**2
        z[name] = float((f[np.arange(b), choices.item] - mean).sum() / np.sqrt(variance.sum()))
    return z


def test_a_first_choice_is_drawn_from_the_truth(town: Town) -> None:
    truth, n = town.truth, 100_000
    user, time_s = np.full(n, 7), np.full(n, START_S + 6 * 365 * DAY_S)
    sampler = Sampler(truth, np.random.default_rng(0))
    found = np.bincount(sampler._fresh(sampler._plan(user, time_s), np.arange(n)), minlength=len(truth.item_id))
    logs = truth.scores([truth.user_id[7].decode()], time_s[:1])[0].astype(np.float64)
    expected = n * np.exp(logs)
    assert (found[logs == NEVER] == 0).all()
    some = expected > 5
    chi2 = ((found[some] - expected[some]) ** 2 / expected[some]).sum()
    assert abs(chi2 - some.sum()) < 4 * np.sqrt(2 * some.sum())


def test_visits_follow_the_truth(town: Town, choices: Choices) -> None:
    logs = choices.ask(town.truth)
    assert logs[np.arange(len(logs)), choices.item].min() > -30
    np.testing.assert_allclose(np.exp(logs.astype(np.float64)).sum(1), 1, rtol=1e-4)
    z = z_scores(town.truth, choices)
    assert max(map(abs, z.values())) < 4, z


@pytest.mark.parametrize(
    "change",
    [
        {"decay_km": 2.6},
        {"anchor": 0.0},
        {"far": 0.03},
        {"price": 0.15},
        {"hype": -0.4},
        {"again": 0.15},
        {"habit_decay": 0.5},
        {"drift_s": 3e7},
    ],
)
def test_a_wrong_formula_is_noticed(town: Town, choices: Choices, change: dict[str, float]) -> None:
    wrong = replace(town.truth, tastes=replace(town.truth.tastes, **change))
    assert max(map(abs, z_scores(wrong, choices).values())) > 4


def test_scores_of_some_items_are_columns_of_all_scores(town: Town, choices: Choices) -> None:
    truth, some = town.truth, slice(500, 540)
    offsets = choices.offsets[500:541] - choices.offsets[500]
    visited = choices.visited[choices.offsets[500] : choices.offsets[540]]
    whole = truth.scores(choices.user_ids[some], choices.time_s[some], None, (offsets, visited))
    ids = ["", "nowhere", *(key.decode() for key in truth.item_id[::-1])]
    part = truth.scores(choices.user_ids[some], choices.time_s[some], ids, (offsets, len(ids) - 1 - visited))
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part[:, 2:], whole[:, ::-1])
    assert (part[:, :2] == NEVER).all()
    assert (
        whole[~((choices.time_s[some, None] >= truth.item_open_s) & (choices.time_s[some, None] < truth.item_close_s))] == NEVER
    ).all()


def test_an_unknown_user_and_a_wrong_file_are_refused(town: Town) -> None:
    with pytest.raises(DataError, match="is not in the simulated town"):
        town.truth.scores(["nobody"], np.array([1_500_000_000]))
    with pytest.raises(DataError, match="Simulate the town again"):
        Truth.load(town.folder / "yelp_academic_dataset_tip.json")


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    simulate(tmp_path / "a", users=60, businesses=50, events=900, seed=1)
    simulate(tmp_path / "b", users=60, businesses=50, events=900, seed=1, progress=lambda done, total: calls.append((done, total)))
    simulate(tmp_path / "c", users=60, businesses=50, events=900, seed=2)
    first, second, third = (digest(tmp_path / name) for name in "abc")
    assert first == second
    assert len(first) == 6
    assert all(first[name] != third[name] for name in first)
    assert calls == sorted(calls)
    assert calls[-1] == (900, 900)


@pytest.mark.parametrize("wrong", [{"users": 0}, {"businesses": 10}, {"events": 399}, {"seed": -1}, {"users": 2.5}])
def test_impossible_sizes_are_one_sentence(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong))} .* must be a whole number of at least"):
        simulate(tmp_path / "town", **{**SIZES, **wrong})
    assert not (tmp_path / "town").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "town").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        simulate(tmp_path / "town", **SIZES)
