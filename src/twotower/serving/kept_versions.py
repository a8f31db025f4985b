"""Keep the last served bundles in a folder, so that a server can go back to them after their folder was replaced.

The files are hard links where the file system allows it, so a kept version takes no space until its original is replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from twotower.bundle.sealed_folder import MANIFEST, SIGNATURE, read_manifest
from twotower.errors import DataError
from twotower.utils.atomic_files import atomic_file
from twotower.utils.console import log

HISTORY = "history.json"


def kept_beside(bundle: Path) -> Path:
    """Return the folder of the versions that a server of `bundle` keeps."""
    return bundle.resolve().with_name(f"{bundle.resolve().name}.versions")


class KeptVersions:
    """Copies of the last served versions.

    Parameters
    ----------
    folder
        Where they are kept; it is made when it is needed.
    keep
        Number of versions before the current one.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def add(self, path: Path, version: str) -> None:
        """Keep the bundle at `path`, which is served now. A failure is logged."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if not (self._folder / version).is_dir():
                self._link(path, version)
            names = [name for name in self.names() if name != version]
            for old in names[: -self._keep]:
                shutil.rmtree(self._folder / old, ignore_errors=True)
            self._write([*names[-self._keep :], version])
        except (OSError, DataError) as error:
            log.warning("version %s is not kept in %s: %s", version, self._folder, error)

    def names(self) -> list[str]:
        """Return the kept versions, the last served one at the end."""
        try:
            found = json.loads((self._folder / HISTORY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [str(name) for name in found if (self._folder / str(name) / MANIFEST).is_file()]

    def before(self, version: str) -> Path:
        """Return the folder of the version that was served before another one.

        Raises
        ------
        DataError
            None is kept.
        """
        names = self.names()
        earlier = names[: names.index(version)] if version in names else names
        if not earlier:
            raise DataError(f"No version before {version} is kept in {self._folder}. Load a folder with POST /admin/reload.")
        return self._folder / earlier[-1]

    def drop(self, version: str) -> None:
        """Do not return to a version again."""
        with suppress(OSError):
            self._write([name for name in self.names() if name != version])
            shutil.rmtree(self._folder / version, ignore_errors=True)

    def paths(self) -> list[Path]:
        """Return the folders of all kept versions."""
        return [self._folder / name for name in self.names()]

    def renamed(self, path: Path, version: str) -> None:
        """Note that the kept bundle at `path` was rewritten, and is another version now."""
        names = self.names()
        shutil.rmtree(self._folder / version, ignore_errors=True)
        path.rename(self._folder / version)
        self._write([version if name == path.name else name for name in names if name != version])

    def _link(self, path: Path, version: str) -> None:
        beside = self._folder / f".{uuid4().hex[:12]}.new"
        try:
            names = [*read_manifest(path)["hashes"], MANIFEST, *([SIGNATURE] if (path / SIGNATURE).is_file() else [])]
            for name in names:
                target = beside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path / name, target)
                except OSError:  # another file system, or not allowed
                    shutil.copyfile(path / name, target)
            if str(read_manifest(beside).get("seal"))[:12] != version:
                raise DataError("its folder was replaced meanwhile")
            beside.rename(self._folder / version)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _write(self, names: list[str]) -> None:
        with atomic_file(self._folder / HISTORY) as beside:
            beside.write_text(json.dumps(names), encoding="utf-8")
