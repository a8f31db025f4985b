"""Provide what the HTTP routes call: recommendations, storage of events and reloading of bundles.

A response comes from one bundle version and includes every event acknowledged before. A new bundle is loaded and tested in the
background. It replaces the current one between two requests, or not at all.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import DataError, RequestError, TwoTowerError
from twotower.retrieval.request_reader import UnknownItemError
from twotower.schema import UNKNOWN
from twotower.serving.batching import Batcher
from twotower.serving.catalogue import Browser
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import Event, open_store
from twotower.serving.limits import Limits
from twotower.serving.model_version import Engine, Likeness, Listed, Question
from twotower.serving.prometheus import Meters
from twotower.serving.schemas import EventIn, RecommendIn
from twotower.utils.console import log
from twotower.utils.types import Json

MAX_EVENT_BATCH = 256  # requests whose events go into one write


@dataclass(frozen=True, slots=True)
class Version:
    """One bundle version that is served."""

    path: Path
    engine: Engine
    browser: Browser


class Service:
    """All parts of a running server except HTTP.

    Parameters
    ----------
    bundle
        Folder of the first bundle.
    events
        Address of the event store; see `open_store`.

    Raises
    ------
    TwoTowerError
        The bundle or the store cannot be opened.
    """

    def __init__(self, bundle: Path, events: str, limits: Limits) -> None:
        self.limits = limits
        engine = Engine.load(bundle)
        self.journal = Journal(open_store(events))
        self.meters = Meters(lambda: self.answers.waiting)
        self.answers = Batcher("answers", max_waiting=limits.waiting, max_batch=limits.max_batch, on_batch=self.meters.batch)
        self.writes = Batcher("events", max_waiting=limits.waiting, max_batch=MAX_EVENT_BATCH)
        self.current = Version(bundle, engine, Browser(engine, self.journal))
        self.meters.bundle(engine.version)
        self._reloading = asyncio.Lock()

    @property
    def ready(self) -> bool:
        """Return True if both worker threads are alive."""
        return self.answers.alive and self.writes.alive

    @property
    def overloaded(self) -> bool:
        """Return True if the queue is more than half full. Below that, a batch of any allowed size fits into it."""
        return self.answers.waiting > self.limits.waiting // 2

    async def recommend(self, bodies: Sequence[RecommendIn], *within: str) -> tuple[str, list[Json]]:
        """Return the bundle version and a list for each request. `within` is the path to the requests in the JSON body.

        Raises
        ------
        PartError
            A request cannot be answered.
        BusyError
            The queue is full.
        """
        engine, deadline = self.current.engine, time.perf_counter() + self.limits.queue_timeout_s
        self.answers.admit(len(bodies), deadline)  # before any work, so that a rejection costs little
        paths: list[tuple[str | int, ...]] = [(*within, number) if within else () for number in range(len(bodies))]
        questions = [Question(body.request(), self.journal.of(body.user) if body.user else ()) for body in bodies]
        futures = self.answers.submit(engine.answer, questions, deadline)
        answers = []
        for path, found in zip(paths, await asyncio.gather(*futures, return_exceptions=True), strict=True):
            with _part(*path):
                answers.append(self._as_json(found))
        return engine.version, answers

    async def similar(self, item_id: str, k: int, filter: str | None) -> tuple[str, list[Json]]:
        """Return the bundle version and the items most similar to an item."""
        engine = self.current.engine
        deadline = time.perf_counter() + self.limits.queue_timeout_s
        with _part():
            (future,) = self.answers.submit(engine.similar, [Likeness(item_id, k, filter)], deadline)
            return engine.version, await future

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
                _check(engine, body)
        events = [
            Event(b.event_id, b.user, b.item_id, now if b.time_s is None else b.time_s, b.event_type, b.stars) for b in bodies
        ]
        (future,) = self.writes.submit(self.journal.append, [events], time.perf_counter() + self.limits.queue_timeout_s)
        new = await future
        self.meters.events(new, len(events) - new)
        return new, len(events) - new

    async def reload(self, path: Path | None = None) -> tuple[str, str]:
        """Serve the bundle at `path`, or read the current folder again. Return the new and the previous version.

        Raises
        ------
        DataError
            The bundle cannot answer. The current one stays in use.
        """
        async with self._reloading:
            before = self.current
            try:
                version = await asyncio.to_thread(self._open, path or before.path)
            except TwoTowerError:
                self.meters.reload("refused")
                raise
            self.current = version
            self.meters.reload("loaded")
            self.meters.bundle(version.engine.version)
            log.info("now serving %s, version %s", version.path, version.engine.version)
            return version.engine.version, before.engine.version

    def close(self) -> None:
        """Finish the queued work and close the event store."""
        self.answers.close()
        self.writes.close()
        self.journal.close()
        gc.unfreeze()  # lets the interpreter free everything in order at exit

    def _open(self, path: Path) -> Version:
        try:
            engine = Engine.load(path)
        except TwoTowerError:
            raise
        except Exception:  # valid hashes but invalid content
            log.exception("%s cannot be served", path)
            raise DataError(
                f"The bundle {path} fails on a test request; the log has the traceback. Write it again with `twotower export`."
            ) from None
        freeze_garbage_collector()
        return Version(path, engine, Browser(engine, self.journal))

    def _as_json(self, listed: Listed | BaseException) -> Json:
        if isinstance(listed, BaseException):
            raise listed
        answer = listed.answer
        self.meters.answer(answer)
        return {
            "source": answer.source,
            "confidence": round(answer.confidence, 4),
            "user_known": answer.user_known,
            "items": listed.items,
            "stages_ms": {stage: round(spent, 3) for stage, spent in answer.stages_ms.items()},
        }


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


def _check(engine: Engine, event: EventIn) -> None:
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
