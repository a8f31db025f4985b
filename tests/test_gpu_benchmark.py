"""`benchmarks/gpu.py`: a part that fails or hangs never stops the next, and the real parts run without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAKE_BENCH = """
from typing import NamedTuple

class Found(NamedTuple):
    ok: object
    figures: dict

class Bench:
    name = "a card"
    def __init__(self, device, data, out, small):
        self.out = out
"""
FAKE_PARTS = """
import os, subprocess, time
from gpu_bench import Found

def machine(bench):
    print("not a row")
    return Found(True, {"cores": 1})

def same_losses(bench):
    raise ValueError("wrong on purpose")

def variant(bench, name):
    if name == "micro-batches":
        child = subprocess.Popen(["sleep", "1000"])
        with open(os.path.join(os.path.dirname(__file__), "child"), "w") as file:
            file.write(str(child.pid))
        time.sleep(1000)
    if name == "tables by rows":
        os._exit(3)
    return Found(None, {"name": name})

def overflow(bench):
    return Found(False, {"scale_halved": False})
"""


def with_fake_parts(folder: Path) -> Path:
    """Return a copy of the script with parts that hold, fail or hang."""
    for name in ("gpu.py", "common.py"):
        shutil.copy(BENCHMARKS / name, folder / name)
    (folder / "gpu_bench.py").write_text(FAKE_BENCH)
    (folder / "gpu_right.py").write_text(FAKE_PARTS)
    return folder / "gpu.py"


def run(script: Path, out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows, and the table. The notebook keeps its run in the folder for temporary files, which is its own here."""
    command = [sys.executable, str(script), "--device", "cpu", "--out", str(out), *arguments]
    (out / "tmp").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(out / "tmp")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    file = out / "gpu.jsonl"
    assert file.is_file(), done.stderr
    return done.returncode, [json.loads(line) for line in file.read_text().splitlines()], done.stdout


@pytest.mark.slow
def test_a_part_that_fails_hangs_or_dies_never_stops_the_next(tmp_path: Path) -> None:
    code, rows, table = run(with_fake_parts(tmp_path), tmp_path, "--data", str(tmp_path), "--only", "right", "--part-limit-s", "20")
    assert code == 1, "some failed"
    found = {row["gpu_part"].removeprefix("right: "): row for row in rows}
    assert found["the machine"]["ok"] is True and found["the machine"]["cores"] == 1
    wrong = found["losses and lists as on the CPU"]
    assert wrong["failed"] and wrong["error"] == "wrong on purpose" and "Traceback" in wrong["traceback"]
    assert found["gradient checkpointing"]["ok"] is None and not found["gradient checkpointing"]["failed"]
    assert found["micro-batches"]["failed"] and "its limit" in found["micro-batches"]["error"]
    child = Path("/proc") / (tmp_path / "child").read_text() / "cmdline"
    assert not child.is_file() or b"sleep" not in child.read_bytes(), "what a part started ends with it"
    assert found["tables by rows"]["failed"] and "ended with 3" in found["tables by rows"]["error"]
    assert found["next event"]["name"] == "next event", "begun anew after each of the three"
    assert found["an overflow in fp16"]["ok"] is False and not found["an overflow in fp16"]["failed"]
    assert [line.split("  ")[0] for line in table.splitlines()[2:]] == [row["gpu_part"] for row in rows]
    assert "DOES NOT HOLD" in table and table.count("FAILED") == 6  # the three, and three that the fake does not have


@pytest.mark.slow
def test_what_there_is_no_time_for_is_skipped(tmp_path: Path) -> None:
    code, rows, _ = run(with_fake_parts(tmp_path), tmp_path, "--data", str(tmp_path), "--quick", "--limit-s", "5")
    assert code == 0 and {row["skipped"] for row in rows} == {"no time left"}


@pytest.mark.slow
def test_the_real_parts_run_on_a_cpu(tmp_path: Path) -> None:
    """Those of the short form that ask whether it is right; what it says here on a CPU is what it says of a GPU there."""
    code, rows, _ = run(BENCHMARKS / "gpu.py", tmp_path, "--data", str(tmp_path / "sets"), "--quick", "--only", "right")
    assert code == 0 and len(rows) >= 4
    for row in rows:
        assert row["ok"] is True and row["machine"].endswith("CPU"), row
    apart = [row["losses_apart"] for row in rows if "losses_apart" in row]
    assert len(apart) == 3 and max(apart) == 0, "the same device computes the same"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["the notebook's cells", "cut and resumed"])
def test_parts_of_the_long_form_run_on_a_cpu(tmp_path: Path, part: str) -> None:
    code, rows, _ = run(BENCHMARKS / "gpu.py", tmp_path, "--data", str(tmp_path / "sets"), "--only", part)
    assert code == 0 and [row["ok"] for row in rows] == [True], rows
