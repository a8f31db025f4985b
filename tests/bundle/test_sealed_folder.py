"""Test that a changed bundle is rejected with a one-line error, and that a bundle is replaced atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.bundle import sealed_folder
from twotower.bundle.bundle import load_bundle, note_report
from twotower.bundle.sealed_folder import MANIFEST, atomic_replace, read_manifest, verify_manifest, write_manifest
from twotower.errors import DataError
from twotower.schema import BUNDLE_FORMAT

from ..documents import bundle_manifest, empty_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a sealed folder with two files."""
    with atomic_replace(tmp_path / "bundle") as fresh:
        (fresh / "inner").mkdir()
        (fresh / "a.txt").write_text("one")
        (fresh / "inner" / "b.txt").write_text("two")
        write_manifest(fresh, bundle_manifest(1))
    return tmp_path / "bundle"


def edit(folder: Path, change: Callable[[dict], None], *, again: bool = False) -> None:
    """Change the manifest; with `again`, also write a matching seal, as an attacker would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if again:
        manifest["seal"] = sealed_folder._seal_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def outside(manifest: dict) -> None:
    manifest["hashes"]["../secret.txt"] = manifest["hashes"]["a.txt"]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda f: (f / "a.txt").write_text("One"), "a.txt has changed"),
    "longer": (lambda f: (f / "a.txt").write_text("one "), "a.txt has changed"),
    "shorter": (lambda f: (f / "inner" / "b.txt").write_text("tw"), "b.txt has changed"),
    "missing": (lambda f: (f / "a.txt").unlink(), "a.txt is missing"),
    "more": (lambda f: (f / "inner" / "c.py").write_text("print()"), "c.py is not in the manifest"),
    "link": (lambda f: (f / "c").symlink_to("/etc/hostname"), "link or a device"),
    "linked folder": (lambda f: (f / "c").symlink_to("/etc"), "link or a device"),
    "pipe": (lambda f: os.mkfifo(f / "c"), "link or a device"),
    "manifest edited": (lambda f: edit(f, lambda m: m.update(revision=2)), "manifest.json has changed"),
    "manifest cut off": (lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:-9]), "no readable manifest.json"),
    "manifest of lists": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "no readable manifest.json"),
    "manifest a link": (lambda f: ((f / MANIFEST).rename(f / "m"), (f / MANIFEST).symlink_to("m")), "no readable manifest.json"),
    "another kind": (lambda f: edit(f, lambda m: m.update(kind="dataset"), again=True), "has kind 'dataset', expected 'bundle'"),
    "newer": (lambda f: edit(f, lambda m: m.update(format=BUNDLE_FORMAT + 1), again=True), "newer version"),
    "older": (lambda f: edit(f, lambda m: m.update(format=1), again=True), "Write it again with"),
    "a format of two lines": (
        lambda f: edit(f, lambda m: m.update(format="4\n5"), again=True),
        "Write it again with",
    ),
    "no hashes": (lambda f: edit(f, lambda m: m.pop("hashes"), again=True), "has no hashes"),
    "unknown key": (lambda f: edit(f, lambda m: m.update(number=1), again=True), "number: Extra inputs are not permitted"),
    "no time": (lambda f: edit(f, lambda m: m.pop("moment_s"), again=True), "moment_s: Field required"),
    "outside": (lambda f: ((f.parent / "secret.txt").write_text("one"), edit(f, outside, again=True)), "outside its folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_whatever_was_done_to_it_is_one_line(folder: Path, name: str) -> None:
    assert verify_manifest(folder).revision == 1
    damage, said = DAMAGE[name]
    damage(folder)
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        verify_manifest(folder)
    assert "\n" not in str(caught.value)


def test_what_fails_half_way_leaves_the_old_one(folder: Path) -> None:
    with pytest.raises(KeyError), atomic_replace(folder) as fresh:
        (fresh / "a.txt").write_text("half")
        raise KeyError
    assert verify_manifest(folder).revision == 1
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("me")
    with pytest.raises(DataError, match="neither empty nor a bundle"), atomic_replace(tmp_path / "letters"):
        pytest.fail("must not begin")
    assert (tmp_path / "letters" / "dear.txt").read_text() == "me"


def test_a_link_to_a_bundle_goes_on_leading_to_it(folder: Path) -> None:
    link = folder.parent / "current"
    link.symlink_to(folder)
    with atomic_replace(link) as fresh:
        write_manifest(fresh, bundle_manifest(2))
    assert link.is_symlink() and verify_manifest(folder).revision == 2


def test_a_reader_always_finds_one(folder: Path) -> None:
    seen, lost, done = set(), [], threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(read_manifest(folder)["revision"])
            except DataError as error:
                lost.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(2, 60):
        with atomic_replace(folder) as fresh:
            write_manifest(fresh, bundle_manifest(number))
    done.set()
    reader.join()
    assert not lost and len(seen) > 5


def test_where_folders_cannot_be_exchanged_a_loader_waits(
    town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(town_bundle, tmp_path / "bundle")
    monkeypatch.setattr("twotower.utils.atomic_files._exchange", lambda *_: False)
    note_report(tmp_path / "bundle", empty_report("good"))
    assert load_bundle(tmp_path / "bundle").manifest.report == empty_report("good").summary()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (tmp_path / "bundle").rename(tmp_path / "away")
    threading.Timer(0.02, lambda: (tmp_path / "away").rename(tmp_path / "bundle")).start()
    assert load_bundle(tmp_path / "bundle").manifest.report == empty_report("good").summary()
