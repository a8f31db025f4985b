"""Run a notebook in a new kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXECUTE = """
import sys, nbclient, nbformat
source, executed, folder = sys.argv[1:]
notebook = nbformat.read(source, 4)
client = nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": folder}}
)
try:
    client.execute()
finally:
    nbformat.write(notebook, executed)
"""
UNSET = ("MPLBACKEND", "PYTEST_CURRENT_TEST", "PYTHONPATH")


def run_notebook(
    notebook: Path, tmp_path: Path, folder: Path, *, python: Path = Path(sys.executable), **environment: str
) -> tuple[list[dict[str, Any]], str]:
    """Return the code cells after a run in `folder` with `python`, and what the runner wrote to stderr: "" if no cell failed."""
    kernel = {"IPYTHONDIR": "ipython", "JUPYTER_DATA_DIR": "jupyter", "JUPYTER_RUNTIME_DIR": "runtime"}
    env = {name: value for name, value in os.environ.items() if name not in UNSET}
    env |= {name: str(tmp_path / value) for name, value in kernel.items()} | environment
    executed = tmp_path / "executed.ipynb"
    command = [python, "-c", EXECUTE, notebook, executed, folder]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert executed.is_file(), done.stdout + done.stderr
    cells = [cell for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return cells, done.stderr if done.returncode else ""
