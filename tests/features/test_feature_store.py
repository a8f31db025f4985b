"""Test point-in-time states against brute force, and that training and serving build equal inputs."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower.features.feature_store import last_tokens
from twotower.features.point_in_time import History, ItemDynamics
from twotower.schema import DAY_S

event = st.tuples(st.integers(2, 6), st.integers(0, 40), st.sampled_from([float("nan"), 1.0, 3.0, 5.0]))
PLACE = np.array([[np.nan, np.nan]] * 3 + [[10.0, 20.0], [11.0, 21.0], [12.0, 25.0], [0.0, 0.0]])


def history_of(users: list[list[tuple[int, int, float]]]) -> History:
    """Return ragged histories, with times in days."""
    ordered = [sorted(events, key=lambda one: one[1]) for events in users]
    flat = [one for events in ordered for one in events]
    offsets = np.concatenate([[0], np.cumsum([len(events) for events in ordered])]).astype(np.int64)
    rows, days, stars = (np.array([one[i] for one in flat]) for i in range(3))
    return History(
        offsets, rows.astype(np.int64), days.astype(np.int64) * DAY_S, np.ones(len(flat), np.int64), stars.astype(np.float32), PLACE
    )


def by_hand(events: list[tuple[int, int, float]]) -> dict[str, object]:
    """Return the state after `events`, computed event by event."""
    rated = [stars for _, _, stars in events if np.isfinite(stars)]
    locations = [PLACE[row] for row, _, _ in events if np.isfinite(PLACE[row]).all()]
    return {
        "count": len(events),
        "stars_sum": sum(rated),
        "stars_n": len(rated),
        "location": np.sum(locations, axis=0) if locations else np.zeros(2),
        "location_n": len(locations),
        "first_s": events[0][1] * DAY_S if events else 0,
        "last_s": events[-1][1] * DAY_S if events else 0,
    }


def check(state, row: int, expected: dict[str, object]) -> None:
    for field in fields(state):
        np.testing.assert_allclose(getattr(state, field.name)[row], expected[field.name], err_msg=field.name)


@given(st.lists(st.lists(event, max_size=6), min_size=1, max_size=4))
def test_history_state_is_brute_force(users):
    history = history_of(users)
    for row, events in enumerate(users):
        ordered = sorted(events, key=lambda one: one[1])
        for pos in range(len(ordered) + 1):
            check(history.state(np.array([row]), np.array([pos])), 0, by_hand(ordered[:pos]))


@given(st.lists(st.lists(event, min_size=1, max_size=6), min_size=1, max_size=4))
def test_state_without_one_event_is_brute_force(users):
    history = history_of(users)
    for row, events in enumerate(users):
        ordered = sorted(events, key=lambda one: one[1])
        for i in range(len(ordered)):
            expected = by_hand(ordered[:i] + ordered[i + 1 :])
            expected["last_s"] = ordered[i - 1][1] * DAY_S if i else 0
            check(history.state_without(np.array([row]), history.offsets[[row]] + i), 0, expected)


@given(
    st.lists(st.tuples(st.integers(2, 5), st.integers(0, 100), st.sampled_from([float("nan"), 2.0, 5.0])), max_size=20),
    st.integers(2, 6),
    st.integers(0, 120),
)
def test_item_state_is_brute_force_and_strictly_before(visits, row, day):
    visits = sorted(visits, key=lambda one: one[:2])
    columns = [np.array([one[i] for one in visits]) for i in range(3)]
    dynamics = ItemDynamics(columns[0].astype(np.int64), columns[1].astype(np.int64) * DAY_S, columns[2].astype(np.float32))
    found = dynamics.state(np.array([row]), np.array([day * DAY_S]))[0]
    before = [one for one in visits if one[0] == row and one[1] < day]
    rated = [stars for _, _, stars in before if np.isfinite(stars)]
    recent = sum(one[1] >= day - 30 for one in before)
    age = day - before[0][1] if before else 0
    expected = [
        np.log1p(len(before)) / 3,
        (sum(rated) - 3.75 * len(rated)) / (len(rated) + 5),
        np.log1p(recent) / 2,
        np.log1p(age) / 5,
        not before,
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_last_tokens():
    np.testing.assert_array_equal(last_tokens(np.array([0, 5, 9]), np.array([5, 5, 11]), 3), [[2, 3, 4], [-1, -1, -1], [9, 10, -1]])


def test_a_causal_training_example_equals_the_same_question_served(dataset):
    """There is no train-serve skew: the serving path builds the same input from each example as a query."""
    from twotower.data.data_loader import TrainLoader
    from twotower.data.dataset_features import open_store
    from twotower.utils.config import parse_config

    config = parse_config({"training": {"objective": "next_event", "batch_size": 400}})
    store = open_store(dataset, "valid", config.model)
    loader = TrainLoader(dataset, store, config)
    members = loader.plan(0)[0]
    examples = loader.objective.examples(members, np.random.default_rng(0))
    moments = loader.events.history.time_s[examples.event]
    served = store.users(dataset.histories(examples.user_row, moments))
    for name, value in served.fields.items():
        torch.testing.assert_close(examples.users.fields[name], value, msg=name)
    torch.testing.assert_close(examples.users.user_row, served.user_row)
    for i in range(len(moments)):
        one, other = (_seen(batch, i) for batch in (examples.users, served))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


def _seen(batch, i: int) -> tuple[torch.Tensor, ...]:
    """Return the last visible events of example `i`: item rows, types, stars. (A window may have fewer than a query.)"""
    at, seen = int(batch.at[i]), min(int(batch.seen[i]), 25)
    locations = slice(at - seen + 1, at + 1)
    return batch.items.row[batch.history[locations]], batch.event_type[locations], batch.stars[locations]


def test_batches_do_not_depend_on_company(dataset):
    """A query gives the same features alone and in a batch."""
    from twotower.data.dataset_features import open_store
    from twotower.utils.config import ModelConfig

    store = open_store(dataset, "valid", ModelConfig())
    queries = dataset.held_out("valid").queries.slice(0, 50)
    together = store.users(queries)
    for i in (0, 17, 49):
        alone = store.users(queries.slice(i, i + 1))
        for name, value in alone.fields.items():
            torch.testing.assert_close(together.fields[name][i : i + 1], value)
        for a, b in zip(_seen(together, i), _seen(alone, 0), strict=True):
            torch.testing.assert_close(a, b)


def test_stars_off_the_scale_read_as_its_ends(dataset):
    """The table of stars has eight rows: padding, no stars, and 0 to 5 stars."""
    from dataclasses import replace

    from twotower.data.dataset_features import open_store
    from twotower.utils.config import ModelConfig

    store, queries = open_store(dataset, "valid", ModelConfig()), dataset.held_out("valid").queries.slice(0, 50)
    for stars, bucket in ((9.0, 7), (5.0, 7), (0.0, 2), (-3.0, 2), (np.nan, 1)):
        found = store.users(replace(queries, stars=np.full_like(queries.stars, stars))).stars
        assert set(found.tolist()) <= {0, bucket}
        assert (found == bucket).any()
