"""Kill exports, backups and the writer of an event store at random moments, and count what is lost.

    python benchmarks/export_kills.py --kills 100

A process appends events as a server does and tells which ones the store has acknowledged. Meanwhile other processes export the
store and back it up. Each is killed with SIGKILL after a random time; every fifth time the writer is killed, too, and another one
goes on.
After each kill the output file is absent, or complete: it can be read and has every event that was acknowledged before the export
began. At the end the store has all acknowledged events. About a second for each kill on one core.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
from common import RESULTS, claim, tell

from twotower.serving.event_export import export_events
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event
from twotower.serving.stored_rows import every_event

BATCH = 50  # events of a write
WRITES_BEFORE = 200  # so that an export takes some time
PAUSE_S = 0.1  # between later writes, so that the store does not grow without end


class Writer:
    """A process that appends events, and the number of those that are acknowledged."""

    def __init__(self, url: str, first: int) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self.acknowledged = first
        self.pid = in_child(lambda: _append(url, first, write))
        os.close(write)
        self._rest = b""

    def listen(self) -> int:
        """Return the number of events that were acknowledged until now."""
        while True:
            try:
                block = os.read(self._read, 65_536)
            except BlockingIOError:
                return self.acknowledged
            if not block:
                return self.acknowledged
            *lines, self._rest = (self._rest + block).split(b"\n")
            if lines:
                self.acknowledged = int(lines[-1])

    def kill(self) -> int:
        """Kill it, and return what it had acknowledged."""
        kill(self.pid)
        return self.listen()


def _append(url: str, first: int, write: int) -> None:
    store = open_store(url)
    for number in range(first, 10**9, BATCH):
        store.append([Event(f"e{n}", f"u{n % 997}", f"i{n % 313}", 1_700_000_000 + n) for n in range(number, number + BATCH)])
        os.write(write, b"%d\n" % (number + BATCH))
        if number > WRITES_BEFORE * BATCH:
            time.sleep(PAUSE_S)


def in_child(work: Callable[[], None]) -> int:
    """Run a function in a copy of this process, and return its id."""
    pid = os.fork()
    if pid:
        return pid
    _run(work)


def _run(work: Callable[[], None]) -> NoReturn:
    try:
        work()
        os._exit(0)
    except BaseException as error:  # the copy must not go on as this process
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)


def kill(pid: int) -> bool:
    """Kill a process. Return True if it had not ended before."""
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def held(file: Path, kind: str) -> int | None:
    """Return the number of events of an output; None if there is none. Raise an error for half a file."""
    if not file.exists():
        return None
    if kind == "export":
        return int(pq.read_table(file).num_rows)
    store = open_store(f"sqlite:{file}", reading=True)
    try:
        return sum(map(len, every_event(store)))
    finally:
        store.close()


def backup(url: str, out: Path) -> None:
    """Write a backup as `twotower events backup` does."""
    store = open_store(url, reading=True)
    try:
        store.backup(out)
    finally:
        store.close()


def measured(folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill, and return what was found."""
    url, rng = f"sqlite:{folder / 'events.sqlite'}", np.random.default_rng(seed)
    writer, usual_s = Writer(url, 0), 0.0
    while writer.listen() < WRITES_BEFORE * BATCH:
        time.sleep(0.01)
    works: dict[str, Callable[[Path], None]] = {"export": lambda out: _export(url, out), "backup": lambda out: backup(url, out)}
    row: dict[str, Any] = {"kills": 0, "hit_at_work": 0, "writer_kills": 0, "complete_files": 0, "half_files": 0, "lost_events": 0}
    for kind, work in works.items():  # how long an undisturbed one takes
        began = time.perf_counter()
        assert os.waitpid(in_child(lambda work=work, kind=kind: work(folder / f"whole.{kind}")), 0)[1] == 0  # type: ignore[misc]
        usual_s = max(usual_s, time.perf_counter() - began)
    while row["kills"] < kills:
        kind = ("export", "backup")[row["kills"] % 2]
        out, before = folder / f"{row['kills']}.{kind}", writer.listen()
        pid = in_child(lambda work=works[kind], out=out: work(out))  # type: ignore[misc]
        time.sleep(float(rng.uniform(0, usual_s)))
        row["kills"] += 1
        row["hit_at_work"] += kill(pid)
        if row["kills"] % 5 == 0:
            acknowledged = writer.kill()
            row["writer_kills"] += 1
            row["lost_events"] += acknowledged - min(acknowledged, _count(url, acknowledged))
            writer = Writer(url, acknowledged)
        try:
            found = held(out, kind)
        except Exception:  # half a file may fail in any way
            found = -1
        row["half_files"] += found is not None and found < before
        row["complete_files"] += found is not None and found >= before
        out.unlink(missing_ok=True)
    acknowledged = writer.kill()
    row["acknowledged_events"] = acknowledged
    row["lost_events"] += acknowledged - min(acknowledged, _count(url, acknowledged))
    return row


def _export(url: str, out: Path) -> None:
    export_events(url, out)


def _count(url: str, first: int) -> int:
    """Return how many of the first events are in the store."""
    store = open_store(url, reading=True)
    try:
        return len({int(event.event_id[1:]) for page in every_event(store) for event in page} & set(range(first)))
    finally:
        store.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS / "export_kills.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        row = measured(Path(folder), given.kills)
    lost = row["half_files"] + row["lost_events"]
    more = {name: value for name, value in row.items() if name != "kills"}
    what = "killed exports and backups without half a file or a lost event"
    tell(claim(what, row["kills"] - min(lost, row["kills"]), "kills", "kills", row["kills"], 0, **more), given.results)
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
