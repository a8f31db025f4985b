"""Hold what a fitted model has, save it and open it. Needs no extra."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from weakref import finalize

from twotower.bundle.bundle import REPORT
from twotower.bundle.sealed_folder import atomic_replace, bundle_in, verify_manifest, write_manifest
from twotower.errors import DataError
from twotower.retrieval.recommender import Recommender
from twotower.utils.documents import Report, parse_document
from twotower.utils.frames import Kind, default_kind


@dataclass
class Fitted:
    """Files and kind of frame of a fitted model.

    Attributes
    ----------
    bundle
        Folder of the bundle.
    folder
        Folder of the run; None for a bundle that was opened.
    report_file
        Report of the evaluation; None without one.
    kind
        Library of the answers.
    """

    bundle: Path
    folder: Path | None
    report_file: Path | None
    kind: Kind
    temporary: finalize[..., object] | None = None
    """Removes a temporary folder."""

    @cached_property
    def report(self) -> Report | None:
        """The report of the evaluation."""
        file = self.report_file
        return None if file is None else parse_document(Report, json.loads(file.read_text(encoding="utf-8")), file)

    @cached_property
    def recommender(self) -> Recommender:
        """The opened bundle."""
        return Recommender.load(self.bundle)


def open_bundle(path: Path) -> Fitted:
    """Return a model of the bundle at `path`, or in the run at `path`."""
    bundle = bundle_in(path)
    recommender = Recommender.load(bundle)
    run = None if bundle == path else path
    files = [file for file in (path / REPORT, bundle / REPORT) if file.is_file()]
    made = Fitted(bundle, run, files[0] if files else None, default_kind(recommender.bundle.manifest.frame))
    made.__dict__["recommender"] = recommender
    return made


def save(made: Fitted, path: Path) -> Path:
    """Write the bundle to the folder `path`, with the library of the answers in its manifest."""
    manifest = verify_manifest(made.bundle)
    try:
        with atomic_replace(path) as folder:
            shutil.copytree(made.bundle, folder, dirs_exist_ok=True)
            write_manifest(folder, manifest.model_copy(update={"frame": made.kind}))
    except OSError as error:
        raise DataError(f"Cannot write a model to {path}: {error.strerror or error}. Choose another folder.") from None
    return path
