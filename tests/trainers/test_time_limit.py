"""training.max_hours: the training ends in time with a usable model, says what an epoch takes, and can be resumed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from torch import nn

from twotower.pipeline.stages import train_stage
from twotower.retrieval.recommender import Recommender
from twotower.trainers.callbacks import Training
from twotower.trainers.time_limit import TimeLimit, is_unfinished
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import Config, parse_config

from ..conftest import Town

STEPS = 14


def settings(town: Town, **training: object) -> Config:
    small = {"embedding_dim": 8, "hidden_dims": [8]}
    fixed = {"recipe": "fixed", "max_steps": STEPS, "eval_queries": 50, **training}
    return parse_config({"data": town.config.data.model_dump(), "model": {"user_tower": small}, "training": fixed})


def test_a_training_ends_in_time_and_goes_on_later(town: Town, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = train_stage(settings(town, max_hours=1e-9), town.folder, tmp_path / "run")
    assert (best.step, best.total_steps) == (1, STEPS) and best.value is not None
    assert f"stopping at step 1 of {STEPS}" in caplog.text and is_unfinished(tmp_path / "run")
    recommender = Recommender.load(tmp_path / "run" / "bundle")
    assert len(recommender.recommend(user=str(recommender.dataset.user_ids[2]), k=3)) == 3
    train_stage(settings(town), town.folder, tmp_path / "run", resume=True)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == STEPS
    assert not is_unfinished(tmp_path / "run")


def test_the_limit_covers_the_recipe_race(town: Town, tmp_path: Path) -> None:
    best = train_stage(settings(town, max_hours=1e-9, recipe="auto"), town.folder, tmp_path / "run")
    assert best.step <= 2 and (tmp_path / "run" / "bundle" / "manifest.json").is_file()


def test_the_log_says_what_an_epoch_takes(town: Town, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "twotower"):
        train_stage(settings(town, max_hours=10), town.folder, tmp_path / "run")
    (line,) = [record.getMessage() for record in caplog.records if "an epoch of" in record.getMessage()]
    assert "steps takes about" in line and "the rest (4 steps)" in line
    assert not [record for record in caplog.records if "max_hours" in record.getMessage()]


def test_too_little_time_is_told_before_it_is_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit, training = TimeLimit(1e-3), _training(tmp_path)  # 3.6 s for a billion steps
    limit.on_start(training)
    for training.step in range(1, 11):
        limit.on_step(training)
    assert "training.max_hours will end the training at about step" in caplog.text


def _training(folder: Path) -> Training:
    return Training(Config(), folder, nn.Linear(1, 1), last_step=10**9, steps_per_epoch=10**6)
