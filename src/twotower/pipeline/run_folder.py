"""Open the folder of a run: its manifest and its dataset, also after the folder was copied or moved."""

from __future__ import annotations

from pathlib import Path

from twotower.data.dataset import Dataset
from twotower.utils.manifests import RunManifest, open_manifest


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
    return Dataset.open((run / (manifest or run_manifest(run)).dataset).resolve())


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
