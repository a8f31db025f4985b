"""Calibrate the popularity of new items, so that they get a given share of the top-10 positions.

A sample of known items is encoded as if it were new: as many items as the catalogue has new ones, at least a twentieth of the known
items. Their log popularity is chosen so that they would take `model.new_item_exposure` of the top-10 positions. The targets of
the queries are not used.

Reason: a new item has no events, so its popularity is a guess that decides how often it is shown. With the median popularity, new
items of one dataset cost all other items 2 % of NDCG@10, and those of another dataset were in the top 50 less than once in a
thousand lists. A share of positions has the same meaning for every dataset.
"""

from __future__ import annotations

import numpy as np
import torch

from twotower.data.dataset import Dataset
from twotower.models.neural_retriever import NeuralRetriever, item_blocks
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW
from twotower.search.index import ExactIndex
from twotower.utils.types import Float, Int

TOP_K = 10
QUESTIONS = 1000
INDISTINCT = 1e-6  # numbers of unit vectors that differ less are the same
SIMULATED_SHARE = 0.05  # minimum share of the known items


def calibrate_new_items(retriever: NeuralRetriever, dataset: Dataset, *, time_s: int, exposure: float, seed: int) -> float:
    """Return the log popularity of new items, and set it in the retriever's index. The model stays unchanged.

    Parameters
    ----------
    time_s
        Time of the retriever's item vectors, in seconds.
    exposure
        Share of the top-10 positions, in [0, 1). If nothing distinguishes new items, because no feature does, it is 0: all have the
        same vector, so a list has none or as many as fit.

    Returns
    -------
    float
        See `Priors.new_popularity`; what the model has already if popularity has no weight or too few items are known.
    """
    model, vectors = retriever.model, retriever.index.vectors
    priors, device = model.priors, vectors.device
    known = FIRST_ROW + np.arange(dataset.n_train_items)
    size = max(dataset.n_items - len(known), round(SIMULATED_SHARE * len(known)))
    size = min(size, len(known) // 2)
    if not size or not priors.prior:
        return float(priors.new_popularity)
    width = vectors.shape[1] - priors.width
    popularity = slice(width, width + priors.popularities)
    chosen = np.sort(np.random.default_rng(seed).choice(known, size, replace=False))
    at = torch.from_numpy(chosen).to(device)
    kept = vectors[at].clone()
    made = _as_if_new(retriever, chosen, time_s)
    if bool(((made - made[0]).abs() < INDISTINCT).all()):  # they would fill a list together, without a reason for any
        exposure = 0.0
    vectors[at, :width], vectors[at, popularity] = made, 0.0
    as_new, other = np.zeros((2, dataset.n_item_rows), np.bool_)
    as_new[chosen], other[known] = True, True
    queries = _questions(dataset, seed)
    users, seen, index = retriever.encode(queries), (queries.offsets, queries.item_row), ExactIndex(vectors)
    best, known_items = (index.search(users, TOP_K, exclude=seen, allow=mask).scores for mask in (as_new, other & ~as_new))
    vectors[at] = kept
    weight = priors.popularity_weight(torch.from_numpy(queries.lengths).to(device), float(model.temperature().detach()))
    found = _bias(best, known_items, weight.cpu().numpy(), exposure)
    logs, new = (torch.from_numpy(values).to(device) for values in (retriever.store.log_popularity, retriever.store.is_new))
    before = priors.new_popularity.clone()
    priors.new_popularity.fill_(found)
    vectors[:, popularity] = priors.popularity(logs, new).to(vectors)
    priors.new_popularity.copy_(before)
    return found


def _bias(best: Float, known_items: Float, weight: Float, exposure: float) -> float:
    """Return the log popularity of new items that gives them a share of the positions.

    Both inputs are [B, TOP_K], best first; `weight` [B] is the weight of popularity in the scores. The i-th best new item is in
    the top 10 if it beats the (11 - i)-th best known item, so the gap between the two is the bonus for one more position.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a small catalogue leaves positions without an item: their scores are -inf
        gaps = (known_items[:, ::-1] - best)[weight > 0] / weight[weight > 0, None]
    gaps = gaps[np.isfinite(gaps)]
    return float(np.quantile(gaps, exposure)) if len(gaps) else 0.0


def _as_if_new(retriever: NeuralRetriever, rows: Int, time_s: int) -> torch.Tensor:
    """Return vectors [n, D] of known items encoded as new items."""
    model = retriever.model
    with torch.no_grad():
        blocks = [model.encode_items(model.as_if_new(batch)) for batch in item_blocks(model, retriever.store, rows, time_s)]
    return torch.cat(blocks)


def _questions(dataset: Dataset, seed: int) -> Queries:
    """Return a sample of validation or test queries; if both parts are empty, one query per sampled user after the last event."""
    for part in ("valid", "test"):
        queries = dataset.held_out(part, max_queries=QUESTIONS, seed=seed).queries
        if len(queries):
            return queries
    users = np.arange(FIRST_ROW, dataset.n_train_user_rows)
    sample = np.sort(np.random.default_rng(seed).choice(users, min(QUESTIONS, len(users)), replace=False))
    after = int(dataset.events.time_s.max(initial=0)) + 1
    return dataset.histories(sample, np.full(len(sample), after))
