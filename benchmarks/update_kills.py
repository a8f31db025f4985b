"""Kill updates of a run at random moments, and look for damage after each kill.

    python benchmarks/update_kills.py RUN NEW --kills 100

RUN is the folder of a `twotower run`, NEW has events that came after it; copies of the run are updated. Half of the kills come
after a random time, the others at a random change of the file system, such as a rename. After each kill, the bundle must be that
from before the update or the complete new one. The update is then repeated until it ends; its weights must equal those of an update
that was never killed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, claim, in_words, tell
from export_kills import in_child, kill

from twotower.bundle.bundle import load_bundle
from twotower.cli import main as command
from twotower.pipeline import update as module
from twotower.utils.checkpoint import load_checkpoint

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"}
"""Audit events of Python that change the file system."""
MOST = 10_000


def measured(run: Path, new: Path, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill updates of copies of `run` with the data `new`; return counts.

    `damaged` are bundles that cannot be read or are neither the old nor the new one, `unequal` are updates whose weights differ
    from those of the update that was never killed.
    """
    chance = random.Random(seed)
    whole = shutil.copytree(run, folder / "whole")
    old = _files(whole)
    began = time.monotonic()
    changes = _finished(lambda told: _update(whole, new, told), folder)
    needed_s, fresh = time.monotonic() - began, _files(whole)
    row = {"kills": 0, "by_time": 0, "at_changes": 0, "updates": 0, "damaged": 0, "unequal": 0, "after_publication": 0}
    while row["kills"] < kills:
        one = shutil.copytree(run, folder / f"run-{row['updates']}")
        while row["kills"] < kills:
            at_change = row["kills"] % 2
            last = chance.randrange(changes) if at_change else MOST
            pid = in_child(lambda one=one, last=last: _update(one, new, None, last))  # type: ignore[misc]
            if not at_change:
                time.sleep(chance.uniform(0, needed_s / 2))
                killed = kill(pid)
            else:
                killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            if not killed:
                break
            row["kills"] += 1
            row["at_changes" if at_change else "by_time"] += 1
            try:
                found = _files(one)
                row["damaged"] += found not in (old, fresh)
                row["after_publication"] += found != old
            except Exception:  # a damaged bundle may fail in any way
                row["damaged"] += 1
        _finished(lambda told, one=one: _update(one, new, told), folder)  # type: ignore[misc]
        row["unequal"] += not _same(one, whole)
        row["updates"] += 1
        shutil.rmtree(one)
    return row


def _update(run: Path, new: Path, told: Path | None, last: int = MOST) -> None:
    """Update in this process, which kills itself at change number `last`; write the number of changes to `told`."""
    count = 0

    def step() -> None:
        nonlocal count
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    exchange = module.replace_folder

    def watched(fresh: Path, out: Path) -> None:
        step()  # the exchange is a call of the system that Python does not audit
        exchange(fresh, out)
        step()

    module.replace_folder = watched  # type: ignore[attr-defined]
    sys.addaudithook(lambda event, _: step() if event in CHANGES else None)
    if command(["--quiet", "update", str(run), "--data", str(new)]):
        raise RuntimeError("the update failed")
    if told is not None:
        told.write_text(str(count))


def _finished(work: Callable[[Path], None], folder: Path) -> int:
    told = folder / "told"
    if os.waitpid(in_child(lambda: work(told)), 0)[1]:
        raise RuntimeError("the update failed")
    return int(told.read_text())


def _files(run: Path) -> dict[str, str]:
    """Check the bundle of a run, and return the SHA-256 of its files."""
    return load_bundle(run / "bundle").manifest.hashes


def _same(one: Path, other: Path) -> bool:
    first, second = (load_checkpoint(run / "model" / "best.pt")["model"] for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code: 1 if a kill did damage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "update_kills.jsonl", help="file the row is appended to")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        row = measured(given.run.absolute(), given.new.absolute(), Path(folder), given.kills, given.seed)
    kills, harm = row.pop("kills"), row["damaged"] + row["unequal"]
    found = claim("killed updates without damage", kills - harm, "kills", "kills", kills, given.seed, **row)
    tell(found, given.results)
    sys.stderr.write(in_words(found))
    return int(harm > 0)


if __name__ == "__main__":
    sys.exit(main())
