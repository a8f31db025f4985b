"""The wheels for a Kaggle notebook without internet: everything that training needs and Kaggle lacks, and never PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def wheelhouse(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    import wheelhouse as module  # type: ignore[import-not-found]

    return module  # type: ignore[no-any-return]


def test_it_has_what_kaggle_lacks(wheelhouse: ModuleType) -> None:
    names = set(wheelhouse.needed())
    assert {"implicit", "ibis-framework", "duckdb", "sqlglot", "safetensors", "threadpoolctl"} <= names
    assert not {"torch", "triton", "numpy", "scipy", "two-tower-rec"} & names and not [one for one in names if "nvidia" in one]


@pytest.mark.slow
def test_pip_installs_from_it_without_an_index(wheelhouse: ModuleType, tmp_path: Path) -> None:
    """Into an empty folder: what Kaggle has is left out by --no-deps, all else comes from the wheels."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, ROOT / "deploy" / "wheelhouse.py", tmp_path / "wheels", "--python", here]
    subprocess.run(command, check=True, capture_output=True)
    assert not list((tmp_path / "wheels").glob("torch-*")) and (tmp_path / "wheels" / "configs" / "kaggle.yaml").is_file()
    offline = ("--no-index", "--find-links", tmp_path / "wheels", "--no-deps", "--target", tmp_path / "site")
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "two-tower-rec", *wheelhouse.needed()], check=True)
    assert (tmp_path / "site" / "twotower" / "__init__.py").is_file() and (tmp_path / "site" / "implicit").is_dir()
