"""Test that a run that was killed, or whose disk was full, resumes from its last checkpoint with the same result."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twotower.errors import TrainingError
from twotower.utils.checkpoint import load_checkpoint, save_checkpoint
from twotower.utils.config import parse_config

WORKER = Path(__file__).with_name("worker.py")


def settings(**training: object) -> str:
    tower = {"embedding_dim": 16, "hidden_dims": [16]}
    tables = {"user.id": {"update": "sparse", "dtype": "bf16"}}
    common = {
        "batch_size": 250,
        "eval_every_epochs": 0.5,
        "log_every": 5,
        "patience": 1000,
        "checkpoint_every_s": 0.05,
        "num_epochs": 1000,
    }
    values = {"model": {"user_tower": tower, "item_tower": tower, "tables": tables}, "training": {**common, **training}}
    return json.dumps(parse_config(values).model_dump(mode="json"))


def start(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(WORKER), *map(str, arguments)], capture_output=True, text=True, timeout=600, check=check
    )


@pytest.mark.slow
def test_killed_at_25_random_moments_a_run_ends_as_the_uninterrupted_one_to_the_bit(town, tmp_path):
    config = settings(max_steps=500)
    said = start("kill_often", town.folder, tmp_path / "killed", config)
    assert json.loads(said.stdout)["killed"] == 25, said.stderr[-2000:]
    start("train", town.folder, tmp_path / "whole", config)
    killed, whole = (load_checkpoint(tmp_path / name / "last.pt") for name in ("killed", "whole"))
    assert killed["progress"] == whole["progress"]
    for name, value in whole["model"].items():
        assert torch.equal(value, killed["model"][name]), name
    for table, state in whole["rows"].items():
        for name, value in state.items():
            assert torch.equal(value, killed["rows"][table][name]), (table, name)
    logged = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("killed", "whole")]
    losses = [[(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row] for lines in logged]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_the_one_before_loads(town, tmp_path):
    config = settings(max_steps=200, checkpoint_every_s=1000, eval_every_epochs=0.25)
    done = start("kill_while_writing", town.folder, tmp_path, config, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".last.pt.partial").is_file() or (tmp_path / ".best.pt.partial").is_file()
    at = load_checkpoint(tmp_path / "last.pt")["progress"]["step"]
    assert 0 < at < 200
    start("resume", town.folder, tmp_path, config)
    assert load_checkpoint(tmp_path / "last.pt")["progress"]["step"] == 200


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """Limit the file size to 100 kB, so that writes fail as on a full disk."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"value": torch.zeros(10)})
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(path, {"value": torch.zeros(1_000_000)})
        except TrainingError as error:
            (tmp_path / "said").write_text(str(error))
            os._exit(7)
        os._exit(1)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 7
    said = (tmp_path / "said").read_text()
    assert "Cannot write the checkpoint" in said and "The previous checkpoint is intact" in said
    assert load_checkpoint(path)["value"].shape == (10,)
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []
