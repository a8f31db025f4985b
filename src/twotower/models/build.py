"""Build a new model for a dataset and settings."""

from __future__ import annotations

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import layout, open_store
from twotower.data.views import OBJECTIVES
from twotower.features.feature_store import FeatureStore
from twotower.models.two_tower import TwoTower
from twotower.utils.config import ResolvedConfig


def build_model(dataset: Dataset, config: ResolvedConfig, store: FeatureStore | None = None) -> TwoTower:
    """Return a `TwoTower` with fresh weights; the same dataset and settings always give the same shapes.

    Parameters
    ----------
    store
        An open feature store of the dataset, of any split: the fields are the same. None: open one.
    """
    return TwoTower(
        layout(dataset, store or open_store(dataset, "valid", config.model), config.model),
        config.model,
        causal=OBJECTIVES[config.training.objective].causal,
        save_memory=config.training.gradient_checkpointing,
    )
