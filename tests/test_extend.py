"""The pages that show how to extend the package: each has one example of at most 30 lines, which runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .shop import shop

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "extend").glob("*.md"))


def example(page: Path) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return str(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_an_example_is_short(page: Path) -> None:
    assert len(example(page).splitlines()) <= 30


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_an_example_runs(page: Path, tmp_path: Path) -> None:
    orders, products = shop(users=60, items=40, events=900)
    orders.to_csv(tmp_path / "orders.csv", index=False)
    products.to_csv(tmp_path / "products.csv", index=False)
    env = {**os.environ, "WANDB_SILENT": "true"}
    done = subprocess.run([sys.executable, "-c", example(page)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
