"""The notebook that compares libraries: stored with small outputs, and run whole by a fresh kernel."""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from .kernel import run_notebook

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
    cells, stderr = run_notebook(NOTEBOOK, tmp_path, tmp_path)
    assert not stderr
    table = text_of(next(cell["outputs"] for cell in cells if cell["id"] == "table"))
    values = {row.split("  ")[0]: float(row.split()[-2]) for row in table.splitlines()[2:]}
    assert values["two-tower"] > values["popularity"] and values["iALS (implicit)"] > 0
    assert ("EASE (RecTools)" in values) == (find_spec("rectools") is not None)
