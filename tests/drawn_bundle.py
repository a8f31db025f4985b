"""A model whose weights are all drawn at random, so that every part of a tower changes its output."""

from __future__ import annotations

from typing import Any

import torch

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, resolve
from twotower.features.geo import points_km
from twotower.models.build import build_model
from twotower.models.two_tower import TwoTower
from twotower.utils.config import Config, parse_config

from .documents import PROGRESS

TOWER = {"embedding_dim": 16, "hidden_dims": [24, 16]}
MODEL = {"request_location": True, "user_tower": {**TOWER, "max_history": 20}, "item_tower": TOWER}


def drawn(dataset: Dataset, model: dict[str, Any], **training: Any) -> tuple[TwoTower, Config]:
    """A model whose weights are all drawn, the ones that begin at zero too, and its settings."""
    config = resolve(parse_config({"model": model, "training": training}), dataset)
    built = build_model(dataset, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in built.state_dict().items():
            if value.ndim and name != "waves.waves":
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        built.priors.new_popularity.fill_(0.75)
        built.priors.recency.fill_(0.7)
        built.priors.repeats.copy_(torch.tensor([-0.6, 0.9, -0.4, 0.3, -0.2, -0.1]))
        built.priors.transitions.copy_(torch.tensor([0.8, 0.2, -0.5, -0.1]))
        built.priors.weights[:, 0] = torch.tensor([0.5, 0.8, 1.1])
        built.priors.weights[:, -1] = 0.001  # a user 30 km from an item loses 0.45 nats
        points = points_km(open_store(dataset, "future", config.model).location)
        located = points[points.any(axis=1)]
        built.priors.centre.copy_(torch.from_numpy(located.mean(axis=0)) if len(located) else torch.zeros(3))
        built.priors.unlocated.fill_(100.0)
    return built.eval(), config


def checkpoint_of(dataset: Dataset, model: TwoTower, config: Config) -> dict[str, Any]:
    """Return the checkpoint that a trainer would save."""
    settings = config.model_dump(mode="json")
    return {"data": dataset.fingerprint, "config": settings, "model": model.state_dict(), "progress": PROGRESS.json_values()}
