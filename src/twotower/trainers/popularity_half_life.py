"""Choose the half-life of events in the popularity of items, on the validation part, with a refreshed index.

Popularity changes over time: an index that a server refreshes includes recent events, and old events may count less. The best
half-life differs by dataset. The weights of the model stay unchanged; only one number per item changes (see `popularity_before`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import can_refresh, open_store, popularity_before, split_moment
from twotower.models.neural_retriever import NeuralRetriever
from twotower.models.two_tower import TwoTower
from twotower.schema import DAY_S
from twotower.utils import metrics as m
from twotower.utils.config import Config

HALF_LIVES_DAYS = (0.0, 960.0, 480.0, 240.0, 120.0, 60.0, 30.0)
"""Half-lives that are tried, from slow to fast; 0: all events count the same. A tie keeps the slower one."""
MAX_REFRESHES = 12
"""Maximum number of index refreshes along the validation part."""


def choose_half_life(model: TwoTower, dataset: Dataset, config: Config) -> tuple[float | None, list[dict[str, float]]]:
    """Return the half-life in days with the best `training.eval_metric` on the validation part, and all results.

    Returns
    -------
    half_life, tried
        None and [] if there is nothing to choose: the parts of the dataset do not follow each other in time, or there is no
        validation part or no popularity prior. Otherwise {"half_life_days", metric} for each of `HALF_LIVES_DAYS`.
    """
    if not can_refresh(dataset) or not config.prepare.split.has_valid or not config.model.popularity_prior:
        return None, []
    held_out = dataset.held_out("valid", max_queries=config.training.eval_queries, seed=config.seed).by_time()
    if not len(held_out.queries):
        return None, []
    metric, exclude_seen = config.training.eval_metric, config.evaluation.exclude_seen
    start, depth = split_moment(dataset, "valid"), m.parse_metric(metric)[1]
    every = max((int(held_out.queries.time_s[-1]) - start) // MAX_REFRESHES + 1, DAY_S)
    window = np.maximum(held_out.queries.time_s - start, 0) // every
    store, device = (
        open_store(dataset, "test", config.model),
        model.log_temperature.device,
    )  # features of earlier parts only: no test events
    totals = np.zeros(len(HALF_LIVES_DAYS))
    for number in np.unique(window):
        first, stop = np.searchsorted(window, [number, number + 1])
        moment = int(start + number * every)
        retriever = NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=moment)
        queries, offsets = held_out.queries.slice(first, stop), held_out.target_offsets[first : stop + 1]
        targets = held_out.target_row[offsets[0] : offsets[-1]]
        for tried, half_life in enumerate(HALF_LIVES_DAYS):
            logs = torch.from_numpy(popularity_before(dataset, moment, half_life)).to(device)
            retriever.index.vectors[:, -1] = model.popularity(logs, torch.from_numpy(store.is_new).to(device))
            items = retriever.retrieve(queries, depth, exclude_seen=exclude_seen).items
            hits = m.hit_matrix(items, offsets - offsets[0], targets)
            totals[tried] += float(m.compute(metric, hits, np.diff(offsets)).sum())
    means = totals / len(held_out.queries)
    rows: list[dict[str, Any]] = [
        {"half_life_days": half_life, metric: round(float(mean), 6)} for half_life, mean in zip(HALF_LIVES_DAYS, means, strict=True)
    ]
    return HALF_LIVES_DAYS[int(np.argmax(means))], rows
