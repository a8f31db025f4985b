"""Count what the processes of a training exchange in a step, and compare it with the formula of docs/method.md.

    sudo python benchmarks/messages.py            # measure with 2 and 4 processes, at two sizes
    python benchmarks/messages.py --paper         # evaluate the formula for 10⁸ users × 10⁷ items on sixteen GPUs

Measured: the bytes on the loopback device of a network namespace of its own, in a step of the trainer on a simulated town whose id
tables are sharded by row. The formula takes the distinct rows that each process read in these steps. Prints a JSON line for each
size and appends it to benchmarks/results/messages.jsonl. Measuring needs Linux, `ip` and root.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, claim, tell
from sharding import enter_namespace, environment, loopback_bytes
from torch import Tensor

from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.data.simulator.simulate import simulate
from twotower.errors import ConfigError, TwoTowerError
from twotower.trainers.memory import duration
from twotower.trainers.memory.estimate import dense_numbers, storages
from twotower.trainers.memory.plan import human
from twotower.trainers.memory.sizes import WorkloadSizes, yelp_sizes
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils import distributed
from twotower.utils.config import Config, ResolvedConfig, parse_config
from twotower.utils.console import setup_logging

ID, NUMBER = 8, 4  # bytes of an id and of a float32
WARM, STEPS = 2, 8
SIZES = ((256, 32), (1024, 128))  # batch, width
GPUS, HOSTS, USERS, ITEMS, EVENTS, WIDTH = 16, 2, 10**8, 10**7, 10**9, 128
LINKS = {"100 Gbit/s": 12.5e9, "25 Gbit/s": 3.125e9}  # bytes a second of one host, in each direction
H100 = next(one for one in duration.GPUS if one.name == "H100")
NVLINK = 450e9  # bytes a second of one GPU, in each direction: data sheet of the H100


@dataclass(frozen=True)
class Traffic:
    """What one process sends to other processes in a step, bytes, by kind.

    Attributes
    ----------
    ids, rows, gradients
        Of sharded tables: numbers of rows asked for, the rows sent back, and their gradients with the numbers of their rows.
    items
        Item vectors, and their gradients.
    dense
        Gradients of all other weights.
    """

    ids: float
    rows: float
    gradients: float
    items: float
    dense: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.ids + self.rows + self.gradients + self.items + self.dense


def traffic(
    processes: int, *, read: float, merged: float, width: int, stored: int, candidates: float, out: int, dense: float
) -> Traffic:
    """Return the formula's bytes for one of `processes` equal processes.

    Parameters
    ----------
    read, merged
        Rows of sharded tables that a process reads: distinct ones in each read, added up; and distinct ones in the step.
    width, stored
        Numbers of a row, and bytes of a stored number.
    candidates, out
        Candidates of the step, and numbers of an item vector.
    dense
        Weights outside the sharded tables.
    """
    other = (processes - 1) / processes
    return Traffic(
        ids=other * ID * read,
        rows=other * stored * width * read,
        gradients=other * (ID + NUMBER * width) * merged,
        items=other * 3 * NUMBER * out * candidates,  # once to gather the vectors, twice to add up their gradients
        dense=other * 2 * NUMBER * dense,
    )


def main() -> int:
    """Measure, print and append; or evaluate the formula."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="evaluate the formula, measure nothing")
    parser.add_argument("--worker", nargs=2, metavar=("DATASET", "SETTINGS"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS / "messages.jsonl")
    given = parser.parse_args()
    setup_logging(quiet=True)
    if given.worker:
        work(Path(given.worker[0]), parse_config(json.loads(given.worker[1])))
    if given.paper:
        paper()
        return 0
    try:
        enter_namespace()
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), given.results)
    except TwoTowerError as error:
        sys.stderr.write(f"messages: error: {error}\n")
        return 2
    return 0


def measure(folder: Path, results: Path) -> None:
    """Train a few steps for each size and number of processes, and tell the bytes of a step."""
    simulate(folder / "raw", users=3_000, businesses=2_000, events=60_000, seed=0)
    prepare(parse_config({"data": {"source": "yelp", "path": str(folder / "raw")}}), folder / "dataset")
    for batch, width in SIZES:
        for processes in (2, 4):
            settings = json.dumps(town_settings(batch, width))
            found = started([sys.executable, __file__, "--worker", str(folder / "dataset"), settings], processes)
            sent = [
                traffic(processes, read=one["read"], merged=one["merged"], width=width, stored=NUMBER, candidates=one["candidates"],
                        out=one["out"], dense=one["dense"]).total
                for one in found
            ]  # fmt: skip
            more = {"batch": batch, "width": width, "processes": processes}
            more |= {name: round(sum(one[name] for one in found) / processes) for name in ("read", "merged", "candidates", "dense")}
            row = claim(
                f"bytes of a training step on the wire: batch {batch:,}, width {width}, {processes} processes",
                found[0]["wire"], "bytes", "the formula", sum(sent), 0, **more,
            )  # fmt: skip
            tell(row, results)


def town_settings(batch: int, width: int) -> dict[str, object]:
    """Return the settings of a training whose id tables are sharded."""
    tables = {name: {"update": "sparse"} for name in ("item.id", "user.id")}
    tower = {"embedding_dim": width, "hidden_dims": [width]}
    training = {"batch_size": batch, "recipe": "fixed", "device": "cpu", "max_steps": 100, "eval_queries": 100}
    return {"model": {"user_tower": tower, "item_tower": tower, "tables": tables}, "training": training}


def started(command: list[str], processes: int) -> list[dict[str, float]]:
    """Run the processes to their end, and return what each printed.

    Raises
    ------
    TwoTowerError
        A process failed.
    """
    members = [subprocess.Popen(command, env=each, stdout=subprocess.PIPE, text=True) for each in environment(processes)]
    texts = [member.communicate(timeout=1200)[0] for member in members]
    if any(member.returncode for member in members):
        raise TwoTowerError("A process of the training failed. Its error stands above.")
    return [json.loads(text.splitlines()[-1]) for text in texts]


def work(dataset: Path, config: Config) -> None:
    """Be one process of a training, print what it sends in a step, and end the process."""
    rows: list[int] = []
    merged: list[int] = []
    candidates: list[int] = []
    distributed.gather_rows = counting(distributed.gather_rows, rows)
    distributed.scatter_rows = counting(distributed.scatter_rows, merged)
    with tempfile.TemporaryDirectory() as out:
        torch.set_num_threads(1)
        with distributed.process_group(torch.device("cpu")):
            trainer = TwoTowerTrainer(Dataset.open(dataset), config, Path(out))
            for number, batch in enumerate(trainer.batches(0, 0)):
                if number == WARM:
                    dist.barrier()
                    for counts in (rows, merged, candidates):
                        counts.clear()
                    before = loopback_bytes()
                if number == WARM + STEPS:
                    dist.barrier()
                    break
                trainer._step(batch)
                candidates.append(sum(batch.shares))
            found = {
                "wire": (loopback_bytes() - before) / STEPS,
                "read": sum(rows) / STEPS,
                "merged": sum(merged) / STEPS,
                "candidates": sum(candidates) / STEPS,
                "out": config.model.user_tower.hidden_dims[-1],
                "dense": sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]),
            }
            dist.barrier()
        sys.stdout.write(json.dumps(found) + "\n")
    distributed.leave(0)


def counting(exchange: Callable[[Tensor, Tensor], Any], counts: list[int]) -> Callable[[Tensor, Tensor], Any]:
    """Return a function that does the same and appends the number of its rows to `counts`."""

    def counted(row: Tensor, value: Tensor) -> Any:
        counts.append(len(row))
        return exchange(row, value)

    return counted


def paper() -> None:
    """Print the formula's bytes and seconds of a step for 10⁸ users × 10⁷ items on sixteen GPUs, as a table."""
    cells = ["batch", "co-visited items", "rows a GPU reads", "ids", "rows", "gradients", "items", "dense", "a host sends"]
    print_row([*cells, "NVLink", *LINKS, "H100 computes"])
    for batch, neighbours in ((8192, 20), (8192, 0), (65536, 20), (65536, 0)):
        config, workload = planned(batch, neighbours)
        read, merged = rows_read(workload.load.candidates, config)
        width = config.model.user_tower.embedding_dim
        sharded = {table.name for table in storages(workload, config, GPUS) if table.config.update == "sparse"}
        if sharded != {"item.id", "user.id"}:
            raise ConfigError(f"The sharded tables are {sorted(sharded)}. The formula knows item.id and user.id.")
        dense = dense_numbers(workload, config) + width * sum(
            table.rows for table in storages(workload, config, GPUS) if table.name not in sharded
        )
        one = traffic(GPUS, read=read, merged=merged, width=width, stored=NUMBER, candidates=workload.load.candidates,
                      out=config.model.user_tower.hidden_dims[-1], dense=dense)  # fmt: skip
        tables, rings = one.ids + one.rows + one.gradients, one.items + one.dense
        each, away = GPUS // HOSTS, (GPUS - GPUS // HOSTS) / (GPUS - 1)
        host = each * away * tables + rings  # a ring crosses between two hosts once in each direction
        inside = ((1 - away) * tables + rings) / NVLINK
        work = duration.step_work(workload, config, precision="bf16", processes=GPUS)
        computed = duration.step_seconds(replace(work, reduced=0), H100)
        sizes = [one.ids, one.rows, one.gradients, one.items, one.dense, host]
        seconds = [inside, *(host / link for link in LINKS.values()), computed]
        print_row([f"{batch:,}", str(neighbours), f"{read:,.0f}", *(human(int(size)) for size in sizes)]
                  + [f"{1000 * each:,.1f} ms" for each in seconds])  # fmt: skip


def planned(batch: int, neighbours: int) -> tuple[ResolvedConfig, WorkloadSizes]:
    """Return the settings and sizes of a training on 10⁸ users, 10⁷ items and 10⁹ events, width 128."""
    tower = {"embedding_dim": WIDTH, "hidden_dims": [WIDTH]}
    config = parse_config(
        {
            "model": {"user_tower": tower, "item_tower": tower},
            "training": {"batch_size": batch, "recipe": "fixed"},
            "prepare": {"co_visited_items": neighbours},
        }
    )
    resolved = config.resolved(ordered=True, timed=True, events=EVENTS, ids=USERS + ITEMS)
    return resolved, yelp_sizes(USERS, ITEMS, EVENTS, resolved)


def rows_read(candidates: float, config: ResolvedConfig) -> tuple[float, float]:
    """Return the rows of the id tables that a GPU reads, in all reads and distinct, with full histories and uniform items.

    Dropout of ids, histories and co-visited items hides some of them.
    """
    user, item = config.model.user_tower, config.model.item_tower
    own = config.training.batch_size / GPUS
    listed = [own * user.max_history * (1 - user.history_dropout), candidates / GPUS]
    near = config.prepare.co_visited_items * (1 - item.neighbour_dropout)
    history, offered = (distinct(each) for each in listed)
    reads = [history, distinct(history * near), offered * (1 - item.id_dropout), distinct(offered * near)]
    users = own * (1 - user.id_dropout)
    return sum(reads) + users, distinct(sum(reads)) + users


def distinct(draws: float) -> float:
    """Return the expected number of distinct items among uniform draws."""
    return -ITEMS * math.expm1(draws * math.log1p(-1 / ITEMS))


def print_row(cells: list[str]) -> None:
    """Print a row of a Markdown table."""
    sys.stdout.write("| " + " | ".join(cells) + " |\n")


if __name__ == "__main__":
    sys.exit(main())
