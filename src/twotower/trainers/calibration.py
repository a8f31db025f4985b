"""Fit the weights of a score on the validation part: towers, popularity at several half-lives, novelty, distance, repeats.

The validation targets are choices from the whole catalogue, so the weights are those of a conditional logit (McFadden, 1974). The
likelihood is concave; Newton's method finds its maximum. A penalty keeps the weights of training where the part says little. Where
the towers learned little, their weight becomes small, and the answer tends to what simple baselines know. The fitted weights are
used only if they do not lower the validation metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import can_refresh, log_popularity, open_store, split_moment
from twotower.data.held_out import HeldOut
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import PORTION, RefreshedRetriever, item_points, user_points
from twotower.models.priors import GROUPS, Priors, group
from twotower.models.two_tower import TwoTower
from twotower.schema import DAY_S, FIRST_ROW
from twotower.trainers.history_weights import choose_history_weights
from twotower.utils.config import Config
from twotower.utils.documents import CalibrationRecord
from twotower.utils.types import Float64

MAX_CELLS = 40_000_000
"""Most pairs of a validation query and an item that the weights are fitted on; they take 4 bytes each."""
BLOCK_CELLS = 1_000_000
MAX_REFRESHES = 12
"""Most refreshes of the index along the validation part."""
PENALTY = 10.0
"""Half of it times the squared change of a weight is subtracted from the log likelihood: about as much as ten choices tell."""
MAX_STEPS = 20
NEVER_DAYS = 1e6
SAMPLE = 1000
"""Users and items whose distances are sampled."""
ROUNDING_NATS = 0.05
"""Largest error of a score by rounding locations to float32; it bounds the weight of the distance."""


@dataclass(frozen=True)
class Block:
    """Queries of one group and one index.

    Attributes
    ----------
    towers
        float32 [B, n]: logits of the towers; -inf for items that may not be recommended.
    popularity
        float32 [n, H']: popularity columns of the items; see `Priors`.
    user, item
        float64 [B, 5] and [n, 5]: location columns; their product is minus half the squared distance in km².
    query, target
        int64 [T]: query and item of every target.
    """

    group: int
    towers: Tensor
    popularity: Tensor
    user: Tensor
    item: Tensor
    query: Tensor
    target: Tensor

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield the features [b, n, F], the allowed items [b, n], and query and item of the targets, in bounded memory."""
        step = max(BLOCK_CELLS // self.towers.shape[1], 1)
        for start in range(0, len(self.towers), step):
            towers = self.towers[start : start + step]
            allowed = torch.isfinite(towers)
            popularity = self.popularity.expand(len(towers), -1, -1)
            distance = (self.user[start : start + step] @ self.item.T).float().clamp(max=0)
            features = torch.cat([towers.masked_fill(~allowed, 0.0)[..., None], popularity, distance[..., None]], dim=2)
            inside = (self.query >= start) & (self.query < start + step)
            yield features, allowed, self.query[inside] - start, self.target[inside]


def calibrate(model: TwoTower, dataset: Dataset, config: Config) -> CalibrationRecord | None:
    """Fit the weights in `model.priors` on the validation part.

    Returns
    -------
    CalibrationRecord
        None if there is nothing to fit: no validation part, or `model.popularity_prior` is 0.
    """
    if not config.prepare.split.has_valid or not config.model.popularity_prior:
        return None
    held_out = dataset.held_out("valid", max_queries=config.training.eval_queries, seed=config.seed).by_time()
    if not len(held_out.queries):
        return None
    few = max(MAX_CELLS // dataset.n_item_rows, 1)
    sample = dataset.held_out("valid", max_queries=min(few, config.training.eval_queries), seed=config.seed).by_time()
    priors, every_days = model.priors, refresh_interval_days(dataset, held_out, config)
    priors.recency.zero_()
    priors.repeats.zero_()
    priors.transitions.zero_()
    metric, kept = config.training.eval_metric, {name: value.clone() for name, value in priors.state_dict().items()}

    system = refreshed_system(model, dataset, config, every_days)

    def figure() -> float:
        return evaluate(system, held_out, dataset, config.evaluation, metrics=[metric], beyond_k=None).mean(metric)

    before = figure()
    _set_locations(priors, item_points(system.store), user_points(sample.queries, system.store.location))
    fitted, unit = _fit(priors, list(_blocks(system, sample)))
    priors.weights.copy_(fitted)
    system.drop()  # the columns of its vectors depend on the weights
    after = figure()
    if after < before:
        priors.load_state_dict(kept)
    weights = {str(least): [float(f"{value:.6g}") for value in row] for least, row in zip(GROUPS, fitted.tolist(), strict=True)}
    history = None
    if dataset.ordered:
        system.drop()
        repeats, exclude_seen = config.prepare.duplicates == "keep", config.evaluation.exclude_seen
        history = choose_history_weights(system, held_out, metric=metric, exclude_seen=exclude_seen, repeats=repeats)
    return CalibrationRecord(
        metric=metric,
        before=round(before, 6),
        after=round(after, 6),
        used=after >= before,
        queries=len(sample.queries),
        half_lives_days=list(priors.half_lives),
        distance_unit_km=round(unit, 3),
        weights=weights,
        history=history,
    )


def in_words(record: CalibrationRecord) -> str:
    """Return the record of a calibration as one line."""
    towers = [f"{row[0]:.2f} from {least}" for least, row in record.weights.items()]
    towers[0] += " events on"
    kept = "with fitted weights" if record.used else "with fitted weights, which are not used"
    change = f"{record.metric} {record.before:.4f} → {record.after:.4f}"
    line = f"calibration: validation {change} {kept}; towers {', '.join(towers)}"
    if record.history is None:
        return line
    line += f"; weight of the last items {record.history.recency:g}"
    if (order := record.history.transitions) is not None:
        line += f"; {order.before:.4f} → {order.after:.4f} with weights of transitions"
        line += "" if order.used else ", which are not used"
    if (again := record.history.repeats) is not None:
        line += f"; seen items included, {again.before:.4f} → {again.after:.4f} with weights of repeats"
        line += "" if again.used else ", which are not used"
    return line


def _set_locations(priors: Priors, items: Float64, users: Float64) -> None:
    """Set the origin of the locations, and the distance of items without one: the median of users and items."""
    located = items[~np.isnan(items).any(axis=1)]
    if not len(located):
        return
    priors.centre.copy_(torch.from_numpy(located.mean(axis=0)))
    some = located[np.linspace(0, len(located) - 1, min(SAMPLE, len(located)), dtype=np.int64)]
    away = -priors.user_location(torch.from_numpy(users[:SAMPLE])) @ priors.item_location(torch.from_numpy(some)).T
    known = ~np.isnan(users[:SAMPLE]).any(axis=1)
    if known.any():
        priors.unlocated.fill_(float(away[torch.from_numpy(known)].median()))


def refresh_interval_days(dataset: Dataset, held_out: HeldOut, config: Config) -> float | None:
    """Return the days between two indexes along the validation part; None: one index."""
    if not can_refresh(dataset) or config.evaluation.refresh_days is None:
        return None
    span = int(held_out.queries.time_s[-1]) - split_moment(dataset, "valid")
    return max(config.evaluation.refresh_days, (span // MAX_REFRESHES + 1) / DAY_S)


def refreshed_system(model: TwoTower, dataset: Dataset, config: Config, every_days: float | None) -> RefreshedRetriever:
    """Return the model with indexes along the validation part; with one that knows the training part if `every_days` is None."""
    # "test": the state of items from the events of all earlier parts; the index of a moment uses those before it.
    store = open_store(dataset, "valid" if every_days is None else "test", config.model)
    return RefreshedRetriever(
        model,
        store,
        partial(log_popularity, dataset) if every_days else lambda _: store.log_popularity,
        n_item_rows=dataset.n_item_rows,
        start_s=split_moment(dataset, "valid"),
        every_days=every_days or NEVER_DAYS,
        name="calibrated",
    )


def _blocks(system: RefreshedRetriever, held_out: HeldOut) -> Iterator[Block]:
    """Yield the validation queries, by index and by group, without the items of their histories."""
    model, priors = system.model, system.model.priors
    moments = system.moments(held_out.queries.time_s)
    groups = group(torch.from_numpy(held_out.queries.lengths)).numpy()
    item = priors.item_location(torch.from_numpy(item_points(system.store)))
    for moment in np.unique(moments):
        retriever = system.at(int(moment))
        store, vectors = retriever.store, retriever.index.vectors[:, : -priors.width]
        logs = priors.popularity(torch.from_numpy(store.log_popularity), torch.from_numpy(store.is_new)).float()
        for number in np.unique(groups[moments == moment]):
            rows = np.flatnonzero((moments == moment) & (groups == number))
            part = held_out.queries.take(rows)
            with torch.no_grad():
                parts = [part.slice(a, min(a + PORTION, len(part))) for a in range(0, len(part), PORTION)]
                users = torch.cat([model.encode_users(store.users(each).to(vectors.device)) for each in parts])
                towers = (users @ vectors.T / model.temperature()).float().cpu()
            towers[:, :FIRST_ROW] = -torch.inf
            offsets, seen = part.seen
            towers[torch.from_numpy(np.repeat(np.arange(len(part)), np.diff(offsets))), torch.from_numpy(seen)] = -torch.inf
            query, target = held_out.targets(rows)
            reachable = np.isfinite(towers.numpy()[query, target])
            yield Block(
                group=int(number),
                towers=towers,
                popularity=logs,
                user=priors.user_location(torch.from_numpy(user_points(part, store.location))),
                item=item,
                query=torch.from_numpy(query[reachable]),
                target=torch.from_numpy(target[reachable]),
            )
        del retriever, vectors  # frees the index before the next one is built


def _fit(priors: Priors, blocks: list[Block]) -> tuple[Tensor, float]:
    """Return the weights [G, F] with the largest penalised likelihood, and the unit of the distance in km."""
    unit = _distance_unit(blocks)
    start = priors.weights.double().cpu()
    fitted = start.clone()
    bound = _largest_distance_weight(blocks)
    for number in range(len(GROUPS)):
        mine = [block for block in blocks if block.group == number and len(block.query)]
        if mine:
            fitted[number] = _newton(mine, start[number], unit**2)
    fitted[:, 0].clamp_(min=0.0)
    fitted[:, -1].clamp_(min=0.0, max=bound)
    return fitted.to(priors.weights), unit


def _newton(blocks: list[Block], start: Tensor, squared_unit: float) -> Tensor:
    """Return the weights [F] of one group. The last feature is counted in squared units."""
    scale = torch.ones(len(start), dtype=torch.float64)
    scale[-1] = 1 / squared_unit
    begin = start / scale
    weights, (value, gradient, hessian) = begin.clone(), _likelihood(blocks, begin, begin, scale)
    for _ in range(MAX_STEPS):
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while size > 1e-3:
            tried = weights + size * step
            found = _likelihood(blocks, tried, begin, scale)
            if found[0] >= value:
                break
            size /= 2
        else:
            break
        gained = float(found[0] - value)
        weights, (value, gradient, hessian) = tried, found
        if gained < 1e-4:
            break
    return weights * scale


def _likelihood(blocks: list[Block], weights: Tensor, begin: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the penalised log likelihood, its gradient [F] and minus its Hessian [F, F]."""
    change = weights - begin
    value, gradient = -PENALTY / 2 * change.square().sum(), -PENALTY * change
    hessian = PENALTY * torch.eye(len(weights), dtype=torch.float64)
    plain = (weights * scale).float()
    for block in blocks:
        for features, allowed, query, target in block.parts():
            logits = (features @ plain).masked_fill(~allowed, -torch.inf)
            log_share = torch.log_softmax(logits, dim=1)
            share = log_share.exp()
            times = torch.bincount(query, minlength=len(features)).double()  # targets of each query
            mean = torch.einsum("bn,bnf->bf", share, features).double()
            value = value + log_share[query, target].double().sum()
            gradient = gradient + (features[query, target].double().sum(0) - times @ mean) * scale
            flat = features.reshape(-1, features.shape[2])
            second = (flat * (share * times[:, None].float()).reshape(-1, 1)).T @ flat
            covariance = second.double() - (mean * times[:, None]).T @ mean
            hessian = hessian + covariance * scale[:, None] * scale
    return value, gradient, hessian


def _distance_unit(blocks: list[Block]) -> float:
    """Return the median distance of users from their targets in km, at least 0.1; 1 where locations are unknown."""
    found = []
    for block in blocks:
        user, item = block.user[block.query], block.item[block.target]
        both = (user[:, 4] > 0) & (item[:, 3] > 0)
        found.append((-2 * (user * item).sum(1))[both].clamp(min=0).sqrt())
    distances = torch.cat(found) if found else torch.zeros(0)
    return max(float(distances.median()), 0.1) if len(distances) else 1.0


def _largest_distance_weight(blocks: list[Block]) -> float:
    """Return the weight at which rounding to float32 changes a score by `ROUNDING_NATS`."""
    farthest = max((float(block.item[:, 4].abs().max()) for block in blocks), default=0.0)
    return ROUNDING_NATS / max(farthest * float(torch.finfo(torch.float32).eps), 1e-12)
