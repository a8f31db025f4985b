"""Choose on the validation part how a history counts beside the user tower; see `models.history_terms`.

A pass over the validation queries gives the lists for two weights of the last items. Larger ones are tried only if the smallest one
raises the likelihood of the targets clearly; then the weight with the best metric is taken.

The weights of transitions and of repeats are those of a conditional logit each: the choice is between all items, and the other
weights of a score are fixed. So its likelihood needs the probabilities of the items with a bonus alone. Transitions are fitted on
targets outside the histories, and are used if they raise the likelihood of these clearly and do not lower the metric.

The model is too sure of its first items, so at the top of a list repeats deserve more than the likelihood says. A constant is added
to their weight, the one with the best metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower.data.held_out import HeldOut
from twotower.models.history_terms import REPEATS, bonuses_of, merged, recent_sum
from twotower.models.neural_retriever import RefreshedRetriever
from twotower.retriever import Recommendations
from twotower.schema import FIRST_ROW
from twotower.utils import metrics as m
from twotower.utils.documents import HistoryRecord, RepeatsRecord, TransitionsRecord
from twotower.utils.types import Float, Float64, Int

RECENCIES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.5, 7.0, 10.0)
"""Weights of the last items that are tried, in nats."""
OFFSETS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Constants that are tried beside the weights of repeats, in nats."""
SURE = 2.0
"""Standard errors by which the smallest weight must raise the mean log probability of the targets."""
PENALTY = 10.0
"""Half of it times the squared weights is subtracted from the log likelihood."""
MAX_STEPS = 30
CHUNK_CELLS = 4_000_000
"""Most pairs of a query and an item whose scores are in memory."""
ChoicesT = TypeVar("ChoicesT", bound="Choices")


@dataclass(frozen=True, slots=True)
class Choices:
    """Items of the queries whose bonus is fitted.

    Attributes
    ----------
    query
        int64 [P].
    share
        float64 [P]: their probabilities without the bonus, among all items that can be chosen.
    features
        float64 [P, F]: the bonus is their weighted sum.
    chosen
        float64 [P]: number of targets that are the item, 0 or 1.
    """

    query: Int
    share: Float64
    features: Float64
    chosen: Float64


@dataclass(frozen=True, slots=True)
class Lists(Choices):
    """The lists of all queries for one weight of the last items, and the items of their histories, whose features are of repeats.

    Attributes
    ----------
    items, scores
        int64, float32 [Q, k]: lists without the items of the histories; scores in nats.
    item_row, score
        [P]: items of the histories by query, and their scores in nats.
    log_share
        float64 [N]: log probabilities of the targets outside the histories, among the items outside them.
    """

    items: Int
    scores: Float
    item_row: Int
    score: Float
    log_share: Float64

    def with_repeats(self, weights: Float64) -> Int:
        """Return the lists int64 [Q, k] with the items of the histories, whose scores have a bonus."""
        score = (self.score + self.features @ weights).astype(np.float32)
        return merged(Recommendations(self.items, self.scores), self.query, self.item_row, score).items


def choose_history_weights(
    system: RefreshedRetriever, held_out: HeldOut, *, metric: str, exclude_seen: bool, repeats: bool
) -> HistoryRecord:
    """Set `recency`, `transitions` and `repeats`, which are zero before, in the priors of the system's model.

    Parameters
    ----------
    held_out
        Queries by time.
    metric
        Name such as "NDCG@10".
    exclude_seen
        Which protocol decides on the weights of the last items and of transitions; with it, disliked items are left out too.
    repeats
        False: the data say nothing about repeats, and their weights are zero.
    """
    priors, (_, k) = system.model.priors, m.parse_metric(metric)
    sizes = np.diff(held_out.target_offsets)

    def values(items: Int) -> Float64:
        hits = m.hit_matrix(items, held_out.target_offsets, held_out.target_row)
        return m.compute(metric, hits, sizes)

    def figures(lists: Lists) -> tuple[RepeatsRecord | None, Float64]:
        record = _best_repeats(lists, sizes, values) if repeats else None
        weights = np.asarray(record.weights) if record is not None and record.used else np.zeros(REPEATS)
        return record, values(lists.items if exclude_seen else lists.with_repeats(weights))

    found, fitted, given = {}, {}, (system, held_out, exclude_seen)
    every = _lists(*given, k, RECENCIES[:2])
    if _clearly_likelier(every[RECENCIES[1]].log_share, every[0.0].log_share):
        every |= _lists(*given, k, RECENCIES[2:])
    else:
        every = {0.0: every[0.0]}
    for recency, lists in every.items():
        fitted[recency], each = figures(lists)
        found[recency] = round(float(each.mean()), 6)
    best = max(found, key=lambda recency: (found[recency], -recency))
    record, transitions = fitted[best], None
    if system.store.transitions is not None:
        weights = fit_bonus(*_transition_choices(*given, best))
        lists = _lists(*given, k, [best], weights)[best]
        again, each = figures(lists)
        after = round(float(each.mean()), 6)
        used = after >= found[best] and _clearly_likelier(lists.log_share, every[best].log_share)
        transitions = TransitionsRecord(before=found[best], after=after, used=used, weights=_rounded(weights))
        if used:
            record = again
            priors.transitions.copy_(torch.tensor(transitions.weights))
    priors.recency.fill_(best)
    if record is not None and record.used:
        priors.repeats.copy_(torch.tensor(record.weights))
    by_recency = {f"{recency:g}": value for recency, value in found.items()}
    return HistoryRecord(recency=best, by_recency=by_recency, transitions=transitions, repeats=record)


def _clearly_likelier(log_share: Float64, before: Float64) -> bool:
    """Return True if the log probabilities of the same targets rise by more than `SURE` standard errors on average."""
    ahead = log_share - before
    return len(ahead) > 1 and bool(ahead.mean() > SURE * ahead.std() / len(ahead) ** 0.5)


def _best_repeats(lists: Lists, sizes: Int, values: Callable[[Int], Float64]) -> RepeatsRecord:
    """Return the weights of repeats with the best metric: those of the likelihood and a constant."""
    before, weights = float(values(lists.with_repeats(np.zeros(REPEATS))).mean()), fit_bonus(lists, sizes)
    tried = [weights + offset * np.eye(REPEATS)[0] for offset in OFFSETS]
    figures = [round(float(values(lists.with_repeats(each)).mean()), 6) for each in tried]
    after = max(figures)
    chosen = _rounded(tried[figures.index(after)])
    return RepeatsRecord(before=round(before, 6), after=after, used=after >= round(before, 6), weights=chosen)


def _rounded(weights: Float64) -> list[float]:
    return [float(f"{value:.6g}") for value in weights]


def _transition_choices(system: RefreshedRetriever, held_out: HeldOut, exclude_seen: bool, recency: float) -> tuple[Choices, Int]:
    """Return the items with transitions outside the histories, and the number of targets outside each history, int64 [Q]."""
    parts: list[Choices] = []
    outside, done = np.zeros(len(held_out.queries), np.int64), 0
    for rows, scores, recent, _ in _scores(system, held_out, exclude_seen):
        queries = held_out.queries.take(rows)
        scores = scores + recency * recent
        seen = np.repeat(np.arange(len(rows)), queries.lengths)
        scores[torch.from_numpy(seen), torch.from_numpy(queries.item_row)] = -torch.inf
        found = bonuses_of(queries, np.zeros(len(rows), np.bool_), system.store.transitions)
        found = found.take(np.isfinite(scores[found.query, found.item_row].numpy()))
        query, target = held_out.targets(rows)
        wanted = query * system.n_item_rows + target
        chosen = np.isin(found.query * system.n_item_rows + found.item_row, wanted).astype(np.float64)
        share = scores[found.query, found.item_row].double() - torch.logsumexp(scores, dim=1).double()[found.query]
        parts.append(Choices(found.query + done, share.exp().numpy(), found.transitions, chosen))
        outside[done : done + len(rows)] = np.bincount(query[np.isfinite(scores[query, target].numpy())], minlength=len(rows))
        done += len(rows)
    return _joined(parts), outside


def _lists(
    system: RefreshedRetriever,
    held_out: HeldOut,
    exclude_seen: bool,
    k: int,
    recencies: Sequence[float] = RECENCIES,
    transitions: Float64 | None = None,
) -> dict[float, Lists]:
    """Return the lists for each of these weights of the last items, with these weights float64 [4] of transitions."""
    parts: dict[float, list[Lists]] = {recency: [] for recency in recencies}
    done = 0
    for rows, towers, recent, popularity in _scores(system, held_out, exclude_seen):
        queries, every = held_out.queries.take(rows), np.ones(len(rows), np.bool_)
        found = bonuses_of(queries, every)
        found = found.take(np.isfinite(towers[found.query, found.item_row].numpy()))  # without those that are disliked
        at = torch.from_numpy(found.query), torch.from_numpy(found.item_row)
        near = bonuses_of(queries, every, None if transitions is None else system.store.transitions)
        query, target = held_out.targets(rows)
        wanted = query * system.n_item_rows + target
        chosen = np.isin(found.query * system.n_item_rows + found.item_row, wanted).astype(np.float64)
        for recency in recencies:
            scores = towers + recency * recent
            plain = scores[at]
            if transitions is not None:
                scores[near.query, near.item_row] += torch.from_numpy(near.transitions @ transitions).float()
            mine = scores[at]
            share = torch.exp(mine.double() - torch.logsumexp(scores, dim=1).double()[at[0]])
            scores[at] = -torch.inf
            best = scores.topk(min(k, scores.shape[1]), dim=1)
            items = np.where(np.isfinite(best.values.numpy()), best.indices.numpy(), -1)
            features = found.features(popularity[at[1]].double().numpy(), plain.double().numpy())[:, :REPEATS]
            outside = (scores[query, target] - torch.logsumexp(scores, dim=1).double()[query]).numpy()
            choices = found.query + done, share.numpy(), features, chosen
            shown = items, best.values.numpy(), found.item_row, mine.numpy()
            parts[recency].append(Lists(*choices, *shown, outside[np.isfinite(outside)]))
        done += len(rows)
    return {recency: _joined(each) for recency, each in parts.items()}


def _joined(parts: Sequence[ChoicesT]) -> ChoicesT:
    """Return the choices of several parts as one."""
    kind = type(parts[0])
    return kind(*(np.concatenate([getattr(one, field.name) for one in parts]) for field in fields(kind)))


def _scores(system: RefreshedRetriever, held_out: HeldOut, exclude_seen: bool) -> Iterator[tuple[Int, Tensor, Tensor, Tensor]]:
    """Yield queries by position, scores of all items and of their last items (float32 [b, n], nats), and log popularities [n].

    The score is -inf for reserved rows, and with `exclude_seen` for disliked items.
    """
    temperature = float(system.model.temperature().detach())
    moments = system.moments(held_out.queries.time_s)
    for moment in np.unique(moments):
        retriever = system.at(int(moment))
        vectors, width = retriever.index.vectors, retriever.index.vectors.shape[1] - system.model.priors.width
        popularity = vectors[:, width].float().cpu().clone()  # a view would keep the index
        mine, size = np.flatnonzero(moments == moment), max(CHUNK_CELLS // system.n_item_rows, 1)
        for rows in (mine[start : start + size] for start in range(0, len(mine), size)):
            queries = held_out.queries.take(rows)
            with torch.inference_mode():
                towers = (retriever.encode(queries) @ vectors.T / temperature).float().cpu()
                recent = (recent_sum(queries, vectors[:, :width]) @ vectors[:, :width].T).float().cpu()
                towers[:, :FIRST_ROW] = -torch.inf
                if exclude_seen and queries.disliked is not None:
                    offsets, disliked = queries.disliked
                    query = np.repeat(np.arange(len(rows)), np.diff(offsets))
                    towers[torch.from_numpy(query), torch.from_numpy(disliked)] = -torch.inf
            yield rows, towers, recent, popularity
        del retriever, vectors  # frees the index before the next one is built


def fit_bonus(choices: Choices, sizes: Int) -> Float64:
    """Return the weights float64 [F] with the largest penalised likelihood; `sizes` int64 [Q]: targets of each query."""
    weights = np.zeros(choices.features.shape[1])
    value, gradient, hessian = _likelihood(choices, sizes, weights)
    for _ in range(MAX_STEPS):
        step, size = np.linalg.solve(hessian, gradient), 1.0
        tried = _likelihood(choices, sizes, weights + step)
        while not tried[0] >= value and size > 1e-3:  # too long a step overflows: NaN
            size /= 2
            tried = _likelihood(choices, sizes, weights + size * step)
        if not tried[0] >= value + 1e-6:
            break
        weights = weights + size * step
        value, gradient, hessian = tried
    return weights


def _likelihood(choices: Choices, sizes: Int, weights: Float64) -> tuple[float, Float64, Float64]:
    """Return the penalised log likelihood, its gradient [F] and minus its Hessian [F, F]."""
    query, features, n = choices.query, choices.features, len(sizes)
    bonus = features @ weights
    with np.errstate(over="ignore", invalid="ignore"):
        raised = choices.share * np.exp(bonus)
    total = 1.0 + np.bincount(query, raised - choices.share, n)  # of all items
    share = raised / total[query]
    mean = np.stack([np.bincount(query, share * column, n) for column in features.T], axis=1)
    value = choices.chosen @ bonus - sizes @ np.log(total) - PENALTY / 2 * weights @ weights
    gradient = choices.chosen @ features - sizes @ mean - PENALTY * weights
    second = (features * (share * sizes[query])[:, None]).T @ features
    hessian = second - (mean * sizes[:, None]).T @ mean + PENALTY * np.eye(len(weights))
    return float(value), gradient, hessian
