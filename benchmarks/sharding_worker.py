"""Run one process of a table that several processes share. Started by `sharding.py`; reads orders, JSON lines, and answers each.

This module imports nothing of the package at the top, so that TorchRec's Python can import it too (`torchrec_peer.py`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

DIM, FIRST = 64, 2
RATE, DECAY, EPS = 0.003, 0.01, 1e-8
KEPT = 8  # batches that the timed steps use in turn
Order = dict[str, Any]


class Shard(Protocol):
    """The part of a table that this process holds."""

    def step(self, ids: Tensor, grad: Tensor) -> None:
        """Read rows `ids`, int64 [n], take `grad`, float32 [n, DIM], as the gradient of what was read, and update the table."""

    def set(self, whole: Tensor) -> None:
        """Set the weights to this process's rows of `whole`, float32 [rows, DIM]."""

    def part(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of the rows of this process, and the rows as float32."""

    def save(self, file: Path) -> None:
        """Write a checkpoint."""

    def load(self, file: Path) -> None:
        """Restore a checkpoint that any number of processes wrote."""


def first_weights(rows: int) -> Tensor:
    """Return the whole table before the first step."""
    return 0.05 * torch.randn(rows, DIM, generator=torch.Generator().manual_seed(1))


def batch(step: int, rows: int, ids: int) -> tuple[Tensor, Tensor]:
    """Return the ids and gradients of a step, over all processes; small ids are read more often, and several times in a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    drawn = FIRST + ((rows - FIRST) * torch.rand(ids, generator=generator) ** 2).long()
    return drawn, 0.1 * torch.randn(ids, DIM, generator=generator)


def resident_mib() -> float:
    """Return the main memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Worker:
    """Carries out orders on the shard that `make` returns for rows, dtype and the learning rate."""

    def __init__(self, make: Callable[[int, str, float, float], Shard]) -> None:
        self.make_shard = make
        dist.init_process_group("gloo")
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()

    def make(self, rows: int, ids: int, dtype: str = "fp32", rate: float = RATE, decay: float = DECAY) -> Order:
        """Make the table."""
        self.rows, self.ids = rows, ids
        self.shard = self.make_shard(rows, dtype, rate, decay)
        return {}

    def run(self, first: int, last: int) -> Order:
        """Take the steps from number `first` to before `last`."""
        for step in range(first, last):
            ids, grad = batch(step, self.rows, self.ids)
            self.shard.step(ids.chunk(self.processes)[self.rank], grad.chunk(self.processes)[self.rank])
        return {}

    def set(self, value: float | None = None) -> Order:
        """Set the weights to those before the first step, or all to one value."""
        self.shard.set(first_weights(self.rows) if value is None else torch.full((self.rows, DIM), value))
        return {}

    def nudge(self, steps: int) -> Order:
        """Give a row of each process the gradient one in every step; the owner of the first row returns how far it moved."""
        ids = torch.tensor([FIRST + 1 + self.rank])
        before = self._mean(FIRST + 1)
        for _ in range(steps):
            self.shard.step(ids, torch.ones(1, DIM))
        return {"moved": before - self._mean(FIRST + 1)}

    def _mean(self, row: int) -> float:
        numbers, part = self.shard.part()
        return float(part[numbers == row].double().mean()) if (numbers == row).any() else 0.0

    def dump(self, file: str) -> Order:
        """Write this process's part."""
        torch.save(self.shard.part(), f"{file}.{self.rank}")
        return {}

    def save(self, file: str) -> Order:
        """Write a checkpoint."""
        self.shard.save(Path(file))
        return {}

    def load(self, file: str) -> Order:
        """Restore a checkpoint."""
        self.shard.load(Path(file))
        return {}

    def time(self, steps: int) -> Order:
        """Take steps on ids drawn uniformly; return seconds and memory."""
        generator = torch.Generator().manual_seed(self.rank)
        own = self.ids // self.processes
        ids = [torch.randint(FIRST, self.rows, (own,), generator=generator) for _ in range(KEPT)]
        grad = torch.randn(own, DIM, generator=generator)
        self.shard.step(ids[0], grad)
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        for step in range(steps):
            self.shard.step(ids[step % KEPT], grad)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        return {"wall_s": seconds, "cpu_s": cpu_s, "memory_mib": resident_mib()}


def serve(make: Callable[[int, str, float, float], Shard]) -> None:
    """Answer orders until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    worker = Worker(make)
    for line in sys.stdin:
        order = json.loads(line)
        answers.write(json.dumps(getattr(worker, order.pop("do"))(**order)) + "\n")
        answers.flush()
    answers.flush()
    os._exit(0)  # a normal exit may abort because of threads of gloo


class OwnShard:
    """The project's table, updated by rows."""

    def __init__(self, rows: int, dtype: str, rate: float, decay: float) -> None:
        from twotower.models.layers.tables import RowTable
        from twotower.utils.config import EmbeddingConfig

        config = EmbeddingConfig.model_validate({"update": "sparse", "dtype": dtype, "weight_decay": decay})
        self.table, self.rate, self.number = RowTable("table", rows, DIM, config), rate, 0

    def step(self, ids: Tensor, grad: Tensor) -> None:
        """See `Shard`."""
        self.number += 1
        self.table(ids).backward(grad)
        self.table.collect()
        self.table.step(self.number, self.rate, torch.tensor(1.0), torch.tensor(True))

    def set(self, whole: Tensor) -> None:
        """See `Shard`."""
        self.table.weight.copy_(whole[dist.get_rank() :: dist.get_world_size()])

    def part(self) -> tuple[Tensor, Tensor]:
        """See `Shard`."""
        numbers = torch.arange(dist.get_rank(), self.table.rows, dist.get_world_size())
        return numbers, self.table.weight.float() * self.table.scale.float()

    def save(self, file: Path) -> None:
        """See `Shard`."""
        state = self.table.state()
        if dist.get_rank() == 0:
            torch.save(state | {"number": torch.tensor(self.number)}, file)
        dist.barrier()

    def load(self, file: Path) -> None:
        """See `Shard`."""
        state = torch.load(file, weights_only=True)
        self.number = int(state.pop("number"))
        self.table.load(state)


if __name__ == "__main__":
    serve(OwnShard)
