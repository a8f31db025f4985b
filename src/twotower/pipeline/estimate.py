"""Estimate what a bundle would get from the log of a server: `twotower estimate`."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from twotower.errors import DataError, RequestError
from twotower.evaluation.off_policy import Estimates, LoggedLists, estimate, predict_outcomes
from twotower.pipeline.answer_log import read_log
from twotower.retrieval.exploration import probabilities
from twotower.retrieval.ranked_rows import RankedRows
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import HistoryEvent, Request
from twotower.retrieval.request_reader import to_queries
from twotower.schema import UNKNOWN
from twotower.serving.event_types import Event, LoggedAnswer, digest_of
from twotower.serving.schemas import RecommendIn
from twotower.serving.stored_rows import REPAIR
from twotower.utils.documents import Interval, finite
from twotower.utils.types import Float64, Int, Json

BATCH = 64  # lists computed at once
NEVER = 1e-12  # share of positions that leaves the list as it is, and names its pool
MIN_LISTS = 30  # of which the bootstrap makes an interval


@dataclass(frozen=True, slots=True)
class Estimated:
    """The estimates, and the lists that they are made from."""

    estimates: Estimates
    lists: int
    users: int
    first_s: int
    last_s: int

    def as_json(self) -> Json:
        """Return the result as JSON values."""
        found = self.estimates
        rates = {name: finite(getattr(found, name).json_values()) for name in ("logged", "ips", "snips", "dr")}
        sizes = {name: getattr(self, name) for name in ("lists", "users", "first_s", "last_s")}
        more = {name: getattr(found, name) for name in ("support", "effective_lists", "zero_propensity")}
        return {**sizes, **rates, **more}

    def in_words(self, name: str) -> str:
        """Return the result as a table."""
        days = " to ".join(datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d") for at in (self.first_s, self.last_s))
        found = self.estimates
        rows = [("logged", found.logged), ("ips", found.ips), ("snips", found.snips), ("dr", found.dr)]
        lines = [f"{self.lists:,} lists of {self.users:,} users, {days}; estimates for {name}", "", "           outcomes per list"]
        lines += [f"{title:<8} {_rate(one)}" for title, one in rows]
        lines += ["", f"The log could show {min(found.support, 1):.1%} of its items; {found.effective_lists:,.0f} effective lists."]
        if found.zero_propensity:
            lines.append(f"Shown items with propensity 0: {found.zero_propensity:,}. They are missing in ips, and predicted in dr.")
        return "\n".join(lines)


def _rate(one: Interval) -> str:
    if not isfinite(one.value):
        return "undefined: the log could show none of its items"
    return f"{one.value:9.4f}   {one.low:.4f} to {one.high:.4f}"


def estimate_bundle(bundle: Path, store: str, *, explore: float = 0.0, seed: int = 0) -> Estimated:
    """Estimate the outcomes per list of a bundle from the answers and events of a store.

    Only answers after the last event of the bundle count, or the bundle would know what came of them.

    Parameters
    ----------
    explore
        Share of the positions that the bundle's server would give to uncertain items.

    Raises
    ------
    DataError
        The store or the bundle cannot be opened, a row of the log is not valid, or too few answers fit.
    """
    recommender = Recommender.load(bundle)
    events, answers = read_log(store)
    kept = _fitting(answers, events, recommender, str(bundle))
    lists = _logged_lists(kept, events, recommender, explore)
    users = len(np.unique(lists.user))
    return Estimated(estimate(lists, seed=seed), len(lists.slots), users, kept[0].time_s, kept[-1].time_s)


def _fitting(answers: Sequence[LoggedAnswer], events: Sequence[Event], to: Recommender, name: str) -> list[LoggedAnswer]:
    """Return the answers that were shown, first parts of lists after the bundle's last event, by time."""
    shown = {event.request_id for event in events if event.event_type in to.dataset.manifest.config.prepare.impression_types}
    shown -= {None}
    first = [one for one in answers if "cursor" not in one.request and one.items and (not shown or one.request_id in shown)]
    kept = [one for one in first if not to.dataset.has_time or one.time_s >= to.moment_s]
    if len(kept) < MIN_LISTS:
        text = f"The log has {len(kept):,} answers that {name} can be estimated from; at least {MIN_LISTS} are needed."
        more = f" {len(first) - len(kept):,} are older than its last event." if len(first) > len(kept) else ""
        raise DataError(f"{text}{more} Log more answers with impressions, or name the store of the server with --log.")
    if not any(to.reader.items.row(item) != UNKNOWN for one in kept for item in one.items):
        raise DataError(f"The log belongs to another bundle: {name} knows none of its items. Name the store of its server.")
    return sorted(kept, key=lambda one: one.time_s)


def _logged_lists(answers: Sequence[LoggedAnswer], events: Sequence[Event], to: Recommender, explore: float) -> LoggedLists:
    prepare = to.dataset.manifest.config.prepare
    named = (event for event in events if event.request_id is not None and prepare.is_history(event.event_type, event.stars))
    outcomes = {(event.request_id, event.item_id) for event in named}
    user = np.unique([digest_of(one.user or one.request_id) for one in answers], return_inverse=True)[1]
    table, refused = _Table(), []
    for number, found, rows, scores in _ranked(answers, events, to, explore):
        if isinstance(found, RequestError):
            refused.append(f"{answers[number].request_id!r}: {found}")
            continue
        answer = answers[number]
        chance = _chances(found, explore)
        reward = np.array([(answer.request_id, item) in outcomes for item in answer.items], np.float64)
        own = np.array(list(chance), np.int64)
        table.add(
            number,
            propensity=np.array(answer.propensity),
            target=np.array([chance.get(row, 0.0) if row != UNKNOWN else 0.0 for row in rows.tolist()]),
            reward=reward,
            score=scores[rows],
            own_chance=np.array(list(chance.values())),
            own_score=scores[own],
        )
    if (fit := len(answers) - len(refused)) < MIN_LISTS:
        raise DataError(
            f"The bundle can answer {fit:,} of the {len(answers):,} requests of the log; at least {MIN_LISTS} are needed. "
            f"The first that it cannot answer is {refused[0]}"
        )
    return table.lists(user)


class _Table:
    """Columns over shown items, and over the items of the other model's lists."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Float64]] = defaultdict(list)
        self._numbers: list[int] = []

    def add(self, number: int, **columns: Float64) -> None:
        self._numbers.append(number)
        for name, values in columns.items():
            self._columns[name].append(values)

    def lists(self, user: Int) -> LoggedLists:
        owner = user[self._numbers]
        sizes, own_sizes = (np.array([len(one) for one in self._columns[name]]) for name in ("reward", "own_chance"))
        flat = {name: np.concatenate(values).astype(np.float64) for name, values in self._columns.items()}
        fold, own_fold = np.repeat(owner % 2, sizes), np.repeat(owner % 2, own_sizes)
        predicted, own = (
            predict_outcomes(flat["score"], flat["reward"], fold, flat[name], of)
            for name, of in (("score", fold), ("own_score", own_fold))
        )
        at = np.repeat(np.arange(len(owner)), own_sizes)
        return LoggedLists(
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            propensity=flat["propensity"],
            target=flat["target"],
            reward=flat["reward"],
            predicted=predicted,
            slots=np.bincount(at, flat["own_chance"], len(owner)).astype(np.float64),
            expected=np.bincount(at, flat["own_chance"] * own, len(owner)).astype(np.float64),
            user=owner,
        )


def _ranked(
    answers: Sequence[LoggedAnswer], events: Sequence[Event], to: Recommender, explore: float
) -> Iterator[tuple[int, RankedRows | RequestError, Int, Float64]]:
    """Yield the list of the bundle for each answer, the rows of the answer's items, and the scores of all items."""
    history: dict[str, list[HistoryEvent]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.time_s):
        if to.reader.items.row(event.item_id) != UNKNOWN:
            known = event.event_type if event.event_type in to.reader.event_types else None
            history[event.user].append(HistoryEvent(event.item_id, event.time_s, event.stars, known))
    vectors = torch.from_numpy(to.bundle.arrays.vectors)
    for start in range(0, len(answers), BATCH):
        part = range(start, min(start + BATCH, len(answers)))
        requests = [_request(answers[number], history, to, explore) for number in part]
        good: list[tuple[int, RankedRows]] = []
        for number, one in zip(part, to.find(requests), strict=True):
            if isinstance(one, RequestError):
                yield number, one, np.zeros(0, np.int64), np.zeros(0)
            else:
                good.append((number, one))
        if not good:
            continue
        queries = to_queries([one.parsed for _, one in good])
        scores = (to.bundle.query_vectors(queries, np.zeros(len(good), np.float32)) @ vectors.T).numpy().astype(np.float64)
        for (number, one), values in zip(good, scores, strict=True):
            yield number, one, np.array([to.reader.items.row(item) for item in answers[number].items], np.int64), values


def _request(answer: LoggedAnswer, history: dict[str, list[HistoryEvent]], to: Recommender, explore: float) -> Request:
    try:
        body = RecommendIn.model_validate({**json.loads(answer.request), "user": answer.user})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])[:80] or "body"
        raise DataError(
            f"The answer {answer.request_id!r} of the log has a request that is not valid: {where}: {first['msg'][:120]}. {REPAIR}"
        ) from None
    request = body.request(explore=NEVER if explore else 0.0)
    before = history.get(answer.user or "", [])
    before = before[: bisect_left(before, answer.time_s, key=lambda event: event.time_s or 0)]
    own = tuple(event for event in request.history if to.reader.items.row(event.item_id) != UNKNOWN)
    return replace(request, history=(*before, *own), explain=False)


def _chances(found: RankedRows, explore: float) -> dict[int, float]:
    """Return the probability with which a list of the bundle has each item."""
    pool = found.pool if found.pool is not None else np.zeros(0, np.int64)
    kept, drawn = probabilities(len(found.rows), len(pool), explore)
    chances = dict.fromkeys(found.rows.tolist(), kept)
    return chances | (dict.fromkeys(pool.tolist(), drawn) if explore else {})
