"""Check the project on a GPU: correctness, speed, memory, and complete runs.

    python benchmarks/gpu.py --quick                       # in a notebook cell on Kaggle: a minute or two, without data
    python benchmarks/gpu.py --prepare .gpu                # on a machine with the real data: make the datasets
    python benchmarks/gpu.py --data .gpu --out results     # on a machine with a GPU: all parts, at most ten minutes
    python benchmarks/gpu.py --device cpu                  # a small run without a GPU, which shows that all parts run

Parts run one after the other, the cheapest first, in a worker process. A part that exceeds its limit is stopped with its process.
A part that fails is recorded with its traceback, and the next one starts. Each part appends a JSON line to gpu.jsonl in the folder
`--out`: its name, whether its claim holds (null if it only measures), its figures and its seconds. A table is printed at the end.
The exit code is 1 if a part failed, and 0 otherwise, also if a claim does not hold. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from common import Row, commit, machine

REAL_SETS = ("s3rec", "yelp2018")
MIN_PART_S = 10  # a part does not start with less time than this
CPU_LIMIT_FACTOR = 3  # on a CPU, the limits of parts are longer by this factor
PACKED = "sets.tar.xz"


class Part(NamedTuple):
    """A part: its name, its function with arguments, and its limit in seconds. `quick`: True if --quick runs it too.

    The function is in the module of the name's first word: "fits: …" in `gpu_fits`.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    limit_s: float
    quick: bool = False
    needs: str = "town"

    def run(self, bench: Any) -> Any:
        """Run the part and return its result."""
        arguments = dict(self.arguments)
        function = getattr(importlib.import_module(f"gpu_{self.name.partition(':')[0]}"), self.function)
        return function(bench, *arguments.pop("settings", ()), **arguments)


PARTS = (
    Part("right: the machine", "machine", {}, 60, quick=True),
    Part("right: losses and lists as on the CPU", "same_losses", {}, 60, quick=True),
    *(
        Part(f"right: {name}", "variant", {"name": name}, 60, quick=name in ("gradient checkpointing", "tables by rows"))
        for name in ("gradient checkpointing", "micro-batches", "tables by rows", "next event", "classic towers", "full softmax")
    ),
    Part("right: an overflow in fp16", "overflow", {}, 60, quick=True),
    Part("right: cut and resumed", "resumed", {}, 60),
    Part("fits: the town, batches of 512", "fits", {}, 60, quick=True),
    Part("fits: the town in fp16, batches of 8,192", "fits", {"settings": ["training.batch_size=8192"], "precision": "fp16"}, 60),
    Part("fits: tables of the full Yelp dump, 15 GB", "fits", {"full": True, "precision": "fp16"}, 60),
    Part(
        "fits: the same, dense, width 128",
        "fits",
        {
            "full": True,
            "precision": "fp16",
            "settings": ["model.sparse_update_from_rows=100000000", "model.user_tower.embedding_dim=128"],
        },
        60,
    ),
    Part("fast: the town", "speed", {"name": "town"}, 60, quick=True),
    Part("fast: S3-Rec's Yelp", "speed", {"name": "s3rec"}, 60, needs="s3rec"),
    Part("fast: yelp2018", "speed", {"name": "yelp2018"}, 90, needs="yelp2018"),
    *(
        Part(f"fast: the town, batches of {size:,}", "speed", {"name": "town", "settings": [f"training.batch_size={size}"]}, 60)
        for size in (2048, 8192)
    ),
    *(
        Part(f"fast: the town, batches of {size:,} from two processes", "speed", {"name": "town", "settings": settings}, 60)
        for size in (512, 8192)
        for settings in [[f"training.batch_size={size}", "training.loader_processes=2"]]
    ),
    Part("fast: next event, beside RecTools' SASRec", "peer", {}, 90, needs="s3rec"),
    Part("whole: evaluation of the town", "evaluated", {"name": "town"}, 60, quick=True),
    Part("whole: evaluation of S3-Rec's Yelp", "evaluated", {"name": "s3rec"}, 60, needs="s3rec"),
    Part("whole: torchrun and collectives", "processes", {}, 90),
    Part("whole: the notebook's cells", "notebook", {}, 150),
    Part("right: bf16 and fp16 within the noise of fp32", "precisions", {}, 150),
    Part("right: torch.compile", "compiled", {}, 120),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    given = _parser().parse_args(arguments)
    if given.worker:
        return work(given)
    if given.part_limit_s < MIN_PART_S:
        sys.stderr.write(f"--part-limit-s is {given.part_limit_s:g}. It must be at least {MIN_PART_S}.\n")
        return 2
    if given.prepare:
        if not os.environ.get("TWOTOWER_DATA"):
            sys.stderr.write("TWOTOWER_DATA is not set. --prepare needs the folder of the real data. Set it.\n")
            return 2
        return prepare(given.prepare)
    if given.device == "auto":
        from twotower.trainers.optimizer import choose_device

        given.device = choose_device("auto").type  # a GPU without kernels cannot be used
    given.out.mkdir(parents=True, exist_ok=True)
    given.data = unpacked(given)
    chosen = [part for part in PARTS if (part.quick or not given.quick) and all(word in part.name for word in given.only)]
    if not chosen:
        sys.stderr.write(
            f"No part has {' and '.join(map(repr, given.only))} in its name. Parts: {'; '.join(p.name for p in PARTS)}.\n"
        )
        return 2
    rows = run_parts(chosen, given)
    sys.stdout.write(table(rows))
    return int(any(row["failed"] for row in rows))


def prepare(folder: Path) -> int:
    """Make all datasets, record the commit, and pack both into one file."""
    from gpu_bench import prepare_set

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made, tarfile.open(folder / PACKED, "w:xz") as archive:
        for name in ("town", *REAL_SETS):
            prepare_set(name, Path(made))
        (Path(made) / "commit").write_text(commit())
        archive.add(made, ".")
    return 0


def unpacked(given: argparse.Namespace) -> Path:
    """Return the folder of the datasets, after unpacking the file of `prepare` if there is one."""
    packed, folder = given.data / PACKED, given.out / "datasets"
    if not packed.is_file():
        return Path(given.data)
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run_parts(parts: Sequence[Part], given: argparse.Namespace) -> list[Row]:
    """Run parts in worker processes. If a worker is stopped or fails, a new one continues."""
    left, rows, began = list(parts), [], time.perf_counter()
    file, carried = given.out / "gpu.jsonl", given.data / "commit"
    file.write_text("")
    come_from = carried.read_text().strip() if carried.is_file() else commit()

    def note(row: Row) -> None:
        rows.append({**row, "commit": come_from, "date": time.strftime("%Y-%m-%d")})
        with file.open("a", encoding="utf-8") as target:
            target.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
        sys.stderr.write(f"{row['gpu_part']}: {_state(row)}, {row.get('seconds', 0)} s\n")

    def skip(part: Part, why: str) -> None:
        note({"gpu_part": part.name, "ok": None, "failed": False, "skipped": why})

    for part in parts:
        if part.needs != "town" and not (given.data / part.needs / "manifest.json").is_file():
            left.remove(part)
            skip(part, f"no dataset {part.needs}")
    while left and time.perf_counter() - began < given.limit_s - MIN_PART_S:
        left = left[watch(left, given, began, note) :]
    for part in left:
        skip(part, "no time left")
    return rows


def watch(parts: Sequence[Part], given: argparse.Namespace, began: float, tell: Callable[[Row], None]) -> int:
    """Start a worker on `parts`, supervise it, and return the number of finished parts."""
    with tempfile.TemporaryDirectory() as scratch:
        places = ["--out", str(given.out), "--data", str(given.data), "--scratch", scratch]
        names = [word for part in parts for word in ("--part", part.name)]
        command = [sys.executable, __file__, "--worker", "--device", given.device, *places, *names]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        answers, done = _rows_of(worker), 0
        for part in parts:
            started = time.perf_counter()
            own = part.limit_s * (CPU_LIMIT_FACTOR if given.device == "cpu" else 1)
            limit = min(own, given.part_limit_s, given.limit_s - (started - began))
            if limit < MIN_PART_S:
                break
            row = None
            with suppress(queue.Empty):
                row = answers.get(timeout=limit)
            if row is None:
                _end(worker)
                taken = time.perf_counter() - started
                why = f"ended after {taken:.0f} s, its limit" if taken >= limit else f"its process ended with {worker.returncode}"
                row = {"gpu_part": part.name, "ok": False, "failed": True, "seconds": round(taken, 1), "error": why}
            done += 1
            tell(row)
            if row["failed"]:
                break
        _end(worker)
    return done


def _end(worker: subprocess.Popen[str]) -> None:
    """Stop a worker with all its child processes, which would keep the device busy."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _rows_of(worker: subprocess.Popen[str]) -> queue.Queue[Row | None]:
    """Yield the rows that a worker prints, and None at its end."""
    rows: queue.Queue[Row | None] = queue.Queue()

    def read() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("{"):
                rows.put(json.loads(line))
        rows.put(None)

    threading.Thread(target=read, daemon=True).start()
    return rows


def work(given: argparse.Namespace) -> int:
    """Run parts as the worker and print a row for each. Exit after a failure, because the state of the device is unknown."""
    import torch
    from gpu_bench import Bench

    from twotower.utils.console import setup_logging

    setup_logging(quiet=True)
    bench = Bench(torch.device(given.device), given.data, given.scratch, small=given.device == "cpu")
    bench.out.mkdir(parents=True, exist_ok=True)
    for part in (part for part in PARTS if part.name in given.part):
        began = time.perf_counter()
        row: Row = {"gpu_part": part.name}
        try:
            found = part.run(bench)
            row |= {"ok": found.ok, "failed": False, **found.figures}
        except Exception as error:
            sys.stderr.write(traceback.format_exc())
            row |= {"ok": False, "failed": True, "error": str(error)[-500:], "traceback": traceback.format_exc()[-4000:]}
        row |= {"seconds": round(time.perf_counter() - began, 1), "torch": torch.__version__, "machine": machine(bench.name)}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        if row["failed"]:
            return 1
    return 0


def _state(row: Row) -> str:
    if row.get("skipped"):
        return f"skipped, {row['skipped']}"
    if row["failed"]:
        return "FAILED"
    return {True: "holds", False: "DOES NOT HOLD", None: "measured"}[row["ok"]]


def table(rows: Sequence[Row]) -> str:
    """Return a table with one line per part."""
    hidden = {"gpu_part", "ok", "failed", "seconds", "machine", "torch", "commit", "date", "traceback", "skipped"}
    lines = ["", f"{'part':<46} {'':<14} {'s':>5}  figures"]
    for row in rows:
        figures = ", ".join(f"{name} {_short(value)}" for name, value in row.items() if name not in hidden)
        lines.append(f"{row['gpu_part']:<46} {_state(row):<14.14} {row.get('seconds', 0):>5}  {figures}")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="the short form, on a simulated town alone")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="parts with WORD in their name; all WORDs must match"
    )
    parser.add_argument(
        "--data", type=Path, default=Path(".gpu"), help="folder that --prepare made, or of datasets by name (default: .gpu)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.jsonl (default: runs/gpu)")
    parser.add_argument("--limit-s", type=float, default=570, help="seconds for all parts together (default: 570)")
    parser.add_argument("--part-limit-s", type=float, default=600, help="seconds for one part at most (default: its own limit)")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make the datasets in FOLDER and do nothing else")
    hidden = {"help": argparse.SUPPRESS}  # how the worker is called
    parser.add_argument("--worker", action="store_true", **hidden)
    parser.add_argument("--part", action="append", default=[], **hidden)
    parser.add_argument("--scratch", type=Path, **hidden)
    return parser


if __name__ == "__main__":
    sys.exit(main())
