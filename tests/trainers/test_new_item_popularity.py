"""Test the calibration of new items: their share of the top-10 positions, and when it is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import split_moment
from twotower.data.prepare import prepare
from twotower.models.neural_retriever import NeuralRetriever
from twotower.models.two_tower import NEW_LENGTH
from twotower.pipeline.stages import train_stage
from twotower.schema import FIRST_ROW
from twotower.trainers.new_item_popularity import SIMULATED_SHARE, TOP_K, _bias, calibrate_new_items
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.checkpoint import load_checkpoint

from ..conftest import TOWER
from .conftest import settings

WIDTH = TOWER["embedding_dim"]


@pytest.fixture(scope="module")
def trainer(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> TwoTowerTrainer:
    trained = TwoTowerTrainer(dataset, settings(max_steps=60), tmp_path_factory.mktemp("run"))
    trained.fit()
    trained.model.eval()
    return trained


def calibrated(trainer: TwoTowerTrainer, exposure: float, seed: int = 0) -> tuple[float, NeuralRetriever]:
    dataset, moment = trainer.dataset, split_moment(trainer.dataset, "valid")
    retriever = NeuralRetriever(trainer.model, trainer.store, n_item_rows=dataset.n_item_rows, time_s=moment)
    before = retriever.index.vectors.clone()
    kept = float(trainer.model.priors.new_popularity)
    found = calibrate_new_items(retriever, dataset, time_s=moment, exposure=exposure, seed=seed)
    assert float(trainer.model.priors.new_popularity) == kept, "the model stays unchanged"
    new = np.arange(dataset.n_item_rows) >= dataset.n_train_item_rows
    after = retriever.index.vectors
    assert new.any() and torch.equal(after[~new], before[~new]) and torch.equal(after[:, :WIDTH], before[:, :WIDTH])
    counted = WIDTH + len(trainer.model.priors.half_lives)
    np.testing.assert_allclose(after[new, WIDTH:counted], found, atol=1e-6)
    assert torch.equal(after[:, counted:], before[:, counted:]), "the novelty stays"
    return found, retriever


def share_of_positions(trainer: TwoTowerTrainer, retriever: NeuralRetriever, popularity: float, seed: int) -> float:
    """Compute the share of top-10 positions by hand: known items without id and state, ranked among all other known items."""
    dataset, model = trainer.dataset, trainer.model
    known = np.arange(FIRST_ROW, dataset.n_train_item_rows)
    size = max(dataset.n_items - dataset.n_train_items, round(SIMULATED_SHARE * len(known)))
    rows = np.random.default_rng(seed).choice(known, size, replace=False)
    batch = trainer.store.items(rows, np.full(size, split_moment(dataset, "valid")))
    vectors = retriever.index.vectors.clone()
    with torch.no_grad():
        vectors[rows, :WIDTH] = model.encode_items(model.as_if_new(batch))
    vectors[rows, WIDTH:] = popularity
    queries = trainer.held_out.queries
    scores = (retriever.encode(queries) @ vectors.T).numpy()
    scores[:, :FIRST_ROW], scores[:, dataset.n_train_item_rows :] = -np.inf, -np.inf
    scores[np.repeat(np.arange(len(queries)), queries.lengths), queries.item_row] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :TOP_K]
    return float(np.isin(best, rows).mean())


@pytest.mark.parametrize("exposure", [0.03, 0.15])
def test_new_items_take_their_share_of_the_positions(trainer: TwoTowerTrainer, exposure: float) -> None:
    shares = []
    for seed in range(12):
        popularity, retriever = calibrated(trainer, exposure, seed)
        assert share_of_positions(trainer, retriever, popularity, seed) == pytest.approx(exposure, abs=0.01), "of those chosen"
        shares.append(share_of_positions(trainer, retriever, popularity, seed + 100))
    assert np.mean(shares) == pytest.approx(exposure, rel=0.4), "of others"


def test_more_positions_take_more_popularity(trainer: TwoTowerTrainer) -> None:
    found = [calibrated(trainer, exposure)[0] for exposure in (0.0, 0.01, 0.1, 0.5)]
    assert found == sorted(set(found))


def test_a_vector_of_a_new_item_is_shorter_and_has_no_item_state(trainer: TwoTowerTrainer) -> None:
    rows = np.arange(FIRST_ROW, FIRST_ROW + 20)
    early, late = (trainer.store.items(rows, np.full(20, moment)) for moment in (0, 2_000_000_000))
    with torch.no_grad():
        known, new, later = map(trainer.model.encode_items, (early, *map(trainer.model.as_if_new, (early, late))))
    torch.testing.assert_close(new.norm(dim=1), torch.full((20,), NEW_LENGTH))
    torch.testing.assert_close(known.norm(dim=1), torch.ones(20))
    assert torch.equal(new, later)


def test_it_is_found_without_a_validation_part_too(town, tmp_path: Path) -> None:
    """Training stores it in the checkpoint."""
    config = town.config.model_copy(
        update={
            "prepare": town.config.prepare.model_copy(update={"split": town.config.prepare.split.model_copy(update={"valid": 0.0})})
        }
    )
    prepare(config, tmp_path / "dataset")
    best = train_stage(settings(max_steps=5, recipe="fixed"), tmp_path / "dataset", tmp_path / "run")
    assert best.value is None
    assert float(load_checkpoint(tmp_path / "run" / "best.pt")["model"]["priors.new_popularity"]) != 0


def test_new_items_without_features_take_no_positions(dataset: Dataset, tmp_path: Path) -> None:
    config = settings(max_steps=20)
    names = ["item.state", *(f"item.{spec.name}" for spec in dataset.specs if spec.side == "item")]
    config = config.model_copy(update={"model": config.model.model_copy(update={"exclude_features": names})})
    trainer = TwoTowerTrainer(dataset, config, tmp_path)
    trainer.fit()
    popularity, retriever = calibrated(trainer, 0.15)
    assert share_of_positions(trainer, retriever, popularity, 0) < 0.01


def test_where_popularity_has_no_part_nothing_is_made_of_it(dataset: Dataset, tmp_path: Path) -> None:
    config = settings(max_steps=2)
    config = config.model_copy(update={"model": config.model.model_copy(update={"popularity_prior": 0.0})})
    trainer = TwoTowerTrainer(dataset, config, tmp_path)
    trainer.fit()
    moment = split_moment(dataset, "valid")
    retriever = NeuralRetriever(trainer.model, trainer.store, n_item_rows=dataset.n_item_rows, time_s=moment)
    assert calibrate_new_items(retriever, dataset, time_s=moment, exposure=0.1, seed=0) == 0
    batch = trainer.store.items(np.arange(FIRST_ROW, FIRST_ROW + 5), np.zeros(5, np.int64))
    with torch.no_grad():
        vectors = trainer.model.eval().encode_items(trainer.model.as_if_new(batch))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))


def test_a_catalogue_of_fewer_items_than_positions_warns_of_nothing() -> None:
    known_items, best = np.full((3, TOP_K), -np.inf), np.full((3, TOP_K), -np.inf)
    known_items[:, 0], best[:, 0] = 2.0, 1.0
    assert _bias(best, known_items, np.array([1.0, 0.0, 1e-40]), 0.5) == 0.0  # the first gap is to an empty place
    known_items[:, -1] = 0.0
    assert _bias(best, known_items, np.array([1.0, 0.0, 1e-300]), 0.5) == pytest.approx(-0.5e300)
