"""The notebook that compares libraries: stored with small outputs, and run whole by a fresh kernel."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from .test_quickstart import EXECUTE

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "compare.ipynb"
MAX_BYTES = 40_000


def outputs(notebook: Path) -> dict[str, list[dict[str, Any]]]:
    """Outputs of every code cell, by id."""
    stored = json.loads(notebook.read_text(encoding="utf-8"))
    return {cell["id"]: cell["outputs"] for cell in stored["cells"] if cell["cell_type"] == "code"}


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join("".join(one.get("text", "")) + "".join(one.get("data", {}).get("text/plain", "")) for one in found)


def test_its_outputs_are_stored_and_small() -> None:
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    stored = outputs(NOTEBOOK)
    assert {"two-tower", "iALS", "popularity"} <= set(text_of(stored["table"]).split())
    assert "RecTools is not installed" in text_of(stored["rectools"])
    assert not [
        one for found in stored.values() for one in found if one.get("name") == "stderr" or "image/png" in one.get("data", {})
    ]
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]), cell["id"])


@pytest.mark.slow
def test_a_fresh_kernel_runs_it(tmp_path: Path) -> None:
    kernel = {"IPYTHONDIR": "ipython", "JUPYTER_DATA_DIR": "jupyter", "JUPYTER_RUNTIME_DIR": "runtime"}
    env = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "PYTEST_CURRENT_TEST")}
    env |= {name: str(tmp_path / value) for name, value in kernel.items()}
    done = subprocess.run([sys.executable, "-c", EXECUTE, NOTEBOOK], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = text_of(outputs(tmp_path / "executed.ipynb")["table"])
    values = {row.split("  ")[0]: float(row.split()[-2]) for row in table.splitlines()[2:]}
    assert values["two-tower"] > values["popularity"] and values["iALS (implicit)"] > 0
    assert ("EASE (RecTools)" in values) == (find_spec("rectools") is not None)
