"""Build the feature store, the model layout and the item popularity of a dataset."""

from __future__ import annotations

import numpy as np

from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, nearest
from twotower.features.batches import Layout
from twotower.features.feature_store import FeatureStore
from twotower.features.point_in_time import ItemDynamics
from twotower.schema import DAY_S, FIRST_ROW, SPLITS, TRAIN, WITHHELD
from twotower.utils.config import Config, ModelConfig, ResolvedConfig
from twotower.utils.types import Array, Float, Float64, Int

HALF_LIVES_DAYS = (0.0, 960.0, 240.0, 60.0, 15.0)
"""Half-lives of events in the popularity of an item; 0: all events count the same."""
NOVELTY_DAYS = 60.0
"""Half-life of the novelty of an item, in days since its first event."""


def open_store(dataset: Dataset, split: str, model: ModelConfig) -> FeatureStore:
    """Return the features as known when `split` begins: item states use only earlier splits.

    Parameters
    ----------
    split
        "valid" (only training events), "test", or "future" (all events, for serving).
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
        n_train_item_rows=dataset.n_train_item_rows,
        n_train_user_rows=dataset.n_train_user_rows,
        geo=geo,
        cells=(cells[0], cells[1]) if len(cells[0]) else None,
        max_history=model.user_tower.max_history,
        use_location=model.request_location,
        log_popularity=popularity_of(dataset, split),
        transitions=dataset.transitions,
    )


def can_refresh(dataset: Dataset) -> bool:
    """Return True if the dataset is split by time, so that an index can be refreshed during the test period."""
    return dataset.has_time and dataset.manifest.config.prepare.split.kind == "time"


def half_lives(dataset: Dataset) -> tuple[float, ...]:
    """Return the half-lives in days that the popularity of an item is counted with."""
    return HALF_LIVES_DAYS if can_refresh(dataset) else HALF_LIVES_DAYS[:1]


def log_popularity(dataset: Dataset, time_s: int | None = None) -> Float:
    """Return the log popularity of all items, for each half-life, and their novelty.

    Parameters
    ----------
    time_s
        Seconds: positive events strictly before it count, from any part of the dataset. None: all positive training events.

    Returns
    -------
    float32 [n_item_rows, H], or [n_item_rows, H + 1] if the index can be refreshed
        log((1 + n) / (1 + mean n)) in nats. n is the weighted number of events of an item, each counting half after a half-life;
        the mean is over the items seen in training. NaN for new items without an event (see `Priors`), 0 for the reserved rows.
        The last column is the novelty: log(1 + n) of the shortest half-life, halved every `NOVELTY_DAYS` since the first event.
    """
    moment = split_moment(dataset, "valid") if time_s is None else time_s
    return popularity_columns(dataset, weighted_counts(dataset, time_s), dataset.first_event_s, moment)


def weighted_counts(dataset: Dataset, time_s: int | None = None) -> Float64:
    """Return the weighted numbers of events float64 [n_item_rows, H] that `log_popularity` is made of; `time_s` as there."""
    events = dataset.events
    before = events.split == TRAIN if time_s is None else (events.time_s < time_s) & (events.split != WITHHELD)
    counted = np.flatnonzero(events.positive & before)
    age_s = np.zeros(len(counted), np.int64) if time_s is None else time_s - events.time_s[counted]
    return decayed_counts(dataset, events.item_row[counted], events.weight[counted], age_s)


def decayed_counts(dataset: Dataset, item_row: Int, weight: Array, age_s: Int) -> Float64:
    """Return the weighted numbers of events float64 [n_item_rows, H], each counting half after a half-life.

    Parameters
    ----------
    item_row, weight, age_s
        [n]: events; `age_s` is the time since each, in seconds.
    """
    age_days = age_s / DAY_S
    decayed = [weight * 0.5 ** (age_days / days) if days else weight for days in half_lives(dataset)]
    return np.stack([np.bincount(item_row, each, dataset.n_item_rows) for each in decayed], axis=1)


def popularity_columns(dataset: Dataset, counts: Float64, first_s: Float64, time_s: int) -> Float:
    """Return the columns of `log_popularity` from weighted numbers of events and the times of first events."""
    columns = [_log_popularity(dataset, count) for count in counts.T]
    if can_refresh(dataset):
        age_days = np.maximum(time_s - first_s, 0) / DAY_S
        novelty = np.where(first_s < time_s, np.log1p(counts[:, -1]) * 0.5 ** (age_days / NOVELTY_DAYS), 0.0)
        columns.append(novelty.astype(np.float32))
    return np.stack(columns, axis=1)


def popularity_of(dataset: Dataset, split: str) -> Float:
    """Return the log popularity [n_item_rows, H] when `split` begins; of the training events where it cannot be refreshed."""
    return log_popularity(dataset, split_moment(dataset, split) if can_refresh(dataset) else None)


def _log_popularity(dataset: Dataset, count: Array) -> Float:
    row = np.arange(dataset.n_item_rows)
    known = (row >= FIRST_ROW) & (row < dataset.n_train_item_rows)
    if not known.any():
        return np.zeros(dataset.n_item_rows, np.float32)
    logs = np.log1p(count) - np.log1p(count[known].mean())
    counted = np.where(known | (count > 0), logs, np.nan)
    return np.where(row < FIRST_ROW, 0.0, counted).astype(np.float32)


def resolve(config: Config, dataset: Dataset) -> ResolvedConfig:
    """Return the settings with the sizes that they leave to the data. Settings that have all sizes stay as they are."""
    ids = dataset.n_train_users + dataset.n_train_items
    return config.resolved(ordered=dataset.ordered, timed=dataset.has_time, events=dataset.n_train_events, ids=ids)


def layout(dataset: Dataset, store: FeatureStore, model: ModelConfig) -> Layout:
    """Return the sizes and input fields that determine the model, without `model.exclude_features`.

    Raises
    ------
    ConfigError
        `model.exclude_features` names an unknown field; the message has the nearest name.
    """
    sizes = {name: len(values) for name, values in dataset.encoders.vocabularies.items()}
    fields = {"item": store.item_fields(dataset.specs, sizes), "user": store.user_fields(dataset.specs, sizes)}
    known = [f"{side}.{spec.name}" for side, specs in fields.items() for spec in specs]
    for name in model.exclude_features:
        if name not in known:
            raise ConfigError(f"model.exclude_features has the unknown field {name!r}.{nearest(name, known)}")
    kept = {
        side: tuple(spec for spec in specs if f"{side}.{spec.name}" not in model.exclude_features) for side, specs in fields.items()
    }
    return Layout(
        items=dataset.n_train_item_rows,
        users=dataset.n_train_user_rows,
        event_types=len(dataset.event_types),
        item_fields=kept["item"],
        user_fields=kept["user"],
        ordered=dataset.ordered,
        half_lives=half_lives(dataset),
    )


def split_moment(dataset: Dataset, split: str) -> int:
    """Return the time in seconds at which `split` begins: its cut, or without one, just after all earlier events."""
    if split in dataset.manifest.cuts_s:
        return dataset.manifest.cuts_s[split]
    known = dataset.item_events.time_s[dataset.item_events.split < SPLITS.get(split, WITHHELD + 1)]
    return int(known.max(initial=0)) + 1
