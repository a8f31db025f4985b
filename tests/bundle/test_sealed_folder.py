"""Test that a changed bundle is rejected with a one-line error, and that a bundle is replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.bundle import sealed_folder
from twotower.bundle.sealed_folder import MANIFEST, atomic_replace, bundle_in, read_manifest, verify_manifest, write_manifest
from twotower.errors import DataError
from twotower.schema import BUNDLE_FORMAT

from ..documents import bundle_manifest


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


def test_everything_is_on_disk_before_the_manifest_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that after a power failure a folder has a manifest only if all its files are complete."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "inner" / "b.txt").write_text("two")
    synced, sync = [], os.fsync

    def recorded(descriptor: int) -> None:
        assert not (tmp_path / MANIFEST).exists()
        synced.append(os.pread(descriptor, 3, 0))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    written = write_manifest(tmp_path, bundle_manifest(1))
    assert sorted(synced[:2]) == [b"one", b"two"] and len(synced) == 3
    assert written == verify_manifest(tmp_path) and len(synced) == 3, "reading syncs nothing"


def test_the_manifest_says_what_is_in_the_folder(folder: Path) -> None:
    """Hashes are those of the standard library, names have slashes, and the seal does not depend on the order of keys."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["hashes"] == {
        "a.txt": hashlib.sha256(b"one").hexdigest(),
        "inner/b.txt": hashlib.sha256(b"two").hexdigest(),
    }
    assert list(manifest) == sorted(manifest) and manifest["kind"] == "bundle"
    lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    assert len(lines) > 20 and re.match(r' "\w', lines[1]), "people can read it"
    turned = dict(reversed(manifest.items()))
    (folder / MANIFEST).write_text(json.dumps(turned))
    assert verify_manifest(folder).seal == manifest["seal"]


def test_a_new_manifest_replaces_the_old_one(folder: Path) -> None:
    (folder / "a.txt").write_text("One")
    write_manifest(folder, bundle_manifest(3))
    found = verify_manifest(folder)
    assert found.revision == 3 and set(found.hashes) == {"a.txt", "inner/b.txt"}


def test_files_longer_than_a_block_are_hashed_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_folder, "_BLOCK", 4)
    made, sizes = hashlib.sha256, []

    class Recorded:
        def __init__(self) -> None:
            self.digest = made()

        def update(self, block: bytes) -> None:
            sizes.append(len(block))
            self.digest.update(block)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    for size in (0, 3, 4, 5, 13):
        (tmp_path / "f").write_bytes(content := bytes(range(size)))
        with monkeypatch.context() as patch:
            patch.setattr(hashlib, "sha256", Recorded)
            found = sealed_folder.sha256(tmp_path / "f")
        assert found == made(content).hexdigest()
    assert max(sizes) == 4


def test_a_long_format_is_cut_in_the_message(folder: Path) -> None:
    edit(folder, lambda m: m.update(format="4" * 50), again=True)
    with pytest.raises(DataError, match=f"has bundle format {'4' * 20}; this version reads format {BUNDLE_FORMAT}"):
        verify_manifest(folder)


def test_a_manifest_beyond_all_measure_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / MANIFEST).stat().st_size
    monkeypatch.setattr(sealed_folder, "MAX_MANIFEST_BYTES", size)
    assert read_manifest(folder)["revision"] == 1
    monkeypatch.setattr(sealed_folder, "MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(DataError, match=r"no readable manifest\.json"):
        read_manifest(folder)


NAMES = ["/etc/passwd", "inner/../../x", "..", "a\\b", "C:\\x"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_outside(folder: Path, name: str) -> None:
    edit(folder, lambda m: m["hashes"].update({name: "0" * 64}), again=True)
    with pytest.raises(DataError, match=r"outside its folder\. Do not use this bundle"):
        verify_manifest(folder)


@pytest.mark.parametrize("hashes", [None, [], "x", {"a.txt": 3}, {"a.txt": None}])
def test_hashes_of_another_type_are_refused(folder: Path, hashes: object) -> None:
    edit(folder, lambda m: m.update(hashes=hashes), again=True)
    with pytest.raises(DataError, match="has no hashes"):
        verify_manifest(folder)


@pytest.mark.parametrize("content", ["[]", "3", '{"kind": "run"}', "{}", '"bundle"'])
def test_json_that_is_no_manifest_of_a_bundle_is_refused(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DataError, match="expected 'bundle'"):
        read_manifest(folder)
    with pytest.raises(DataError, match="neither empty nor a bundle"), atomic_replace(folder):
        pytest.fail("must not begin")


def test_what_may_be_replaced(tmp_path: Path) -> None:
    """Nothing, an empty folder and a bundle; a file may not."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="neither empty nor a bundle"), atomic_replace(tmp_path / "file"):
        pytest.fail("must not begin")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "new"):
        with atomic_replace(tmp_path / name) as fresh:
            write_manifest(fresh, bundle_manifest(2))
        assert verify_manifest(tmp_path / name).revision == 2


def test_a_run_stands_for_its_bundle(folder: Path) -> None:
    assert bundle_in(folder.parent) == folder, "the run has a bundle"
    assert bundle_in(folder) == folder and bundle_in(folder / "inner") == folder / "inner"
