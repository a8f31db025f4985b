"""Features of a dataset: its feature store, the sizes that it gives to a model, and the popularity of its items."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, nearest
from twotower.features.batches import Layout
from twotower.features.feature_store import FeatureStore
from twotower.features.point_in_time import ItemDynamics
from twotower.schema import DAY_S, FIRST_ROW, SPLITS, TRAIN, WITHHELD
from twotower.utils.config import ModelConfig


def open_store(dataset: Dataset, split: str, model: ModelConfig) -> FeatureStore:
    """Features as known when `split` begins: the state of the items comes from earlier splits alone.

    Parameters
    ----------
    split
        "valid" (what training itself may know), "test", or "future" (everything: for serving).
    """
    dynamics = None
    if dataset.has_time:
        item_events = dataset.item_events
        kept = item_events.split < SPLITS.get(split, WITHHELD + 1)
        dynamics = ItemDynamics(item_events.item_row[kept], item_events.time_s[kept], item_events.stars[kept])
    geo = next((spec.name for spec in dataset.specs if spec.side == "item" and spec.kind == "geo"), "")
    cells = [np.array(dataset.encoders.vocabularies.get(f"item.{geo}.{scale}", ()), np.int64) for scale in range(2)]
    return FeatureStore(
        dataset.item_features,
        dataset.user_features,
        dynamics=dynamics,
        n_trained_items=dataset.n_train_items,
        n_trained_users=dataset.n_train_users,
        geo=geo,
        cells=(cells[0], cells[1]) if len(cells[0]) else None,
        max_history=model.user_tower.max_history,
        use_location=model.request_location,
        log_popularity=_known_popularity(dataset, split, model),
    )


def log_popularity(dataset: Dataset) -> NDArray[np.float32]:
    """Return the log popularity of all items from the training events.

    Returns
    -------
    float32 [n_items]
        log((1 + n) / (1 + mean n)) in nats. n is the number of positive events of an item, by their weight; the mean is that of the
        items that training knows. NaN for items without an event (see `TwoTower.popularity`), 0 for the reserved rows.
    """
    events = dataset.events
    counted = events.positive & (events.split == TRAIN)
    return _log_popularity(dataset, np.bincount(events.item_row[counted], events.weight[counted], dataset.n_items))


def can_refresh(dataset: Dataset) -> bool:
    """Return whether an index can be refreshed along the dataset: its parts follow one another in time."""
    return dataset.has_time and dataset.manifest["config"]["prepare"]["split"]["kind"] == "time"


def popularity_before(dataset: Dataset, time_s: int, half_life_days: float) -> NDArray[np.float32]:
    """Return the log popularity of all items as it is known just before a moment.

    Parameters
    ----------
    time_s
        Seconds: only events strictly before it count, of whichever part of the dataset.
    half_life_days
        An event so many days old counts half; 0: all count alike.

    Returns
    -------
    float32 [n_items]
        As `log_popularity`, n being the decayed number of events.
    """
    events = dataset.events
    counted = events.positive & (events.time_s < time_s) & (events.split != WITHHELD)
    weight = events.weight[counted]
    if half_life_days:
        weight = weight * 0.5 ** ((time_s - events.time_s[counted]) / (half_life_days * DAY_S))
    return _log_popularity(dataset, np.bincount(events.item_row[counted], weight, dataset.n_items))


def _known_popularity(dataset: Dataset, split: str, model: ModelConfig) -> NDArray[np.float32]:
    """Return the popularity of an index for `split`: what serves is as fresh as its data, what is judged knows training alone."""
    half_life = model.popularity_half_life_days
    if split != "future" or half_life is None or not can_refresh(dataset):
        return log_popularity(dataset)
    return popularity_before(dataset, split_moment(dataset, split), half_life)


def _log_popularity(dataset: Dataset, count: NDArray[Any]) -> NDArray[np.float32]:
    row = np.arange(dataset.n_items)
    known = (row >= FIRST_ROW) & (row < FIRST_ROW + dataset.n_train_items)
    if not known.any():
        return np.zeros(dataset.n_items, np.float32)
    logs = np.log1p(count) - np.log1p(count[known].mean())
    counted = np.where(known | (count > 0), logs, np.nan)
    return np.where(row < FIRST_ROW, 0.0, counted).astype(np.float32)


def layout(dataset: Dataset, store: FeatureStore, model: ModelConfig) -> Layout:
    """Sizes that the dataset gives to the model, and the fields that the settings leave it.

    Raises
    ------
    ConfigError
        `model.exclude_features` names a field that there is none of; the nearest name is in the message.
    """
    sizes = {name: len(values) for name, values in dataset.encoders.vocabularies.items()}
    fields = {"item": store.item_fields(dataset.specs, sizes), "user": store.user_fields(dataset.specs, sizes)}
    known = [f"{side}.{spec.name}" for side, specs in fields.items() for spec in specs]
    for name in model.exclude_features:
        if name not in known:
            raise ConfigError(f"model.exclude_features must name fields of the towers. Got {name!r}.{nearest(name, known)}")
    kept = {
        side: tuple(spec for spec in specs if f"{side}.{spec.name}" not in model.exclude_features) for side, specs in fields.items()
    }
    return Layout(
        items=dataset.n_train_items + FIRST_ROW,
        users=dataset.n_train_users + FIRST_ROW,
        event_types=len(dataset.event_types),
        item_fields=kept["item"],
        user_fields=kept["user"],
        ordered=dataset.ordered,
        timed=dataset.has_time,
        events=dataset.n_train_events,
    )


def split_moment(dataset: Dataset, split: str) -> int:
    """Seconds: the moment at which the index for `split` is made (its cut; without one, just after all that is known)."""
    cuts = dataset.manifest.get("cuts_s") or {}
    if split in cuts:
        return int(cuts[split])
    known = dataset.item_events.time_s[dataset.item_events.split < SPLITS.get(split, WITHHELD + 1)]
    return int(known.max(initial=0)) + 1
