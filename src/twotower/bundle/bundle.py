"""Write and open bundles: folders with all data that inference needs.

    manifest.json       format version, settings, features, metrics, the fingerprint of the data, the time of the index, hashes
    model.safetensors   weights of both towers
    towers/             both towers as ONNX (see `onnx_towers`), if the package `onnx` was installed at export
    index.safetensors   arrays with one row per item; see `ItemArrays`
    index/              the index built by `twotower tune-index`; without it the search is exact
    report.json         the report of the evaluation, if there was one
    dataset/            catalogue, encoders, histories (the prepared dataset, without rejects)

A bundle contains no code: weights are safetensors, tables Parquet, graphs ONNX, the rest JSON. It is written to a temporary folder
and swapped in atomically, so a reader sees either the complete old bundle or the complete new one.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from twotower.bundle.signature import check_signature, read_trusted_key
from twotower.data.dataset import ASIDE, Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.errors import DataError
from twotower.features.feature_store import FeatureStore
from twotower.models.build import build_model
from twotower.models.neural_retriever import PORTION, query_vectors, search
from twotower.models.two_tower import TwoTower
from twotower.retriever import Queries, Recommendations
from twotower.schema import FIRST_ROW
from twotower.search.filters.item_filter import ResolvedFilter
from twotower.search.index import ExactIndex, Index, joined
from twotower.search.registry import load_index
from twotower.utils.array_files import arrays_of, open_arrays, write_arrays
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import ResolvedConfig, parse_config
from twotower.utils.console import log
from twotower.utils.documents import Report
from twotower.utils.manifests import BestValidation, BundleManifest, PriorsRecord, TrainingProgress
from twotower.utils.types import Float, Mask

MODEL_FILE, INDEX_FILE, INDEX, TOWERS, DATASET = "model.safetensors", "index.safetensors", "index", "towers", "dataset"
REPORT = "report.json"
TOLERANCE = 1e-3  # absolute difference of stored vectors and the same vectors computed on another machine or in other blocks
TRIES, PAUSE_S = 10, 0.05  # attempts to open a folder that is being replaced, and the seconds between them


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, which implements `Retriever`.

    Attributes
    ----------
    path
        Folder of the bundle.
    dataset
        The prepared dataset without rejects: catalogue, encoders and histories.
    store
        Features at the time of the item vectors.
    arrays
        Arrays with one row per item.
    tower
        The user tower in ONNX Runtime; None: PyTorch computes the user vectors.
    built
        The index built by `twotower tune-index`; None: the search is exact.
    as_of_s
        Time of the item vectors in seconds since 1970, if `bundle.refresh` has recomputed them; else None.
    """

    path: Path
    manifest: BundleManifest
    config: ResolvedConfig
    dataset: Dataset
    store: FeatureStore
    model: TwoTower
    arrays: ItemArrays
    tower: OnnxUserTower | None = None
    built: Index | None = None
    as_of_s: int | None = None
    name: str = "two-tower"

    @property
    def moment_s(self) -> int:
        """Return the time of the item vectors, in seconds since 1970."""
        return self.manifest.moment_s if self.as_of_s is None else self.as_of_s

    @cached_property
    def offered(self) -> Mask | None:
        """Return bool [n_item_rows], False for removed items and reserved rows; None if no item was removed."""
        return None if self.arrays.offered[FIRST_ROW:].all() else self.arrays.offered

    @cached_property
    def index(self) -> Index:
        """Return the index of `arrays.vectors`: the built one, else an exact index."""
        return self.built or ExactIndex(torch.from_numpy(self.arrays.vectors))

    @cached_property
    def vectors(self) -> Tensor:
        """Return the unit vectors of the items, float32 [n_item_rows, D]."""
        return torch.from_numpy(self.arrays.vectors)[:, : -self.model.priors.width]

    def encode(self, queries: Queries) -> Float:
        """Return user vectors float32 [B, D], computed by ONNX Runtime if available, else by PyTorch (equal to 1e-5)."""
        if self.tower is not None:
            return self.tower(self.store.padded(queries))
        with torch.inference_mode():
            vectors: Float = self.model.encode_users(self.store.users(queries)).numpy()
        return vectors

    def query_vectors(self, queries: Queries, popularity_bias: Float) -> Tensor:
        """Return the vectors float32 [B, D + P] to search the index with; see `neural_retriever.query_vectors`."""
        towers, items = torch.from_numpy(self.encode(queries)), torch.from_numpy(self.arrays.vectors)
        return query_vectors(self.model, self.store, towers, queries, items, popularity_bias=popularity_bias)

    def search(
        self,
        vectors: Tensor,
        queries: Queries,
        k: int,
        *,
        again: Mask,
        allow: Mask | None,
        filters: Sequence[ResolvedFilter | None] = (),
    ) -> Recommendations:
        """Return the k best items of each query; see `neural_retriever.search`.

        Parameters
        ----------
        filters
            The filters from which `allow` was compiled, for indexes that evaluate filters themselves.
        """
        index = self.index.with_filters(filters)
        items = torch.from_numpy(self.arrays.vectors)
        return search(self.model, self.store, index, items, vectors, queries, k, again=again, allow=allow)

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """Return the k best items of each query; see `Retriever`. Scores are inner products and bonuses.

        Removed items are not recommended.
        """
        parts = []
        for start in range(0, len(queries), PORTION):
            part = queries.slice(start, start + PORTION)
            allowed = allow[start : start + PORTION] if allow is not None and allow.ndim == 2 else allow
            if self.offered is not None:
                allowed = self.offered if allowed is None else allowed & self.offered
            vectors, again = self.query_vectors(part, np.zeros(len(part), np.float32)), np.full(len(part), not exclude_seen)
            parts.append(self.search(vectors, part, k, again=again, allow=allowed))
        return joined(parts, k)


def load_trained(checkpoint: Path, dataset: Dataset) -> tuple[TwoTower, ResolvedConfig, dict[str, Any]]:
    """Return the model of a checkpoint in evaluation mode, its settings and its training progress.

    Raises
    ------
    DataError
        The dataset has changed since the training, or the checkpoint cannot be read.
    """
    state = load_checkpoint(checkpoint)
    if state["data"] != dataset.fingerprint:
        raise DataError(
            f"{checkpoint} does not match {dataset.path}: the dataset has changed since the model was trained. Train again, or "
            "repeat `twotower forget` if it was interrupted."
        )
    config = parse_config(state["config"], ResolvedConfig)
    model = build_model(dataset, config)
    model.load_state_dict(state["model"])
    return model.eval(), config, state["progress"]


def export_bundle(checkpoint: Path, dataset: Dataset, out: Path, *, metrics: BestValidation | None = None) -> BundleManifest:
    """Write the bundle of a trained model to `out` and return its manifest.

    Item vectors are computed for the end of the data, so all events count for the item state.

    Parameters
    ----------
    checkpoint
        Checkpoint file of a run, such as `best.pt`.
    dataset
        The dataset on which it was trained.
    out
        New folder, or a bundle to replace.
    metrics
        The best validation of the run, for the manifest.

    Raises
    ------
    DataError
        `out` exists and is neither empty nor a bundle, or the dataset has changed since the training.
    """
    with atomic_replace(out) as folder:
        model, config, progress = load_trained(checkpoint, dataset)
        moment = split_moment(dataset, "future")
        store = open_store(dataset, "future", config.model)
        weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        (folder / MODEL_FILE).write_bytes(save(weights))
        write_arrays(folder / INDEX_FILE, arrays_of(item_arrays(model, store, dataset, moment)))
        why_not = hindrance(model)
        if why_not is None:
            export_towers(model, store, folder / TOWERS)
        else:
            log.warning("The bundle has no ONNX graphs. %s", why_not)
        copy_dataset(dataset, folder / DATASET)
        manifest = BundleManifest(
            config=config,
            data=dataset.fingerprint,
            features=list(dataset.specs),
            moment_s=moment,
            training=TrainingProgress(**{name: value for name, value in progress.items() if name != "reached"}),
            metrics=metrics,
            priors=PriorsRecord(**model.priors.as_json(float(model.temperature().detach()))),
        )
        return write_manifest(folder, manifest)


def copy_dataset(dataset: Dataset, folder: Path) -> None:
    """Copy the dataset to the new folder `folder`, without files that inference does not need (`ASIDE`)."""
    folder.mkdir()
    hashes = {name: digest for name, digest in dataset.manifest.hashes.items() if name not in ASIDE}
    for name in hashes:
        shutil.copyfile(dataset.path / name, folder / name)
    inner = dataset.manifest.model_copy(update={"hashes": hashes})
    (folder / MANIFEST).write_text(json.dumps(inner.json_values(), indent=1, sort_keys=True))


def note_report(path: Path, report: Report) -> BundleManifest:
    """Add an evaluation report to the bundle at `path`, and its summary to the manifest. Return the new manifest."""
    manifest = verify_manifest(path)
    with atomic_replace(path) as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        (folder / REPORT).write_text(json.dumps(report.json_values(), sort_keys=True, ensure_ascii=False), encoding="utf-8")
        return write_manifest(folder, manifest.model_copy(update={"report": report.summary()}))


def load_bundle(path: Path, trusted_key: Path | None = None) -> Bundle:
    """Open a bundle. Check its version, the hash of every file and that its files are mutually consistent.

    If the bundle is replaced while it is being read, it is read again.

    Parameters
    ----------
    path
        Folder of the bundle.
    trusted_key
        PEM file of a public Ed25519 key; the bundle must be signed with its private key. None: no signature is needed.

    Raises
    ------
    DataError
        The folder is not a bundle, has another format version, lacks a file, has an extra file, a file has changed, or the
        signature is missing or invalid.
    """
    key = read_trusted_key(trusted_key) if trusted_key is not None else None
    for last in (*[False] * (TRIES - 1), True):
        before = _identity(path)
        try:
            bundle = _load(path, key)
            if last or _identity(path) == before:
                return bundle
        except DataError:
            if before is None:
                time.sleep(PAUSE_S)
            if last or _identity(path) == before:
                raise
    raise AssertionError("the last try returns or raises")


def _load(path: Path, key: Any = None) -> Bundle:
    try:
        manifest = verify_manifest(path)
        if key is not None:
            check_signature(path, manifest, key)
        config = manifest.config
        dataset = Dataset.open(path / DATASET)
        arrays = ItemArrays(**open_arrays(path / INDEX_FILE, writable=True))  # PyTorch warns of read-only arrays
        check_dataset(dataset)
        store = open_store(dataset, "future", config.model)
        model = model_of(dataset, config, load_file(path / MODEL_FILE), store)
        check_arrays(arrays, dataset, config, columns=model.priors.width)
        # The parser of a built index may trust its file, so load it only after all hashes have been checked.
        built = load_index(path / INDEX, torch.from_numpy(arrays.vectors)) if manifest.index else None
        plain = Bundle(path, manifest, config, dataset, store, model, arrays, built=built)
        bundle = plain
        if f"{TOWERS}/{USER_FILE}" in manifest.hashes and can_run():
            bundle = replace(plain, tower=OnnxUserTower(path / TOWERS / USER_FILE, model, arrays.tokens))
        _check_towers(plain, bundle)
        return bundle
    except Exception as error:  # any exception while reading an untrusted file means that the file is invalid
        if isinstance(error, DataError):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise DataError(f"The files of the bundle {path} are inconsistent: {what}. Run `twotower export` again.") from error


def _check_towers(plain: Bundle, bundle: Bundle) -> None:
    """Raise a `ValueError` if the ONNX graph, the stored vectors or the stored tokens do not match the weights."""
    n = plain.dataset.n_item_rows
    queries = Queries.of([[], list(range(FIRST_ROW, min(n, FIRST_ROW + 3)))], time_s=plain.moment_s)
    expected, computed = plain.encode(queries), bundle.encode(queries)
    rows = np.unique(np.array([FIRST_ROW, n - 1]).clip(0, n - 1))
    vectors, tokens = encode_items(plain.model, plain.store, rows, plain.moment_s)
    for name, one, other in (
        (f"the outputs of {USER_FILE}", expected, computed),
        (f"the vectors of {INDEX_FILE}", vectors, plain.arrays.vectors[rows]),
        (f"the tokens of {INDEX_FILE}", tokens, plain.arrays.tokens[rows]),
    ):
        if not np.allclose(one, other, atol=TOLERANCE):
            raise ValueError(f"{name} do not match the weights")


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return numbers that identify the folder at `path`; None if there is no bundle."""
    try:
        folder, manifest = path.stat(), (path / MANIFEST).stat()
        return folder.st_dev, folder.st_ino, manifest.st_ino
    except (OSError, ValueError):  # ValueError: the path has a NUL
        return None
