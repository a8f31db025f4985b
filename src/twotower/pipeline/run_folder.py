"""Open the folder of a run: its manifest and its dataset, also after the folder was copied or moved."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.bundle.sealed_folder import MANIFEST, bundle_in
from twotower.data.dataset import Dataset
from twotower.errors import DataError
from twotower.utils.manifests import RunManifest, open_manifest


def root_of(run: Path) -> Path:
    """Return the folder with the bundle of a run, if its part `model` was named, also as "."."""
    part = run.resolve()
    if part.name != "model" or not (part.parent / "bundle" / MANIFEST).is_file():
        return run
    return run.parent if run.name == "model" else part.parent


@contextmanager
def locked(run: Path, *, shared: bool = False) -> Iterator[None]:
    """Let one process at a time change the folder of a run, or several read it. The lock ends with the process, however that ends.

    A run that is only read, in a folder that cannot be written, needs no lock.

    Raises
    ------
    DataError
        Another process holds the lock.
    """
    run = run.resolve()
    run.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = (run.parent / f".{run.name}.lock").open("w")
    except OSError:
        if not shared:
            raise
        yield
        return
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"Another command is changing {run}. One at a time is allowed. Wait until it has ended.") from None
        yield


def run_manifest(run: Path) -> RunManifest:
    """Return the manifest of a run's folder.

    Raises
    ------
    DataError
        `run` is not a run's folder.
    """
    return open_manifest(
        RunManifest, run, "Expected a folder written by `twotower train` or `twotower run`. Check the path, or train first."
    )


def run_dataset(run: Path, manifest: RunManifest | None = None) -> Dataset:
    """Open the dataset of a run.

    Parameters
    ----------
    run
        Folder with the manifest and the checkpoints.
    manifest
        The run's manifest, if it was read already.

    Raises
    ------
    DataError
        `run` is not a run's folder, or its dataset is missing.
    """
    path = (run / (manifest or run_manifest(run)).dataset).resolve()
    if (path / MANIFEST).is_file():
        return Dataset.open(path)
    root = root_of(run)
    bundle = bundle_in(root)
    more = "" if bundle == root else f" To forget users in its bundle meanwhile, run `twotower forget {bundle} --user ID`."
    raise DataError(
        f"The run {root} was trained on the dataset {path}, which is not there any more. "
        f"Move it back, or link its old path to its new one: `ln -s /NEW/PATH {path}`.{more}"
    )


def dataset_reference(dataset: Path, run: Path) -> str:
    """Return the path of a dataset as the manifest of `run` stores it.

    It is relative to `run` if both are parts of one folder, as `twotower run` writes them. A copy of that folder then uses its own
    dataset. Otherwise the path is absolute.

    Examples
    --------
    >>> dataset_reference(Path("/runs/yelp/dataset"), Path("/runs/yelp/model"))
    '../dataset'
    >>> dataset_reference(Path("/data/yelp"), Path("/runs/yelp"))
    '/data/yelp'
    """
    dataset, run = dataset.resolve(), run.resolve()
    together = (dataset.name, run.name) == ("dataset", "model") and dataset.parent == run.parent
    return "../dataset" if together else str(dataset)
