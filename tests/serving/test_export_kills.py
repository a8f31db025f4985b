"""Test that killed exports and backups leave no half file, and that killed writers lose nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT


@pytest.fixture
def export_kills() -> Iterator[Any]:
    """benchmarks/export_kills.py, which is used here in small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("export_kills")
    for name in ("common", "export_kills"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_kills_leave_no_half_file_and_lose_no_acknowledged_event(export_kills: Any, tmp_path: Path) -> None:
    found = export_kills.measured(tmp_path, kills=10, seed=1)
    assert found["kills"] == 10 and found["writer_kills"] == 2 and found["acknowledged_events"] > 0
    assert (found["half_files"], found["lost_events"]) == (0, 0), found


def test_half_a_file_would_be_found(export_kills: Any, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.write_bytes(b"PAR1")
    for kind in ("export", "backup"):
        with pytest.raises(Exception):  # noqa: B017 - as the benchmark does
            export_kills.held(half, kind)
        assert export_kills.held(tmp_path / "absent", kind) is None
