"""Find the files of a table: one file, the parts in a folder, or the files of a glob; and their form by suffix."""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

from twotower.data.sources.text_files import COMPRESSED, base_suffix
from twotower.errors import DataError

FORMS = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".dat", ".inter", ".item", ".user", ".data", ".tab"), "text"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
}


def form_of(file: Path) -> str:
    """Return "text", "parquet" or "json" by a file's suffix.

    Raises
    ------
    DataError
        The suffix is unknown.
    """
    form = FORMS.get(base_suffix(file))
    if form is None:
        raise DataError(
            f"{file} has an unknown suffix. Allowed: {', '.join(FORMS)}; text and JSON also with {', '.join(COMPRESSED)}. Convert "
            "or rename the file."
        )
    return form


def table_paths(base: Path, path: Path, section: str) -> list[Path]:
    """Return the files of a table, part-2 before part-10: one file, the parts in a folder, or the files of a glob.

    Files whose names begin with "_" or "." are ignored: they are markers of the program that wrote the folder.

    Raises
    ------
    DataError
        There is no file.
    """
    full = base / path
    if full.is_file():
        return [full]
    if full.is_dir():
        found = [full]
    else:
        found = [base / name for name in glob(str(path), root_dir=base, recursive=True)] if set("*?[") & set(str(path)) else []
    parts = [part for each in found for part in (each.rglob("*") if each.is_dir() else [each])]
    kept = sorted({part for part in parts if part.is_file() and not _is_marker(part, full)}, key=_in_number_order)
    if not kept:
        forms = f"a file, a folder or a glob ({', '.join(FORMS)}; also {', '.join(COMPRESSED)})"
        holds = listing(full if full.is_dir() else full.parent)
        raise DataError(f"No file at {full}: {holds}. data.{section}.path must be {forms}, relative to data.path. Correct it.")
    return kept


def _in_number_order(part: Path) -> tuple[list[tuple[int, str]], Path]:
    """Return a key that puts part-2 before part-10."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", str(part))
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], part


def _is_marker(part: Path, below: Path) -> bool:
    names = part.relative_to(below).parts if part.is_relative_to(below) else part.parts[-1:]
    return any(name.startswith(("_", ".")) for name in names)


def listing(folder: Path, most: int = 6) -> str:
    """Return a description of a folder's content for a message."""
    if not folder.exists():
        return f"{folder} does not exist"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {', '.join(names[:most]) or 'nothing'}{rest}"
