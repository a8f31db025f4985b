"""Provide what the HTTP routes call: recommendations, storage of events and reloading of bundles.

A response comes from one bundle version and includes every event acknowledged before. `updates` replaces the version between two
requests, or not at all.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from pydantic_core import to_json

from twotower.errors import BusyError, RequestError
from twotower.retrieval.request_reader import UnknownItemError
from twotower.schema import UNKNOWN
from twotower.serving import cursors
from twotower.serving.batching import Batcher
from twotower.serving.event_journal import FUTURE_S, Journal
from twotower.serving.event_store import Event, open_store
from twotower.serving.freshness import Version
from twotower.serving.limits import HEAVY_WEIGHT
from twotower.serving.model_version import Engine, Likeness, Listed, Question
from twotower.serving.prometheus import Meters
from twotower.serving.schemas import EventIn, RecommendIn
from twotower.serving.telemetry import Telemetry
from twotower.serving.updates import OwnUpdates, Updater, Updates
from twotower.utils.config_serving import Limits
from twotower.utils.types import Json

ANSWER_S = 0.1  # of the time in which a request is answered, kept for writing the response
REFRESH_S = 60.0  # default of `ServingConfig.refresh_s`
MAX_EVENT_BATCH = 256  # requests whose events go into one write


class Fleet(Protocol):
    """All workers of a server, as one of them sees them."""

    @property
    def stopping(self) -> bool:
        """Return True once the server stops."""
        ...

    @property
    def ready(self) -> int:
        """Return the number of workers that answer requests."""
        ...

    async def metrics(self) -> bytes:
        """Return the metrics of all of them."""
        ...


class Service:
    """All parts of a running server except HTTP.

    Parameters
    ----------
    bundle
        Folder of the first bundle.
    events
        Address of the event store; see `open_store`.
    trusted_key, refresh_s
        See `Updater`.

    Raises
    ------
    TwoTowerError
        The bundle or the store cannot be opened.
    """

    def __init__(
        self, bundle: Path, events: str, limits: Limits, trusted_key: Path | None = None, refresh_s: float = REFRESH_S
    ) -> None:
        meters = self._prepare(limits)
        self.journal = Journal(open_store(events), meters.skipped)  # first: it fails sooner than a bundle is loaded
        try:
            updater = Updater(bundle, self.journal, meters, trusted_key, refresh_s)
        except BaseException:
            self.journal.close()
            raise
        self.updates: Updates = OwnUpdates(updater, self._serve)
        self._start(updater.current)

    @classmethod
    def of_worker(cls, version: Version, journal: Journal, limits: Limits, updates: Updates) -> Service:
        """Return the service of a process that answers for a version of its parent, which makes all updates."""
        service = cls.__new__(cls)
        meters = service._prepare(limits)
        service.journal, service.updates = journal, updates
        journal.on_skipped = meters.skipped
        meters.bundle(version.engine.version)
        service._start(version)
        return service

    def _prepare(self, limits: Limits) -> Meters:
        self.limits, self.stopping = limits, False
        self.fleet: Fleet | None = None
        self.telemetry: Telemetry | None = None
        """Sends traces and metrics; set before the application is created."""
        self.meters = Meters(lambda: self.answers.waiting + self.heavy.waiting, lambda: self.journal.state == "ok")
        return self.meters

    def _start(self, version: Version) -> None:
        limits = self.limits
        self.answers, self.heavy = (
            Batcher(name, max_waiting=limits.waiting, max_batch=limits.max_batch, on_batch=self.meters.batch)
            for name in ("answers", "heavy answers")
        )
        self.writes = Batcher("events", max_waiting=limits.waiting, max_batch=MAX_EVENT_BATCH)
        self.current = version

    def _serve(self, version: Version) -> None:
        self.current = version

    @property
    def problem(self) -> str | None:
        """Return why the server should get no requests; None if it is ready."""
        if self.stopping or (self.fleet is not None and self.fleet.stopping):
            return "Not ready: the server is stopping. Use another one."
        if not (self.answers.alive and self.heavy.alive and self.writes.alive):
            return "Not ready: a worker thread has stopped. Restart the server."
        return None

    def state(self) -> Json:
        """Return what a health check says of a server that is ready."""
        workers = 1 if self.fleet is None else self.fleet.ready
        return {"status": "ready", **self.current.about(), "events": self.journal.state, "workers": workers}

    async def metrics(self) -> bytes:
        """Return the metrics in the Prometheus text format, those of all workers added."""
        return self.meters.text() if self.fleet is None else await self.fleet.metrics()

    def overloaded(self, client: str) -> bool:
        """Return True if a client fills half of the queue. Below that, its next batch of any allowed size is admitted."""
        waiting = self.limits.waiting
        return any(lane.waiting_of(client) > waiting // 2 or lane.waiting >= waiting for lane in (self.answers, self.heavy))

    async def recommend(self, body: RecommendIn, client: str = "") -> tuple[Json, bytes]:
        """Return the version (`Version.about`) and the list of a request as JSON.

        Raises
        ------
        PartError
            The request cannot be answered.
        BusyError
            The queue is full.
        """
        version, (found,) = await self._answered([body], client)
        with _part():
            return version, self._as_json(found, body, version)

    async def recommend_many(self, bodies: Sequence[RecommendIn], client: str = "") -> tuple[Json, list[bytes]]:
        """Return the version, and for each request its list as JSON, or its error under "error".

        Raises
        ------
        BusyError
            The queue is full.
        """
        version, found = await self._answered(bodies, client)
        answers: list[bytes] = []
        for number, one in enumerate(found):
            try:
                with _part("requests", number):
                    answers.append(self._as_json(one, bodies[number], version))
            except PartError as error:
                answers.append(to_json({"error": {"code": "invalid", "message": str(error), "location": error.location}}))
        return version, answers

    async def _answered(self, bodies: Sequence[RecommendIn], client: str) -> tuple[Json, list[Listed | BaseException]]:
        current, deadline = self.current, time.perf_counter() + self.limits.queue_timeout_s
        lanes = [self.heavy if body.weight >= HEAVY_WEIGHT else self.answers for body in bodies]
        skips = [_skip(body, current.engine.version) for body in bodies]
        good = [at for at, skip in enumerate(skips) if isinstance(skip, int)]
        groups = [(lane, [at for at in good if lanes[at] is lane]) for lane in dict.fromkeys(lanes)]
        for lane, positions in groups:
            lane.admit(len(positions), deadline, client)  # before any work, so that a rejection costs little
        found: list[Any] = list(skips)  # errors stay
        futures: dict[int, asyncio.Future[Any]] = {}
        for lane, positions in groups:
            questions = [self._question(bodies[at], found[at]) for at in positions]
            weights = [bodies[at].weight for at in positions]
            submitted = lane.submit(current.engine.answer, questions, deadline, client, weights)
            futures |= dict(zip(positions, submitted, strict=True))
        for at, outcome in zip(futures, await asyncio.gather(*futures.values(), return_exceptions=True), strict=True):
            found[at] = outcome
        if self.telemetry is not None:
            self.telemetry.answers(one.answer for one in found if isinstance(one, Listed))
        return current.about(), found

    def _question(self, body: RecommendIn, skip: int) -> Question:
        return Question(body.request(skip), self.journal.of(body.user) if body.user else (), body.strict)

    async def similar(self, item_id: str, k: int, filter: str | None, cursor: str | None = None, client: str = "") -> Json:
        """Return the version, the items most similar to an item, and the cursor of further ones."""
        current, identity = self.current, ["similar", item_id, filter]
        version, deadline = current.engine.version, time.perf_counter() + self.limits.queue_timeout_s
        with _part("cursor"):
            skip = cursors.read(cursor, version, identity)
        with _part(), self._traced("search"):
            (future,) = self.answers.submit(current.engine.similar, [Likeness(item_id, k, filter, skip)], deadline, client)
            items = await future
        return {**current.about(), "next": cursors.following(version, identity, skip, len(items), k), "items": items}

    def items(self, query: str, limit: int, cursor: str | None) -> Json:
        """Return items whose name contains `query`, and the cursor of further ones."""
        current, identity = self.current, ["items", query]
        version = current.engine.version
        with _part("cursor"):
            skip = cursors.read(cursor, version, identity)
        items = current.browser.items(query, limit, skip)
        return {"next": cursors.following(version, identity, skip, len(items), limit), "items": items}

    async def accept(self, bodies: Sequence[EventIn]) -> tuple[int, int]:
        """Store events and return the numbers of new and of repeated ones. On return they are on disk and affect responses.

        Raises
        ------
        RequestError
            An event has an unknown item or event type. No event is stored.
        BusyError
            The queue is full, or the store cannot write.
        """
        engine, now = self.current.engine, int(time.time())
        for number, body in enumerate(bodies):
            with _part("events", number):
                _check(engine, body, now)
        events = [
            Event(b.event_id, b.user, b.item_id, now if b.time_s is None else b.time_s, b.event_type, b.stars) for b in bodies
        ]
        (future,) = self.writes.submit(self.journal.append, [events], time.perf_counter() + self.limits.queue_timeout_s)
        try:
            with self._traced("store"):
                new = await asyncio.wait_for(future, self.limits.queue_timeout_s - ANSWER_S)
        except TimeoutError:
            raise BusyError("The event store is too slow; the events may be stored. Send them again later.") from None
        self.meters.events(new, len(events) - new)
        return new, len(events) - new

    def close(self) -> None:
        """Finish the queued work and close the event store."""
        self.answers.close()
        self.heavy.close()
        self.writes.close()
        self.journal.close()
        gc.unfreeze()  # lets the interpreter free everything in order at exit

    def _traced(self, name: str) -> AbstractContextManager[None]:
        """Return a block that makes a span, if spans are made."""
        return nullcontext() if self.telemetry is None else self.telemetry.span(name)

    def _as_json(self, listed: Listed | BaseException, body: RecommendIn, origin: Json) -> bytes:
        if isinstance(listed, BaseException):
            raise listed
        answer = listed.answer
        self.meters.answer(answer)
        version, found = origin["version"], len(answer.items)
        more = found == body.k and not body.diversity
        head = {
            "source": answer.source,
            "confidence": round(answer.confidence, 4),
            "user_known": answer.user_known,
            "unknown_items": listed.unknown_items,
            "next": cursors.following(version, body.identity, cursors.depth(body.cursor), found, body.k) if more else None,
            "stages_ms": {stage: round(spent, 3) for stage, spent in answer.stages_ms.items()},
        }
        return joined(head, "items", listed.items)


def _skip(body: RecommendIn, version: str) -> int | RequestError:
    """Return how many items of its list a request passes over; an error if its cursor is not valid."""
    if body.cursor is None:
        return 0
    try:
        return cursors.read(body.cursor, version, body.identity)
    except RequestError as error:
        return PartError("cursor", error)


def joined(head: Json, name: str, value: bytes) -> bytes:
    """Return an object as JSON, with one more field that is JSON already: long lists are written in the worker thread.

    Examples
    --------
    >>> joined({"a": 1}, "b", b"[2]")
    b'{"a":1,"b":[2]}'
    """
    return b'%b,"%b":%b}' % (to_json(head)[:-1], name.encode(), value)


class PartError(RequestError):
    """An error in one part of a request.

    Attributes
    ----------
    location
        Path to the part in the JSON of the request. For a filter given as text, a colon and the character position follow.
    """

    def __init__(self, part: str, error: RequestError) -> None:
        super().__init__(str(error))
        inner = getattr(error, "location", None)
        if isinstance(error, UnknownItemError):
            inner = _path("history", error.number, "item_id")
        elif not isinstance(error, PartError) and inner is not None:  # an error in a filter
            inner = f"filter:{inner}" if isinstance(inner, int) else _path(*filter(None, ("filter", inner)))
        self.location = _path(*filter(None, (part, inner)))


def unknown(kind: str, name: str) -> RequestError:
    """Return the error for an unknown id; `kind` is "item" or "user"."""
    return RequestError(f"Unknown {kind} {name[:80]!r}. Search for valid ids with GET /v1/{kind}s?q=TEXT.")


def _check(engine: Engine, event: EventIn, now: int) -> None:
    if event.time_s is not None and event.time_s > now + FUTURE_S:
        text = f"The time {event.time_s} is more than a day in the future. Send seconds since 1970, not milliseconds."
        raise PartError("time_s", RequestError(text))
    if engine.row(event.item_id) == UNKNOWN:
        raise PartError("item_id", unknown("item", event.item_id))
    known = engine.recommender.reader.event_types
    if event.event_type is not None and event.event_type not in known:
        text = f"Unknown event type {event.event_type[:80]!r}. Allowed: {', '.join(known)}."
        raise PartError("event_type", RequestError(text))


def _path(*steps: str | int) -> str:
    return ".".join(str(step) for step in steps)


@contextmanager
def _part(*path: str | int) -> Iterator[None]:
    """Turn a `RequestError` of the block into a `PartError` with this path."""
    try:
        yield
    except RequestError as error:
        raise PartError(_path(*path), error) from None
