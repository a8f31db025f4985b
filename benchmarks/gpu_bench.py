"""Define what all parts of `gpu.py` share: the `Bench` that they run on, and the type of their results.

A part is a function of a `Bench`, in `gpu_right`, `gpu_fast`, `gpu_fits` or `gpu_whole`. It computes on `bench.device`: "cuda", or
"cpu" for a small run. It may raise any error: the runner records it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import QUALITY_SETS, ROOT

from twotower.data.dataset import Dataset
from twotower.pipeline.stages import TOWN, prepare_stage, simulate_stage
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import Config, load_config

CPU = torch.device("cpu")
QUIET = ("training.log_every=1000000", "training.eval_every_epochs=1000000")


class Found(NamedTuple):
    """Result of a part: whether its claim holds (None if it only measures), and figures by name."""

    ok: bool | None
    figures: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Device, datasets and settings of a part.

    Attributes
    ----------
    data
        Folder of prepared datasets, by name; the town is created if it is missing.
    small
        True for a small run, with just enough steps to show that the code runs.
    """

    device: torch.device
    data: Path
    out: Path
    small: bool

    def dataset(self, name: str = "town") -> Dataset:
        """Open a dataset."""
        folder = self.data / name
        if name == "town" and not (folder / "manifest.json").is_file():
            prepare_set(name, self.data)
        return Dataset.open(folder)

    def config(self, name: str = "town", *settings: str, device: torch.device | None = None) -> Config:
        """Return the default recipe for a dataset, with some settings changed."""
        chosen = f"training.device={(device or self.device).type}"
        return load_config(ROOT / "configs" / QUALITY_SETS[name].config, [chosen, *settings])

    def trainer(self, name: str = "town", *settings: str, device: torch.device | None = None) -> TwoTowerTrainer:
        """Return a trainer before its first step, without logging and validation."""
        self.out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.out))
        chosen = self.config(name, "training.max_steps=600", *QUIET, *settings, device=device)
        return TwoTowerTrainer(self.dataset(name), chosen, folder)

    @cached_property
    def name(self) -> str:
        """Name of the GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def wait(self) -> None:
        """Wait until the device has finished all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds of a call, including its work on the device."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began


def prepare_set(name: str, folder: Path) -> None:
    """Prepare a dataset of `QUALITY_SETS` in `folder`/name; real data are read from TWOTOWER_DATA."""
    chosen = QUALITY_SETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.raw is None:
            raw = Path(scratch) / "raw"
            simulate_stage(raw, **TOWN, seed=0)
        else:
            raw = Path(os.environ["TWOTOWER_DATA"]) / chosen.raw
        settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}"]
        prepare_stage(load_config(ROOT / "configs" / chosen.config, settings), folder / name)
