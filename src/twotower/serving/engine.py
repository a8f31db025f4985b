"""A bundle that answers over HTTP: the one place where the server touches a `Recommender`.

Enters: requests of `retrieval.request`. Leaves: answers, and what a page shows of items, as plain values for JSON. Everything an
answer is made from belongs to one `Engine`, so an answer is of one version throughout.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from twotower.errors import RequestError
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Answer, Place, Request, Visit
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW, UNKNOWN

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Likeness:
    """A question for places like one."""

    item_id: str
    k: int
    where: str | Json | None = None


class Engine:
    """One version of a bundle, ready.

    Attributes
    ----------
    version
        A dozen hexadecimal digits that stand for every file of the bundle.
    """

    def __init__(self, recommender: Recommender) -> None:
        self.recommender, self.dataset = recommender, recommender.dataset
        manifest = recommender.bundle.manifest
        self.version = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
        self.metrics: Json = manifest.get("metrics") or {}
        self.name = recommender.bundle.path.resolve().name
        self.moment_s = int(manifest["moment_s"])
        self.rows = {str(item_id): row for row, item_id in enumerate(self.dataset.item_ids) if row >= FIRST_ROW}
        self.user_rows = {str(user): row for row, user in enumerate(self.dataset.user_ids) if row >= FIRST_ROW}

    @classmethod
    def load(cls, path: Path) -> Engine:
        """Open the bundle at `path`, check it, and let it answer once.

        Raises
        ------
        DataError
            It is no whole bundle of this version.
        """
        engine = cls(Recommender.load(path))
        engine.answer([Request(history=(Visit(next(iter(engine.rows))),) if engine.rows else (), k=1)])
        return engine

    def row(self, item_id: str) -> int:
        """Row of an item.

        Raises
        ------
        RequestError
            There is none of this id.
        """
        if item_id not in self.rows:
            raise RequestError(f"The item must be in the catalogue. Found no {item_id[:80]!r}.")
        return self.rows[item_id]

    def check_type(self, event_type: str | None) -> None:
        """Refuse a kind of events that the bundle does not know.

        Raises
        ------
        RequestError
            It is none of `dataset.event_types`.
        """
        known = self.dataset.event_types
        if event_type is not None and event_type not in known:
            raise RequestError(f"An event must be of a kind the bundle knows: {', '.join(known)}. Got {event_type[:80]!r}.")

    def visits(self, accepted: Iterable[Visit], before_s: int | None) -> tuple[Visit, ...]:
        """Of accepted events those this bundle can read, before a moment if one is given."""
        types = self.dataset.event_types
        return tuple(
            visit if visit.event_type in types else replace(visit, event_type=None)
            for visit in accepted
            if visit.item_id in self.rows and (before_s is None or (visit.time_s or 0) < before_s)
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request."""
        return [self._answer(request) for request in requests]

    def similar(self, questions: Sequence[Likeness]) -> list[list[Place]]:
        """For each question the items whose vectors are nearest to the item's own, best first."""
        return [self._similar(question) for question in questions]

    def place(self, place: Place) -> Json:
        """A recommended place as a page reads it."""
        latitude, longitude = self.at(self.rows[place.item_id])
        return {
            "rank": place.rank,
            "item_id": place.item_id,
            "name": place.name,
            "categories": place.categories,
            "city": place.city,
            "distance_km": place.distance_km,
            "score": place.score,
            "latitude": latitude,
            "longitude": longitude,
            "reasons": [asdict(reason) for reason in place.reasons],
        }

    def item(self, row: int) -> Json:
        """What a page shows of an item."""
        facts = self.recommender.describe(row)
        latitude, longitude = self.at(row)
        categories = facts.get(self.recommender.filter.category or "") or []
        return {
            "item_id": facts["item_id"],
            "name": facts.get("name") or facts["item_id"],
            "categories": [categories] if isinstance(categories, str) else [str(one) for one in categories if one is not None],
            "city": facts.get("city"),
            "latitude": latitude,
            "longitude": longitude,
        }

    def at(self, row: int) -> tuple[float | None, float | None]:
        """Where an item is: degrees, None where unknown."""
        latitude, longitude = self.recommender.filter.places[row - FIRST_ROW].tolist()
        return (latitude, longitude) if latitude == latitude else (None, None)

    def _answer(self, request: Request) -> Answer:
        began = time.perf_counter()
        rows = [self.row(visit.item_id) for visit in request.history]
        known = request.user in self.user_rows
        recommender = self.recommender
        queries = self._queries(request, rows)
        home = request.near or recommender._home(queries)
        allow = recommender.filter.compile(str(request.where), home=home) if request.where else None
        found = recommender.retriever.retrieve(queries, request.k, exclude_seen=request.exclude_seen, allow=allow)
        pairs = zip(found.items[0].tolist(), found.scores[0].tolist(), strict=True)
        places = [self._as_place(rank, row, score, home) for rank, (row, score) in enumerate(pairs, 1) if row >= 0]
        seen = len(queries.item_row)
        return Answer(
            places=places,
            source="model",
            confidence=seen / (seen + 3),
            user_known=known,
            stages_ms={"search": 1000 * (time.perf_counter() - began)},
            selectivity=None if allow is None else float(allow.mean()),
        )

    def _queries(self, request: Request, rows: list[int]) -> Queries:
        time_s = request.time_s or self.moment_s
        place = np.array([request.near or (np.nan, np.nan)], np.float32)
        row = np.array([self.user_rows.get(request.user or "", UNKNOWN)])
        own = self.dataset.histories(row, np.array([time_s]))
        if not rows:
            return replace(own, place=place)
        queries = Queries.of([own.item_row.tolist() + rows], time_s=time_s, place=request.near)
        return replace(queries, user_row=row)

    def _as_place(self, rank: int, row: int, score: float, home: Any) -> Place:
        found = self.recommender._place(rank, row, score, home)
        return Place(found.rank, found.item_id, found.name, found.categories, found.city, found.distance_km, found.score)

    def _similar(self, question: Likeness) -> list[Place]:
        row = self.row(question.item_id)
        latitude, longitude = self.at(row)
        home = None if latitude is None or longitude is None else (latitude, longitude)
        allow = self.recommender.filter.compile(str(question.where), home=home) if question.where else None
        query = self.recommender.bundle.vectors[row : row + 1]
        itself = (np.array([0, 1]), np.array([row]))
        found = self.recommender.retriever.index.search(query, question.k, exclude=itself, allow=allow)
        pairs = zip(found.items[0].tolist(), found.scores[0].tolist(), strict=True)
        return [self._as_place(rank, other, score, home) for rank, (other, score) in enumerate(pairs, 1) if other >= 0]
