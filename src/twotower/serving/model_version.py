"""Answer requests with one bundle version. Only this module of the server uses a `Recommender`.

It takes requests of `retrieval.request` and returns answers and items as plain values for JSON. One `Engine` makes a whole
answer, so an answer comes from one bundle version.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic_core import to_json

from twotower.bundle.bundle import Bundle
from twotower.bundle.publish import RemoteIndex
from twotower.errors import RequestError
from twotower.retrieval.item_details import nan_to_none
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Answer, HistoryEvent, Recommendation, Request
from twotower.retrieval.request_reader import UnknownItemError
from twotower.schema import FIRST_ROW, UNKNOWN
from twotower.utils.ids import Id
from twotower.utils.types import Json


@dataclass(frozen=True, slots=True)
class Question:
    """A request and the accepted events of its user, oldest first."""

    request: Request
    accepted: tuple[HistoryEvent, ...] = ()
    strict: bool = False  # an unknown item of the history is an error


@dataclass(frozen=True, slots=True)
class Likeness:
    """A request for items similar to an item."""

    item_id: str
    k: int
    filter: str | None = None
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Listed:
    """An answer and its items as JSON, written in the worker thread so that long lists do not block the event loop."""

    answer: Answer
    items: bytes
    unknown_items: list[str]  # items of the history that the bundle does not know


class Engine:
    """One loaded bundle version.

    Attributes
    ----------
    version
        12 hexadecimal digits, from a hash over the manifest, which holds the hashes of all files.
    """

    def __init__(self, recommender: Recommender) -> None:
        self.recommender, self.dataset = recommender, recommender.dataset
        self.manifest = recommender.bundle.manifest
        self.version = self.manifest.seal[:12]
        self.name = recommender.bundle.path.resolve().name

    @classmethod
    def load(cls, path: Path, trusted_key: Path | None = None, index: RemoteIndex | None = None) -> Engine:
        """Open and check the bundle at `path`, with its index in Milvus if one is given, and run one test request.

        Raises
        ------
        DataError
            It is not a bundle, incomplete, changed, not signed with the trusted key, or of another format version.
        """
        engine = cls(Recommender.load(path, trusted_key=trusted_key, index=index))
        engine.recommender.filter.warm()
        engine.try_out()
        return engine

    @property
    def as_of(self) -> int | None:
        """Return the time up to which events count for the items, in seconds; None if events have no times."""
        return self.recommender.moment_s if self.dataset.has_time else None

    def with_bundle(self, bundle: Bundle) -> Engine:
        """Return the same version with refreshed items, after a test request that also fills its caches."""
        other = copy(self)
        other.recommender = self.recommender.with_bundle(bundle)
        other.try_out()
        return other

    def with_items(self, bundle: Bundle) -> Engine:
        """Return the same version with changed items, after a test request."""
        other = Engine(Recommender(bundle))
        other.recommender.filter.warm()
        other.try_out()
        return other

    def try_out(self) -> None:
        """Answer one test request."""
        some = tuple(HistoryEvent(item) for item in self.dataset.item_ids[FIRST_ROW : FIRST_ROW + 1])
        self.answer([Question(Request(history=some, k=1, explain=True))])

    def row(self, item_id: Id) -> int:
        """Return the row of an item, UNKNOWN for an unknown id."""
        return self.recommender.reader.items.row(item_id)

    def user_row(self, user: str) -> int:
        """Return the row of a user, UNKNOWN for an unknown id."""
        return self.recommender.reader.users.row(user)

    def news(self, user: str, accepted: Sequence[HistoryEvent]) -> list[HistoryEvent]:
        """Return the events of a user's history that were accepted and are not in the bundle yet (a newer one may hold them)."""
        return [event for event, _ in self._news(user, accepted) if self.recommender.reader.is_history(event)]

    def _news(self, user: str, accepted: Sequence[HistoryEvent]) -> list[tuple[HistoryEvent, int]]:
        if not accepted:
            return []
        row, events = self.user_row(user), self.dataset.events
        own = slice(*events.offsets[row : row + 2].tolist())
        stored = set(zip(events.item_row[own].tolist(), events.time_s[own].tolist(), strict=True))
        rows = [self.row(event.item_id) for event in accepted]
        return [(event, row) for event, row in zip(accepted, rows, strict=True) if (row, event.time_s) not in stored]

    def answer(self, questions: Sequence[Question]) -> list[Listed | RequestError]:
        """Return the answer or the error of each request."""
        by_history = {id(one.accepted): one for one in questions if one.accepted}  # many requests of a batch may have the same user
        readable = {key: self._readable(str(one.request.user), one.accepted) for key, one in by_history.items()}
        given = [self._known(one) for one in questions]
        requests = [_after(one, readable.get(id(of.accepted), ())) for (one, _), of in zip(given, questions, strict=True)]
        listed: list[Listed | RequestError] = []
        for (own, unknown), request, answer in zip(given, requests, self.recommender.answer_each(requests), strict=True):
            if isinstance(answer, UnknownItemError):
                listed.append(UnknownItemError(answer.number - len(request.history) + len(own.history), str(answer)))
            elif isinstance(answer, RequestError):
                listed.append(answer)
            else:
                items = [_as_json(item, own.skip, chance) for item, chance in zip(answer.items, answer.propensity, strict=True)]
                listed.append(Listed(answer, to_json(items, inf_nan_mode="null"), unknown))
        return listed

    def _known(self, question: Question) -> tuple[Request, list[str]]:
        """Return the request without the events of unknown items, and these items; a strict request as it is."""
        request = question.request
        if question.strict:
            return request, []
        unknown = [str(event.item_id) for event in request.history if self.row(str(event.item_id)) == UNKNOWN]
        if not unknown:
            return request, []
        left_out = set(unknown)
        kept = tuple(event for event in request.history if str(event.item_id) not in left_out)
        return replace(request, history=kept), list(dict.fromkeys(unknown))

    def _readable(self, user: str, accepted: tuple[HistoryEvent, ...]) -> tuple[HistoryEvent, ...]:
        """Return the accepted events of a user that are not in the bundle and whose item the bundle knows."""
        types = self.recommender.reader.event_types
        return tuple(
            event if event.event_type in types else replace(event, event_type=None)
            for event, row in self._news(user, accepted)
            if row != UNKNOWN
        )

    def similar(self, questions: Sequence[Likeness]) -> list[list[Json] | RequestError]:
        """Return for each request the items with the nearest vectors, best first, or its error."""
        return [self._similar(question) for question in questions]

    def _similar(self, question: Likeness) -> list[Json] | RequestError:
        try:
            found = self.recommender.similar(question.item_id, k=question.k, skip=question.skip, filter=question.filter)
        except RequestError as error:
            return error
        return [_as_json(item, question.skip) for item in found]

    def item(self, row: int) -> Json:
        """Return the display fields and the location of an item."""
        at = self.recommender.filter.locations[row - FIRST_ROW].tolist()
        latitude, longitude = map(nan_to_none, at)
        details = self.recommender.details
        return {**details.display_fields(details.describe(row)), "latitude": latitude, "longitude": longitude}


def _after(request: Request, accepted: tuple[HistoryEvent, ...]) -> Request:
    """Return the request with the accepted events before its history, up to and including the second of its time.

    The second itself is included because an accepted event affects the next response.
    """
    moment = request.time_s
    if moment is not None:
        accepted = accepted[: bisect_right(accepted, moment, key=lambda event: event.time_s or 0)]
        moment += bool(accepted) and accepted[-1].time_s == moment
    return replace(request, history=accepted + request.history, time_s=moment) if accepted else request


def _as_json(item: Recommendation, skip: int = 0, propensity: float = 1.0) -> Json:
    """Return a recommendation as JSON values. `skip` items of its list come before those of the answer."""
    details = {name: getattr(item, name) for name in item.__slots__}
    return details | {"rank": item.rank + skip, "reasons": [asdict(reason) for reason in item.reasons], "propensity": propensity}
