"""A bundle that answers: known users, unknown users by their history, with filters, in people's terms.

recommender = Recommender.load(Path("runs/town/bundle"))
recommender.recommend(history=["b_17", "b_230", "b_5"], k=10, where='category == "Mexican" and within(5)')
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twotower.data.data_loader import open_store
from twotower.errors import RequestError
from twotower.retrieval.bundle import Bundle, load_bundle
from twotower.retrieval.filters import ItemFilter, check_place, distances_km
from twotower.retrieval.neural import NeuralRetriever
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW, UNKNOWN

RECENT_PLACES = 100  # of a history, for the middle of where its user goes


@dataclass(frozen=True, slots=True)
class Place:
    """One recommended item in people's terms.

    Attributes
    ----------
    distance_km
        From where the request comes, else from the most central place of the history; None when either is unknown.
    score
        Cosine of user and item vector, in [-1, 1].
    """

    rank: int
    item_id: str
    name: str
    categories: list[str]
    city: str | None
    distance_km: float | None
    score: float


class Recommender:
    """Answers from an opened bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.dataset = bundle, bundle.dataset
        self.moment_s = int(bundle.manifest["moment_s"])
        store = open_store(self.dataset, "future", bundle.config.model)
        self.retriever = NeuralRetriever(
            bundle.model, store, n_items=self.dataset.n_items, time_s=self.moment_s, vectors=bundle.vectors
        )

    @classmethod
    def load(cls, path: Path) -> Recommender:
        """Open the bundle at `path`; see `load_bundle` for the errors."""
        return cls(load_bundle(path))

    @cached_property
    def filter(self) -> ItemFilter:
        """The filter language over this catalogue."""
        return ItemFilter(self.dataset.items, self.dataset.specs)

    def recommend(
        self,
        *,
        user: str | None = None,
        history: list[str] | None = None,
        k: int = 10,
        where: str | None = None,
        near: tuple[float, float] | None = None,
        exclude_seen: bool = True,
    ) -> list[Place]:
        """The `k` best items for a known user, or for whoever visited `history` (item ids, oldest first).

        Parameters
        ----------
        where
            A filter; see `retrieval.filters`.
        near
            Latitude and longitude the request comes from: distances and `within(km)` count from there, and a model trained with
            `model.request_place` prefers what is around. Default: the most central place of the history.

        Raises
        ------
        RequestError
            Neither or both are given, an id is unknown, `k` is out of range, or `near` is no place, or the filter is malformed.
        """
        if k < 1:
            raise RequestError(f"k must be at least 1. Got {k}.")
        queries = self._queries(user, history)
        near = None if near is None else check_place(near)
        if near is not None:
            queries = replace(queries, place=np.array([near], np.float32))
        home = near or self._home(queries)
        allow = self.filter.compile(where, home=home) if where else None
        found = self.retriever.retrieve(queries, min(k, self.dataset.n_items), exclude_seen=exclude_seen, allow=allow)
        rows, scores = found.items[0], found.scores[0]
        return [
            self._place(rank, int(row), float(score), home)
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
            if row >= 0
        ]

    def _queries(self, user: str | None, history: list[str] | None) -> Queries:
        if (user is None) == (history is None):
            raise RequestError("Say who asks: either a user id, or a history of item ids.")
        if user is not None:
            row = self.dataset.user_rows([user])
            if row[0] == UNKNOWN:
                raise RequestError(f"The user must be in the bundle. Found no {user!r}. Give a history of item ids instead.")
            return self.dataset.histories(row, np.array([self.moment_s]))
        ids = history or []
        rows = self.dataset.item_rows(ids)
        if (rows == UNKNOWN).any():
            raise RequestError(
                f"Every item of a history must be in the catalogue. Found no {ids[int(np.argmax(rows == UNKNOWN))]!r}."
            )
        return Queries.of([rows.tolist()], time_s=self.moment_s)

    def _home(self, queries: Queries) -> tuple[float, float] | None:
        places = self.filter.places[queries.item_row - FIRST_ROW]
        known = places[np.isfinite(places).all(axis=1)]
        if not len(known):
            return None
        # The visited place nearest to all others: between two towns a mean would lie where nobody goes.
        known = known[-RECENT_PLACES:]
        total = [float(distances_km(known, place).sum()) for place in known]
        middle = known[int(np.argmin(total))]
        return float(middle[0]), float(middle[1])

    def _place(self, rank: int, row: int, score: float, home: tuple[float, float] | None) -> Place:
        facts = self.describe(row)
        categories = facts.get(self.filter.category or "") or []
        at = self.filter.places[row - FIRST_ROW]
        distance = float(distances_km(at[None], home)[0]) if home is not None and np.isfinite(at).all() else None
        return Place(
            rank=rank,
            item_id=facts["item_id"],
            name=facts.get("name") or facts["item_id"],
            categories=[categories] if isinstance(categories, str) else [str(one) for one in categories if one is not None],
            city=facts.get("city"),
            distance_km=None if distance is None else round(distance, 2),
            score=round(score, 4),
        )

    def describe(self, row: int) -> dict[str, Any]:
        """Raw columns of an item row."""
        facts: dict[str, Any] = self.dataset.items.slice(row - FIRST_ROW, 1).to_pylist()[0]
        return facts
