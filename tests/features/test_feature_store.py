"""Test that training and serving build equal inputs."""

from __future__ import annotations

import numpy as np
import torch

from twotower.features.feature_store import last_tokens


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
