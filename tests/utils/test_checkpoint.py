"""Test checkpoints: complete on disk before they get their name, and one-line errors for those that cannot be written or read."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower.errors import TrainingError
from twotower.schema import FORMAT_VERSION
from twotower.utils.checkpoint import load_checkpoint, save_checkpoint

STATE: dict[str, Any] = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "step": 7, "names": ["a", None], "rate": 0.5}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write beyond `size` bytes of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_state_is_loaded_completely(tmp_path: Path) -> None:
    path = tmp_path / "run" / "model" / "last.pt"
    save_checkpoint(path, STATE)
    found = load_checkpoint(path)
    assert torch.equal(found["model"].pop("weight"), STATE["model"]["weight"])
    assert found == {"format": FORMAT_VERSION, "model": {}, "step": 7, "names": ["a", None], "rate": 0.5}
    save_checkpoint(path, {"step": 8})
    assert load_checkpoint(path)["step"] == 8 and [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_it_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the content is synced before the rename, so that a power failure leaves no empty file."""
    path, calls = tmp_path / "last.pt", []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        calls.append(("sync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        calls.append(("rename", self.stat().st_ino, self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    save_checkpoint(path, STATE)
    file, size = path.stat().st_ino, path.stat().st_size
    assert calls == [("sync", file, size), ("rename", file, size)] and size > 500


def test_a_full_disk_keeps_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    with files_of_at_most(20_000), pytest.raises(TrainingError) as caught:
        save_checkpoint(path, {"model": torch.zeros(100_000)})
    said = str(caught.value)
    assert said.startswith(f"Cannot write the checkpoint {path}: File too large. The previous checkpoint is intact.")
    assert caught.value.__suppress_context__ and load_checkpoint(path)["step"] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(TrainingError, match=r"Cannot write the checkpoint .*last\.pt: Is a directory"):
        save_checkpoint(tmp_path / "last.pt", STATE)


def test_an_error_that_is_none_of_the_disk_is_not_hidden(tmp_path: Path) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            raise RuntimeError("a fault of the caller")

    with pytest.raises(RuntimeError, match="a fault of the caller"):
        save_checkpoint(tmp_path / "last.pt", {"odd": Odd()})
    assert not list(tmp_path.iterdir())


class Trap:
    """Pickles as code that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "text", "trap", "unreadable"])
def test_one_that_cannot_be_read_is_one_line_and_runs_no_code(tmp_path: Path, how: str) -> None:
    path, trapped = tmp_path / "last.pt", tmp_path / "trapped"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "trap":
        torch.save({"format": FORMAT_VERSION, "trap": Trap(trapped)}, path)
    elif how == "unreadable":
        path.write_bytes(b"PK\x03\x04" + whole[:50])
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"weights: 3\n" * 50}[how])
    said = "No checkpoint at" if how == "missing" else "is damaged. Use the other one of last.pt and best.pt"
    with pytest.raises(TrainingError, match=said) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and not trapped.exists()


@pytest.mark.parametrize("content", [{"format": FORMAT_VERSION + 1, "step": 7}, {"step": 7}, [FORMAT_VERSION], torch.zeros(2)])
def test_another_format_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match=f"has another format, expected {FORMAT_VERSION}. Train again"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No checkpoint at"):
        load_checkpoint(tmp_path)


def test_it_is_read_as_data_and_into_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of PyTorch run code from a file by default, and a checkpoint of a GPU opens on a machine without one."""
    seen, load = [], torch.load

    def recorded(*given: Any, **kept: Any) -> Any:
        seen.append(kept)
        return load(*given, **kept)

    monkeypatch.setattr(torch, "load", recorded)
    save_checkpoint(tmp_path / "last.pt", STATE)
    load_checkpoint(tmp_path / "last.pt")
    assert seen == [{"map_location": "cpu", "weights_only": True}]
