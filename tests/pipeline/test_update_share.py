"""Test how much of the change of an update is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twotower.data.dataset import Dataset
from twotower.models.two_tower import TwoTower
from twotower.pipeline import update_share
from twotower.pipeline.update_share import Newest, take_best_share
from twotower.trainers.weight_mix import mix_weights
from twotower.utils.checkpoint import load_checkpoint, save_checkpoint

from ..drawn_bundle import MODEL, checkpoint_of, drawn


@pytest.mark.parametrize("best", [1.0, 0.5, 0.25])
def test_the_share_that_is_best_on_the_newest_events_is_taken_once(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: float
) -> None:
    model, config = drawn(dataset, MODEL)
    before = {name: value + 1 if name == "log_temperature" else value for name, value in model.state_dict().items()}
    wanted = mix_weights(before, model.state_dict(), best)
    save_checkpoint(tmp_path / "best.pt", checkpoint_of(dataset, model, config))

    def values(_: Newest, judged: TwoTower, known: Dataset) -> Any:
        assert known is dataset
        return -np.abs(float(judged.state_dict()["log_temperature"] - wanted["log_temperature"])) + np.zeros(3)

    monkeypatch.setattr(update_share.Newest, "values", values)
    newest = Newest(dataset, config)  # type: ignore[arg-type]
    for _ in range(2):  # the second time as after an interruption
        assert take_best_share(newest, before, tmp_path / "best.pt") == best
        found = load_checkpoint(tmp_path / "best.pt")["model"]
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
