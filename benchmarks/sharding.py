"""Compare our tables, sharded by row, with TorchRec's: exactness, time, bytes and memory, with 2 and 4 processes on one host.

    sudo python benchmarks/sharding.py --peer-python PEER/.venv/bin/python

PEER is an environment with TorchRec and the wheel of fbgemm-gpu-cpu for its PyTorch (`pip install torchrec fbgemm-gpu-cpu`, the CPU
wheel last). A step reads rows, takes given gradients and updates the rows (`sharding_worker.py`, `torchrec_peer.py`). Both run in
turn, for several rounds; the figure is the median. The processes speak over the loopback device of a network namespace of their
own, so that its counter holds their bytes and no others: that needs Linux, `ip` and root. Prints a JSON line for each claim and
appends it to benchmarks/results/sharding.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, claim, tell
from sharding_worker import DECAY, DIM, EPS, RATE, batch, first_weights
from torch import Tensor

from twotower.errors import ConfigError, TwoTowerError
from twotower.models.layers.tables import BETA

OURS, PEER = "ours", "TorchRec"
SIZES = ((1_000_000, 8192), (100_000, 2048))
EXACT_ROWS, EXACT_IDS, EXACT_STEPS = 20_000, 2048, 30
NUDGES, NUDGE_RATE = 400, {OURS: 2.4e-5, PEER: 2e-4}  # each step is below half of the last bit of 0.75 in fp16, 4.9e-4
CLONE_NEWNET = 0x40000000


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True, help="Python of an environment with TorchRec")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--results", type=Path, default=RESULTS / "sharding.jsonl")
    given = parser.parse_args()
    commands = {
        OURS: [sys.executable, str(ROOT / "benchmarks" / "sharding_worker.py")],
        PEER: [str(given.peer_python.absolute()), str(ROOT / "benchmarks" / "torchrec_peer.py")],
    }
    try:
        enter_namespace()
        for processes, (rows, ids) in itertools.product((2, 4), SIZES):
            with group(commands[OURS], processes) as ours, group(commands[PEER], processes) as peer:
                costs({OURS: ours, PEER: peer}, rows, ids, given.rounds, given.steps, given.results)
        with tempfile.TemporaryDirectory() as folder:
            exactness(commands, Path(folder), given.results)
    except TwoTowerError as error:
        sys.stderr.write(f"sharding: error: {error}\n")
        return 2
    return 0


def enter_namespace() -> None:
    """Move this process, and those that it starts, into a network namespace with nothing but a loopback device.

    Raises
    ------
    ConfigError
        This is not Linux, not root, or `ip` is missing.
    """
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        raise ConfigError("A network namespace is needed to count bytes. It needs Linux, root and `ip` (iproute2). Run it there.")
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise ConfigError(
            f"The system refused a network namespace ({os.strerror(ctypes.get_errno())}). Run it where they are allowed."
        )
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def loopback_bytes() -> int:
    """Return the bytes that the loopback device of this namespace has carried."""
    return int(next(line for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines() if "lo:" in line).split()[1])


class Group:
    """Processes that share a table."""

    def __init__(self, members: list[subprocess.Popen[str]]) -> None:
        self.members = members

    def ask(self, do: str, **values: Any) -> list[dict[str, Any]]:
        """Give all processes an order and return their answers.

        Raises
        ------
        TwoTowerError
            A process ended.
        """
        for member in self.members:
            assert member.stdin is not None
            member.stdin.write(json.dumps({"do": do, **values}) + "\n")
            member.stdin.flush()
        answers = []
        for member in self.members:
            assert member.stdout is not None
            line = member.stdout.readline()
            if not line:
                raise TwoTowerError(f"A process ended during {do}. Its error stands above.")
            answers.append(json.loads(line))
        return answers


def environment(processes: int) -> list[dict[str, str]]:
    """Return the environment of each process of a new group, with what `torchrun` would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@contextmanager
def group(command: list[str], processes: int) -> Iterator[Group]:
    """Start the processes of a table, and end them after the block."""
    members = []
    try:
        for each in environment(processes):
            members.append(subprocess.Popen(command, text=True, env=each, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        yield Group(members)
    finally:
        for member in members:
            assert member.stdin is not None and member.stdout is not None
            member.stdin.close()
        for member in members:
            try:
                member.wait(timeout=20)
            except subprocess.TimeoutExpired:
                member.kill()
            member.stdout.close()


def costs(groups: dict[str, Group], rows: int, ids: int, rounds: int, steps: int, results: Path) -> None:
    """Time both in turn, and tell time, CPU time, bytes and memory of a step."""
    found: dict[str, dict[str, list[float]]] = {name: {"ms": [], "cpu": [], "wire": [], "memory": []} for name in groups}
    for one in groups.values():
        one.ask("make", rows=rows, ids=ids)
    for _ in range(rounds):
        for name, one in groups.items():
            before = loopback_bytes()
            answers = one.ask("time", steps=steps)
            wire = (loopback_bytes() - before) / (steps + 1)  # one step warms up
            found[name]["ms"].append(1000 * max(answer["wall_s"] for answer in answers) / steps)
            found[name]["cpu"].append(1000 * sum(answer["cpu_s"] for answer in answers) / steps)
            found[name]["wire"].append(wire)
            found[name]["memory"].append(max(answer["memory_mib"] for answer in answers))
    processes = len(next(iter(groups.values())).members)
    what = f"a table of {rows:,} rows × {DIM}, {ids:,} ids a step, {processes} processes"
    titles = {"ms": ("a step", "ms"), "cpu": ("CPU time of a step, all processes", "ms")}
    titles |= {
        "wire": ("bytes of a step on the loopback device", "bytes"),
    }
    titles |= {"memory": ("memory of a process", "MiB")}
    for key, (title, unit) in titles.items():
        ours, peer = (statistics.median(found[name][key]) for name in (OURS, PEER))
        more = {"range": [round(min(found[OURS][key]), 2), round(max(found[OURS][key]), 2)]} if unit == "ms" else {}
        more |= {"peer_range": [round(min(found[PEER][key]), 2), round(max(found[PEER][key]), 2)]} if unit == "ms" else {}
        tell(claim(f"{title}: {what}", ours, unit, PEER, peer, 0, **more), results)


def exactness(commands: dict[str, list[str]], folder: Path, results: Path) -> None:
    """Tell how exact each is: against its own rule in float64, with other numbers of processes, after a resume, and in fp16."""
    errors: dict[str, dict[str, float]] = {}
    for name, command in commands.items():
        wanted = reference(name)
        tables, found = {}, errors.setdefault(name, {})
        for processes in (2, 4):
            with group(command, processes) as one:
                one.ask("make", rows=EXACT_ROWS, ids=EXACT_IDS)
                one.ask("set")
                one.ask("run", first=1, last=1 + EXACT_STEPS // 2)
                if processes == 2:
                    one.ask("save", file=str(folder / name))
                one.ask("run", first=1 + EXACT_STEPS // 2, last=1 + EXACT_STEPS)
                tables[processes] = whole(one, folder / "part")
                if processes == 4:
                    one.ask("make", rows=EXACT_ROWS, ids=EXACT_IDS)
                    one.ask("load", file=str(folder / name))
                    one.ask("run", first=1 + EXACT_STEPS // 2, last=1 + EXACT_STEPS)
                    found["resumed"] = largest(whole(one, folder / "part"), tables[2])
                if processes == 2:
                    one.ask("make", rows=EXACT_ROWS, ids=EXACT_IDS, dtype="fp16", rate=NUDGE_RATE[name], decay=0.0)
                    one.ask("set", value=0.75)
                    found["moved"] = sum(answer["moved"] for answer in one.ask("nudge", steps=NUDGES)) / wanted_move(name)
            found[f"reference, {processes} processes"] = largest(tables[processes], wanted)
        found["processes"] = largest(tables[2], tables[4])
    what = f"{EXACT_STEPS} steps of a table of {EXACT_ROWS:,} rows × {DIM}, {EXACT_IDS:,} ids a step with repetitions"
    titles = {
        "reference, 2 processes": f"largest error against the same rule, dense, in float64: {what}, 2 processes",
        "reference, 4 processes": f"largest error against the same rule, dense, in float64: {what}, 4 processes",
        "processes": f"largest difference between 2 and 4 processes: {what}",
        "resumed": f"largest difference of a run resumed by 4 processes from an undisturbed one of 2: {what}",
    }
    for key, title in titles.items():
        tell(claim(title, errors[OURS][key], "", PEER, errors[PEER][key], 0), results)
    for name in (OURS, PEER):
        title = f"fp16 rows, {NUDGES} updates below half of the last bit: share of them that arrives, {name}"
        tell(claim(title, errors[name]["moved"], "", "all", 1.0, 0), results)


def reference(name: str) -> Tensor:
    """Return the table after the steps, computed for all rows at every step in float64: AdamW without momentum, or Adagrad."""
    table = first_weights(EXACT_ROWS).double()
    second = torch.zeros(EXACT_ROWS, dtype=torch.float64)
    for step in range(1, EXACT_STEPS + 1):
        ids, grad = batch(step, EXACT_ROWS, EXACT_IDS)
        dense = torch.zeros_like(table).index_add_(0, ids, grad.double())
        mean = dense.square().mean(dim=1)
        if name == PEER:
            second += mean
            table -= RATE * dense / (second.sqrt() + EPS)[:, None]
        else:
            second = BETA * second + (1 - BETA) * mean
            table *= 1 - RATE * DECAY
            table -= RATE * dense / ((second / (1 - BETA**step)).sqrt() + EPS)[:, None]
    return table


def wanted_move(name: str) -> float:
    """Return how far a weight with gradient one in every step moves: by the rate at each step; with Adagrad, by rate / √step."""
    return sum(NUDGE_RATE[name] / (math.sqrt(step) if name == PEER else 1) for step in range(1, NUDGES + 1))


def whole(one: Group, file: Path) -> Tensor:
    """Return the table from the parts of the processes."""
    one.ask("dump", file=str(file))
    result = torch.full((EXACT_ROWS, DIM), math.nan, dtype=torch.float64)
    for rank in range(len(one.members)):
        numbers, part = torch.load(f"{file}.{rank}", weights_only=True)
        result[numbers] = part.double()
    return result


def largest(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of a number."""
    return float((found - wanted).abs().max())


if __name__ == "__main__":
    sys.exit(main())
