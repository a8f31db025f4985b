"""Validate that a bundle's files are mutually consistent, before memory is allocated.

A failed check raises `ValueError` (or the exception of a reader); `bundle.load_bundle` turns it into a one-line `DataError`.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from twotower.bundle.item_arrays import ItemArrays
from twotower.data.dataset import Dataset
from twotower.data.event_arrays import Events, ItemEvents, NegativeEvents
from twotower.features.feature_store import FeatureStore
from twotower.models.build import build_model
from twotower.models.two_tower import TwoTower
from twotower.utils.config import ResolvedConfig, ResolvedModel
from twotower.utils.types import Int


def model_of(dataset: Dataset, config: ResolvedConfig, weights: dict[str, Tensor], store: FeatureStore) -> TwoTower:
    """Return the model with the stored weights. Settings that contradict the weights are rejected before memory is allocated."""
    _check_settings(config.model, weights)
    model = build_model(dataset, config, store)
    for name, value in model.state_dict().items():
        if name in weights and (weights[name].dtype != value.dtype or not _finite(weights[name])):
            raise ValueError(f"{name} does not hold finite numbers of type {value.dtype}")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _finite(values: Tensor) -> bool:
    """Return True if all values are finite. Smallest and largest value tell it, without a mask of the size of a table."""
    return not values.numel() or all(math.isfinite(float(bound)) for bound in values.aminmax())


def _check_settings(config: ResolvedModel, weights: dict[str, Tensor]) -> None:
    user, item = config.user_tower, config.item_tower
    pairs: list[tuple[str, Any, Any]] = [("user_tower.embedding_dim", user.embedding_dim, weights["geo.weight"].shape[0])]
    for name, tower in (("user_tower", user), ("item_tower", item)):
        if tower.tower == "mlp":
            pairs.append((f"{name}.hidden_dims", tower.hidden_dims[:-1], _hidden(weights, name)))
    if user.num_blocks:
        pairs.append(("user_tower.max_history", user.max_history, weights["user_tower.encoder.position"].shape[0]))
    for name, setting, stored in pairs:
        if setting != stored:
            raise ValueError(f"model.{name} is {str(setting)[:40]}, but the weights have {stored}")
    if max(user.num_blocks, user.cross_layers, item.cross_layers) > len(weights):
        raise ValueError("the settings have more layers than there are weights")


def _hidden(weights: dict[str, Tensor], tower: str) -> list[int]:
    """Return the widths of the hidden layers of a tower's MLP."""
    found = {name: re.fullmatch(rf"{tower}\.head\.body\.mlp\.(\d+)\.weight", name) for name in weights}
    layers = sorted((int(match[1]), weights[name].shape[0]) for name, match in found.items() if match)
    return [width for _, width in layers[:-1]]


def check_dataset(dataset: Dataset) -> None:
    """Check that the sizes of all parts agree. This reads every part, so none is read later from a replaced folder."""
    events, item_events, negatives = dataset.events, dataset.item_events, dataset.negatives
    sizes = {
        "items": len(dataset.items) == dataset.n_items,
        "users": len(dataset.users) == dataset.n_users,
        "trained items": 0 <= dataset.n_train_items <= dataset.n_items,
        "trained users": 0 <= dataset.n_train_users <= dataset.n_users,
        "item features": all(len(value) == dataset.n_item_rows for value in dataset.item_features.values()),
        "user features": all(len(value) == dataset.n_user_rows for value in dataset.user_features.values()),
        "events": _equal_lengths(events),
        "events of items": _equal_lengths(item_events),
        "negatives": negatives is None
        or (_equal_lengths(negatives) and _covers(negatives.offsets, dataset.n_user_rows, len(negatives))),
        "events of users": _covers(events.offsets, dataset.n_user_rows, len(events)),
        "offsets of events of items": _covers(item_events.offsets, dataset.n_item_rows, len(item_events)),
        "items of events": _rows_within(events.item_row, dataset.n_item_rows),
        "items of negatives": negatives is None or _rows_within(negatives.item_row, dataset.n_item_rows),
        "types of events": not len(events)
        or bool(events.event_type.min() >= 0 and events.event_type.max() <= len(dataset.event_types)),
        "features": dataset.encoders.specs == dataset.specs,
    }
    for name, fits in sizes.items():
        if not fits:
            raise ValueError(f"the {name} do not match the manifest")


def _equal_lengths(arrays: Events | ItemEvents | NegativeEvents) -> bool:
    values = [getattr(arrays, part.name) for part in fields(arrays) if part.name != "offsets"]
    return all(len(value) == len(arrays) for value in values if value is not None)


def _rows_within(row: Int, size: int) -> bool:
    return not len(row) or bool(row.min() >= 0 and row.max() < size)


def _covers(offsets: Int, slices: int, total: int) -> bool:
    rising = bool((np.diff(offsets) >= 0).all())
    return offsets.shape == (slices + 1,) and offsets.dtype == np.int64 and rising and offsets[0] == 0 and offsets[-1] == total


def check_arrays(arrays: ItemArrays, dataset: Dataset, config: ResolvedConfig, *, columns: int) -> None:
    n, user = dataset.n_item_rows, config.model.user_tower
    wanted = {
        "vectors": ((n, user.hidden_dims[-1] + columns), np.float32),
        "tokens": ((n, user.embedding_dim), np.float32),
        "recent_event_count": ((n,), np.int64),
        "offered": ((n,), np.bool_),
    }
    for name, (shape, kind) in wanted.items():
        array = getattr(arrays, name)
        if array.shape != shape or array.dtype != kind or not np.isfinite((array.min(), array.max())).all():
            raise ValueError(f"{name} has {array.dtype} of shape {array.shape}; expected finite {np.dtype(kind)} of shape {shape}")
