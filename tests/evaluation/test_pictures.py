"""The pictures of the data, the lists of a few users, and what is said in words."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.baselines.baselines import BASELINES
from twotower.data.dataset import Dataset
from twotower.evaluation.examples import USERS, examples
from twotower.evaluation.insights import relative
from twotower.evaluation.pictures import drawn, pictures
from twotower.schema import FIRST_ROW

from ..conftest import Town


@pytest.fixture(scope="module")
def dataset(town: Town) -> Dataset:
    return Dataset.open(town.folder)


def test_the_pictures_count_what_is_there(dataset: Dataset) -> None:
    weeks, tail, lengths = pictures(dataset)
    assert sum(weeks.y) == len(dataset.events) and len(weeks.x) == len(weeks.y) <= 104
    assert tail.y[0] == 0 and tail.y[-1] == 100 and np.all(np.diff(tail.y) >= 0) and tail.y[10] > tail.x[10]
    assert sum(lengths.y) == np.count_nonzero(np.diff(dataset.events.offsets)[FIRST_ROW:])


def test_a_drawn_picture_fills_its_box(dataset: Dataset) -> None:
    line, _, bars = map(drawn, pictures(dataset))
    points = [tuple(map(float, point.split(","))) for point in line["path"].split()]
    assert points[0][0] == 0 and points[-1][0] == 300 and min(y for _, y in points) == 0 and not line["bars"]
    assert max(bar["height"] for bar in bars["bars"]) == 120 and not bars["path"]


def test_examples_are_lists_of_users_with_their_history(dataset: Dataset) -> None:
    held_out = dataset.held_out("test").by_time()
    found = examples(BASELINES["popular"](dataset), held_out, dataset, exclude_seen=True, seed=0)
    assert len(found) == USERS == len({one.user for one in found})
    for one in found:
        seen = {item.item for item in one.history}
        assert len(one.recommended) == 5 and not seen & {item.item for item in one.recommended}
        assert one.history and one.came_next
        assert all(
            item.item in {each.item for each in one.came_next} for item in one.recommended if item.hit and len(one.came_next) < 5
        )
    assert found == examples(BASELINES["popular"](dataset), held_out, dataset, exclude_seen=True, seed=0)


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (0.12, 0.1, "20 % higher than"),
        (0.09, 0.1, "10 % lower than"),
        (0.1, 0.1, "equal to"),
        (0.1003, 0.1, "within 0.5 % of"),
        (0.1, 0, "above"),
        (0, 0, "equal to"),
    ],
)
def test_a_difference_in_words(own: float, other: float, said: str) -> None:
    assert relative(own, other) == said
