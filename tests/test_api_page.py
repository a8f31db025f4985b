"""The documented names are the public ones, and the ten lines that README and site begin with run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import twotower as tt

from .shop import shop

ROOT = Path(__file__).parents[1]
TEN_LINES = re.compile(r"^```python\n(import pandas as pd, twotower as tt\n.*?)^```", re.S | re.M)
PAGES = ("README.md", "docs/python.md", "docs/getting-started.md")


def ten_lines(page: str) -> str:
    """Return the first block of Python of a page."""
    found = TEN_LINES.search((ROOT / page).read_text(encoding="utf-8"))
    assert found, f"{page} does not show the ten lines"
    return found[1]


def test_the_pages_begin_with_the_same_ten_lines() -> None:
    assert len({ten_lines(page) for page in PAGES}) == 1
    assert len([line for line in ten_lines("README.md").splitlines() if line.strip()]) <= 10
    assert (ROOT / "README.md").read_text(encoding="utf-8").index("```python") < 500


def test_the_page_of_the_api_has_the_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    import references  # type: ignore[import-not-found]

    documented = [
        entry.partition(":")[2] for names in references.PYTHON.values() for entry in names if entry.startswith("twotower:")
    ]
    assert sorted([*documented, "__version__"]) == sorted(tt.__all__)
    for name in documented:
        target = getattr(tt, name)
        assert (target.__doc__ or "").strip() and target.__module__.startswith("twotower.")


def test_types_are_those_of_the_modules() -> None:
    """Check that the imports under TYPE_CHECKING are those of the lazy loader."""
    source = (ROOT / "src" / "twotower" / "__init__.py").read_text(encoding="utf-8")
    declared = dict(re.findall(r"from (twotower\.[\w.]+) import \w+ as (\w+)", source)[::-1])
    pairs = {name: module for module, name in re.findall(r"from (twotower\.[\w.]+) import \w+ as (\w+)", source)}
    assert declared and sorted([*pairs, "__version__"]) == sorted(tt.__all__)
    for name, module in pairs.items():
        assert getattr(tt, name).__module__ == module


@pytest.mark.slow
def test_the_ten_lines_run_as_printed(tmp_path: Path) -> None:
    orders, products = shop(users=100, items=50, events=1500)
    orders.to_csv(tmp_path / "orders.csv", index=False)
    products.to_csv(tmp_path / "products.csv", index=False)
    code = ten_lines("README.md") + '\nprint(len(model.recommend("C0001")), len(tt.load("shop").recommend(history=["P0001"])))\n'
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "10 10\n"
