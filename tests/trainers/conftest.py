"""Provide fixtures: a simulated town and short runs on it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twotower.data.dataset import Dataset
from twotower.utils.config import Config, parse_config

TOWER: dict[str, Any] = {"embedding_dim": 16, "hidden_dims": [16]}


@pytest.fixture(scope="module")
def dataset(town) -> Dataset:
    return Dataset.open(town.folder)


def settings(**training: object) -> Config:
    common = {"batch_size": 256, "max_steps": 20, "eval_every_epochs": 0.4, "log_every": 1, "learning_rate": 0.01, "patience": 50}
    return parse_config({"model": {"user_tower": TOWER, "item_tower": TOWER}, "training": {**common, **training}})


def figures(out, name: str) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]
