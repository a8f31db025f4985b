"""Test several processes with `torchrun`: same results as one process, resuming with another number, and errors when one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twotower.utils.config import parse_config

WORKER = Path(__file__).with_name("worker.py")
TOWER = {"embedding_dim": 16, "hidden_dims": [32, 16], "dropout": 0, "id_dropout": 0}
STILL = {**TOWER, "history_dropout": 0}  # nothing is left to chance but what the seed of the step draws


def settings(*, rows: bool = False, **training: object) -> str:
    tables = {name: {"update": "sparse", "weight_decay": 0.01} for name in ("item.id", "user.id", "item.categories")}
    # The MLP's dropout is no setting; a straight tower has none.
    tower = {**STILL, "hidden_dims": [16]}
    model = {
        "user_tower": tower,
        "item_tower": {**{k: v for k, v in tower.items() if k != "history_dropout"}, "neighbour_dropout": 0},
    }
    common = {
        "batch_size": 250,
        "max_steps": 50,
        "eval_every_epochs": 100,
        "log_every": 10,
        "learning_rate": 0.003,
        "eval_queries": 200,
    }
    values = {"model": {**model, **({"tables": tables} if rows else {})}, "training": {**common, **training}}
    return json.dumps(parse_config(values).model_dump(mode="json"))


def start(world_size: int, *arguments: object, fails: bool = False) -> str:
    launch = [sys.executable]
    if world_size > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "--master-port", "0"]
        launch += ["--rdzv-backend", "c10d",
                   "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    command = [*launch, str(WORKER), *map(str, arguments)]
    traced = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, env=traced, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode != 0) == fails, done.stderr[:6000] + done.stderr[-1000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_loss_and_gradients_do_not_depend_on_the_number_of_processes(town, tmp_path):
    cases = [{}, {"rows": True}, {"rows": True, "micro_batch_size": 40}, {"objective": "next_event", "loss": "full_softmax"}]
    for world_size in (1, 2, 4):
        start(world_size, "gradients", town.folder, tmp_path / str(world_size), *(settings(**case) for case in cases))
    for number, case in enumerate(cases):
        alone = torch.load(tmp_path / "1" / str(number), weights_only=True)
        assert sum(float(value.abs().sum()) > 0 for value in alone.values()) >= len(alone) - 4
        for world_size in (2, 4):
            found = torch.load(tmp_path / str(world_size) / str(number), weights_only=True)
            assert found.keys() == alone.keys()
            assert_close(found, alone, 1e-9, f"{case} on {world_size}")


@pytest.mark.slow
def test_weights_after_fifty_steps_do_not_depend_on_the_number_of_processes(town, tmp_path):
    for world_size in (1, 2, 4):
        start(world_size, "train", town.folder, tmp_path / str(world_size), settings(), settings(rows=True))
    for number in ("0", "1"):
        alone = weights(tmp_path / "1" / number)
        for world_size in (2, 4):
            assert_close(weights(tmp_path / str(world_size) / number), alone, 1e-4, f"{number} on {world_size}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(run / "last.pt", weights_only=True)["model"])


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], within: float, what: str) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=within, atol=within, msg=lambda m, name=name: f"{what}: {name}: {m}")


@pytest.mark.slow
def test_a_run_of_two_whose_process_dies_goes_on_with_one_and_with_four(town, tmp_path):
    config = settings(rows=True, eval_every_epochs=0.25, patience=100)
    for world_size in (1, 4):
        out = tmp_path / f"on {world_size}"
        said = start(2, "die", town.folder, out, config, fails=True)
        assert "Training needs all" in said, said[-2000:]
        at = torch.load(out / "last.pt", weights_only=True)["progress"]["step"]
        assert 0 < at < 13
        start(world_size, "resume", town.folder, out, config)
        assert torch.load(out / "last.pt", weights_only=True)["progress"]["step"] == 50
    start(1, "train", town.folder, tmp_path / "whole", config)
    for world_size in (1, 4):
        assert_close(weights(tmp_path / f"on {world_size}"), weights(tmp_path / "whole"), 1e-4, f"on {world_size}")


@pytest.mark.slow
def test_the_command_trains_on_two_processes_and_leaves_a_bundle(town, tmp_path):
    arguments = ["train", "--data", town.folder, "--out", tmp_path / "run", "--set", "training.max_steps=10", "--set",
                 "model.tables.user.id=null"]  # fmt: skip
    said = start(2, "cli", *arguments[:-2])
    assert "2 processes" in said
    assert said.count("bundle in") == 1
    assert (tmp_path / "run" / "bundle" / "manifest.json").is_file()
