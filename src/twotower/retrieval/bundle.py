"""One folder that holds everything needed to answer: weights, item vectors, catalogue, encoders, histories, settings, hashes.

    manifest.json       format version, settings, metrics, the moment of the index, sha256 of every file
    model.safetensors   weights of both towers
    index.safetensors   "items" float32 [n_items, D]
    dataset/            catalogue, encoders, histories (the prepared dataset, without rejects)

Nothing in it is code: weights are safetensors, tables Parquet, the rest JSON. Written beside its place and renamed: whole or not
at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from twotower.checkpoint import load_checkpoint
from twotower.config import Config, parse_config
from twotower.data.data_loader import open_store, split_moment
from twotower.data.dataset import ASIDE, Dataset
from twotower.errors import DataError
from twotower.models.build import build_model
from twotower.models.two_tower import TwoTower
from twotower.retrieval.neural import NeuralRetriever
from twotower.schema import FORMAT_VERSION


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: dict[str, Any]
    config: Config
    dataset: Dataset
    model: TwoTower
    vectors: Tensor


def load_trained(checkpoint: Path, dataset: Dataset) -> tuple[TwoTower, Config, dict[str, Any]]:
    """A model with the weights of a checkpoint, its settings, and where its training stood."""
    state = load_checkpoint(checkpoint)
    if state["data"] != dataset.fingerprint:
        raise DataError(
            f"A model goes with the data it was trained on. {dataset.path} has changed since {checkpoint} was written. Train again."
        )
    config = parse_config(state["config"])
    model = build_model(dataset, config)
    model.load_state_dict(state["model"])
    return model.eval(), config, state["progress"]


def export_bundle(checkpoint: Path, dataset: Dataset, out: Path, *, metrics: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the bundle of a trained model to `out` and return its manifest.

    Item vectors stand for the end of the data: every event counts towards an item's state.

    Raises
    ------
    DataError
        `out` exists and is no bundle.
    """
    if out.exists() and not _replaceable(out):
        raise DataError(
            f"A bundle is written to a new folder or over an older bundle. {out} is something else. Choose another --out."
        )
    model, config, progress = load_trained(checkpoint, dataset)
    moment = split_moment(dataset, "future")
    store = open_store(dataset, "future", config.model)
    retriever = NeuralRetriever(model, store, n_items=dataset.n_items, time_s=moment)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "dataset").mkdir(parents=True)
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    (beside / "model.safetensors").write_bytes(save(weights))
    (beside / "index.safetensors").write_bytes(save({"items": retriever.index.vectors.cpu().contiguous()}))
    inner = json.loads((dataset.path / "manifest.json").read_text())
    inner["hashes"] = {name: digest for name, digest in inner["hashes"].items() if name not in ASIDE}
    for name in inner["hashes"]:
        shutil.copyfile(dataset.path / name, beside / "dataset" / name)
    (beside / "dataset" / "manifest.json").write_text(json.dumps(inner, indent=1, sort_keys=True))
    manifest = {
        "format": FORMAT_VERSION,
        "kind": "bundle",
        "config": config.model_dump(mode="json"),
        "moment_s": moment,
        "training": progress,
        "metrics": metrics or {},
        "hashes": {str(path.relative_to(beside)): _sha256(path) for path in sorted(beside.rglob("*")) if path.is_file()},
    }
    (beside / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    if out.exists():
        shutil.rmtree(out)
    beside.rename(out)
    return manifest


def load_bundle(path: Path) -> Bundle:
    """Open a bundle after checking its version and the hash of every file.

    Raises
    ------
    DataError
        It is none, of another version, incomplete, or a file is not what was written.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        raise DataError(f"A bundle is a folder with a manifest.json. Found none at {path}. Run `twotower export`.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "bundle":
        raise DataError(f"The folder must hold a bundle. {path} holds something else. Run `twotower export RUN --out BUNDLE`.")
    if manifest.get("format") != FORMAT_VERSION:
        raise DataError(
            f"The bundle must have format {FORMAT_VERSION}. {path} has {manifest.get('format')}. Export it again with this version."
        )
    for name, digest in manifest["hashes"].items():
        file = path / name
        if not file.is_file() or _sha256(file) != digest:
            raise DataError(
                f"A bundle must be as it was written. {file} is {'changed' if file.is_file() else 'missing'}. Export it again."
            )
    config = parse_config(manifest["config"])
    dataset = Dataset.open(path / "dataset")
    model = build_model(dataset, config)
    model.load_state_dict(load_file(path / "model.safetensors"))
    return Bundle(path, manifest, config, dataset, model.eval(), load_file(path / "index.safetensors")["items"])


def _replaceable(path: Path) -> bool:
    if path.is_dir() and not any(path.iterdir()):
        return True
    try:
        return bool(json.loads((path / "manifest.json").read_text())["kind"] == "bundle")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
