"""Provide what the HTTP routes call: recommendations, storage of events and reloading of bundles.

A response comes from one bundle version and includes every event acknowledged before. A new bundle is loaded and tested in the
background. It replaces the current one between two requests, or not at all. So do refreshed items.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from twotower.errors import BusyError, DataError, RequestError, TwoTowerError
from twotower.retrieval.request_reader import UnknownItemError
from twotower.schema import UNKNOWN
from twotower.serving.batching import Batcher
from twotower.serving.catalogue import Browser
from twotower.serving.event_journal import FUTURE_S, Journal
from twotower.serving.event_store import Event, open_store
from twotower.serving.freshness import Freshness, RefreshError, Version
from twotower.serving.limits import HEAVY_WEIGHT, Limits
from twotower.serving.model_version import Engine, Likeness, Listed, Question
from twotower.serving.prometheus import Meters
from twotower.serving.schemas import EventIn, RecommendIn
from twotower.serving.telemetry import Telemetry
from twotower.utils.console import log
from twotower.utils.types import Json

ANSWER_S = 0.1  # of the time in which a request is answered, kept for writing the response
REFRESH_S = 60.0  # default interval between two refreshes of the items
MAX_EVENT_BATCH = 256  # requests whose events go into one write


class Service:
    """All parts of a running server except HTTP.

    Parameters
    ----------
    bundle
        Folder of the first bundle.
    events
        Address of the event store; see `open_store`.
    trusted_key
        Public key that bundles must be signed for, those of reloads included; see `load_bundle`.
    refresh_s
        Interval in seconds at which the items are refreshed with the accepted events; 0: only on demand.

    Raises
    ------
    TwoTowerError
        The bundle or the store cannot be opened.
    """

    def __init__(
        self, bundle: Path, events: str, limits: Limits, trusted_key: Path | None = None, refresh_s: float = REFRESH_S
    ) -> None:
        self.limits, self._trusted_key, self.refresh_s = limits, trusted_key, refresh_s
        self.meters = Meters(lambda: self.answers.waiting + self.heavy.waiting, lambda: self.journal.state == "ok")
        self.journal = Journal(open_store(events), self.meters.skipped)  # first: it fails sooner than a bundle is loaded
        try:
            self.current = self._version(bundle, Engine.load(bundle, trusted_key))
        except BaseException:
            self.journal.close()
            raise
        self.answers, self.heavy = (
            Batcher(name, max_waiting=limits.waiting, max_batch=limits.max_batch, on_batch=self.meters.batch)
            for name in ("answers", "heavy answers")
        )
        self.writes = Batcher("events", max_waiting=limits.waiting, max_batch=MAX_EVENT_BATCH)
        self._serve(self.current)
        self.stopping = False
        self.telemetry: Telemetry | None = None
        """Sends traces and metrics; set before the application is created."""
        self._changing = asyncio.Lock()  # held by reloads and refreshes

    @property
    def problem(self) -> str | None:
        """Return why the server should get no requests; None if it is ready."""
        if self.stopping:
            return "Not ready: the server is stopping. Use another one."
        if not (self.answers.alive and self.heavy.alive and self.writes.alive):
            return "Not ready: a worker thread has stopped. Restart the server."
        return None

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
            return version, self._as_json(found)

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
                    answers.append(self._as_json(one))
            except PartError as error:
                answers.append(to_json({"error": {"code": "impossible", "message": str(error), "location": error.location}}))
        return version, answers

    async def _answered(self, bodies: Sequence[RecommendIn], client: str) -> tuple[Json, list[Listed | BaseException]]:
        current, deadline = self.current, time.perf_counter() + self.limits.queue_timeout_s
        lanes = [self.heavy if body.weight >= HEAVY_WEIGHT else self.answers for body in bodies]
        groups = [(lane, [at for at, one in enumerate(lanes) if one is lane]) for lane in dict.fromkeys(lanes)]
        for lane, positions in groups:
            lane.admit(len(positions), deadline, client)  # before any work, so that a rejection costs little
        questions = [Question(body.request(), self.journal.of(body.user) if body.user else (), body.strict) for body in bodies]
        futures: dict[int, asyncio.Future[Any]] = {}
        for lane, positions in groups:
            weights = [bodies[at].weight for at in positions]
            submitted = lane.submit(current.engine.answer, [questions[at] for at in positions], deadline, client, weights)
            futures |= dict(zip(positions, submitted, strict=True))
        found = await asyncio.gather(*(futures[at] for at in range(len(bodies))), return_exceptions=True)
        if self.telemetry is not None:
            self.telemetry.answers(one.answer for one in found if isinstance(one, Listed))
        return current.about(), found

    async def similar(self, item_id: str, k: int, filter: str | None, client: str = "") -> tuple[Json, list[Json]]:
        """Return the version, and the items most similar to an item."""
        current = self.current
        deadline = time.perf_counter() + self.limits.queue_timeout_s
        with _part(), self._traced("search"):
            (future,) = self.answers.submit(current.engine.similar, [Likeness(item_id, k, filter)], deadline, client)
            return current.about(), await future

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

    async def reload(self, path: Path | None = None) -> tuple[str, str]:
        """Serve the bundle at `path`, or read the current folder again. Return the new and the previous version.

        Raises
        ------
        DataError
            The bundle cannot answer. The current one stays in use.
        """
        async with self._changing:
            before = self.current
            try:
                version = await asyncio.to_thread(self._open, path or before.path)
            except TwoTowerError as error:
                self.meters.reload("refused")
                log.error("reload refused; %s stays in use: %s", before.path, error)
                raise
            self._serve(version)
            self.meters.reload("loaded")
            log.info("now serving %s, version %s", version.path, version.engine.version)
            return version.engine.version, before.engine.version

    async def refresh(self) -> Version:
        """Refresh the items with all accepted events and return the version that is served now.

        Raises
        ------
        RefreshError
            It failed. The last items stay in use.
        """
        async with self._changing:
            version = self.current
            self._serve(await asyncio.to_thread(version.freshness.refresh, version))
            return self.current

    async def keep_fresh(self) -> None:
        """Refresh the items every `refresh_s` seconds, without end; 0: never."""
        while self.refresh_s:
            await asyncio.sleep(self.refresh_s)
            with suppress(RefreshError):  # logged
                await self.refresh()

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

    def _serve(self, version: Version) -> None:
        self.current = version
        self.meters.bundle(version.engine.version)
        self.meters.items(version.engine.as_of, asdict(version.freshness.counts))

    def _open(self, path: Path) -> Version:
        try:
            engine = Engine.load(path, self._trusted_key)
        except TwoTowerError:
            raise
        except Exception:  # valid hashes but invalid content
            log.exception("%s cannot be served", path)
            raise DataError(
                f"The bundle {path} fails on a test request; the log has the traceback. Write it again with `twotower export`."
            ) from None
        freeze_garbage_collector()
        return self._version(path, engine)

    def _version(self, path: Path, engine: Engine) -> Version:
        """Return the version of a loaded bundle, with the accepted events unless items are refreshed only on demand."""
        freshness = Freshness(engine, self.journal, self.meters)
        version = Version(path, engine, Browser(engine, self.journal), freshness)
        if self.refresh_s:
            with suppress(RefreshError):  # logged
                return freshness.refresh(version)
        return version

    def _as_json(self, listed: Listed | BaseException) -> bytes:
        if isinstance(listed, BaseException):
            raise listed
        answer = listed.answer
        self.meters.answer(answer)
        head = {
            "source": answer.source,
            "confidence": round(answer.confidence, 4),
            "user_known": answer.user_known,
            "unknown_items": listed.unknown_items,
            "stages_ms": {stage: round(spent, 3) for stage, spent in answer.stages_ms.items()},
        }
        return joined(head, "items", listed.items)


def joined(head: Json, name: str, value: bytes) -> bytes:
    """Return an object as JSON, with one more field that is JSON already: long lists are written in the worker thread.

    Examples
    --------
    >>> joined({"a": 1}, "b", b"[2]")
    b'{"a":1,"b":[2]}'
    """
    return b'%b,"%b":%b}' % (to_json(head)[:-1], name.encode(), value)


def freeze_garbage_collector() -> None:
    """Exclude all loaded objects from garbage collection, which would delay responses by tens of milliseconds."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


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
    known = engine.dataset.event_types
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
