"""Test atomic writes: readers see the old or the new content, and no temporary file is left."""

from __future__ import annotations

import ctypes
import os
import sys
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
def test_a_folder_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, exchange: bool) -> None:
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


def test_a_file_is_synced_completely_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure, the name has the old or the new content, never an empty file."""
    path, synced = tmp_path / "file.txt", []
    path.write_text("old")
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append((os.pread(descriptor, 100, 0), path.read_text()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with atomic_file(path) as beside:
        beside.write_text("new")
        assert not synced
    assert synced == [(b"new", "old")] and path.read_text() == "new"


def test_a_file_that_the_block_did_not_write_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass
    assert path.read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders")
def test_two_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    """A reader never finds the name missing."""
    one, other = folder(tmp_path / "one", "a"), folder(tmp_path / "other", "b")
    assert atomic_files._exchange(one, tmp_path / "nothing") is False
    assert atomic_files._exchange(one, other) is True
    assert (one / "b").exists() and (other / "a").exists()


@pytest.mark.parametrize("lacks", ["the call", "a library", "a default library"])
def test_where_folders_cannot_be_exchanged_the_answer_is_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    def opened(*_: object, **__: object) -> object:
        if lacks == "the call":
            return object()
        raise OSError if lacks == "a library" else TypeError

    monkeypatch.setattr(ctypes, "CDLL", opened)
    one, other = folder(tmp_path / "one", "a"), folder(tmp_path / "other", "b")
    assert atomic_files._exchange(one, other) is False and (one / "a").exists()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "renamed"])
def test_an_old_folder_that_cannot_be_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    """Check that the new folder is complete, and the old one stays under a hidden name."""
    if not exchange:
        monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    out = folder(tmp_path / "out", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        with atomic_folder(out) as fresh:
            folder(fresh, "new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == [".out.", "out"]


def test_the_parents_of_a_new_folder_are_made(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "deep" / "down" / name) as fresh:
            assert fresh.parent == tmp_path / "deep" / "down" and fresh.name.startswith(f".{name}.")
            folder(fresh, "new")
    assert sorted(path.name for path in (tmp_path / "deep" / "down").iterdir()) == ["first", "second"]


def test_a_file_at_the_name_of_a_folder_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(OSError), atomic_folder(out) as fresh:
        folder(fresh, "new")
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]


def test_an_old_folder_that_was_renamed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an atomic exchange of folders, the old one is renamed until the new one is in position."""
    monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)
    out, rename, seen = folder(tmp_path / "out", "old"), Path.rename, []

    def recorded(self: Path, target: Path) -> Path:
        seen.append((self.name.rpartition(".")[2], target.name.rpartition(".")[2]))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", recorded)
    with atomic_folder(out) as fresh:
        folder(fresh, "new")
    assert seen == [("out", "old"), ("new", "out")] and [path.name for path in tmp_path.iterdir()] == ["out"]
