"""A bundle that answers: known users, unknown users by their history, with filters, in people's terms.

    recommender = Recommender.load(Path("runs/town/bundle"))
    recommender.recommend(history=["b_17", "b_230", "b_5"], k=10, filter='category == "Mexican" and within(5)')

Enters: requests. Leaves: answers. One way for all who ask, from Python, from the command line and over HTTP:

    read (ids → rows) ─▶ user tower ─▶ filter ─▶ search ─▶ popularity and diversity ─▶ describe ─▶ explain

Promise: with the exact index a request is answered the same alone or among others, but for items whose scores differ in the last
digit alone; an approximate one looks as far as the request that asks for most, so company may only improve a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import time
from typing import Any, TypeAlias

import numpy as np
import torch

from twotower.bundle.bundle import Bundle, load_bundle
from twotower.errors import RequestError
from twotower.features.geo import mutual_km
from twotower.retrieval.explain import Explainer
from twotower.retrieval.item_details import Home, ItemDetails
from twotower.retrieval.request import Answer, HistoryEvent, Reason, Recommendation, Request, Source, Stages
from twotower.retrieval.request_reader import ParsedRequest, Reader, to_queries
from twotower.retriever import Recommendations
from twotower.schema import FIRST_ROW
from twotower.search.filters.item_filter import ItemFilter
from twotower.search.reranking import POPULARITY_SCALE, append_popularity_weight, boost_recent_items, fallback_scores, mmr
from twotower.search.topk import top_k
from twotower.utils.types import Float, Int, Mask

HOME_EVENTS = 100  # of a history, for the middle of where its user goes
CANDIDATES_PER_ITEM, MIN_CANDIDATES = 5, 50  # that diversity chooses from
TRUST_EVENTS = 3  # events of a history at which half of the confidence is reached

FilterSpec: TypeAlias = "str | dict[str, Any] | None"


@dataclass(slots=True)
class RankedRows:
    """The list of one request in rows.

    Attributes
    ----------
    rows, scores
        int64 [n], float32 [n]: item rows in the order of the list, and what the model gives them, the dial of popularity at rest;
        of a back-off visits as a share of the greatest.
    home
        Where distances count from.
    selectivity
        Share of the items that pass the filter; None without one.
    """

    parsed: ParsedRequest
    source: Source
    rows: Int
    scores: Float
    home: Home
    selectivity: float | None = None
    reasons: list[tuple[Reason, ...]] = field(default_factory=list)


class Recommender:
    """Answers from an opened bundle; may be asked from several threads at once.

    Attributes
    ----------
    details
        What people are told of items.
    offered
        bool [n_items]: False for items taken out of the catalogue, and the reserved rows; None where all are offered.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.dataset, self.moment_s = bundle, bundle.dataset, bundle.moment_s
        self.offered = bundle.offered
        self.filter = ItemFilter(self.dataset.items, self.dataset.specs, offered=self.offered)
        self.reader = Reader(self.dataset, self.moment_s)
        self.index, self._prior, self._revisit = bundle.index, bundle.model.popularity_weight(), bundle.model.recent_item_weight()
        self._locations = np.concatenate([np.full((FIRST_ROW, 2), np.nan), self.filter.locations])
        self.details = ItemDetails(self.dataset.items, self.filter.category, self._locations)

    @classmethod
    def load(cls, path: Path | str) -> Recommender:
        """Open the bundle at `path`; see `load_bundle` for the errors."""
        return cls(load_bundle(Path(path)))

    @cached_property
    def explainer(self) -> Explainer:
        """What says why."""
        return Explainer(self.bundle, self.details.describe)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer many requests at once.

        Raises
        ------
        RequestError
            The first that cannot be answered: an unknown item in a history, a malformed filter, a number out of range.
        """
        answers = self.answer_each(requests)
        for one in answers:
            if isinstance(one, RequestError):
                raise one
        return [one for one in answers if isinstance(one, Answer)]

    def answer_each(self, requests: Sequence[Request]) -> list[Answer | RequestError]:
        """Answer many requests at once; a request that cannot be answered gets its error, the others their answers."""
        stages = Stages()
        found = self.find(requests, stages)
        good = [one for one in found if isinstance(one, RankedRows)]
        with stages("explain"):
            for one in good:
                if one.parsed.request.explain and one.source == "model":
                    one.reasons = self.explainer.reasons(one.parsed.history, one.rows, again=not one.parsed.request.exclude_seen)
        with stages("describe"):
            items = iter(self.details.recommendations([(one.rows, one.scores, one.home, one.reasons) for one in good]))
            answers = [one if isinstance(one, RequestError) else self._answer(one, next(items), stages) for one in found]
        return answers

    def recommend(
        self,
        *,
        user: str | None = None,
        history: Sequence[str | HistoryEvent] | None = None,
        k: int = 10,
        filter: FilterSpec = None,
        near: tuple[float, float] | None = None,
        exclude_seen: bool = True,
        diversity: float = 0.0,
        popularity: float = 0.0,
        explain: bool = False,
    ) -> list[Recommendation]:
        """The `k` best items for a known user, for whoever visited `history` (oldest first), or for a user who went on to visit it.

        Parameters
        ----------
        filter
            A filter; see `search.filters`.
        near
            Latitude and longitude the request comes from: distances and `within(km)` count from there, and a model trained with
            `model.request_location` prefers what is around. Default: the most central place of the history.
        diversity, popularity, explain
            See `Request`.

        Raises
        ------
        RequestError
            Neither user nor history is given, an id is unknown, `k` is out of range, or `near` is no place, or the filter is
            malformed.
        """
        if user is None and history is None:
            raise RequestError("Say who asks: a user id, a history of item ids, or both.")
        visits = tuple(event if isinstance(event, HistoryEvent) else HistoryEvent(event) for event in history or ())
        dials = {"exclude_seen": exclude_seen, "diversity": diversity, "popularity": popularity, "explain": explain}
        (answer,) = self.answer([Request(user=user, history=visits, k=k, filter=filter, near=near, **dials)])  # type: ignore[arg-type]
        if history is None and not answer.user_known:
            raise RequestError(f"The user must be in the bundle. Found no {user!r}. Give a history of item ids instead.")
        return answer.items

    def similar(self, item_id: str, *, k: int = 10, filter: FilterSpec = None) -> list[Recommendation]:
        """The `k` items whose vectors are nearest to that of an item, best first; distances count from it.

        Raises
        ------
        RequestError
            The item is unknown, or the filter is malformed.
        """
        row = self.reader.item(item_id)
        latitude, longitude = self._locations[row].tolist()
        home = None if latitude != latitude else (latitude, longitude)
        allow = self.filter.compile(filter, home=home, now=int(time())) if filter else self.offered
        query = self.bundle.arrays.vectors[row : row + 1].copy()
        query[:, -1] = 0  # popularity has no part in likeness
        best = self.index.search(torch.from_numpy(query), k, exclude=(np.array([0, 1]), np.array([row])), allow=allow)
        rows, scores = best.items[0], best.scores[0]
        rows, scores = rows[rows >= 0], scores[rows >= 0]
        return self.details.recommendations([(rows, scores, home, [])])[0]

    def find(
        self, requests: Sequence[Request], stages: Stages | None = None, *, now: int | None = None
    ) -> list[RankedRows | RequestError]:
        """Rows and scores of many requests: what `answer_each` puts into words.

        Parameters
        ----------
        now
            Seconds that `open_now` means where a request does not say; None: the clock's.
        """
        stages = stages or Stages()
        found: list[RankedRows | RequestError | None] = [None] * len(requests)
        parsed: dict[int, tuple[ParsedRequest, Home, Mask | None]] = {}
        for i, request in enumerate(requests):
            try:
                with stages("features"):
                    one = self.reader.read(request)
                    home = one.near or self._home(one.history.item_row)
                with stages("filter"):
                    parsed[i] = one, home, self._mask(one, home, now)
            except RequestError as error:
                found[i] = error
        for speaks, search in ((True, self._search), (False, self._search_nothing_known)):
            chosen = [i for i, (one, _, _) in parsed.items() if one.speaks == speaks]
            if chosen:
                parts = [parsed[i] for i in chosen]
                lists = search([one for one, _, _ in parts], _allowed([mask for _, _, mask in parts]), stages)
                for i, (one, home, mask), (source, rows, scores) in zip(chosen, parts, lists, strict=True):
                    found[i] = RankedRows(one, source, rows, scores, home, self._share(one.request, mask))
        return [one for one in found if one is not None]

    def _search(self, parsed: list[ParsedRequest], allow: Mask | None, stages: Stages) -> list[tuple[Source, Int, Float]]:
        queries = to_queries(parsed)
        with stages("tower"):
            towers = torch.from_numpy(self.bundle.encode(queries))
            again = np.array([not one.request.exclude_seen for one in parsed])
            vectors = boost_recent_items(towers, queries, self.bundle.vectors, self._revisit, again).numpy()
        with stages("search"):
            dial = np.array([one.request.popularity for one in parsed])
            vectors_with_bias = append_popularity_weight(vectors, self._prior, dial)
            seen = [one.history.item_row if one.request.exclude_seen else one.history.item_row[:0] for one in parsed]
            exclude = (np.append(0, np.cumsum([len(rows) for rows in seen])), np.concatenate(seen))
            most = min(max(_candidates(one.request) for one in parsed), self.dataset.n_items)
            best = self.index.search(torch.from_numpy(vectors_with_bias), most, exclude=exclude, allow=allow)
            lists = [self._cut(one.request, best, b) for b, one in enumerate(parsed)]
        items = self.bundle.arrays.vectors
        extra = (dial * POPULARITY_SCALE).astype(np.float32)  # orders the list, and is no part of the score
        return [("model", rows, scores - extra[b] * items[rows, -1]) for b, (rows, scores) in enumerate(lists)]

    def _search_nothing_known(
        self, parsed: list[ParsedRequest], allow: Mask | None, stages: Stages
    ) -> list[tuple[Source, Int, Float]]:
        recent_event_count, locations = self.bundle.arrays.recent_event_count, self._locations
        lists: list[tuple[Source, Int, Float]] = []
        with stages("search"):
            for b, one in enumerate(parsed):
                source: Source = "recent" if one.near is None or np.isnan(locations).all() else "nearby"
                scores = fallback_scores(recent_event_count, locations, one.near if source == "nearby" else None)
                mine = None if allow is None else allow[b] if allow.ndim == 2 else allow
                best = top_k(scores[None], min(_candidates(one.request), self.dataset.n_items), allow=mine)
                rows, _ = self._cut(one.request, best, 0)
                lists.append(
                    (source, rows, (recent_event_count[rows] / max(int(recent_event_count.max(initial=0)), 1)).astype(np.float32))
                )
        return lists

    def _cut(self, request: Request, best: Recommendations, b: int) -> tuple[Int, Float]:
        """The list of query `b`: the first `k` candidates, or `k` that differ."""
        wanted = _candidates(request)
        rows, scores = best.items[b, :wanted], best.scores[b, :wanted]
        rows, scores = rows[rows >= 0], scores[rows >= 0]
        if not request.diversity:
            return rows[: request.k], scores[: request.k]
        order = mmr(scores, self.bundle.arrays.vectors[rows, :-1], request.k, request.diversity)
        return rows[order], scores[order]

    def _mask(self, parsed: ParsedRequest, home: Home, now: int | None) -> Mask | None:
        if not parsed.request.filter:
            return self.offered
        history = parsed.history
        moment = next(second for second in (parsed.request.time_s, now, int(time())) if second is not None)
        return self.filter.compile(parsed.request.filter, home=home, now=moment, seen=history.item_row)

    def _share(self, request: Request, mask: Mask | None) -> float | None:
        if not request.filter or mask is None:
            return None
        return np.count_nonzero(mask) / max(self.dataset.n_items - FIRST_ROW, 1)

    def _home(self, rows: Int) -> Home:
        """The visited place nearest to all others: between two towns a mean would lie where nobody goes."""
        locations = self._locations[rows]
        known = locations[np.isfinite(locations).all(axis=1)][-HOME_EVENTS:]
        if not len(known):
            return None
        latitude, longitude = known[int(np.argmin(mutual_km(known).sum(axis=1)))].tolist()
        return latitude, longitude

    def _answer(self, found: RankedRows, items: list[Recommendation], stages: Stages) -> Answer:
        events = len(found.parsed.history.item_row)
        confidence = 0.0 if found.source != "model" else events / (events + TRUST_EVENTS)
        return Answer(items, found.source, round(confidence, 3), found.parsed.known, stages.ms, found.selectivity)


def _candidates(request: Request) -> int:
    """How many of the best a list is made from."""
    return max(CANDIDATES_PER_ITEM * request.k, MIN_CANDIDATES) if request.diversity else request.k


def _allowed(masks: list[Mask | None]) -> Mask | None:
    """One mask for all requests where they share it, else one each."""
    if all(mask is masks[0] for mask in masks):
        return masks[0]
    return np.stack([np.ones_like(next(m for m in masks if m is not None)) if mask is None else mask for mask in masks])
