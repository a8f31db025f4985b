"""Test the quickstart notebook: stored without outputs, and run completely in a new kernel."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, "executed.ipynb")
"""


def cells() -> dict[str, str]:
    """Source of every code cell, by id."""
    stored: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all((cell["outputs"], cell["execution_count"]) == ([], None) for cell in stored["cells"] if cell["cell_type"] == "code")
    return {cell["id"]: "".join(cell["source"]) for cell in stored["cells"] if cell["cell_type"] == "code"}


def test_its_cells_are_python_and_name_the_repository() -> None:
    for name, source in cells().items():
        ast.parse(source, name)
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert f'REPOSITORY = "{urls["Repository"]}.git"' in cells()["install"]


@pytest.mark.slow
def test_a_fresh_kernel_runs_it(tmp_path: Path) -> None:
    kernel = {"IPYTHONDIR": "ipython", "JUPYTER_DATA_DIR": "jupyter", "JUPYTER_RUNTIME_DIR": "runtime"}
    env = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "PYTEST_CURRENT_TEST")}
    env |= {name: str(tmp_path / value) for name, value in kernel.items()}
    done = subprocess.run([sys.executable, "-c", EXECUTE, NOTEBOOK], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    executed = json.loads((tmp_path / "executed.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = {cell["id"]: [out["data"] for out in cell.get("outputs", []) if "data" in out] for cell in executed}
    assert "<h3>" in "".join(shown["report"][0]["text/html"]) and "image/png" in shown["plot"][0]
    assert all(shown[name] for name in ("describe", "fit", "frame", "known", "new", "similar", "join", "save"))
    assert (tmp_path / "shop" / "manifest.json").is_file()
