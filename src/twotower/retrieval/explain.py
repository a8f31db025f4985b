"""Explain a score: the contribution of each event of the history and of each feature of user and item.

A contribution is gradient times input, to the first order, with the lengths of both vectors held constant. The inner product is
attributed twice: to the inputs of the user tower (events and user features) and to the inputs of the item tower. Popularity and
distance are reasons of their own.

For a linear tower (no MLP, no attention, mean pooling) the contributions add up to the inner product. Otherwise they give the
effect of a small change; the rest comes from interactions of several inputs in attention and MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower.bundle.bundle import Bundle
from twotower.features.batches import ItemBatch, UserBatch
from twotower.features.transitions import LAST
from twotower.models.history_terms import REPEATS, recent_sum
from twotower.models.neural_retriever import model_bonuses, user_points
from twotower.retrieval.request import Reason
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW, UNKNOWN
from twotower.utils.nouns import spoken
from twotower.utils.types import Float, Float64, Int

MAX_REASONS, MAX_LABEL_CHARS = 10, 80
MIN_CONTRIBUTION = 0.0005  # smaller contributions would be printed as zero
LABELS = {
    ("user", "id"): "user id",
    ("user", "state"): "user activity: number, recency and stars of events",
    ("user", "home"): "home area",
    ("user", "request_location"): "location of the request",
    ("user", "hour"): "hour of the day",
    ("user", "weekday"): "day of the week",
    ("user", "month"): "month",
    ("item", "id"): "item id",
    ("item", "popularity"): "popularity",
    ("item", "new"): "new item",
    ("item", "distance"): "distance",
    ("item", "repeat"): "seen before",
    ("item", "order"): "often comes after the last items, or before them",
    ("item", "state"): "item activity: number, recency and stars of events",
}


@dataclass(frozen=True)
class Contributions:
    """Contributions to the inner products of one user and `k` items.

    Attributes
    ----------
    event_items
        int64 [V]: distinct items of the part of the history that the model reads.
    events, user, item
        float32 [k, V], [k, user fields], [k, item fields].
    popularity, distance
        float32 [k]: see `models.priors`.
    repeat, order
        float32 [k]: bonuses of the items of the history (zeros if they were not ranked), and of the items after or before them; see
        `models.history_terms`.
    """

    event_items: Int
    events: Float
    user: Float
    item: Float
    popularity: Float
    distance: Float
    repeat: Float
    order: Float


class Explainer:
    """Computes contributions and reasons with the weights of a bundle.

    Parameters
    ----------
    describe
        Returns the raw columns of an item row.
    """

    def __init__(self, bundle: Bundle, describe: Callable[[int], dict[str, Any]]) -> None:
        self.model, self.store, self.moment_s, self._describe = bundle.model, bundle.store, bundle.moment_s, describe
        self.vectors = bundle.vectors
        self._columns_of_items = torch.from_numpy(bundle.arrays.vectors[:, self.vectors.shape[1] :])
        self._new = np.isnan(self.store.log_popularity[:, 0])
        self._user = [spec.name for spec in self.model.user_embedding.fields]
        self._item = [spec.name for spec in (*self.model.item_embedding.fields, *self.model.item_state.fields)]
        self._noun = bundle.dataset.noun
        self._columns = {spec.name: spec for spec in bundle.dataset.specs if spec.side == "item"}

    def contributions(self, history: Queries, rows: Int, *, again: bool = False) -> Contributions:
        """Return the contributions for one query and item rows int64 [k]; `again`: its seen items were ranked too."""
        repeated, items = _repeated(history, len(rows)), self.vectors[torch.from_numpy(rows)]
        user_vectors, user, events = self._user_side(self.store.users(repeated), items)
        points, lengths = torch.from_numpy(user_points(history, self.store.location)), torch.from_numpy(history.lengths)
        temperature = float(self.model.temperature().detach())
        scale, columns = self.model.priors.user_columns(lengths, points, temperature, torch.zeros(1))
        known = (self._columns_of_items[torch.from_numpy(rows)] * columns).numpy()
        popularities, factor = self.model.priors.popularities, float(scale)
        item_batch = self.store.items(rows, np.full(len(rows), self.moment_s, np.int64))
        weight = temperature * float(self.model.priors.recency)
        asked = user_vectors * factor + weight * recent_sum(repeated, self.vectors)
        item = self._item_side(item_batch, asked)
        read, latest = history.item_row[-self.store.max_history :], history.item_row[-LAST:][::-1] if weight else ()
        event_items = np.unique(np.concatenate([read, np.asarray(latest, np.int64)]))
        summed = np.zeros((len(event_items), len(rows)), np.float32)
        np.add.at(summed, np.searchsorted(event_items, read), events.T * factor)
        for back, row in enumerate(latest):
            if row >= FIRST_ROW:
                summed[np.searchsorted(event_items, row)] += weight * 0.5**back * (items @ self.vectors[row]).numpy()
        popularity, distance = known[:, :popularities].sum(axis=1), known[:, popularities:].sum(axis=1)
        products = (asked * items).sum(dim=1).double().numpy() + known.sum(axis=1)
        bonuses = self._bonuses(history, rows, products / temperature, again=again) * temperature
        return Contributions(event_items, summed.T, user * factor, item, popularity, distance, *bonuses)

    def _bonuses(self, history: Queries, rows: Int, scores: Float64, *, again: bool) -> Float:
        """Return the bonuses float32 [2, k] of item rows in nats: as items of the history, and as items after or before them.

        `scores` float64 [k]: their scores without, in nats.
        """
        priors = self.model.priors
        found = model_bonuses(self.model, self.store, history, np.array([again]))
        known, at, mine = np.intersect1d(rows, found.item_row, return_indices=True)
        features = found.take(mine).features(self._columns_of_items[known, 0].double().numpy(), scores[at])
        weights = torch.cat([priors.repeats, priors.transitions]).double().numpy()
        bonuses = np.zeros((2, len(rows)), np.float32)
        bonuses[0, at], bonuses[1, at] = (features[:, part] @ weights[part] for part in (slice(REPEATS), slice(REPEATS, None)))
        return bonuses

    def reasons(self, history: Queries, rows: Int, *, again: bool = False) -> list[tuple[Reason, ...]]:
        """Return the reasons of each item: the contributions with the largest absolute values."""
        if not len(rows):
            return []
        contributions = self.contributions(history, rows, again=again)
        event_items = [self._describe(int(row)) if row > UNKNOWN else {} for row in contributions.event_items]
        return [
            tuple(
                sorted(self._reasons_of(contributions, j, int(row), event_items), key=lambda reason: -abs(reason.contribution))[
                    :MAX_REASONS
                ]
            )
            for j, row in enumerate(rows)
        ]

    def _reasons_of(self, contributions: Contributions, j: int, row: int, event_items: list[dict[str, Any]]) -> Iterator[Reason]:
        columns = self._describe(row)
        for name, contribution in {
            "new" if self._new[row] else "popularity": contributions.popularity[j],
            "distance": contributions.distance[j],
            "repeat": contributions.repeat[j],
            "order": contributions.order[j],
        }.items():
            if abs(contribution) >= MIN_CONTRIBUTION:
                yield Reason("item", name, spoken(LABELS["item", name], self._noun), round(float(contribution), 4))
        for about, contribution in zip(event_items, contributions.events[j].tolist(), strict=True):
            if about and abs(contribution) >= MIN_CONTRIBUTION:
                yield Reason("event", about["item_id"], about.get("name") or about["item_id"], round(contribution, 4))
        for name, contribution in zip(self._user, contributions.user[j].tolist(), strict=True):
            if abs(contribution) >= MIN_CONTRIBUTION:
                yield Reason("user", name, LABELS.get(("user", name), name.replace("_", " ")), round(contribution, 4))
        for name, contribution in zip(self._item, contributions.item[j].tolist(), strict=True):
            if abs(contribution) >= MIN_CONTRIBUTION:
                yield Reason("item", name, self.item_label(name, columns), round(contribution, 4))

    def item_label(self, name: str, columns: dict[str, Any]) -> str:
        """Return the label of an item feature, with its value if it has a printable one."""
        spec = self._columns.get(name)
        if spec is None:
            return spoken(LABELS.get(("item", name), name), self._noun)
        value = columns.get(name, columns.get(spec.columns[0]))  # a feature may be trained on ids while the catalogue has names
        if spec.kind not in ("categorical", "multi", "number") or value is None:
            return name.replace("_", " ")
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"{name.replace('_', ' ')}: {text if len(text) <= MAX_LABEL_CHARS else text[: MAX_LABEL_CHARS - 1] + '…'}"

    def _user_side(self, batch: UserBatch, items: Tensor) -> tuple[Tensor, Float, Float]:
        """Return user vectors [k, D], contributions of the fields [k, F] and of the events [k, W]; query j belongs to item j."""
        tower = self.model.user_tower
        with torch.no_grad():
            fields = torch.stack(self.model.user_fields(batch), dim=1)
            tokens = tower.event_embeddings(self.model.history_items(batch.items), batch)
        leaves = [fields.requires_grad_(), tokens.requires_grad_()]
        raw = tower.head.raw(tower.beside_history(fields.unbind(dim=1), tokens, batch))
        by_field, by_token = _contributions(raw, tower.head.divisor(raw), items, leaves)
        valid = (batch.history > 0).view(len(items), -1)
        by_event = (by_token.view(len(items), -1) * valid).numpy()[:, : int(batch.seen.max())]
        return (raw / tower.head.divisor(raw)).detach(), by_field.numpy(), by_event

    def _item_side(self, batch: ItemBatch, users: Tensor) -> Float:
        with torch.no_grad():
            fields = torch.stack(self.model.offered_fields(batch), dim=1)
        head = self.model.item_tower.head
        raw = head.raw(fields.requires_grad_().unbind(dim=1))
        (by_field,) = _contributions(raw, head.divisor(raw), users, [fields])
        contributions: Float = (by_field * self.model.item_length(batch.row)).numpy()
        return contributions


def _contributions(raw: Tensor, divisor: Tensor, others: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return gradient times input of Σ raw · others / divisor, with a constant divisor: one number per embedding of `leaves`."""
    products = (raw / divisor.detach() * others).sum()
    gradients = torch.autograd.grad(products, leaves, allow_unused=True)
    return [
        torch.zeros(leaf.shape[:-1]) if gradient is None else (gradient * leaf.detach()).sum(dim=-1)
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def _repeated(history: Queries, times: int) -> Queries:
    """Return the query repeated `times` times."""
    length = len(history.item_row)
    return Queries(
        offsets=np.arange(times + 1) * length,
        item_row=np.tile(history.item_row, times),
        event_time_s=np.tile(history.event_time_s, times),
        event_type=np.tile(history.event_type, times),
        stars=np.tile(history.stars, times),
        time_s=np.repeat(history.time_s, times),
        user_row=np.repeat(history.user_row, times),
        location=np.repeat(history.location, times, axis=0),
    )
