"""Remove users from what a run has written: dataset, checkpoints, bundle and report, and from an event store.

Each folder and file is replaced atomically. A command that was killed can be given again.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twotower.bundle.bundle import load_bundle
from twotower.bundle.forgetting import USER_TABLE, forget_users, without_examples, without_rows
from twotower.bundle.sealed_folder import MANIFEST, bundle_in, read_manifest
from twotower.data.dataset import Dataset
from twotower.data.forgetting import rows_to_forget, without_users
from twotower.errors import BusyError, DataError
from twotower.evaluation.report import write_report
from twotower.pipeline.run_folder import locked, root_of, run_dataset, run_manifest
from twotower.serving.event_store import open_store
from twotower.serving.event_types import EventStore
from twotower.serving.kept_versions import KeptVersions, kept_beside
from twotower.utils.atomic_files import atomic_file, atomic_folder
from twotower.utils.checkpoint import load_checkpoint, save_checkpoint
from twotower.utils.documents import Report, parse_document
from twotower.utils.run_parts import CHECKPOINTS, REPORT
from twotower.utils.types import Int

TIDY_WAIT_S = 600.0  # time for Redis to end a rewrite of its file that has begun before
TIDY_STEP_S = 0.1


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed, by place: numbers of users, and of events of a store."""

    bundle: int = 0
    dataset: int = 0
    events: int = 0


def forget(target: Path, users: Sequence[str], store: str | None) -> Removed:
    """Remove users from a run or a bundle, and from an event store. Users that a place does not have are not an error.

    Parameters
    ----------
    target
        A run, or a bundle.
    store
        Address of the event store; None: there is none.

    Raises
    ------
    DataError
        `target` is neither a run nor a bundle, there is no such store, or a server uses it.
    BusyError
        The store does not respond, or could not begin to remove the users from the disk in time.
    """
    target = root_of(target)
    bundle, model = bundle_in(target), target / "model"
    run = model if model.is_dir() else target
    is_run = _kind(run) == "run"
    if not is_run and (_kind(bundle) != "bundle" or (run / CHECKPOINTS[0]).is_file()):
        raise DataError(f"{target} is neither a run nor a bundle. Name a folder of `twotower run`, or a bundle.")
    with ExitStack() as stack:
        owner = target.resolve().parent  # of the bundle of a run, which an update may be about to replace
        if not is_run and "run" in (_kind(owner), _kind(owner / "model")):
            stack.enter_context(locked(owner))
        stack.enter_context(locked(target))
        opened, events = None, 0
        if store is not None:
            opened = open_store(store, create=False)  # it fails while a server uses the store
            stack.callback(opened.close)
        _check_folders(target, run, set(users), is_run=is_run)
        if opened is not None:
            events = sum(opened.forget(user) for user in users)
        in_bundle, in_dataset = _forget_in_folders(target, run, set(users), is_run=is_run)
        if opened is not None:
            _wait_until_tidy(opened)
    return Removed(in_bundle, in_dataset, events)


def _check_folders(target: Path, run: Path, names: set[str], *, is_run: bool) -> None:
    """Read all that will be written again: what is wrong is found before anything is changed.

    Raises
    ------
    DataError
        A part is missing or damaged, or cannot be written.
    """
    bundle, written = bundle_in(target), set[Path]()
    if is_run and len(rows_to_forget(dataset := run_dataset(run), names.__contains__)):
        written |= {run, dataset.path.parent}
        for file in [run / name for name in CHECKPOINTS if (run / name).is_file()]:
            load_checkpoint(file)
    if _kind(bundle) == "bundle":
        served, kept = load_bundle(bundle), KeptVersions(kept_beside(bundle), keep=0).paths()
        if len(rows_to_forget(served.dataset, names.__contains__)):
            written.add(bundle.resolve().parent)
            kept = [path for path in kept if path.name != served.manifest.seal[:12]]  # that one is dropped
        for path in kept:
            if len(rows_to_forget(load_bundle(path).dataset, names.__contains__)):
                written.add(path.resolve().parent)
    written |= {folder for folder in {target, run} if _clean_report(folder, names) is not None}
    for folder in sorted(written):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DataError(f"The folder {folder} cannot be written, so nothing was changed. Run the command as its owner.")


def _forget_in_folders(target: Path, run: Path, names: set[str], *, is_run: bool) -> tuple[int, int]:
    """Return the numbers of users that were removed from the bundle and from the dataset."""
    bundle, in_bundle = bundle_in(target), 0
    in_dataset = _forget_in_run(run, names) if is_run else 0
    if _kind(bundle) == "bundle":
        served = str(read_manifest(bundle).get("seal"))[:12]
        in_bundle = _forget_in_bundle(bundle, names)
        _forget_in_versions(kept_beside(bundle), names, served if in_bundle else None)
    for folder in {target, run}:
        if (report := _clean_report(folder, names)) is not None:
            write_report(report, folder)
    root = target.resolve()
    parts = [root, *(root / name for name in ("dataset", "model", "bundle"))]
    _remove_leftovers([*parts, run_dataset(run).path] if is_run else parts)
    return in_bundle, in_dataset


def _wait_until_tidy(store: EventStore) -> None:
    """Wait until a store has removed the users from the disk, or has begun to.

    Raises
    ------
    BusyError
        It takes too long. The store begins later, while a server uses it.
    """
    end = time.monotonic() + TIDY_WAIT_S
    while not store.tidy():
        if time.monotonic() >= end:
            raise BusyError(
                "The users were removed, but Redis does not begin to rewrite its append-only file, which may hold them. A server "
                "that uses this Redis asks again until it does. Without one, run `redis-cli BGREWRITEAOF` later."
            )
        time.sleep(TIDY_STEP_S)


def _forget_in_bundle(bundle: Path, names: set[str]) -> int:
    known = len(rows_to_forget(Dataset.open(bundle / "dataset"), names.__contains__))
    return known if forget_users(bundle, names.__contains__) is not None else 0


def _forget_in_versions(folder: Path, names: set[str], rewritten: str | None) -> None:
    """Rewrite the versions that a server has kept; drop that of the rewritten bundle and what the server does not know any more."""
    versions = KeptVersions(folder, keep=0)
    if rewritten is not None:
        versions.drop(rewritten)  # it is kept again when the rewritten bundle is served
    for path in versions.paths():
        manifest = forget_users(path, names.__contains__)
        if manifest is not None:
            versions.renamed(path, manifest.seal[:12])
    for left in set(folder.glob("*/")) - set(versions.paths()):
        shutil.rmtree(left, ignore_errors=True)


def _remove_leftovers(parts: Sequence[Path]) -> None:
    """Remove what killed commands have left beside and in these folders: copies that still have the users."""
    for part in parts:
        for left in part.parent.glob(f".{glob.escape(part.name)}.*"):
            if left.suffix in (".new", ".old", ".update"):  # a killed update begins anew
                shutil.rmtree(left, ignore_errors=True)
        for left in part.glob(".*.partial"):
            left.unlink(missing_ok=True)


def _kind(folder: Path) -> str:
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("kind"))
    except (OSError, ValueError, AttributeError):
        return ""


def _forget_in_run(run: Path, names: set[str]) -> int:
    """Rewrite the dataset and the checkpoints of a run. The checkpoints know the new dataset before it takes its place."""
    manifest = run_manifest(run)
    dataset = run_dataset(run, manifest)
    rows = rows_to_forget(dataset, names.__contains__)
    if not len(rows):
        return 0
    with atomic_folder(dataset.path) as fresh:
        shutil.copytree(dataset.path, fresh, dirs_exist_ok=True)
        without_users(dataset, rows, fresh)
        fingerprint = Dataset.open(fresh).fingerprint
        for file in [run / name for name in CHECKPOINTS if (run / name).is_file()]:
            state = load_checkpoint(file)
            save_checkpoint(file, _without(state, dataset, rows) | {"data": fingerprint})
        with atomic_file(run / MANIFEST) as beside:
            values = manifest.model_copy(update={"data": fingerprint}).json_values()
            beside.write_text(json.dumps(values, indent=1, sort_keys=True))
    return len(rows)


def _without(state: dict[str, Any], dataset: Dataset, rows: Int) -> dict[str, Any]:
    state = state | {"model": without_rows(state["model"], dataset, rows)}
    moments = state.get("rows", {}).get(USER_TABLE.removesuffix(".weight"), {}).get("moments")
    if moments is not None:
        moments[torch.from_numpy(rows[rows < len(moments)])] = 0
    return state


def _clean_report(folder: Path, names: set[str]) -> Report | None:
    """Return the report of a run without the lists of these users; None if there is no report, or it has none of them."""
    file = folder / REPORT
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        clean = without_examples(found, names)
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise DataError(f"{file} is not a readable report. Delete it, or write it again with `twotower evaluate`.") from None
    return None if clean == found else parse_document(Report, clean, file)
