"""Test the lists that a simulated town shows: the rest of the town stays, lists hold open items, and choices follow taste."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.data.simulator.impressions import LIST_SIZE
from twotower.data.simulator.simulate import PREFIX, simulate
from twotower.data.simulator.town import NEVER, Truth
from twotower.schema import TRUTH_FILE
from twotower.utils.config import parse_config

SIZES: dict[str, Any] = {"users": 120, "businesses": 100, "events": 2000, "seed": 5}


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{PREFIX}{kind}.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def towns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, int]]:
    """The folders of a town without lists and with them, and the numbers of the second."""
    root = tmp_path_factory.mktemp("towns")
    simulate(root / "plain", **SIZES)
    return root / "plain", root / "shown", simulate(root / "shown", impressions=True, **SIZES)


def test_all_other_rows_are_those_of_the_town_without_lists(towns: tuple[Path, Path, dict[str, int]]) -> None:
    plain, shown, counts = towns
    for kind in ("business", "review", "checkin", "user"):
        assert (plain / f"{PREFIX}{kind}.json").read_bytes() == (shown / f"{PREFIX}{kind}.json").read_bytes()
    tips, more = lines(plain, "tip"), lines(shown, "tip")
    chosen = [row for row in lines(shown, "impression") if row["chosen"]]
    assert more[: len(tips)] == tips and len(more) == counts["tips"] == len(tips) + len(chosen)
    wanted = sorted((row["user_id"], row["business_id"]) for row in chosen)
    assert sorted((row["user_id"], row["business_id"]) for row in more[len(tips) :]) == wanted
    again = shown.with_name("again")
    simulate(again, impressions=True, **SIZES)
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in shown.iterdir())
    simulate(again, **SIZES)
    assert not (again / f"{PREFIX}impression.json").exists()


def test_lists_hold_distinct_open_items_and_choices_follow_the_true_preferences(towns: tuple[Path, Path, dict[str, int]]) -> None:
    _, shown, counts = towns
    rows, truth = lines(shown, "impression"), Truth.load(shown / TRUTH_FILE)
    assert len(rows) == counts["impressions"]
    lists: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lists.setdefault(row["request_id"], []).append(row)
    ranks = []
    for one in lists.values():
        assert [row["position"] for row in one] == list(range(1, len(one) + 1)) and len(one) <= LIST_SIZE
        assert len({row["business_id"] for row in one}) == len(one) and sum(row["chosen"] for row in one) <= 1
    chosen = [one for one in lists.values() if any(row["chosen"] for row in one)]
    assert 0.02 < len(chosen) / len(lists) < 0.5
    for one in chosen[:200]:
        time_s = np.array([np.datetime64(one[0]["date"].replace(" ", "T"), "s").astype(np.int64)])
        scores = truth.scores([one[0]["user_id"]], time_s, [row["business_id"] for row in one])[0]
        assert (scores > NEVER).all(), "a closed item was shown"
        at = next(number for number, row in enumerate(one) if row["chosen"])
        ranks.append((scores < scores[at]).mean() + (scores == scores[at]).mean() / 2)
    assert np.mean(ranks) > 0.55, "chosen items are liked more than the others of their list"


def test_prepare_keeps_the_lists_as_negatives(towns: tuple[Path, Path, dict[str, int]], tmp_path: Path) -> None:
    _, shown, counts = towns
    prepare(parse_config({"data": {"path": str(shown)}, "prepare": {"text_dim": 0}}), tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.negatives is not None and len(dataset.negatives) == counts["impressions"]
    assert len(dataset.events) == counts["reviews"] + counts["tips"]
    rows = dataset.negatives
    assert np.allclose(rows.weight, 1 / rows.position) and len(np.unique(rows.request)) == len(
        {row["request_id"] for row in lines(shown, "impression")}
    )
