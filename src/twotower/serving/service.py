"""Implement the functions behind the HTTP routes: recommendations, storage of events and reloading of bundles.

Each response comes from one bundle version, and all events acknowledged before count. `updates` replaces the version between two
requests.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pydantic_core import to_json

from twotower.bundle.publish import RemoteIndex
from twotower.errors import RequestError
from twotower.serving import cursors
from twotower.serving.batching import Batcher
from twotower.serving.event_journal import Journal
from twotower.serving.event_schemas import EventIn
from twotower.serving.event_store import open_store
from twotower.serving.feedback import Accepted, Feedback
from twotower.serving.freshness import Version
from twotower.serving.kept_versions import KeptVersions, kept_beside
from twotower.serving.limits import HEAVY_WEIGHT
from twotower.serving.model_version import Likeness, Listed, Question
from twotower.serving.outcomes import as_json
from twotower.serving.part_error import PartError, part
from twotower.serving.prometheus import Meters
from twotower.serving.schemas import RecommendIn
from twotower.serving.shadow import Shadow
from twotower.serving.telemetry import Telemetry
from twotower.serving.updater import Trial, Updater, versions_of
from twotower.serving.updates import OwnUpdates, Updates
from twotower.utils.config_serving import Limits
from twotower.utils.types import Json

REFRESH_S = 60.0  # default of `ServingConfig.refresh_s`
MAX_EVENT_BATCH = 256  # requests whose events go into one write


class Fleet(Protocol):
    """Interface through which a worker asks for the state of all workers of its server."""

    @property
    def stopping(self) -> bool:
        """Return True if the server is stopping."""
        ...

    @property
    def ready(self) -> int:
        """Return the number of workers that answer requests."""
        ...

    async def metrics(self) -> bytes:
        """Return the metrics of all workers added up, in the Prometheus text format."""
        ...


class Service:
    """A running server without HTTP: event store, bundle versions, queues and metrics.

    Parameters
    ----------
    bundle
        Folder of the first bundle.
    events
        Address of the event store; see `open_store`.
    limits
        Limits of queues, batches and times.
    trusted_key, refresh_s, trial, index
        See `Updater`.

    Raises
    ------
    TwoTowerError
        The bundle or the store cannot be opened.
    """

    def __init__(
        self,
        bundle: Path,
        events: str,
        limits: Limits,
        trusted_key: Path | None = None,
        refresh_s: float = REFRESH_S,
        trial: Trial | None = None,
        index: RemoteIndex | None = None,
    ) -> None:
        meters = self._prepare(limits)
        self.store_url, self.kept = events, KeptVersions(kept_beside(bundle), limits.keep_versions)
        self.journal = Journal(open_store(events), meters.skipped)  # first: it fails sooner than a bundle is loaded
        try:
            updater = Updater(bundle, self.journal, meters, trusted_key, refresh_s, trial or Trial(), limits, index)
        except BaseException:
            self.journal.close()
            raise
        self.updates: Updates = OwnUpdates(updater, self._serve)
        self._start(updater.current)

    @classmethod
    def of_worker(
        cls, version: Version, journal: Journal, limits: Limits, updates: Updates, events: str, kept: KeptVersions
    ) -> Service:
        """Return the service of a worker process. It serves the version of its parent, which does all updates."""
        service = cls.__new__(cls)
        meters = service._prepare(limits)
        service.journal, service.updates, service.store_url, service.kept = journal, updates, events, kept
        journal.on_skipped = meters.skipped
        meters.bundle(*(one.engine.version for one in versions_of(version)))
        service._start(version)
        return service

    def _prepare(self, limits: Limits) -> Meters:
        self.limits, self.stopping = limits, False
        self.fleet: Fleet | None = None
        self.telemetry: Telemetry | None = None
        """Exports traces and metrics. Set it before the application is created."""
        self.meters = Meters(lambda: self.answers.waiting + self.heavy.waiting, lambda: self.journal.state == "ok")
        return self.meters

    def _start(self, version: Version) -> None:
        limits = self.limits
        self.answers, self.heavy = (
            Batcher(name, max_waiting=limits.waiting, max_batch=limits.max_batch, on_batch=self.meters.batch, heavy=heavy)
            for name, heavy in (("answers", False), ("heavy answers", True))
        )
        self.writes = Batcher("events", max_waiting=limits.waiting, max_batch=MAX_EVENT_BATCH)
        self.feedback = Feedback(self.journal, limits, self.meters, self.writes, self._traced)
        self.shadow = Shadow(self.meters)
        self.current = version

    def _serve(self, version: Version) -> None:
        self.current = version

    @property
    def problem(self) -> str | None:
        """Return the reason why the server is not ready for requests; None if it is ready."""
        if self.stopping or (self.fleet is not None and self.fleet.stopping):
            return "Not ready: the server is stopping. Use another one."
        if not (self.answers.alive and self.heavy.alive and self.writes.alive):
            return "Not ready: a worker thread has stopped. Restart the server."
        return (lost := self.current.engine.recommender.index.problem) and f"Not ready: {lost}"

    def state(self) -> Json:
        """Return the body of the health check of a ready server: version, event store and number of workers."""
        workers = 1 if self.fleet is None else self.fleet.ready
        return {"status": "ready", **self.current.state(), "events": self.journal.state, "workers": workers}

    async def metrics(self) -> bytes:
        """Return the metrics in the Prometheus text format, added up over all workers."""
        return self.meters.text() if self.fleet is None else await self.fleet.metrics()

    def overloaded(self, client: str) -> bool:
        """Return True if the queue is full, or a client fills half of it. Otherwise a batch of any allowed size is admitted."""
        waiting = self.limits.waiting
        return any(lane.waiting_of(client) > waiting // 2 or lane.waiting >= waiting for lane in (self.answers, self.heavy))

    async def recommend(self, body: RecommendIn, client: str = "", request_id: str = "") -> tuple[Json, bytes]:
        """Return the version (`Version.about`) and the answer to a request as JSON.

        Parameters
        ----------
        client
            Address of the client, for a fair queue.
        request_id
            Id under which the answer is logged; empty: it is not logged.

        Raises
        ------
        PartError
            The request cannot be answered.
        BusyError
            The queue is full.
        """
        ((version, listed),) = await self._answered([body], client)
        with part():
            return version.about(), self._as_json(listed, body, version, request_id)

    async def recommend_many(
        self, bodies: Sequence[RecommendIn], client: str = "", request_id: str = ""
    ) -> tuple[Json, list[bytes]]:
        """Return the version, and for each request its answer as JSON, or an object with its "error".

        With two versions, each answer contains the version of its user. The returned version is the first one.

        Raises
        ------
        BusyError
            The queue is full.
        """
        current, answers = self.current, list[bytes]()
        for number, (version, one) in enumerate(await self._answered(bodies, client)):
            try:
                with part("requests", number):
                    name = f"{request_id}.{number}" if request_id else ""
                    head = {"request_id": name, "version": version.engine.version}
                    answers.append(self._as_json(one, bodies[number], version, name, head))
            except PartError as error:
                answers.append(to_json({"error": {"code": "invalid", "message": str(error), "location": error.location}}))
        return current.about(), answers

    async def _answered(self, bodies: Sequence[RecommendIn], client: str) -> list[tuple[Version, Listed | BaseException]]:
        """Return for each request its version, and its list or its error."""
        current, deadline = self.current, time.perf_counter() + self.limits.queue_timeout_s
        versions = [current.of(body.user) for body in bodies]
        lanes = [self.heavy if body.weight >= HEAVY_WEIGHT else self.answers for body in bodies]
        skips = [_skip(body, version.engine.version) for body, version in zip(bodies, versions, strict=True)]
        good = [at for at, skip in enumerate(skips) if isinstance(skip, int)]
        for lane in dict.fromkeys(lanes):  # before any work, so that a rejection costs little
            lane.admit(sum(lanes[at] is lane for at in good), deadline, client)
        results: list[Any] = list(skips)  # errors stay
        futures: dict[int, asyncio.Future[Any]] = {}
        for lane, engine in dict.fromkeys((lanes[at], versions[at].engine) for at in good):
            positions = [at for at in good if lanes[at] is lane and versions[at].engine is engine]
            questions = [self._question(bodies[at], results[at]) for at in positions]
            weights = [bodies[at].weight for at in positions]
            submitted = lane.submit(engine.answer, questions, deadline, client, weights)
            futures |= dict(zip(positions, submitted, strict=True))
        shadowed = {at: self._question(bodies[at], results[at]) for at in futures} if current.shadow is not None else {}
        for at, outcome in zip(futures, await asyncio.gather(*futures.values(), return_exceptions=True), strict=True):
            results[at] = outcome
        if self.telemetry is not None:
            self.telemetry.answers(one.answer for one in results if isinstance(one, Listed))
        for at, question in shadowed.items():
            if isinstance(results[at], Listed) and current.shadow is not None:
                self.shadow.offer(current.shadow.engine, question, results[at])
        return list(zip(versions, results, strict=True))

    def _question(self, body: RecommendIn, skip: int) -> Question:
        request = body.request(skip, self.limits.explore)
        if body.user is not None and self.journal.is_forgotten(body.user):  # the user's data in the bundle must not be used
            request = replace(request, user=None)
        return Question(request, self.journal.of(body.user) if body.user else (), body.strict)

    async def similar(self, item_id: str, k: int, filter: str | None, cursor: str | None = None, client: str = "") -> Json:
        """Return the version, the items most similar to an item, and the cursor of the next page."""
        current, identity = self.current, ["similar", item_id, filter]
        version, deadline = current.engine.version, time.perf_counter() + self.limits.queue_timeout_s
        with part("cursor"):
            skip = cursors.read(cursor, version, identity)
        with part(), self._traced("search"):
            (future,) = self.answers.submit(current.engine.similar, [Likeness(item_id, k, filter, skip)], deadline, client)
            items = await future
        return {**current.about(), "next": cursors.following(version, identity, skip, len(items), k), "items": items}

    def items(self, query: str, limit: int, cursor: str | None) -> Json:
        """Return items whose name contains `query`, and the cursor of the next page."""
        current, identity = self.current, ["items", query]
        version = current.engine.version
        with part("cursor"):
            skip = cursors.read(cursor, version, identity)
        items = current.browser.items(query, limit, skip)
        return {"next": cursors.following(version, identity, skip, len(items), limit), "items": items}

    async def accept(self, bodies: Sequence[EventIn]) -> Accepted:
        """Store events; see `Feedback.accept`."""
        return await self.feedback.accept(self.current.engine, bodies)

    async def forget(self, user: str) -> Json:
        """Delete all data of a user; see `Updates.forget`."""
        self.feedback.forget(user)
        return await self.updates.forget(user)

    def versions(self) -> Json:
        """Return the served versions with their shares of the users and the outcomes of their lists."""
        current, prepare = self.current, self.current.engine.dataset.manifest.config.prepare
        outcomes = self.journal.outcomes().summary(lambda name: prepare.is_history(name))
        share = current.rival_share if current.rival is not None else 0.0
        roles = [("first", current, 1 - share), ("second", current.rival, share), ("shadow", current.shadow, 0.0)]
        served = [
            {
                "version": one.engine.version,
                "bundle": one.engine.name,
                "role": role,
                "share": round(frac, 6),
                "outcomes": as_json(outcomes[one.engine.version]) if one.engine.version in outcomes else None,
            }
            for role, one, frac in roles
            if one is not None
        ]
        rates = [None if one is None else outcomes.get(one.engine.version) for one in (current, current.rival)]
        return {
            "versions": served,
            "outcomes": {name: as_json(one) for name, one in outcomes.items()},
            "difference": None if rates[0] is None or rates[1] is None else rates[0].difference_to(rates[1]),
            "kept": self.kept.names(),
        }

    def close(self) -> None:
        """Finish the queued work and close the event store."""
        for lane in (self.shadow, self.answers, self.heavy, self.writes, self.feedback, self.journal):
            lane.close()
        gc.unfreeze()  # lets the interpreter free everything in order at exit

    def _traced(self, name: str) -> AbstractContextManager[None]:
        """Return a context that records a span, if telemetry is on."""
        return nullcontext() if self.telemetry is None else self.telemetry.span(name)

    def _as_json(
        self, listed: Listed | BaseException, body: RecommendIn, version: Version, request_id: str, more: Json | None = None
    ) -> bytes:
        if isinstance(listed, BaseException):
            raise listed
        answer, name = listed.answer, version.engine.version
        asyncio.get_running_loop().call_soon(self.meters.answer, answer, name)  # after the response
        if request_id:
            self.feedback.answered(request_id, name, body, answer.items, answer.propensity)
        size = len(answer.items)
        has_next = size == body.k and not body.diversity
        head = {
            **(more or {}),
            "source": answer.source,
            "confidence": round(answer.confidence, 4),
            "user_known": answer.user_known,
            "unknown_items": listed.unknown_items,
            "next": cursors.following(name, body.identity, cursors.depth(body.cursor), size, body.k) if has_next else None,
            "stages_ms": {stage: round(spent, 3) for stage, spent in answer.stages_ms.items()},
        }
        return joined(head, "items", listed.items)


def _skip(body: RecommendIn, version: str) -> int | RequestError:
    """Return the number of items before the page of a request; an error if its cursor is invalid."""
    if body.cursor is None:
        return 0
    try:
        return cursors.read(body.cursor, version, body.identity)
    except RequestError as error:
        return PartError("cursor", error)


def joined(head: Json, name: str, value: bytes) -> bytes:
    """Return an object as JSON with one more field, whose value is already JSON.

    Examples
    --------
    >>> joined({"a": 1}, "b", b"[2]")
    b'{"a":1,"b":[2]}'
    """
    return b'%b,"%b":%b}' % (to_json(head)[:-1], name.encode(), value)
