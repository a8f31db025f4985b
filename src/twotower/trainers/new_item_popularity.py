"""How often new items are shown: what popularity they count as, found by showing known items as if they were new.

Enters: a model while it is validated, and questions, of which no answer is looked at. Leaves: the model's `new_popularity`, set so
that as many known items as the catalogue has new ones (a twentieth at least), shown without what training knows of them, would
take `model.new_item_exposure` of the first ten places.

Why: an item nobody has gone to has no popularity, and what is guessed decides whether it is ever shown. As popular as the median,
new items of one dataset cost all others 2 % of NDCG@10, and those of another were among the best fifty less than once in a
thousand times: how well features tell items apart differs. A share of the places means the same everywhere.
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

PLACES = 10
QUESTIONS = 1000
SIMULATED_SHARE = 0.05  # of the known items, at least


def calibrate_new_items(retriever: NeuralRetriever, dataset: Dataset, *, time_s: int, exposure: float, seed: int) -> None:
    """Set what popularity new items count as, in the model and in the retriever's index of it.

    Parameters
    ----------
    time_s
        Seconds: the moment the retriever's item vectors stand for.
    exposure
        Share of the first ten places, in [0, 1).
    """
    model, vectors = retriever.model, retriever.index.vectors
    known = FIRST_ROW + np.arange(dataset.n_train_items)
    size = max(dataset.n_items - FIRST_ROW - len(known), round(SIMULATED_SHARE * len(known)))
    size = min(size, len(known) // 2)
    weight = model.popularity_weight()
    if not size or not weight:
        return
    chosen = np.sort(np.random.default_rng(seed).choice(known, size, replace=False))
    at = torch.from_numpy(chosen).to(vectors.device)
    kept = vectors[at].clone()
    vectors[at] = _as_if_new(retriever, chosen, time_s)
    shown, other = np.zeros((2, dataset.n_items), np.bool_)
    shown[chosen], other[known] = True, True
    queries = _questions(dataset, seed)
    users, seen, index = retriever.encode(queries), (queries.offsets, queries.item_row), ExactIndex(vectors)
    best, known_items = (index.search(users, PLACES, exclude=seen, allow=mask).scores for mask in (shown, other & ~shown))
    vectors[at] = kept
    model.new_popularity.fill_(_bias(best, known_items, exposure) / weight)
    fresh = torch.from_numpy(np.isnan(retriever.store.log_popularity)).to(vectors.device)
    vectors[fresh, -1] = model.new_popularity


def _bias(best: Float, known_items: Float, exposure: float) -> float:
    """What is added to the scores of the new so that they take a share of the places: [B, PLACES] each, best first.

    The i-th best of the new is among the first ten if it beats the (11 - i)-th best of the others, so the gaps between those are
    what it takes to have one place more.
    """
    gaps = known_items[:, ::-1] - best
    gaps = gaps[np.isfinite(gaps)]
    return float(np.quantile(gaps, exposure)) if len(gaps) else 0.0


def _as_if_new(retriever: NeuralRetriever, rows: Int, time_s: int) -> torch.Tensor:
    """Vectors [n, D + 1] of known items without what training and the visits know of them; the last number is 0."""
    model = retriever.model
    with torch.no_grad():
        blocks = [model.encode_items(model.as_if_new(batch)) for batch in item_blocks(model, retriever.store, rows, time_s)]
    return torch.nn.functional.pad(torch.cat(blocks), (0, 1))


def _questions(dataset: Dataset, seed: int) -> Queries:
    """A sample of the next part's questions, or, where everything is trained on, of what everybody may ask after it."""
    for part in ("valid", "test"):
        queries = dataset.held_out(part, max_queries=QUESTIONS, seed=seed).queries
        if len(queries):
            return queries
    users = FIRST_ROW + np.arange(dataset.n_train_users)
    asked = np.sort(np.random.default_rng(seed).choice(users, min(QUESTIONS, len(users)), replace=False))
    after = int(dataset.events.time_s.max(initial=0)) + 1
    return dataset.histories(asked, np.full(len(asked), after))
