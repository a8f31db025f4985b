"""One folder that holds everything needed to answer: weights, item vectors, catalogue, encoders, histories, settings, hashes.

    manifest.json       format version, settings, features, metrics, the fingerprint of the data, the moment of the index, hashes
    model.safetensors   weights of both towers
    towers/             both towers as ONNX (see `onnx_towers`), where the package `onnx` was there to write them
    index.safetensors   what is known of each item row; see `ItemArrays`
    index/              what `twotower tune-index` built to search the vectors faster; without it they are searched exactly
    dataset/            catalogue, encoders, histories (the prepared dataset, without rejects)

Nothing in it is code: weights are safetensors, tables Parquet, graphs ONNX, the rest JSON. Written beside its place and exchanged
with what is there: a reader finds the old bundle or the new one, whole.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from twotower.bundle.consistency import check_arrays, check_dataset, model_of
from twotower.bundle.item_arrays import ItemArrays, encode_items, item_arrays
from twotower.bundle.onnx_towers import USER_FILE, OnnxUserTower, can_run, export_towers, hindrance
from twotower.bundle.sealed_folder import MANIFEST, atomic_replace, verify_manifest, write_manifest
from twotower.data.dataset import ASIDE, Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.errors import DataError
from twotower.features.feature_store import FeatureStore
from twotower.models.build import build_model
from twotower.models.neural_retriever import PORTION
from twotower.models.two_tower import TwoTower
from twotower.retriever import Queries, Recommendations
from twotower.schema import FIRST_ROW
from twotower.search.index import ExactIndex, Index, joined
from twotower.search.registry import load_index
from twotower.search.reranking import append_popularity_weight, boost_recent_items
from twotower.utils.array_files import open_arrays, write_arrays
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import Config, parse_config
from twotower.utils.console import log
from twotower.utils.types import Float, Mask

MODEL_FILE, INDEX_FILE, INDEX, TOWERS, DATASET = "model.safetensors", "index.safetensors", "index", "towers", "dataset"
SAME = 1e-3  # between a stored number and the same computed again, on another machine and in other blocks
REPORTED = ("verdict", "protocol", "dataset", "systems", "differences", "beyond")  # of a judgement: what the page shows
TRIES, PAUSE_S = 10, 0.05  # of opening a folder that is being replaced


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; a `Retriever`.

    Attributes
    ----------
    store
        Features as known at the moment of the index.
    arrays
        What is known of each item.
    tower
        The user tower in ONNX Runtime; None where there is none, and PyTorch answers.
    built
        The index that `twotower tune-index` built; None where there is none, and all vectors are searched.
    """

    path: Path
    manifest: dict[str, Any]
    config: Config
    dataset: Dataset
    store: FeatureStore
    model: TwoTower
    arrays: ItemArrays
    tower: OnnxUserTower | None = None
    built: Index | None = None
    name: str = "two-tower"

    @property
    def moment_s(self) -> int:
        """Seconds: the moment the item vectors stand for."""
        return int(self.manifest["moment_s"])

    @cached_property
    def offered(self) -> Mask | None:
        """bool [n_items]: False for items taken out of the catalogue, and the reserved rows; None where all are offered."""
        return None if self.arrays.offered[FIRST_ROW:].all() else self.arrays.offered

    @cached_property
    def index(self) -> Index:
        """What searches `arrays.vectors`."""
        return self.built or ExactIndex(torch.from_numpy(self.arrays.vectors))

    @cached_property
    def vectors(self) -> Tensor:
        """float32 [n_items, D]: unit vectors of the items."""
        return torch.from_numpy(self.arrays.vectors)[:, :-1]

    def encode(self, queries: Queries) -> Float:
        """User vectors float32 [B, D]: through ONNX Runtime where it is, else through PyTorch, the same to 1e-5."""
        if self.tower is not None:
            return self.tower(self.store.padded(queries))
        with torch.inference_mode():
            vectors: Float = self.model.encode_users(self.store.users(queries)).numpy()
        return vectors

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """See `Retriever`; scores are inner products. Items that were taken out of the catalogue are not recommended."""
        found = []
        for start in range(0, len(queries), PORTION):
            part = queries.slice(start, start + PORTION)
            allowed = allow[start : start + PORTION] if allow is not None and allow.ndim == 2 else allow
            if self.offered is not None:
                allowed = self.offered if allowed is None else allowed & self.offered
            again, dial = np.full(len(part), not exclude_seen), np.zeros(len(part), np.float32)
            towers = torch.from_numpy(self.encode(part))
            vectors = boost_recent_items(towers, part, self.vectors, self.model.recent_item_weight(), again).numpy()
            found.append(
                self.index.search(
                    append_popularity_weight(vectors, self.model.popularity_weight(), dial),
                    k,
                    exclude=(part.offsets, part.item_row) if exclude_seen else None,
                    allow=allowed,
                )
            )
        return joined(found, k)


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
    with atomic_replace(out) as folder:
        model, config, progress = load_trained(checkpoint, dataset)
        moment = split_moment(dataset, "future")
        store = open_store(dataset, "future", config.model)
        weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        (folder / MODEL_FILE).write_bytes(save(weights))
        write_arrays(folder / INDEX_FILE, asdict(item_arrays(model, store, dataset, moment)))
        why_not = hindrance(model)
        if why_not is None:
            export_towers(model, store, folder / TOWERS)
        else:
            log.warning("This bundle is without ONNX graphs. %s", why_not)
        copy_dataset(dataset, folder / DATASET)
        return write_manifest(
            folder,
            {
                "config": config.model_dump(mode="json"),
                "data": dataset.fingerprint,
                "features": [asdict(spec) for spec in dataset.specs],
                "moment_s": moment,
                "training": progress,
                "metrics": metrics or {},
                "popularity_weight": model.popularity_weight(),
                "recent_item_weight": model.recent_item_weight(),
            },
        )


def copy_dataset(dataset: Dataset, folder: Path) -> None:
    """Copy what a model is made from into the new folder `folder`."""
    folder.mkdir()
    inner = json.loads((dataset.path / MANIFEST).read_text())
    inner["hashes"] = {name: digest for name, digest in inner["hashes"].items() if name not in ASIDE}
    for name in inner["hashes"]:
        shutil.copyfile(dataset.path / name, folder / name)
    (folder / MANIFEST).write_text(json.dumps(inner, indent=1, sort_keys=True))


def note_report(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Put the judgement's figures into the manifest of the bundle at `path`, beside those of its training; returns the manifest."""
    manifest = verify_manifest(path)
    kept = {name: report[name] for name in REPORTED if name in report}
    with atomic_replace(path) as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        return write_manifest(folder, {**manifest, "report": kept})


def load_bundle(path: Path) -> Bundle:
    """Open a bundle after checking its version, the hash of every file, and that its parts fit together.

    A bundle that takes the place of another while it is read is read again.

    Raises
    ------
    DataError
        It is none, of another version, incomplete, holds more than was written, or a file is not what was written.
    """
    for last in (*[False] * (TRIES - 1), True):
        before = _identity(path)
        try:
            bundle = _load(path)
            if last or _identity(path) == before:
                return bundle
        except DataError:
            if before is None:
                time.sleep(PAUSE_S)
            if last or _identity(path) == before:
                raise
    raise AssertionError("the last try returns or raises")


def _load(path: Path) -> Bundle:
    try:
        manifest = verify_manifest(path)
        config = parse_config(manifest["config"])
        dataset = Dataset.open(path / DATASET)
        arrays = ItemArrays(**{name: np.array(array) for name, array in open_arrays(path / INDEX_FILE).items()})
        check_dataset(dataset)
        check_arrays(arrays, dataset, config)
        store = open_store(dataset, "future", config.model)
        model = model_of(dataset, config, load_file(path / MODEL_FILE), store)
        # A built index may go to a parser that trusts its file: only now that the hash of every file was checked.
        built = load_index(path / INDEX, torch.from_numpy(arrays.vectors)) if manifest.get("index") else None
        plain = Bundle(path, manifest, config, dataset, store, model, arrays, built=built)
        bundle = plain
        if f"{TOWERS}/{USER_FILE}" in manifest["hashes"] and can_run():
            bundle = replace(plain, tower=OnnxUserTower(path / TOWERS / USER_FILE, arrays.tokens))
        _check_towers(plain, bundle)
        return bundle
    except Exception as error:  # whatever a reader of a stranger's file raises: the file is at fault
        if isinstance(error, DataError):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise DataError(f"The parts of a bundle must fit together. {path}: {what}. Export it again.") from error


def _check_towers(plain: Bundle, bundle: Bundle) -> None:
    """Both towers give vectors, and the graph gives those of the weights."""
    n = plain.dataset.n_items
    queries = Queries.of([[], list(range(FIRST_ROW, min(n, FIRST_ROW + 3)))], time_s=plain.moment_s)
    wanted, found = plain.encode(queries), bundle.encode(queries)
    rows = np.unique(np.array([FIRST_ROW, n - 1]).clip(0, n - 1))
    vectors, tokens = encode_items(plain.model, plain.store, rows, plain.moment_s)
    for name, one, other in (
        (f"the graph of {USER_FILE}", wanted, found),
        (f"the vectors of {INDEX_FILE}", vectors, plain.arrays.vectors[rows]),
        (f"the tokens of {INDEX_FILE}", tokens, plain.arrays.tokens[rows]),
    ):
        if not np.allclose(one, other, atol=SAME):
            raise ValueError(f"{name} are not those of the weights")


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Which folder stands at `path`, None where none does."""
    try:
        at, manifest = path.stat(), (path / MANIFEST).stat()
        return at.st_dev, at.st_ino, manifest.st_ino
    except OSError:
        return None
