"""Recommend items from a bundle to known users, and to unknown users with a history.

    recommender = Recommender.load(Path("runs/town/bundle"))
    recommender.recommend(history=["P0001", "P0005"], k=10, filter='category == "Mexican" and within(5)')

Python, the command line and HTTP use the same pipeline:

    read (ids → rows) ─▶ user tower ─▶ filter ─▶ search ─▶ popularity and diversity ─▶ describe ─▶ explain

With the exact index, a request gets the same answer alone and in a batch, up to rounding of scores. An approximate index uses the
search width of the largest request of the batch, so lists in a batch are equal or better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from html import escape
from pathlib import Path
from time import time
from typing import Any, TypeAlias

import numpy as np
import torch

from twotower.bundle.bundle import Bundle, load_bundle
from twotower.bundle.publish import RemoteIndex, with_milvus
from twotower.errors import RequestError
from twotower.features.geo import medoid
from twotower.retrieval.explain import Explainer
from twotower.retrieval.exploration import POOL, explored, pool_of, uncertain_items
from twotower.retrieval.item_details import Home, ItemDetails
from twotower.retrieval.ranked_rows import RankedRows
from twotower.retrieval.request import Answer, HistoryEvent, Recommendation, Request, Source, Stages
from twotower.retrieval.request_reader import ParsedRequest, Reader, check_filter, check_k, to_queries
from twotower.retriever import Recommendations
from twotower.schema import FIRST_ROW, ITEM_ID
from twotower.search.filters.item_filter import ItemFilter, ResolvedFilter
from twotower.search.reranking import POPULARITY_SCALE, fallback_scores, mmr
from twotower.search.topk import top_k
from twotower.utils.ids import Id, id_types
from twotower.utils.types import Float, Int, Mask

HOME_EVENTS = 100  # latest events of a history that define the home location
CANDIDATES_PER_ITEM, MIN_CANDIDATES = 5, 50  # candidates for the diversity re-ranking
TRUST_EVENTS = 3  # events of a history at which the confidence is 0.5

Search: TypeAlias = "Callable[..., list[tuple[Source, Int, Float]]]"  # returns a source, item rows and scores per request
FilterSpec: TypeAlias = "str | dict[str, Any] | None"


class Recommender:
    """Answers requests from an opened bundle. Several threads may use it at once.

    Attributes
    ----------
    details
        Display fields of the items.
    offered
        bool [n_item_rows]: False for items removed from the catalogue and for reserved rows; None if all items are offered.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.dataset, self.moment_s = bundle, bundle.dataset, bundle.moment_s
        self.offered = bundle.offered
        self.filter = ItemFilter(self.dataset.items, self.dataset.specs, offered=self.offered)
        self.reader = Reader(self.dataset, self.moment_s)
        self.index = bundle.index
        self.rng = np.random.default_rng()
        self._locations = np.concatenate([np.full((FIRST_ROW, 2), np.nan), self.filter.locations])
        self.details = ItemDetails(
            self.dataset.items, self.filter.category, self._locations, id_types(self.dataset.manifest)[ITEM_ID]
        )

    @classmethod
    def load(cls, path: Path | str, *, trusted_key: Path | None = None, index: RemoteIndex | None = None) -> Recommender:
        """Open the bundle at `path`; see `load_bundle`. With `index`, search in Milvus; see `with_milvus`."""
        bundle = load_bundle(Path(path), trusted_key)
        return cls(bundle if index is None else with_milvus(bundle, index))

    def with_bundle(self, bundle: Bundle) -> Recommender:
        """Return a recommender with refreshed items of the same bundle (see `bundle.refresh`). All other parts are shared."""
        other = copy(self)
        other.__dict__.pop("explainer", None)
        other.bundle, other.moment_s, other.index = bundle, bundle.moment_s, bundle.index
        other.reader = self.reader.at(bundle.moment_s)
        return other

    def __repr__(self) -> str:
        return f"Recommender({str(self.bundle.path)!r}): {self.dataset.size}"

    def _repr_html_(self) -> str:
        return f"<b>Recommender</b> of {escape(str(self.bundle.path))}<br>{self.dataset.size}"

    @cached_property
    def explainer(self) -> Explainer:
        """Return the explainer of the bundle."""
        return Explainer(self.bundle, self.details.describe)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers to many requests.

        Raises
        ------
        RequestError
            A request is invalid: a history has an unknown item, a filter is malformed, or a number is out of range.
        """
        answers = self.answer_each(requests)
        for answer in answers:
            if isinstance(answer, RequestError):
                raise answer
        return [answer for answer in answers if isinstance(answer, Answer)]

    def answer_each(self, requests: Sequence[Request]) -> list[Answer | RequestError]:
        """Return an answer to each valid request, and an error for each invalid one."""
        stages = Stages()
        results = self.find(requests, stages)
        ranked = [one for one in results if isinstance(one, RankedRows)]
        with stages("explain"):
            self._explain(ranked)
        with stages("describe"):
            items = iter(self.details.recommendations([(one.rows, one.scores, one.home, one.reasons) for one in ranked]))
            answers = [one if isinstance(one, RequestError) else self._answer(one, next(items), stages) for one in results]
        return answers

    def ranked(self, requests: Sequence[Request]) -> list[RankedRows]:
        """Return the item rows, scores and reasons of many requests. An invalid request raises its `RequestError`."""
        ranked = []
        for one in self.find(requests):
            if isinstance(one, RequestError):
                raise one
            ranked.append(one)
        self._explain(ranked)
        return ranked

    def _explain(self, ranked: Sequence[RankedRows]) -> None:
        for one in ranked:
            if one.parsed.request.explain and one.source == "model":
                one.reasons = self.explainer.reasons(one.parsed.history, one.rows, again=not one.parsed.request.exclude_seen)

    def recommend(
        self,
        *,
        user: Id | None = None,
        history: Sequence[Id | HistoryEvent] | None = None,
        k: int = 10,
        filter: FilterSpec = None,
        near: tuple[float, float] | None = None,
        exclude_seen: bool = True,
        diversity: float = 0.0,
        popularity_bias: float = 0.0,
        explain: bool = False,
    ) -> list[Recommendation]:
        """Return the `k` best items, best first, for a known user, for a history, or for a known user with further events.

        Parameters
        ----------
        history
            Item ids or events, oldest first. With `user`, they follow the stored history.
        filter
            Condition on the items, as text or JSON; see `search.filters`.
        near
            Latitude and longitude of the request in degrees, for distances and `within(km)`, and as an input of models trained with
            `model.request_location`. Default for distances: the most central location of the history.
        diversity, popularity_bias, explain
            See `Request`.

        Raises
        ------
        RequestError
            Neither user nor history is given, an id is unknown, `k` or `near` is out of range, or the filter is malformed.
        """
        if user is None and history is None:
            raise RequestError("Neither user nor history is given. Pass a user id, a history of item ids, or both.")
        events = tuple(event if isinstance(event, HistoryEvent) else HistoryEvent(event) for event in history or ())
        settings = {"exclude_seen": exclude_seen, "diversity": diversity, "popularity_bias": popularity_bias, "explain": explain}
        (answer,) = self.answer([Request(user=user, history=events, k=k, filter=filter, near=near, **settings)])  # type: ignore[arg-type]
        if history is None and not answer.user_known:
            raise RequestError(f"Unknown user {user!r}. For a user that is not in the bundle, pass a history of item ids.")
        return answer.items

    def similar(self, item_id: Id, *, k: int = 10, skip: int = 0, filter: FilterSpec = None) -> list[Recommendation]:
        """Return the `k` items most similar to an item, best first, with their distances to it in km.

        Parameters
        ----------
        skip
            Number of the most similar items to leave out.

        Raises
        ------
        RequestError
            The item is unknown, or the filter is malformed.
        """
        check_k(k)
        check_filter(filter)
        row = self.reader.item(item_id)
        latitude, longitude = self._locations[row].tolist()
        home = None if latitude != latitude else (latitude, longitude)
        now, index = int(time()), self.index
        allow = self.filter.compile(filter, home=home, now=now) if filter else self.offered
        if filter and index.reads_filters:
            index = index.with_filters([self.filter.resolve(filter, home=home, now=now)])
        query = self.bundle.arrays.vectors[row : row + 1].copy()
        query[:, -self.bundle.model.priors.width :] = 0  # similarity ignores popularity and distance
        most = min(skip + k, self.dataset.n_item_rows)
        best = index.search(torch.from_numpy(query), most, exclude=(np.array([0, 1]), np.array([row])), allow=allow)
        rows, scores = best.items[0, skip:], best.scores[0, skip:]
        rows, scores = rows[rows >= 0], scores[rows >= 0]
        return self.details.recommendations([(rows, scores, home, [])])[0]

    def find(
        self, requests: Sequence[Request], stages: Stages | None = None, *, now: int | None = None, with_homes: bool = True
    ) -> list[RankedRows | RequestError]:
        """Return the item rows and scores of each request, or its error. `answer_each` turns them into answers.

        Parameters
        ----------
        with_homes
            False: do not look for the origin of the distances where only answers need it.
        now
            Time of `open_now` in seconds since 1970, for requests without a time; None: the system clock.
        """
        stages = stages or Stages()
        results: list[RankedRows | RequestError | None] = [None] * len(requests)
        parsed: dict[int, tuple[ParsedRequest, Home, Mask | None, ResolvedFilter | None]] = {}
        now = int(time()) if now is None else now
        for i, request in enumerate(requests):
            try:
                with stages("features"):
                    one = self.reader.read(request)
                    home = one.near or (self._home(one.history.item_row) if with_homes or request.filter else None)
                with stages("filter"):
                    parsed[i] = one, home, *self._filtered(one, home, now)
            except RequestError as error:
                results[i] = error
        for personal, search in ((True, self._search), (False, self._search_fallback)):
            chosen = [i for i, (one, *_) in parsed.items() if one.can_personalize == personal]
            if chosen:
                asked, homes, masks, filters = zip(*(parsed[i] for i in chosen), strict=True)
                lists = search(asked, _allowed(masks), stages, filters)
                for i, one, home, mask, (source, rows, scores) in zip(chosen, asked, homes, masks, lists, strict=True):
                    results[i] = ranked = RankedRows(one, source, rows, scores, home, self._share(one.request, mask))
                    if one.request.explore and not one.request.skip and len(rows):
                        self._explore(ranked, search, mask, stages)
        return [one for one in results if one is not None]

    def _search(
        self, parsed: Sequence[ParsedRequest], allow: Mask | None, stages: Stages, filters: Sequence[ResolvedFilter | None] = ()
    ) -> list[tuple[Source, Int, Float]]:
        queries = to_queries(parsed)
        with stages("tower"):
            bias = np.array([one.request.popularity_bias for one in parsed], np.float32)
            vectors = self.bundle.query_vectors(queries, bias)
        with stages("search"):
            again = np.array([not one.request.exclude_seen for one in parsed])
            most = min(max(_candidates(one.request) for one in parsed), self.dataset.n_item_rows)
            best = self.bundle.search(vectors, queries, most, again=again, allow=allow, filters=filters)
            lists = [self._cut(one.request, best, b) for b, one in enumerate(parsed)]
        popularity = self.bundle.arrays.vectors[:, self.bundle.vectors.shape[1]]  # of all events
        shift = (bias * POPULARITY_SCALE).astype(np.float32)  # affects the order of the list, not the score
        return [("model", rows, scores - shift[b] * popularity[rows]) for b, (rows, scores) in enumerate(lists)]

    def _search_fallback(
        self, parsed: Sequence[ParsedRequest], allow: Mask | None, stages: Stages, _filters: Sequence[ResolvedFilter | None] = ()
    ) -> list[tuple[Source, Int, Float]]:
        recent_event_count, locations = self.bundle.arrays.recent_event_count, self._locations
        lists: list[tuple[Source, Int, Float]] = []
        with stages("search"):
            for b, one in enumerate(parsed):
                source: Source = "recent" if one.near is None or np.isnan(locations).all() else "nearby"
                scores = fallback_scores(recent_event_count, locations, one.near if source == "nearby" else None)
                mine = None if allow is None else allow[b] if allow.ndim == 2 else allow
                seen = one.history.seen if one.request.exclude_seen else None
                best = top_k(scores[None], min(_candidates(one.request), self.dataset.n_item_rows), exclude=seen, allow=mine)
                rows, _ = self._cut(one.request, best, 0)
                lists.append(
                    (source, rows, (recent_event_count[rows] / max(int(recent_event_count.max(initial=0)), 1)).astype(np.float32))
                )
        return lists

    def _explore(self, ranked: RankedRows, search: Search, mask: Mask | None, stages: Stages) -> None:
        """Replace some items of a list by items that follow it, and by items with few events."""
        longer = replace(ranked.parsed, request=replace(ranked.parsed.request, k=ranked.parsed.request.k + POOL, diversity=0.0))
        few = self._uncertain if mask is None else self._uncertain & mask
        lists = [search([longer], allow, stages)[0][1:] for allow in (mask, few)]
        ranked.pool, scores = pool_of(ranked.rows, lists)
        shown = explored(ranked.rows, ranked.scores, ranked.pool, scores, ranked.parsed.request.explore, self.rng)
        ranked.rows, ranked.scores, ranked.propensity = shown.rows, shown.scores, shown.propensity

    @cached_property
    def _uncertain(self) -> Mask:
        return uncertain_items(self.dataset)

    def _cut(self, request: Request, best: Recommendations, b: int) -> tuple[Int, Float]:
        """Return the list of query `b`: the first `k` candidates, or with diversity the `k` chosen by MMR."""
        wanted = _candidates(request)
        rows, scores = best.items[b, :wanted], best.scores[b, :wanted]
        rows, scores = rows[rows >= 0], scores[rows >= 0]
        if not request.diversity:
            part = slice(request.skip, request.skip + request.k)
            return rows[part], scores[part]
        order = mmr(scores, self.bundle.vectors[rows].numpy(), request.k, request.diversity)
        return rows[order], scores[order]

    def _filtered(self, parsed: ParsedRequest, home: Home, now: int) -> tuple[Mask | None, ResolvedFilter | None]:
        """Return bool [n_item_rows] of allowed items (None: all), and the filter if the index evaluates filters."""
        request = parsed.request
        if not request.filter:
            return self.offered, None
        moment = now if request.time_s is None else request.time_s
        context: dict[str, Any] = {"home": home, "now": moment, "seen": parsed.history.item_row}
        mask = self.filter.compile(request.filter, **context)
        return mask, self.filter.resolve(request.filter, **context) if self.index.reads_filters else None

    def _share(self, request: Request, mask: Mask | None) -> float | None:
        """Return the share of the items that match the filter; None without a filter."""
        if not request.filter or mask is None:
            return None
        return np.count_nonzero(mask) / max(self.dataset.n_items, 1)

    def _home(self, rows: Int) -> Home:
        """Return the medoid of the history's locations: a mean could be between two towns."""
        locations = self._locations[rows]
        known = locations[np.isfinite(locations).all(axis=1)][-HOME_EVENTS:]
        if not len(known):
            return None
        latitude, longitude = known[medoid(known)].tolist()
        return latitude, longitude

    def _answer(self, ranked: RankedRows, items: list[Recommendation], stages: Stages) -> Answer:
        events = len(ranked.parsed.history.item_row)
        confidence = 0.0 if ranked.source != "model" else events / (events + TRUST_EVENTS)
        propensity = (1.0,) * len(items) if ranked.propensity is None else tuple(ranked.propensity.tolist())
        known, selectivity = ranked.parsed.known, ranked.selectivity
        return Answer(items, ranked.source, round(confidence, 3), known, stages.ms, selectivity, stages.began, propensity)


def _candidates(request: Request) -> int:
    """Return the number of candidates that the search must return for a request."""
    return max(CANDIDATES_PER_ITEM * request.k, MIN_CANDIDATES) if request.diversity else request.skip + request.k


def _allowed(masks: Sequence[Mask | None]) -> Mask | None:
    """Return one mask bool [n_item_rows] if all requests share it, else [B, n_item_rows]; None if all items are allowed."""
    if all(mask is masks[0] for mask in masks):
        return masks[0]
    return np.stack([np.ones_like(next(m for m in masks if m is not None)) if mask is None else mask for mask in masks])
