"""Run a task of the tests in a separate process that can be killed: worker.py MODE DATASET OUT SETTINGS…

Settings are JSON; of several, each leaves what it makes in a part of OUT by its number.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from twotower.cli import main
from twotower.data.dataset import Dataset
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils import distributed
from twotower.utils.config import Config, parse_config


def gradients(trainer: TwoTowerTrainer, out: Path) -> None:
    """Write the loss and gradients of one batch, in float64, from the first process."""
    wide(trainer)
    batch = next(trainer.batches(0, 0))
    loss, examples = trainer.backward(batch, 1.0)
    found = {"loss": torch.tensor(loss, dtype=torch.float64), "examples": torch.tensor(examples)}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    distributed.all_reduce_sum([value for name, value in found.items() if name not in ("loss", "examples")])
    for name, table in trainer.tables.items():
        table.collect()
        row, grad = table.merged
        found[name] = distributed.gather_full(torch.zeros_like(table.weight).index_put_((row,), grad), table.rows)
    if distributed.rank() == 0:
        out.parent.mkdir(exist_ok=True)
        torch.save(found, out)


def wide(trainer: TwoTowerTrainer) -> None:
    """Use float64 for the model and its inputs."""
    trainer.model.double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # branches that start at zero would hide what lies behind them
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        for table in trainer.model.tables.values():
            if distributed.rank() == 0:
                table.weight[0] = 0
    for name in ("encode_users", "encode_items"):
        encode = getattr(trainer.model, name)
        setattr(trainer.model, name, lambda part, encode=encode: encode(doubled(part)))


def doubled(part):
    """Return the batch with float64 fields."""
    fields = {name: value.double() if value.is_floating_point() else value for name, value in part.fields.items()}
    return replace(part, fields=fields, **({"items": doubled(part.items)} if hasattr(part, "items") else {}))


def die_at(trainer: TwoTowerTrainer, step: int) -> None:
    """Kill the last process at a given step."""
    take = trainer._step

    def then_die(batch):
        if trainer.state.step == step and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        take(batch)

    trainer._step = then_die


def hang_at(trainer: TwoTowerTrainer, step: int, out: Path) -> None:
    """Let the process that HANGS names stop for good at a given step, and tell the test by a file; others give it up soon."""
    take = trainer._step

    def then_hang(batch):
        if trainer.state.step == step and distributed.rank() == int(os.environ["HANGS"]):
            (out / "hangs").touch()
            time.sleep(600)
        take(batch)

    trainer._step = then_hang


def kill_often(dataset: Path, config: Config, out: Path, *, times: int) -> None:
    """Start a run, kill it at a random time and resume it several times, then let it finish; print how often it was killed."""
    moments, killed = random.Random(0), 0
    while True:
        child = os.fork()
        if child == 0:
            TwoTowerTrainer(Dataset.open(dataset), config, out).fit(resume=(out / "last.pt").is_file())
            os._exit(0)
        if killed < times:
            time.sleep(moments.uniform(0.1, 1.5))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
    sys.stdout.write(json.dumps({"killed": killed}))


def kill_while_writing(trainer: TwoTowerTrainer) -> None:
    """Kill the process while it writes the second checkpoint, like a power failure."""
    save, count = torch.save, 0

    def half(state, file):
        nonlocal count
        count += 1
        if count < 3:
            save(state, file)
            return
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    trainer.fit()


def run() -> None:
    mode, data, out, *settings = sys.argv[1:]
    configs = [parse_config(json.loads(text)) for text in settings]
    torch.set_num_threads(1)
    if mode == "hang":
        distributed.LOST = timedelta(seconds=20)
    if mode == "kill_often":
        kill_often(Path(data), configs[0], Path(out), times=25)
        return
    with distributed.process_group(torch.device("cpu")):
        for number, config in enumerate(configs):
            one(mode, Path(data), config, Path(out) / str(number) if len(configs) > 1 else Path(out))


def one(mode: str, data: Path, config: Config, out: Path) -> None:
    trainer = TwoTowerTrainer(Dataset.open(data), config, out)
    if mode == "gradients":
        gradients(trainer, out)
        return
    if mode == "die":
        die_at(trainer, 13)
    if mode == "hang":
        hang_at(trainer, 13, out)
    if mode == "kill_while_writing":
        kill_while_writing(trainer)
    trainer.fit(resume=mode == "resume")


if __name__ == "__main__":
    if sys.argv[1] == "cli":
        distributed.leave(main(sys.argv[2:]))
    run()
    distributed.leave(0)
