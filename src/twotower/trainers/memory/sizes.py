"""Compute the data sizes that `estimate.predict` needs, from a dataset and its first epoch, or from counts alone.

From counts alone, the batches are the largest that the settings allow: every history is full, and items are drawn uniformly.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from twotower.data.data_loader import TrainLoader
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import layout, open_store
from twotower.data.views import OBJECTIVES
from twotower.features.batches import FieldSpec, Layout
from twotower.features.feature_store import CLOCK, WIDTHS
from twotower.features.point_in_time import ITEM_STATE_WIDTH, USER_STATE_WIDTH
from twotower.schema import FIRST_ROW, NEIGHBOURS, TRAIN
from twotower.utils.config import Config
from twotower.utils.types import Int

ID, F32 = 8, 4  # bytes of an int64 and of a float32
MAPPED_EVENT, MAPPED_ITEM_EVENT = 3 * ID + 2 * F32 + 2, ID + F32 + 1
"""Bytes per event in the files: item, time, type; stars, weight; positive, split. Per event of `ItemEvents`: time; stars; split."""
TRAIN_EVENT, OWN_EVENT = 25, 106
"""Bytes per event of `TrainEvents`. In every process: position in the file 8, positive 1, targets of the objective 8, order of an
epoch 8. For the process's own users: user, item, time, type 32; stars, weight 8; in its `History` a location in float64 16, two
flags 2, prefix sums of stars, locations and their counts 40; the positive pairs 8."""
TRAIN_ITEM_EVENT = 4 * ID
"""Bytes per event of `ItemDynamics`: key, time, two prefix sums."""
OPENING_EVENT = 7 * ID
"""Bytes per event while the data is loaded, seven integers: users of all events and of training events, pairs that are sorted."""
LOOKED_AT = 200  # sampled batches of an epoch whose sizes are compared
YELP_BAGS = {"categories": 6, "attributes": 20}


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Sizes of one batch, over all processes.

    Attributes
    ----------
    examples
        Number of examples.
    slots
        History positions, with padding.
    members
        Examples or windows, depending on the objective.
    history_items
        Distinct items of the histories.
    candidates, masked
        Candidates, and (example, candidate) pairs that are masked or explicit negatives.
    events
        All events of the batch's users.
    """

    examples: int
    slots: int
    members: int
    history_items: int
    candidates: int
    masked: int
    events: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadSizes:
    """Sizes that follow from the data.

    Attributes
    ----------
    items
        Rows of the catalogue.
    bags
        Number of ids per row of each multi-valued field, by field name.
    data_bytes, shared_bytes
        Memory during training: `Dataset`, `FeatureStore` and `TrainLoader` with the pages of mapped files; and the histories, of
        which each process holds a part.
    opening_bytes
        Temporary memory while the data is loaded.
    question_slots
        Mean number of history positions of a validation query.
    trained
        Events of the training part.
    load
        Sizes of the largest batches.
    """

    layout: Layout
    items: int
    bags: dict[str, int]
    data_bytes: int
    shared_bytes: int
    opening_bytes: int
    question_slots: float
    trained: int
    load: BatchSizes


def dataset_sizes(dataset: Dataset, config: Config) -> WorkloadSizes:
    """Return the sizes of a dataset; each size in `load` is the maximum over the largest batches of the first epoch."""
    alone = config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": None})})
    store = open_store(dataset, "valid", config.model)
    loader = TrainLoader(dataset, store, alone)
    static = dataset.item_features
    of_users = sum(value.nbytes for name, value in dataset.user_features.items() if name not in ("since_s", "elite"))
    copied = sum(value.nbytes * (2 if value.dtype == np.int32 else 1) for value in static.values())
    features = of_users * 2 + copied + sum(value.nbytes for value in static.values())
    events, trained = len(dataset.events), int((dataset.events.split == TRAIN).sum())
    item_events = len(dataset.item_events) if dataset.has_time else 0
    lengths = np.diff(dataset.events.offsets)
    return WorkloadSizes(
        layout=layout(dataset, store, config.model),
        items=dataset.n_item_rows,
        bags={name: value.shape[1] for name, value in static.items() if value.ndim == 2},
        data_bytes=features + _data_bytes(events, trained, item_events, dataset.n_user_rows),
        shared_bytes=trained * OWN_EVENT,
        opening_bytes=OPENING_EVENT * events,
        question_slots=_mean_width(lengths, config.model.user_tower.max_history),
        trained=trained,
        load=_greatest([_batch_sizes(loader, int(step)) for step in _largest(loader)]),
    )


def yelp_sizes(users: int, items: int, events: int, config: Config) -> WorkloadSizes:
    """Return the sizes of a Yelp-like dataset with the given numbers of users, items and events, before it exists."""
    tower, training = config.model.user_tower, config.training
    if not OBJECTIVES[training.objective].causal:
        examples, slots = training.batch_size, training.batch_size * tower.max_history
        members = examples
    else:
        examples = slots = training.batch_size  # a window of two events has as many examples as positions
        members = max(slots // (tower.max_history + 1), 1)
    draws = training.negatives_per_positive * examples
    proposed = items if training.loss == "full_softmax" else round(_distinct(items, examples + draws))
    form = yelp_layout(users, items, config.prepare.text_dim, neighbours=config.prepare.co_visited_items > 0)
    bags = YELP_BAGS | {NEIGHBOURS: config.prepare.co_visited_items}
    features = 3 * items * row_bytes(form.item_fields, bags)
    load = BatchSizes(
        examples=examples,
        slots=slots,
        members=members,
        history_items=round(_distinct(items, slots)) + 1,
        candidates=proposed,
        masked=round(examples * tower.max_history * proposed / items),
        events=examples * tower.max_history,
    )
    return WorkloadSizes(
        layout=form,
        items=items + FIRST_ROW,
        bags=bags,
        data_bytes=features + _data_bytes(events, events, events, users),
        shared_bytes=events * OWN_EVENT,
        opening_bytes=OPENING_EVENT * events,
        question_slots=float(tower.max_history),
        trained=events,
        load=load,
    )


def yelp_layout(users: int, items: int, text_dim: int, *, neighbours: bool) -> Layout:
    """Return the fields of Yelp's businesses and users, with rounded vocabulary sizes, which are small beside the id tables."""
    slots = (1_000, 20_000)
    item = [
        FieldSpec("categories", "bag", (1_300,), "item.categories"),
        FieldSpec("attributes", "bag", (150,), "item.attributes"),
        FieldSpec("price", "rows", (6,), "item.price"),
        FieldSpec("city", "rows", (1_500,), "item.city"),
        FieldSpec("location", "geo", slots, "item.location"),
        FieldSpec("hours", "dense", (168,), "item.hours"),
        *([FieldSpec("text", "dense", (text_dim,), "item.text")] if text_dim else []),
        *([FieldSpec(NEIGHBOURS, "bag", (items + FIRST_ROW,), "item.id")] if neighbours else []),
        FieldSpec("state", "dense", (ITEM_STATE_WIDTH,), "item.state"),
    ]
    user = [
        FieldSpec("state", "dense", (USER_STATE_WIDTH,), "user.state"),
        FieldSpec("home", "geo", slots, "item.location"),
        *(FieldSpec(name, "rows", (n + FIRST_ROW,), name) for name, n in CLOCK.items()),
    ]
    return Layout(
        items=items + FIRST_ROW,
        users=users + FIRST_ROW,
        event_types=3,
        item_fields=tuple(item),
        user_fields=tuple(user),
        ordered=True,
    )


def row_bytes(specs: tuple[FieldSpec, ...], bags: dict[str, int]) -> int:
    """Return the bytes of one row of a batch: its id and its fields.

    Examples
    --------
    >>> row_bytes((FieldSpec("text", "dense", (4,), ""), FieldSpec("city", "rows", (10,), "item.city")), {})
    32
    """
    total = ID
    for spec in specs:
        each = {"rows": ID, "geo": 2 * ID + 3 * F32, "bag": ID * bags.get(spec.name, 1), "dense": F32 * spec.sizes[0]}
        total += each[spec.kind]
    return total


def scaled(load: BatchSizes, factor: float) -> BatchSizes:
    """Return the sizes of batches that are `factor` times as large."""
    return BatchSizes(*(max(round(getattr(load, part.name) * factor), 1) for part in fields(load)))


def _data_bytes(events: int, trained: int, item_events: int, users: int) -> int:
    mapped = events * MAPPED_EVENT + item_events * MAPPED_ITEM_EVENT
    return (
        mapped + trained * TRAIN_EVENT + item_events * TRAIN_ITEM_EVENT + users * 3 * ID
    )  # offsets of events, training events and positives


def _largest(loader: TrainLoader) -> Int:
    """Return the batches with the largest size and with the most targets, of an evenly spaced sample of the epoch."""
    plan = loader.plan(0)
    sampled = np.unique(np.linspace(0, len(plan) - 1, min(len(plan), LOOKED_AT)).astype(np.int64))
    size = [loader.objective.size(plan[i]) for i in sampled]
    target_counts = [len(loader.objective.target_events(plan[i])) for i in sampled]
    return np.unique([sampled[int(np.argmax(size))], sampled[int(np.argmax(target_counts))]])


def _batch_sizes(loader: TrainLoader, step: int) -> BatchSizes:
    members = loader.plan(0)[step]
    batch = loader.batch(members, 0, step)
    owner = loader.events.user_row[loader.objective.target_events(members)]
    lengths = np.diff(loader.events.history.offsets)
    return BatchSizes(
        examples=batch.examples,
        slots=sum(len(part.history) for part in batch.users),
        members=len(members),
        history_items=sum(len(part.items.row) for part in batch.users),
        candidates=len(batch.log_weight),
        masked=len(batch.masked.example) + (len(batch.negatives.example) if batch.negatives else 0),
        events=int(lengths[owner].sum()),
    )


def _greatest(loads: list[BatchSizes]) -> BatchSizes:
    return BatchSizes(*(max(getattr(load, part.name) for load in loads) for part in fields(BatchSizes)))


def _mean_width(lengths: Int, most: int) -> float:
    """Return the mean over events of the padded history length of the event's user."""
    classes = np.array([width for width in WIDTHS if width < most] + [most])
    width = classes[np.searchsorted(classes, np.minimum(lengths, most))]
    return float((width * lengths).sum() / max(int(lengths.sum()), 1))


def _distinct(items: int, draws: int) -> float:
    """Return the expected number of distinct items among uniform draws; no other distribution gives more."""
    return items * -float(np.expm1(draws * np.log1p(-1 / max(items, 2))))
