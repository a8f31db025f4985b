"""What stands behind the routes: the version that answers, the thread that computes, the journal of events, and how they change.

Promise: whoever asks gets an answer of one version, and every event acknowledged before is in it; a new bundle is loaded and tried
aside, and takes over between two requests, or not at all.
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
    """One version of what is served."""

    path: Path
    engine: Engine
    browser: Browser


class Service:
    """Everything of a running server but HTTP.

    Parameters
    ----------
    bundle
        Folder of the bundle to begin with.
    events
        Where accepted events go; see `open_store`.

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
        """Whether both threads work."""
        return self.answers.alive and self.writes.alive

    @property
    def overloaded(self) -> bool:
        """Whether half of the room is taken: what is let in below that, a batch of any size included, finds a place."""
        return self.answers.waiting > self.limits.waiting // 2

    async def recommend(self, bodies: Sequence[RecommendIn], *within: str) -> tuple[str, list[Json]]:
        """Version, and a list for each request; `within` is the path to them in what was sent.

        Raises
        ------
        PartError
            One cannot be answered.
        BusyError
            Too much waits.
        """
        engine, deadline = self.current.engine, time.perf_counter() + self.limits.queue_timeout_s
        self.answers.admit(len(bodies), deadline)  # a refusal must cost little
        paths: list[tuple[str | int, ...]] = [(*within, number) if within else () for number in range(len(bodies))]
        questions = [Question(body.request(), self.journal.of(body.user) if body.user else ()) for body in bodies]
        futures = self.answers.submit(engine.answer, questions, deadline)
        answers = []
        for path, found in zip(paths, await asyncio.gather(*futures, return_exceptions=True), strict=True):
            with _part(*path):
                answers.append(self._as_json(found))
        return engine.version, answers

    async def similar(self, item_id: str, k: int, filter: str | None) -> tuple[str, list[Json]]:
        """Version, and the places most like one."""
        engine = self.current.engine
        deadline = time.perf_counter() + self.limits.queue_timeout_s
        with _part():
            (future,) = self.answers.submit(engine.similar, [Likeness(item_id, k, filter)], deadline)
            return engine.version, await future

    async def accept(self, bodies: Sequence[EventIn]) -> tuple[int, int]:
        """Keep events; how many were new, and how many repeated. They are on the disk, and count, when this returns.

        Raises
        ------
        RequestError
            One speaks of what the bundle does not know: then none is kept.
        BusyError
            Too much waits, or the store does not write.
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
        """Serve the bundle at `path`, or the same folder again; versions now and before.

        Raises
        ------
        DataError
            It is no bundle that can answer; the one before goes on.
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
        """Finish what waits, and let go of the events."""
        self.answers.close()
        self.writes.close()
        self.journal.close()
        gc.unfreeze()  # at the end everything is let go of in its order

    def _open(self, path: Path) -> Version:
        try:
            engine = Engine.load(path)
        except TwoTowerError:
            raise
        except Exception:  # hashes that fit and a content that does not
            log.exception("%s cannot be served", path)
            raise DataError(f"A bundle must be able to answer. {path} fails at it; the log says how. Export it again.") from None
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
    """Take what is loaded out of the rounds of the garbage collector, which would hold up answers for tens of milliseconds."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class PartError(RequestError):
    """A mistake in one part of a request.

    Attributes
    ----------
    location
        Path to the part in the JSON of the request; of a filter as text, a colon and the character follow.
    """

    def __init__(self, part: str, error: RequestError) -> None:
        super().__init__(str(error))
        inner = getattr(error, "location", None)
        if isinstance(error, UnknownItemError):
            inner = _path("history", error.number, "item_id")
        elif not isinstance(error, PartError) and inner is not None:  # a mistake of a filter
            inner = f"filter:{inner}" if isinstance(inner, int) else _path(*filter(None, ("filter", inner)))
        self.location = _path(*filter(None, (part, inner)))


def unknown(kind: str, name: str) -> RequestError:
    """A mistake about who or what nobody knows."""
    return RequestError(f"The {kind} must be known. Found no {name[:80]!r}.")


def _check(engine: Engine, event: EventIn) -> None:
    if engine.row(event.item_id) == UNKNOWN:
        raise PartError("item_id", unknown("item", event.item_id))
    known = engine.dataset.event_types
    if event.event_type is not None and event.event_type not in known:
        text = f"An event must be of a kind the bundle knows: {', '.join(known)}. Got {event.event_type[:80]!r}."
        raise PartError("event_type", RequestError(text))


def _path(*steps: str | int) -> str:
    return ".".join(str(step) for step in steps)


@contextmanager
def _part(*path: str | int) -> Iterator[None]:
    """A `RequestError` of the block becomes one about this part of the request."""
    try:
        yield
    except RequestError as error:
        raise PartError(_path(*path), error) from None
