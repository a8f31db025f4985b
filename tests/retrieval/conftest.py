"""One bundle of the town for all tests of retrieval: weights drawn at random, so that every part of a tower says something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from twotower.checkpoint import save_checkpoint
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.models.build import build_model
from twotower.models.two_tower import TwoTower
from twotower.retrieval.bundle import export_bundle
from twotower.retrieval.recommender import Recommender

TOWER = {"embedding_dim": 16, "hidden_dims": [24, 16]}
MODEL = {"request_place": True, "user_tower": {**TOWER, "max_history": 20}, "item_tower": TOWER}


def drawn(dataset: Dataset, model: dict[str, Any], **training: Any) -> tuple[TwoTower, Config]:
    """A model whose weights are all drawn, the ones that begin at zero too, and its settings."""
    config = parse_config({"model": model, "training": training})
    built = build_model(dataset, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in built.state_dict().items():
            if value.ndim and name != "waves.waves":
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        built.new_popularity.fill_(0.75)
    return built.eval(), config


def checkpoint_of(dataset: Dataset, model: TwoTower, config: Config) -> dict[str, Any]:
    """What a trainer would have saved."""
    settings = config.model_dump(mode="json")
    return {"data": dataset.fingerprint, "config": settings, "model": model.state_dict(), "progress": {}}


@pytest.fixture(scope="session")
def town_bundle(town: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle; treat it as read-only."""
    root = tmp_path_factory.mktemp("town-bundle")
    dataset = Dataset.open(town.folder)
    model, config = drawn(dataset, MODEL)
    save_checkpoint(root / "best.pt", checkpoint_of(dataset, model, config))
    export_bundle(root / "best.pt", dataset, root / "bundle", metrics={"metric": "NDCG@10", "value": 0.1})
    return root / "bundle"


@pytest.fixture(scope="session")
def recommender(town_bundle: Path) -> Recommender:
    """The bundle, opened."""
    return Recommender.load(town_bundle)
