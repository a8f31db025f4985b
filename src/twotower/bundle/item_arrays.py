"""Compute the arrays of a bundle with one row per item: vector, popularity, history token, and whether the item is offered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from twotower.data.dataset import Dataset
from twotower.features.feature_store import FeatureStore
from twotower.models.neural_retriever import encoded_items
from twotower.models.two_tower import TwoTower
from twotower.schema import DAY_S, FIRST_ROW
from twotower.utils.open_flag import IS_OPEN, open_flag
from twotower.utils.ragged import lower_bound
from twotower.utils.types import Float, Int, Mask

RECENT_DAYS = 90


@dataclass(frozen=True)
class ItemArrays:
    """Arrays with one row per item, including the reserved rows.

    Attributes
    ----------
    vectors
        float32 [n_item_rows, D + P]: item vector, followed by its popularities and location; see `models.priors`.
    tokens
        float32 [n_item_rows, d]: embedding of the item as an event of a history.
    recent_event_count
        int64 [n_item_rows]: events in the last 90 days of the data; without times, all events.
    offered
        bool [n_item_rows]: False for an item that was removed from the catalogue or has closed. It still counts in histories.
    """

    vectors: Float
    tokens: Float
    recent_event_count: Int
    offered: Mask


def item_arrays(model: TwoTower, store: FeatureStore, dataset: Dataset, moment_s: int) -> ItemArrays:
    """Return the arrays of all items at a time."""
    vectors, tokens = encode_items(model, store, np.arange(dataset.n_item_rows), moment_s)
    return ItemArrays(
        vectors=vectors,
        tokens=tokens,
        recent_event_count=recent_event_count(dataset, moment_s),
        offered=offered_items(dataset),
    )


def recent_event_count(dataset: Dataset, moment_s: int) -> Int:
    """Return the number of events of each item in the `RECENT_DAYS` before a time, int64 [n_item_rows]; without times, of all."""
    offsets = dataset.item_events.offsets
    if not dataset.has_time:
        return np.diff(offsets)
    after = np.full(dataset.n_item_rows, moment_s - RECENT_DAYS * DAY_S)
    return offsets[1:] - lower_bound(dataset.item_events.time_s, offsets[:-1], offsets[1:], after)


def offered_items(dataset: Dataset) -> Mask:
    """Return bool [n_item_rows]: False for reserved rows and, without `data.include_closed`, for items whose `is_open` is 0."""
    offered = np.arange(dataset.n_item_rows) >= FIRST_ROW
    if IS_OPEN in dataset.items.column_names and not dataset.manifest.config.data.include_closed:
        closed = [open_flag(value) == 0 for value in dataset.items[IS_OPEN].to_pylist()]
        offered[FIRST_ROW:] &= ~np.array(closed, np.bool_)
    return offered


def encode_items(model: TwoTower, store: FeatureStore, row: Int, moment_s: int) -> tuple[Float, Float]:
    """Return index vectors float32 [n, D + P] and history tokens float32 [n, d] of item rows at a time."""
    with torch.inference_mode():
        vectors, tokens = (whole.float().numpy(force=True) for whole in encoded_items(model, store, row, moment_s, tokens=True))
    return vectors, tokens
