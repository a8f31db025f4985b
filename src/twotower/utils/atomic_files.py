"""Write files and folders atomically: a temporary one beside the target is renamed, so readers see the old or the new content."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path `.NAME.partial` beside `path`. After the block, flush that file to disk and rename it to `path`.

    If the block raises an exception, the partial file is removed and `path` stays as it was. A killed process leaves the partial
    file; the next write replaces it.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `out`. After the block, it takes the place of `out`, whose old content is removed.

    If the block raises an exception, the new folder is removed and `out` stays as it was. If `out` is a symbolic link, the folder
    that it points to is replaced and the link stays.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{uuid4().hex[:12]}.new")
    beside.mkdir()
    try:
        yield beside
        replace_folder(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(fresh: Path, out: Path) -> None:
    """Put the folder `fresh` at `out`, at once. What was there goes to where `fresh` was, or is removed."""
    if not out.exists() or not any(out.iterdir()):
        fresh.rename(out)
    elif not _exchange(fresh, out):
        old = fresh.with_suffix(".old")
        out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders atomically. Return False if the system cannot do that."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)
