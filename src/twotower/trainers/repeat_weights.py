"""Fit the weights of repeats (`models.repeats`) on the validation part.

The choice is between all items, those of the history included. The other weights of a score are fixed, so the likelihood of this
conditional logit needs one number of a query beside its history: the log of the sum over the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from twotower.data.dataset import HeldOut
from twotower.models.neural_retriever import RefreshedRetriever
from twotower.models.repeats import WIDTH, repeats_of
from twotower.schema import FIRST_ROW
from twotower.utils.ragged import ragged_arange
from twotower.utils.types import Float64, Int

PENALTY = 10.0
"""Half of it times the squared weights is subtracted from the log likelihood."""
MAX_STEPS = 30
CHUNK_CELLS = 4_000_000
"""Most pairs of a query and an item whose scores are in memory."""


@dataclass(frozen=True, slots=True)
class Choices:
    """Repeats of queries, and what was chosen.

    Attributes
    ----------
    query
        int64 [P]: query of each repeat, ascending.
    share
        float64 [P]: probability of the repeat without its bonus.
    features
        float64 [P, 3].
    targets
        float64 [Q]: number of targets of each query.
    chosen
        float64 [P]: number of targets that are the repeat, 0 or 1.
    """

    query: Int
    share: Float64
    features: Float64
    targets: Float64
    chosen: Float64


def fit_repeats(system: RefreshedRetriever, held_out: HeldOut) -> Float64:
    """Return the weights float64 [3] with the largest penalised likelihood; zeros if no query has a history."""
    choices = _choices(system, held_out)
    weights = np.zeros(WIDTH)
    value, gradient, hessian = _likelihood(choices, weights)
    for _ in range(MAX_STEPS):
        step, size = np.linalg.solve(hessian, gradient), 1.0
        tried = _likelihood(choices, weights + step)
        while tried[0] < value and size > 1e-3:
            size /= 2
            tried = _likelihood(choices, weights + size * step)
        if tried[0] < value + 1e-6:
            break
        weights = weights + size * step
        value, gradient, hessian = tried
    return weights


def _choices(system: RefreshedRetriever, held_out: HeldOut) -> Choices:
    """Return the repeats of all queries, with their probabilities."""
    temperature = float(system.model.temperature().detach())
    moments, sizes = system.moments(held_out.queries.time_s), np.diff(held_out.target_offsets)
    parts: list[tuple[Int, Float64, Float64, Float64, Float64]] = []
    done = 0
    for moment in np.unique(moments):
        retriever = system.at(int(moment))
        everything, size = retriever.index.vectors, max(CHUNK_CELLS // system.n_item_rows, 1)
        mine = np.flatnonzero(moments == moment)
        for rows in (mine[start : start + size] for start in range(0, len(mine), size)):
            queries = held_out.queries.take(rows)
            with torch.inference_mode():
                scores = retriever.encode(queries) @ everything.T / temperature
                scores[:, :FIRST_ROW] = -torch.inf
                log_share = torch.log_softmax(scores.double(), dim=1).cpu().numpy()
            found = repeats_of(queries, np.ones(len(rows), np.bool_))
            query, at = ragged_arange(held_out.target_offsets[rows], sizes[rows])
            wanted = query * system.n_item_rows + held_out.target_row[at]
            chosen = np.isin(found.query * system.n_item_rows + found.item_row, wanted)
            share = np.exp(log_share[found.query, found.item_row])
            parts.append((found.query + done, share, found.features, sizes[rows].astype(float), chosen.astype(float)))
            done += len(rows)
    columns = [np.concatenate(each) for each in zip(*parts, strict=True)]
    return Choices(*columns)


def _likelihood(choices: Choices, weights: Float64) -> tuple[float, Float64, Float64]:
    """Return the penalised log likelihood, its gradient [3] and minus its Hessian [3, 3]."""
    query, features, n = choices.query, choices.features, len(choices.targets)
    bonus = features @ weights
    raised = choices.share * np.exp(bonus)
    total = 1.0 + np.bincount(query, raised - choices.share, n)  # of all items
    share = raised / total[query]
    mean = np.stack([np.bincount(query, share * column, n) for column in features.T], axis=1)
    value = choices.chosen @ bonus - choices.targets @ np.log(total) - PENALTY / 2 * weights @ weights
    gradient = choices.chosen @ features - choices.targets @ mean - PENALTY * weights
    second = (features * (share * choices.targets[query])[:, None]).T @ features
    hessian = second - (mean * choices.targets[:, None]).T @ mean + PENALTY * np.eye(WIDTH)
    return float(value), gradient, hessian
