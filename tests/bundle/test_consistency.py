"""Test that inconsistent files are rejected with a one-line error, also with a valid seal, before memory is allocated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.bundle.bundle import INDEX_FILE, MODEL_FILE, load_bundle
from twotower.bundle.sealed_folder import MANIFEST, verify_manifest, write_manifest
from twotower.errors import DataError
from twotower.utils.array_files import open_arrays, write_arrays

from ..documents import seal_again

Change = Callable[[Path, dict[str, Any]], object]


def edit_arrays(file: Path, **changes: Callable[[Any], Any]) -> None:
    arrays = {name: np.array(value) for name, value in open_arrays(file).items()}
    write_arrays(file, arrays | {name: change(arrays[name]) for name, change in changes.items()})


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tower(*names: str, **settings: Any) -> Change:
    def change(_: Path, manifest: dict[str, Any]) -> None:
        for name in names or ("user_tower",):
            manifest["config"]["model"][name].update(settings)

    return change


CHANGES: dict[str, tuple[Change, str]] = {
    "wide": (tower("user_tower", "item_tower", embedding_dim=4 * 10**9), "embedding_dim is 4000000000, but the weights have 16"),
    "hidden": (tower(hidden_dims=[10**9, 16]), "hidden_dims is [1000000000], but the weights have [24]"),
    "deep": (tower(num_blocks=10**9), "more layers than there are weights"),
    "long": (tower(max_history=10**12), "max_history is 1000000000000, but the weights have 20"),
    "another setting": (tower(pooling="attention"), "pooling"),
    "no settings": (lambda _, manifest: manifest.pop("config"), "config: Field required"),
    "other vectors": (lambda f, _: edit_arrays(f / INDEX_FILE, vectors=lambda v: v[:, ::-1]), "the vectors of index.safetensors"),
    "no numbers": (lambda f, _: edit_arrays(f / INDEX_FILE, vectors=lambda v: v * np.nan), "vectors has float32"),
    "one infinite number": (
        lambda f, _: edit_arrays(f / INDEX_FILE, tokens=lambda v: np.where(np.arange(v.size).reshape(v.shape) == 7, -np.inf, v)),
        "tokens has float32",
    ),
    "fewer items": (
        lambda f, _: edit_arrays(f / INDEX_FILE, recent_event_count=lambda v: v[:-1]),
        "recent_event_count has int64",
    ),
    "broken weights": (
        lambda f, _: edit_arrays(f / MODEL_FILE, **{"geo.weight": lambda v: v * np.inf}),
        "geo.weight does not hold finite",
    ),
    "other weights": (lambda f, _: edit_arrays(f / MODEL_FILE, **{"geo.weight": lambda v: -v}), "do not match the weights"),
    "more users": (lambda f, _: edit_json(f / "dataset" / MANIFEST, n_users=10**12), "the users do not match"),
    "more trained": (lambda f, _: edit_json(f / "dataset" / MANIFEST, n_train_users=10**12), "the trained users do not match"),
    "lost items": (
        lambda f, _: edit_arrays(f / "dataset" / "events.safetensors", item_row=lambda v: v + 1000),
        "the items of events do not match",
    ),
    "no graph": (lambda f, _: (f / "towers" / "user.onnx").write_bytes(b"print('hello')"), "towers"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_one_line(town_bundle: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(town_bundle, tmp_path / "bundle"))
    manifest = json.loads((folder / MANIFEST).read_text())
    change, said = CHANGES[name]
    change(folder, manifest)
    seal_again(folder, manifest)
    with pytest.raises(DataError) as caught:
        load_bundle(folder)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_bundle_without_graphs_answers_by_its_weights(town_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(town_bundle, tmp_path / "bundle"))
    shutil.rmtree(folder / "towers")
    write_manifest(folder, verify_manifest(town_bundle))
    assert load_bundle(folder).tower is None
