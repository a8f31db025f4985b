"""Test the quickstart notebook: stored without outputs, and run completely in a new kernel."""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from .kernel import run_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


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
    executed, stderr = run_notebook(NOTEBOOK, tmp_path, tmp_path)
    assert not stderr
    shown = {cell["id"]: [out["data"] for out in cell.get("outputs", []) if "data" in out] for cell in executed}
    assert "<h3>" in "".join(shown["report"][0]["text/html"]) and "image/png" in shown["plot"][0]
    assert all(shown[name] for name in ("describe", "fit", "frame", "known", "new", "similar", "join", "save"))
    assert (tmp_path / "shop" / "manifest.json").is_file()
