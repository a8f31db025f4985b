"""Test which settings a search tries, and that a default recipe is one of its points."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import resolve
from twotower.pipeline.search_space import NEGATIVE_WEIGHT, RANGES, SearchSpace
from twotower.utils.config import Config, load_config

from ..conftest import Town

SEARCHED = set(RANGES) - {NEGATIVE_WEIGHT}
"""The settings that are searched on a dataset without explicit negatives."""


@pytest.fixture(scope="module")
def dataset(town: Town) -> Dataset:
    return Dataset.open(town.folder)


def test_what_the_user_set_is_not_searched(dataset: Dataset) -> None:
    assert set(SearchSpace.of(Config(), dataset).ranges) == SEARCHED
    given = {"training.learning_rate": 0.004, "model.temperature": 0.1, "model.item_tower.id_dropout": 0.2}
    config = load_config(None, [f"{name}={value}" for name, value in given.items()])
    space = SearchSpace.of(config, dataset)
    assert set(space.ranges) == SEARCHED - set(given)
    assert space.config({"training.weight_decay": 0.2}).training.learning_rate == 0.004


@pytest.mark.parametrize(
    ("setting", "left_out"),
    [
        ("training.batch_size=64", {"training.batch_size", "training.objective"}),
        ("training.max_steps=5", {"training.num_epochs"}),
        ("model.item_tower.embedding_dim=32", {"model.user_tower.embedding_dim"}),
        ("model.user_tower.num_heads=128", {"model.user_tower.embedding_dim"}),
        ("training.loss=full_softmax", {"training.negatives_per_positive"}),
        ("model.exclude_features=[item.neighbours]", {"model.item_tower.neighbour_dropout"}),
    ],
)
def test_what_has_no_effect_is_not_searched(dataset: Dataset, setting: str, left_out: set[str]) -> None:
    assert SEARCHED - set(SearchSpace.of(load_config(None, [setting]), dataset).ranges) == left_out


def test_the_values_of_a_default_recipe_give_its_settings(dataset: Dataset) -> None:
    space = SearchSpace.of(Config(), dataset)
    assert [one.name for one in space.defaults] == ["any event", "next event"]
    for recipe in space.defaults:
        values = space.values(recipe, dataset)
        assert all(space.ranges[name]._contains(space.ranges[name].to_internal_repr(value)) for name, value in values.items())
        made, wanted = resolve(space.config(values), dataset), resolve(recipe.config, dataset)
        assert wanted.training.num_epochs is None and made.training.num_epochs is not None
        assert made.model_dump(exclude={"training": {"num_epochs"}}) == wanted.model_dump(exclude={"training": {"num_epochs"}})


def test_the_page_names_every_setting_that_is_searched() -> None:
    page = (Path(__file__).parents[2] / "docs/method.md").read_text().partition("## Search for settings")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z_.]+)`", page, re.M)) == set(RANGES)
