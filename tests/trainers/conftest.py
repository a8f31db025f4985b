"""Provide fixtures: a simulated town and short runs on it."""

from __future__ import annotations

import json

from twotower.utils.config import Config, parse_config

from ..conftest import TOWER


def settings(**training: object) -> Config:
    common = {"batch_size": 256, "max_steps": 20, "eval_every_epochs": 0.4, "log_every": 1, "learning_rate": 0.01, "patience": 50}
    return parse_config({"model": {"user_tower": TOWER, "item_tower": TOWER}, "training": {**common, **training}})


def figures(out, name: str) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]
