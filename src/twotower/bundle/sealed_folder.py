"""Seal the folder of a bundle with its manifest, and verify that it is complete and unchanged.

`manifest.json` holds the SHA-256 of every file and, under "seal", of the manifest itself.

A verified folder holds exactly the files of its manifest, unchanged. No name leads outside the folder, and no link is followed.
`atomic_replace` swaps a new folder for an old one, so a reader finds either of them complete. A seal detects damage and mixed-up
files. It does not prove who wrote a bundle (`signature` does), so files are read as data only, never as code.
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
from twotower.utils.documents import parse_document
from twotower.utils.manifests import BundleManifest
from twotower.utils.types import Json

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"  # see `signature`
KIND = "bundle"
MAX_MANIFEST_BYTES = 64 << 20
_BLOCK = 1 << 20


def bundle_in(folder: Path) -> Path:
    """Return the bundle inside a folder written by `run` or `train`; another path is returned unchanged."""
    return folder / "bundle" if (folder / "bundle" / MANIFEST).is_file() else folder


def write_manifest(folder: Path, manifest: BundleManifest) -> BundleManifest:
    """Write the manifest of `folder` with the hashes of all files. On return, all files are flushed to disk.

    Returns
    -------
    BundleManifest
        The manifest, with its hashes and seal.
    """
    (folder / SIGNATURE).unlink(missing_ok=True)  # of what the folder held before
    files = sorted(_files(folder), key=lambda name: name.as_posix())
    hashes = {name.as_posix(): sha256(folder / name, flush=True) for name in files if name.as_posix() != MANIFEST}
    body = {**manifest.json_values(), "hashes": hashes}
    body["seal"] = _seal_of(body)
    with atomic_file(folder / MANIFEST) as beside, beside.open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=1, sort_keys=True)
    return manifest.model_copy(update={"hashes": hashes, "seal": body["seal"]})


def verify_manifest(folder: Path) -> BundleManifest:
    """Verify a sealed folder and return its manifest.

    Raises
    ------
    DataError
        The folder is not a bundle, has another format version, or has changed since it was written.
    """
    manifest = read_manifest(folder)
    found = manifest.get("format")
    if found != BUNDLE_FORMAT:
        newer = isinstance(found, int) and found > BUNDLE_FORMAT
        do = "Install the newer version of twotower that wrote it" if newer else "Write it again with `twotower export`"
        raise DataError(f"{folder} has bundle format {str(found)[:20]}; this version reads format {BUNDLE_FORMAT}. {do}.")
    hashes = manifest.get("hashes")
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        raise _changed(folder / MANIFEST, "has no hashes")
    for name in hashes:
        if "\\" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"The manifest of {folder} names {name[:80]!r}, outside its folder. Do not use this bundle.")
    present = {name.as_posix() for name in _files(folder)} - {MANIFEST, SIGNATURE}
    for name in sorted(hashes.keys() - present):
        raise _changed(folder / name, "is missing")
    for name in sorted(present - hashes.keys()):
        raise _changed(folder / name, "is not in the manifest")
    if manifest.get("seal") != _seal_of(manifest):
        raise _changed(folder / MANIFEST, "has changed")
    for name, digest in hashes.items():
        if sha256(folder / name) != digest:
            raise _changed(folder / name, "has changed")
    return parse_document(BundleManifest, manifest, folder / MANIFEST)


def read_manifest(folder: Path) -> Json:
    """Return the manifest of a bundle, of any format version: only its kind is checked.

    Raises
    ------
    DataError
        The folder has no manifest of a bundle.
    """
    file = folder / MANIFEST
    try:
        if not stat.S_ISREG(file.lstat().st_mode) or file.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(
            f"{folder} is not a bundle: it has no readable {MANIFEST}. Create one with `twotower export RUN --out BUNDLE`."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        kind = manifest.get("kind") if isinstance(manifest, dict) else None
        raise DataError(
            f"{folder} is not a bundle: its {MANIFEST} has kind {str(kind)[:40]!r}, expected {KIND!r}. "
            "Create one with `twotower export RUN --out BUNDLE`."
        )
    return manifest


@contextmanager
def atomic_replace(out: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `out` if the block succeeds, and is deleted if it fails.

    Raises
    ------
    DataError
        `out` exists and is neither empty nor a bundle.
    """
    if out.exists() and not _replaceable(out):
        raise DataError(f"Cannot write a bundle to {out}: it is neither empty nor a bundle. Choose another folder.")
    with atomic_folder(out) as beside:
        yield beside


def _files(folder: Path) -> Iterator[Path]:
    """Yield the relative paths of all files below `folder`. Raise DataError for links and devices."""
    for base, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(base, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DataError(f"{path} is a link or a device; a bundle may hold only plain files. Do not use this bundle.")
        yield from (Path(base, name).relative_to(folder) for name in files)


def sha256(path: Path, *, flush: bool = False) -> str:
    """Return the SHA-256 of a file. With `flush`, its content is on disk when this returns."""
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
    return DataError(f"The bundle is damaged: {file} {how}. Write it again with `twotower export`.")


def _replaceable(path: Path) -> bool:
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        return bool(read_manifest(path))
    except DataError:
        return False
