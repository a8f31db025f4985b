"""Hold what a fitted model has, save it and open it. Needs no extra."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from twotower.bundle.sealed_folder import atomic_replace, bundle_in, verify_manifest, write_manifest
from twotower.retrieval.recommender import Recommender
from twotower.utils.frames import Kind, default_kind

FRAME = "frame"
"""Key of a saved bundle's manifest: the library of the frames that the model was fitted on."""


@dataclass
class Fitted:
    """What a fitted model has.

    Attributes
    ----------
    bundle
        Folder of the bundle.
    folder
        Folder of the run; None for a bundle that was opened.
    report
        Report of the evaluation, as JSON values; None without one.
    kind
        Library of the answers.
    """

    bundle: Path
    folder: Path | None
    report: dict[str, Any] | None
    kind: Kind

    @cached_property
    def recommender(self) -> Recommender:
        """The opened bundle."""
        return Recommender.load(self.bundle)


def open_bundle(path: Path) -> Fitted:
    """Return a model of the bundle at `path`, or in the run at `path`."""
    bundle = bundle_in(path)
    recommender = Recommender.load(bundle)
    manifest, report = recommender.bundle.manifest, path / "report.json"
    run = None if bundle == path else path
    said = json.loads(report.read_text(encoding="utf-8")) if run and report.is_file() else manifest.get("report")
    made = Fitted(bundle, run, said, default_kind(manifest.get(FRAME)))
    made.__dict__["recommender"] = recommender
    return made


def save(made: Fitted, path: Path) -> Path:
    """Write the bundle to the folder `path`, with the library of the answers in its manifest."""
    manifest = verify_manifest(made.bundle)
    with atomic_replace(path) as folder:
        shutil.copytree(made.bundle, folder, dirs_exist_ok=True)
        write_manifest(folder, {**manifest, FRAME: made.kind})
    return path
