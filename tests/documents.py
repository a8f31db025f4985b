"""Manifests and reports that tests make or change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower.bundle import sealed_folder
from twotower.bundle.sealed_folder import MANIFEST
from twotower.models.priors import Priors
from twotower.utils.config import parse_config
from twotower.utils.documents import Report
from twotower.utils.manifests import BestValidation, BundleManifest, DatasetManifest, PriorsRecord, TrainingProgress

BEST = BestValidation(metric="NDCG@10", value=0.1, step=1, total_steps=1)
PROGRESS = TrainingProgress(
    epoch=0, step_in_epoch=1, step=1, total_steps=1, examples=1, best=0.1, best_step=1, validations_since_best=0
)


def with_split(manifest: DatasetManifest, **split: Any) -> DatasetManifest:
    """Return the manifest with other settings of the split."""
    values = manifest.json_values()
    values["config"]["prepare"]["split"] |= split
    return DatasetManifest.model_validate(values)


def bundle_manifest(revision: int = 0, *, moment_s: int = 0) -> BundleManifest:
    """Return a manifest of a bundle without files."""
    return BundleManifest(
        config=parse_config({}).resolved(ordered=True, timed=True, events=0, ids=0),
        data="",
        features=[],
        moment_s=moment_s,
        training=PROGRESS,
        priors=PriorsRecord(**Priors(1.0, (0.0,)).as_json(1.0)),
        revision=revision,
    )


def empty_report(verdict: str) -> Report:
    """Return a report on nothing."""
    counts = ["users", "items", "new_users", "new_items", "events"]
    counts += [f"{part}_events" for part in ("train", "valid", "test", "withheld")]
    sizes = dict.fromkeys(("queries", "users", "targets", "catalogue"), 0)
    protocol = {"split": "time", "part": "test", "seen": "masked", "metric": "NDCG@10", "ks": [10], "ties": "", "interval": ""}
    maps = ("systems", "differences", "beyond", "settings", "left_out", "seconds", "slices")
    dataset = {**dict.fromkeys(counts, 0), "event_types": [], "features": []}
    return Report(verdict=verdict, protocol=protocol | sizes, dataset=dataset, **{name: {} for name in maps})  # type: ignore[arg-type]


def seal_again(folder: Path, manifest: Any) -> None:
    """Write a manifest with matching hashes and seal, as an attacker would."""
    hashes = {path.relative_to(folder).as_posix(): sealed_folder.sha256(path) for path in folder.rglob("*") if path.is_file()}
    manifest["hashes"] = {name: digest for name, digest in hashes.items() if name != MANIFEST}
    manifest["seal"] = sealed_folder._seal_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
