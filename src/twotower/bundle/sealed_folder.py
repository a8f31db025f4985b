"""A folder sealed by its manifest: whole and as it was written, or refused.

Enters: a folder of plain files. Leaves: a `manifest.json` with the sha256 of every file and, under "seal", of the manifest itself.

Promises: what is opened holds the files of its manifest and no others, each byte as it was written; no name leads outside, no link
is followed. `atomic_replace` puts a new folder in the place of an old one so that a reader finds one of the two, whole. A seal
tells damage and mixing up; it does not tell who wrote a bundle, so what is read from it is still data only, never code.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from twotower.errors import DataError
from twotower.schema import BUNDLE_FORMAT
from twotower.utils.atomic_files import atomic_file, atomic_folder
from twotower.utils.types import Json

MANIFEST = "manifest.json"
KIND = "bundle"
MAX_MANIFEST_BYTES = 64 << 20  # of a manifest
_BLOCK = 1 << 20


def write_manifest(folder: Path, manifest: Json) -> Json:
    """Write the manifest of what `folder` holds, with hashes; everything is on the disk when it returns.

    Returns
    -------
    dict
        The manifest, with "hashes" and "seal".
    """
    files = sorted(_files(folder), key=lambda name: name.as_posix())
    hashes = {name.as_posix(): sha256(folder / name, flush=True) for name in files if name.as_posix() != MANIFEST}
    body = {**manifest, "format": BUNDLE_FORMAT, "kind": KIND, "hashes": hashes}
    body["seal"] = _seal_of(body)
    with atomic_file(folder / MANIFEST) as beside, beside.open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=1, sort_keys=True)
    return body


def verify_manifest(folder: Path) -> Json:
    """The manifest of a sealed folder, after every check.

    Raises
    ------
    DataError
        It is no bundle, of another version, or not as it was written.
    """
    manifest = read_manifest(folder)
    found = manifest.get("format")
    if found != BUNDLE_FORMAT:
        newer = isinstance(found, int) and found > BUNDLE_FORMAT
        do = "A newer version of twotower wrote it: install that one" if newer else "Export it again with this version"
        raise DataError(f"The bundle must have format {BUNDLE_FORMAT}. {folder} has {str(found)[:20]}. {do}.")
    hashes = manifest.get("hashes")
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        raise _changed(folder / MANIFEST, "lists no hashes")
    for name in hashes:
        if "\\" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"A bundle names files of its own folder alone. {folder} names {name[:80]!r}. Do not use it.")
    present = {name.as_posix() for name in _files(folder)} - {MANIFEST}
    for name in sorted(hashes.keys() - present):
        raise _changed(folder / name, "missing")
    for name in sorted(present - hashes.keys()):
        raise _changed(folder / name, "not of it")
    if manifest.get("seal") != _seal_of(manifest):
        raise _changed(folder / MANIFEST, "changed")
    for name, digest in hashes.items():
        if sha256(folder / name) != digest:
            raise _changed(folder / name, "changed")
    return manifest


def read_manifest(folder: Path) -> Json:
    """The manifest of a bundle as it stands, unchecked but for its kind.

    Raises
    ------
    DataError
        There is none.
    """
    file = folder / MANIFEST
    try:
        if not stat.S_ISREG(file.lstat().st_mode) or file.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"A bundle is a folder with a {MANIFEST}. Found none at {folder}. Run `twotower export`.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise DataError(f"The folder must hold a bundle. {folder} holds something else. Run `twotower export RUN --out BUNDLE`.")
    return manifest


@contextmanager
def atomic_replace(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out`, which takes its place when the block ends well and vanishes when it does not.

    Raises
    ------
    DataError
        `out` exists and is neither empty nor a bundle.
    """
    if out.exists() and not _replaceable(out):
        raise DataError(
            f"A bundle is written to a new folder or over an older bundle. {out} is something else. Choose another folder."
        )
    with atomic_folder(out) as beside:
        yield beside


def _files(folder: Path) -> Iterator[Path]:
    """Relative paths of all files below `folder`."""
    for base, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(base, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DataError(f"A bundle holds plain files alone. {path} is a link or a device. Do not use it.")
        yield from (Path(base, name).relative_to(folder) for name in files)


def sha256(path: Path, *, flush: bool = False) -> str:
    """Hash of a file; `flush`: whose content is on the disk when it returns."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        if flush:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _seal_of(manifest: Json) -> str:
    body = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _changed(file: Path, how: str) -> DataError:
    return DataError(f"A bundle must be as it was written. {file} is {how}. Export it again.")


def _replaceable(path: Path) -> bool:
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        return bool(read_manifest(path))
    except DataError:
        return False
