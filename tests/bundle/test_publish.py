"""Test the published files: their inner products give the lists of the bundle, and they hold what a database needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.api.model import load
from twotower.bundle.bundle import load_bundle
from twotower.bundle.publish import publish_parquet, publish_users
from twotower.bundle.revision import remove_items
from twotower.cli import main
from twotower.data.dataset import Dataset
from twotower.retrieval.recommender import Recommender
from twotower.schema import FIRST_ROW


@pytest.fixture(scope="module")
def files(town_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("published")
    items, users = folder / "vectors.parquet", folder / "users.parquet"
    assert main(["publish", str(town_bundle), "--to", str(items), "--users", str(users)]) == 0
    return items, users


def array(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), np.float32)


def test_the_inner_products_give_the_lists_of_the_bundle(files: tuple[Path, Path], recommender: Recommender) -> None:
    items, users = (pq.read_table(file) for file in files)
    assert users.num_rows == recommender.dataset.n_users and items.num_rows == int(recommender.bundle.arrays.offered.sum())
    scores, ids = array(users["vector"]) @ array(items["vector"]).T, np.array(items["item_id"].to_pylist())
    bonuses = 0
    for at in range(0, users.num_rows, 23):
        seen = np.isin(ids, users["seen"][at].as_py())
        for item, bonus in zip(users["bonus_items"][at].as_py(), users["bonuses"][at].as_py(), strict=True):
            scores[at, ids == item] += bonus
            assert item not in users["seen"][at].as_py()
            bonuses += 1
        best = np.argsort(-np.where(seen, -np.inf, scores[at]), kind="stable")[:10]
        wanted = recommender.recommend(user=users["user_id"][at].as_py(), k=10)
        assert ids[best].tolist() == [one.item_id for one in wanted]
        np.testing.assert_allclose(scores[at, best], [one.score for one in wanted], atol=2e-3)
    assert bonuses > 100


def test_the_norms_of_items_are_similar(files: tuple[Path, Path], recommender: Recommender) -> None:
    norms = np.linalg.norm(array(pq.read_table(files[0])["vector"]), axis=1)
    raw = np.linalg.norm(recommender.bundle.arrays.vectors[FIRST_ROW:], axis=1)
    assert norms.max() / norms.min() < 3 < raw.max() / 100, "a graph of neighbours needs this"


def test_items_disliked_after_the_last_event_are_left_out_too(
    town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(town_bundle)
    hated = int(bundle.arrays.offered[FIRST_ROW:].argmax()) + FIRST_ROW

    def late(_: Dataset, __: np.ndarray, time_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return an item that everybody dislikes, an hour after the last event."""
        found = time_s > bundle.moment_s + 3600
        return np.append(0, np.cumsum(found)), np.full(int(found.sum()), hated)

    monkeypatch.setattr(Dataset, "disliked", late)
    publish_users(bundle, tmp_path / "users.parquet")
    users = pq.read_table(tmp_path / "users.parquet")
    name = bundle.dataset.item_ids[hated]
    assert all(name in seen for seen in users["seen"].to_pylist())
    assert not any(name in listed for listed in users["bonus_items"].to_pylist())


def test_a_new_history_is_queried_with_the_balance_of_the_file(files: tuple[Path, Path], town_bundle: Path) -> None:
    about = json.loads(pq.read_schema(files[0]).metadata[b"twotower"])
    model, table = load(town_bundle), pq.read_table(files[0])
    bundle = load_bundle(town_bundle)
    bundle.model.priors.transitions.zero_()  # only the server knows their bonuses for a new history
    assert about["version"] == bundle.manifest.seal[:12]
    assert about["tower"] + about["popularity"] + about["location"] == array(table["vector"]).shape[1]
    history = table["item_id"].to_pylist()[3:6]
    _, queries = model.user_vectors(history=history)
    queries[:, -len(about["balance"]) :] /= about["balance"]
    scores = (queries @ array(table["vector"]).T)[0]
    scores[3:6] = -np.inf
    best = np.argsort(-scores)[:8]
    wanted = Recommender(bundle).recommend(history=history, k=8)
    assert [table["item_id"][int(at)].as_py() for at in best] == [one.item_id for one in wanted]


def test_the_payload_is_the_catalogue(files: tuple[Path, Path], recommender: Recommender) -> None:
    table, dataset = pq.read_table(files[0]), recommender.dataset
    offered = pa.array(np.flatnonzero(recommender.bundle.arrays.offered[FIRST_ROW:]))
    for name in dataset.items.column_names:
        assert table[name].to_pylist() == dataset.items[name].take(offered).to_pylist(), name
    np.testing.assert_allclose(
        table["popularity"].to_numpy(),
        recommender.bundle.arrays.vectors[offered.to_numpy() + FIRST_ROW, recommender.bundle.vectors.shape[1]],
    )


def test_removed_items_are_left_out(town_bundle: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(town_bundle, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    gone = str(bundle.dataset.item_ids[np.flatnonzero(bundle.arrays.offered)[0]])
    before = publish_parquet(bundle, tmp_path / "a.parquet")
    remove_items(tmp_path / "bundle", [gone])
    assert publish_parquet(load_bundle(tmp_path / "bundle"), tmp_path / "b.parquet") == before - 1
    assert gone not in pq.read_table(tmp_path / "b.parquet")["item_id"].to_pylist()


def test_columns_of_the_same_name_stay_apart(town_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(town_bundle)
    bundle.dataset.items = bundle.dataset.items.append_column("vector", pa.array(range(len(bundle.dataset.items))))
    publish_parquet(bundle, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert pa.types.is_fixed_size_list(table["vector"].type) and pa.types.is_integer(table["catalogue_vector"].type)


def test_files_that_exist_stay(town_bundle: Path, files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    before = files[0].read_bytes()
    assert main(["publish", str(town_bundle), "--to", str(files[0])]) == 2
    assert "already exists" in capsys.readouterr().err and files[0].read_bytes() == before
    assert main(["publish", str(town_bundle), "--to", str(tmp_path / "new.parquet"), "--users", str(files[1])]) == 2
    assert not (tmp_path / "new.parquet").exists()
    assert publish_users(load_bundle(town_bundle), tmp_path / "users.parquet") == pq.read_metadata(files[1]).num_rows
