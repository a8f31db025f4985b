"""Log answers, and accept the events that name them: impressions and outcomes.

An answer is logged a moment after it is sent. An event that names it is checked against its list: the item must have been shown, to
this user, and not later than the event.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from twotower.errors import BusyError, RequestError
from twotower.schema import UNKNOWN
from twotower.serving.batching import Batcher
from twotower.serving.event_journal import FUTURE_S, Journal
from twotower.serving.event_schemas import EventIn
from twotower.serving.event_types import Event, LoggedAnswer
from twotower.serving.model_version import Engine
from twotower.serving.part_error import PartError, part, unknown
from twotower.serving.prometheus import Meters
from twotower.serving.schemas import RecommendIn
from twotower.utils.config_serving import Limits

ANSWER_S = 0.1  # of the time in which a request is answered, kept for writing the response
FLUSH_S = 0.02  # time in which answers are collected for one write
RECENT = 2000  # answers kept in memory
OTHERS_S = 0.5  # time for other processes to write an answer
SKEW_S = 60  # clocks of clients may be behind by this
MAX_BUFFERED = 5000  # answers; more are dropped and counted


Traced = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Accepted:
    """Numbers of new and of repeated events."""

    new: int
    repeated: int


class Feedback:
    """Answers and events of one process.

    Parameters
    ----------
    writes
        The thread that writes to the store.
    traced
        Returns a block that makes a span of a name.
    """

    def __init__(self, journal: Journal, limits: Limits, meters: Meters, writes: Batcher, traced: Traced) -> None:
        self.journal, self.limits, self.meters, self.logged = journal, limits, meters, limits.keep_answers_days > 0
        self.writes, self._traced = writes, traced
        self._recent: OrderedDict[str, LoggedAnswer] = OrderedDict()
        self._first: set[str] = set()
        """Ids of recent answers that the store has, and not another answer with the same id."""
        self._buffer: list[LoggedAnswer] = []
        self._timer: asyncio.TimerHandle | None = None

    def answered(self, request_id: str, version: str, body: RecommendIn, items: Sequence[Any], propensity: Sequence[float]) -> None:
        """Log an answer; it is written with others in a moment."""
        if not self.logged or request_id in self._recent:  # the first of an id is kept
            return
        if len(self._buffer) >= MAX_BUFFERED:
            self.meters.answers_logged("dropped", 1)
            return
        asked = body.model_dump_json(exclude={"user"}, exclude_defaults=True)
        names = [str(item.item_id) for item in items]
        answer = LoggedAnswer(request_id, int(time.time()), version, body.user, names, list(propensity), asked)
        self._recent[request_id] = answer
        if len(self._recent) > RECENT:
            self._first.discard(self._recent.popitem(last=False)[0])
        self._buffer.append(answer)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, answers, self._buffer = None, self._buffer, []
        if not answers:
            return
        try:
            (future,) = self.writes.submit(self.journal.log_answers, [answers], time.perf_counter() + self.limits.request_s)
        except BusyError:
            self.meters.answers_logged("dropped", len(answers))
            return
        future.add_done_callback(lambda done: self._written(done, answers))

    def _written(self, done: asyncio.Future[Any], answers: Sequence[LoggedAnswer]) -> None:
        """Count the answers of a write, and leave out those whose id another process has used before."""
        failed = done.cancelled() or done.exception() is not None
        self.meters.answers_logged("dropped" if failed else "logged", len(answers))
        for answer, first in () if failed else zip(answers, done.result(), strict=True):
            if first and answer.request_id in self._recent:
                self._first.add(answer.request_id)
            elif not first:
                self._recent.pop(answer.request_id, None)

    def forget(self, user: str) -> None:
        """Leave out what this process has in memory of a user's answers."""
        self._recent = OrderedDict((name, answer) for name, answer in self._recent.items() if answer.user != user)
        self._first &= self._recent.keys()
        self._buffer = [answer for answer in self._buffer if answer.user != user]

    async def accept(self, engine: Engine, bodies: Sequence[EventIn]) -> Accepted:
        """Store events and return the numbers of new and of repeated ones. On return they are on disk and affect responses.

        Raises
        ------
        RequestError
            An event has an unknown item, type or list, or does not fit its list. No event is stored.
        BusyError
            The queue is full, or the store cannot write.
        """
        now = int(time.time())
        lists = await self._lists({body.request_id for body in bodies if body.request_id is not None})
        events: list[Event] = []
        for number, body in enumerate(bodies):
            with part("events", number):
                events += _events(engine, body, lists, now)
        (future,) = self.writes.submit(self.journal.append, [events], time.perf_counter() + self.limits.queue_timeout_s)
        try:
            with self._traced("store"):
                new = await asyncio.wait_for(future, self.limits.queue_timeout_s - ANSWER_S)
        except TimeoutError:
            raise BusyError("The event store is too slow; the events may be stored. Send them again later.") from None
        self.meters.events(new, len(events) - new)
        if new:
            for (version, event_type), count in Counter((e.version, e.event_type) for e in events if e.version).items():
                self.meters.list_events(version or "", event_type or "", count)
        return Accepted(new, len(events) - new)

    async def _lists(self, request_ids: set[str]) -> dict[str, LoggedAnswer]:
        """Return the logged answers with these ids, also those that another process is about to write.

        An answer of this process counts once the store has it: another process may have used its id before.
        """
        if request_ids and not self.logged:
            text = "This server logs no answers, so events cannot name one. Start it with serving.keep_answers_days above 0."
            raise PartError("events", RequestError(text))
        found = {name: self._recent[name] for name in request_ids if name in self._first}
        if len(found) < len(request_ids) and self._buffer:
            self._flush()  # the store reads after it has written
        end = time.monotonic() + (OTHERS_S if self.journal.shared else 0.0)
        while missing := [name for name in request_ids if name not in found]:
            (future,) = self.writes.submit(self.journal.answers_of, [missing], time.perf_counter() + self.limits.queue_timeout_s)
            found |= {answer.request_id: answer for answer in await future}
            found |= {name: self._recent[name] for name in missing if name not in found and name in self._recent}  # dropped
            if time.monotonic() >= end:
                break
            await asyncio.sleep(2 * FLUSH_S)
        return found

    def close(self) -> None:
        """Write the last answers. Nothing else may be written any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._buffer:
            with suppress(BusyError):
                self.journal.log_answers([self._buffer])


def _events(engine: Engine, body: EventIn, lists: dict[str, LoggedAnswer], now: int) -> Iterator[Event]:
    """Yield the events of one part of a request: one, or one for each item that was shown.

    Raises
    ------
    RequestError
        It does not fit the bundle or its list.
    """
    if body.time_s is not None and body.time_s > now + FUTURE_S:
        text = f"The time {body.time_s} is more than a day in the future. Send seconds since 1970, not milliseconds."
        raise PartError("time_s", RequestError(text))
    known = engine.recommender.reader.event_types
    if body.event_type is not None and body.event_type not in known:
        text = f"Unknown event type {body.event_type[:80]!r}. Allowed: {', '.join(known)}."
        raise PartError("event_type", RequestError(text))
    for item_id in body.shown or [body.item_id or ""]:
        if engine.row(item_id) == UNKNOWN:
            raise PartError("shown" if body.shown else "item_id", unknown("item", item_id))
    time_s = now if body.time_s is None else body.time_s
    if body.request_id is None:
        yield Event(body.event_id or "", body.user or "", body.item_id or "", time_s, body.event_type, body.stars)
        return
    answer = lists.get(body.request_id)
    if answer is None:
        text = f"Unknown request_id {body.request_id[:80]!r}. Send the request_id of an answer of this server that is still logged."
        raise PartError("request_id", RequestError(text))
    yield from _of_list(engine, body, answer, max(time_s, answer.time_s) if time_s >= answer.time_s - SKEW_S else time_s)


def _of_list(engine: Engine, body: EventIn, answer: LoggedAnswer, time_s: int) -> Iterator[Event]:
    user = answer.user if body.user is None else body.user
    if user is None:
        raise PartError("user", RequestError("Neither the event nor its list has a user. Send the user or session that it is of."))
    if answer.user is not None and user != answer.user:
        raise PartError("user", RequestError(f"The list {body.request_id!r} was made for another user. Send the user of the list."))
    if time_s < answer.time_s:
        text = f"The time {time_s} is before the list was made ({answer.time_s}): a clock is behind. Correct it, or send no time."
        raise PartError("time_s", RequestError(text))
    prepare = engine.dataset.manifest.config.prepare
    shown_type = next(iter(prepare.impression_types), None)
    event_type = body.event_type or (shown_type if body.shown else next(iter(engine.dataset.event_types), None))
    if body.shown and event_type not in prepare.impression_types:
        text = f"The field shown goes with an impression, and {event_type!r} is none. Send item_id for an outcome."
        raise PartError("shown", RequestError(text))
    for place, item_id in enumerate(body.shown or [body.item_id or ""], 1):
        if item_id not in answer.items:
            text = f"Item {item_id[:80]!r} is not in the list {answer.request_id!r}. Send one of its {len(answer.items)} items."
            raise PartError("shown" if body.shown else "item_id", RequestError(text))
        position = place if body.shown else body.position or answer.items.index(item_id) + 1
        if position > len(answer.items):
            text = f"Position {position} is outside the list, which has {len(answer.items)} items. Send a position in it."
            raise PartError("position", RequestError(text))
        event_id = body.event_id if body.event_id is not None and not body.shown else f"{answer.request_id}/{event_type}/{item_id}"
        yield Event(
            event_id,
            user,
            item_id,
            time_s,
            event_type,
            body.stars,
            request_id=answer.request_id,
            position=position,
            version=answer.version,
        )
