"""Test atomic writes: readers see the old or the new content, and no temporary file is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.utils import atomic_files
from twotower.utils.atomic_files import atomic_file, atomic_folder


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old" and beside == tmp_path / ".file.txt.partial"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_stays_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as beside:
        beside.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_partial_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".file.txt.partial").write_text("half of what was written")
    with atomic_file(tmp_path / "file.txt") as beside:
        beside.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def folder(path: Path, name: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_text(name)
    return path


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "renamed"])
@pytest.mark.parametrize("before", ["nothing", "empty", "full", "link"])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)
    out = tmp_path / "out"
    if before == "link":
        out.symlink_to(folder(tmp_path / "there", "old"), target_is_directory=True)
    elif before != "nothing":
        out.mkdir()
        if before == "full":
            folder(out, "old")
    with atomic_folder(out) as fresh:
        assert not list(fresh.iterdir())
        folder(fresh, "new")
    assert [path.name for path in out.iterdir()] == ["new"] and out.is_symlink() == (before == "link")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "there"} - ({"there"} if before != "link" else set())


def test_a_folder_stays_when_the_block_fails(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", "old")
    with pytest.raises(ValueError), atomic_folder(out) as fresh:
        folder(fresh, "half")
        raise ValueError
    assert [path.name for path in out.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [out]


def test_a_folder_stays_when_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)
    out, rename = folder(tmp_path / "out", "old"), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError), atomic_folder(out) as fresh:
        folder(fresh, "new")
    assert [path.name for path in out.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [out]
