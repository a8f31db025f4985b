"""A bundle that answers over HTTP: the one place where the server touches a `Recommender`.

Enters: requests of `retrieval.request`. Leaves: answers, and what a page shows of items, as plain values for JSON. Everything an
answer is made from belongs to one `Engine`, so an answer is of one version throughout.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twotower.errors import RequestError
from twotower.retrieval.filters import distances_km
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Answer, Place, Request, Visit
from twotower.schema import FIRST_ROW, UNKNOWN

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Likeness:
    """A question for places like one."""

    item_id: str
    k: int
    where: str | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """An answer, and its places as a page reads them: made where it is computed, since long lists would hold up everybody else."""

    answer: Answer
    items: list[Json]


class Engine:
    """One version of a bundle, ready.

    Attributes
    ----------
    version
        A dozen hexadecimal digits that stand for every file of the bundle.
    """

    def __init__(self, recommender: Recommender) -> None:
        self.recommender, self.dataset = recommender, recommender.dataset
        self.manifest: Json = recommender.bundle.manifest
        self.version = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()[:12]
        self.name = recommender.bundle.path.resolve().name

    @classmethod
    def load(cls, path: Path) -> Engine:
        """Open the bundle at `path`, check it, and let it answer once.

        Raises
        ------
        DataError
            It is no whole bundle of this version.
        """
        engine = cls(Recommender.load(path))
        engine.answer([Request(history=tuple(Visit(item) for item in engine.dataset.item_ids[FIRST_ROW : FIRST_ROW + 1]), k=1)])
        return engine

    def row(self, item_id: str) -> int:
        """Row of an item; UNKNOWN where there is none of this id."""
        return self.recommender.reader.items.row(item_id)

    def user_row(self, user: str) -> int:
        """Row of a user; UNKNOWN where the bundle knows none of this id."""
        return self.recommender.reader.users.row(user)

    def visits(self, accepted: Iterable[Visit]) -> tuple[Visit, ...]:
        """Of accepted events those this bundle can read."""
        types = self.dataset.event_types
        return tuple(
            visit if visit.event_type in types else replace(visit, event_type=None)
            for visit in accepted
            if self.row(visit.item_id) != UNKNOWN
        )

    def answer(self, requests: Sequence[Request]) -> list[Listed | RequestError]:
        """For each request its answer, or its mistake."""
        return [
            one if isinstance(one, RequestError) else Listed(one, [self.place(place) for place in one.places])
            for one in self.recommender.answer_each(requests)
        ]

    def similar(self, questions: Sequence[Likeness]) -> list[list[Json] | RequestError]:
        """For each question the items whose vectors are nearest to the item's own, best first; or its mistake."""
        return [self._similar(question) for question in questions]

    def place(self, place: Place) -> Json:
        """A recommended place as a page reads it."""
        latitude, longitude = self.at(self.row(place.item_id))
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

    def _similar(self, question: Likeness) -> list[Json] | RequestError:
        bundle, row = self.recommender.bundle, self.row(question.item_id)
        here = self.at(row)
        home = None if here[0] is None or here[1] is None else (here[0], here[1])
        allow = bundle.arrays.offered
        try:
            if question.where:
                allow = allow & self.recommender.filter.compile(question.where, home=home)
        except RequestError as error:
            return error
        query = bundle.arrays.vectors[row : row + 1].copy()
        query[:, -1] = 0  # popularity has no part in likeness
        itself = (np.array([0, 1]), np.array([row]))
        found = self.recommender.index.search(torch.from_numpy(query), question.k, exclude=itself, allow=allow)
        rows, scores = found.items[0][found.items[0] >= 0], found.scores[0]
        away = distances_km(self.recommender.filter.places[rows - FIRST_ROW], home) if home is not None else [math.nan] * len(rows)
        return [
            {
                **self.item(int(other)),
                "rank": rank,
                "distance_km": None if math.isnan(km) else round(float(km), 2),
                "score": round(float(score), 4),
                "reasons": [],
            }
            for rank, (other, km, score) in enumerate(zip(rows, away, scores, strict=False), 1)
        ]

    def at(self, row: int) -> tuple[float | None, float | None]:
        """Where an item is: degrees, None where unknown."""
        latitude, longitude = self.recommender.filter.places[row - FIRST_ROW].tolist()
        return (latitude, longitude) if latitude == latitude else (None, None)
