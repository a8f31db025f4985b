"""What all parts of `gpu.py` share: the `Bench` that they run on, and the form of what they find.

A part is a function of a `Bench`, in `gpu_right`, `gpu_fast`, `gpu_fits` or `gpu_whole`. It computes on `bench.device`: "cuda",
or "cpu" for a rehearsal. It may raise any error: the runner records it.
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
    """What a part found: whether its promise holds (None: there is none, it only measures), and figures by name."""

    ok: bool | None
    figures: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where a part runs.

    Attributes
    ----------
    data
        Folder of prepared datasets, by name; the town is made where it is missing.
    small
        A rehearsal: as few steps as show that the code runs.
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
        """The default recipe for a set, with some settings changed."""
        chosen = f"training.device={(device or self.device).type}"
        return load_config(ROOT / "configs" / QUALITY_SETS[name].config, [chosen, *settings])

    def trainer(self, name: str = "town", *settings: str, device: torch.device | None = None) -> TwoTowerTrainer:
        """A trainer that is ready for its first step, and neither logs nor validates by itself."""
        self.out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.out))
        chosen = self.config(name, "training.max_steps=600", *QUIET, *settings, device=device)
        return TwoTowerTrainer(self.dataset(name), chosen, folder)

    @cached_property
    def name(self) -> str:
        """The card's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long it takes, on the device too."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began


def prepare_set(name: str, folder: Path) -> None:
    """Make the prepared dataset of one of `QUALITY_SETS` in `folder`/name; real data lie below TWOTOWER_DATA."""
    chosen = QUALITY_SETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.raw is None:
            raw = Path(scratch) / "raw"
            simulate_stage(raw, **TOWN, seed=0)
        else:
            raw = Path(os.environ["TWOTOWER_DATA"]) / chosen.raw
        settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}"]
        prepare_stage(load_config(ROOT / "configs" / chosen.config, settings), folder / name)
