"""Keep accepted events in memory by user, in sync with a persistent event store.

When `append` returns, the events are durable and `of` returns them. Events enter memory only through `catch_up`, so a restarted
server or another server sees the same events.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from twotower.bundle.changed_items import ItemChange
from twotower.errors import BusyError
from twotower.retrieval.request import HistoryEvent
from twotower.serving.event_types import Event, EventStore, Forgotten, LoggedAnswer, PositionLost, StoreInUse, digest_of
from twotower.serving.outcomes import Outcomes
from twotower.utils.console import log

FUTURE_S = 86_400  # how far ahead of this clock an event may be
MAX_EVENTS_PER_USER = 1000  # latest events of a user and an event type kept in memory; the store keeps all
RETRY_S = 1.0  # pause after an error of the store
REFUSED_S = 60.0  # for which `state` tells of a write that a file has refused, though it can be read
WARN_S = 10.0  # between two warnings that the store cannot be read
TIDY_S = 1.0  # interval for removing what a store could not remove at once

Accepted = tuple[str, HistoryEvent]
"""A user and an accepted event."""


class News(Protocol):
    """Tells the processes of one server that there are new entries in their store."""

    def tell(self) -> None:
        """Count new entries, which are in the store."""
        ...

    def latest(self) -> int:
        """Return a number that is another one after every `tell` of any process."""
        ...


_kept: list[EventStore] = []


class Journal:
    """Accepted events in a store and, by user, in memory.

    Parameters
    ----------
    store
        Event store, read from the beginning.
    on_skipped
        Called with the number of entries that could not be read.
    news
        Tells the processes of one server that there are new entries.
    follow
        False: entries of other servers are read only with `catch_up`.
    """

    def __init__(
        self,
        store: EventStore,
        on_skipped: Callable[[int], None] = lambda _: None,
        news: News | None = None,
        *,
        follow: bool = True,
    ) -> None:
        self._store, self._position, self._lock = store, "", threading.Lock()
        self._news, self._heard = news, 0
        self._memory = _Memory()
        self._forgotten: frozenset[str] = frozenset()
        self._writing = threading.Lock()
        self.on_skipped = on_skipped
        self.state: str
        """`ok`, or why the store does not work at the moment."""
        self._refused_until = self._warn_from = 0.0
        self._stop = threading.Event()
        self.catch_up()
        self._thread: threading.Thread | None = None
        if follow:
            self._start_following()

    def in_another_process(self, store: EventStore, news: News) -> None:
        """Go on in a copy of this process, with a store that it has opened itself."""
        _kept.append(self._store)  # closing it here would release the locks of the new one
        self._store, self._lock, self._stop, self._news = store, threading.Lock(), threading.Event(), news
        self._writing = threading.Lock()
        with suppress(BusyError):  # `state` has it: recommendations go on with what was read before
            self.catch_up()
        self._start_following()

    @property
    def follow_s(self) -> float | None:
        """See `EventStore.follow_s`."""
        return self._store.follow_s

    def _start_following(self) -> None:
        if self._store.follow_s is not None:
            self._thread = threading.Thread(target=self._follow, args=(self._store.follow_s,), name="follow", daemon=True)
            self._thread.start()

    def of(self, user: str) -> tuple[HistoryEvent, ...]:
        """Return the accepted events of a user, oldest first, those included that another process has acknowledged."""
        self.listen()
        return self._memory.events.get(user, ())

    def users(self) -> list[str]:
        """Return all users with accepted events, the newest user last."""
        self.listen()
        return list(self._memory.events)

    def outcomes(self) -> Outcomes:
        """Return what came of the lists, those included whose events another process has acknowledged."""
        self.listen()
        return self._memory.outcomes

    def is_forgotten(self, user: str) -> bool:
        """Return True if a user was forgotten: what a bundle says of it does not count."""
        return bool(self._forgotten) and digest_of(user) in self._forgotten

    @property
    def forgotten(self) -> frozenset[str]:
        """Return the digests of the users that were forgotten."""
        return self._forgotten

    def listen(self) -> None:
        """Read the entries that another process of this server has written. Without news it costs a comparison."""
        if self._news is None or (latest := self._news.latest()) == self._heard:
            return
        try:
            self.catch_up()
        except BusyError as error:
            if time.monotonic() >= self._warn_from:  # every request comes here
                log.warning("cannot read the events of other workers, retrying: %s", error.__cause__ or error)
                self._warn_from = time.monotonic() + WARN_S
            return
        self._heard = latest

    def log(self) -> list[Accepted]:
        """Return all accepted events in the order of the store.

        The list only grows; it is another one after entries were lost or deleted.
        """
        return self._memory.log

    def append(self, groups: Sequence[Sequence[Event]]) -> list[int]:
        """Store the events of several requests with one write. Return the number of new events of each request."""
        with self._using(writes=True):
            new = iter(self._store.append([event for group in groups for event in group]))
        self._tell()
        return [sum(next(new) for _ in group) for group in groups]

    def _tell(self) -> None:
        self.catch_up()
        if self._news is not None:
            self._news.tell()

    def log_answers(self, groups: Sequence[Sequence[LoggedAnswer]]) -> list[list[bool]]:
        """Store answers, so that events can name them. Return for each True if it is the first with its id."""
        with self._using(writes=True):
            new = iter(self._store.log_answers([answer for group in groups for answer in group]))
        return [[next(new) for _ in group] for group in groups]

    def answers_of(self, groups: Sequence[Sequence[str]]) -> list[list[LoggedAnswer]]:
        """Return the logged answers with these ids; unknown ids are left out."""
        with self._writing:
            return [self._store.answers_of(group) for group in groups]

    @property
    def shared(self) -> bool:
        """Return True if other processes write to the store, too."""
        return self._news is not None or self._store.follow_s is not None

    def forget(self, user: str) -> int:
        """Delete everything about a user from store and memory. Return the number of deleted events."""
        with self._using(writes=True):
            count = self._store.forget(user)
        self._store.tidy()
        self._tell()
        return count

    def change_items(self, changes: Mapping[str, ItemChange], reset: Sequence[str]) -> int:
        """Store changes of items. Return how often items have been changed."""
        with self._using(writes=True):
            return self._store.change_items(changes, reset)

    def item_changes(self, known: int) -> tuple[int, dict[str, ItemChange]] | None:
        """Return how often items have been changed, and all changes by item; None if it was `known` times."""
        with self._using():
            return self._store.item_changes(known)

    def expire(self, events_before_s: int | None, answers_before_s: int | None) -> None:
        """Delete what is older from store and memory."""
        with self._using(writes=True):
            count = self._store.expire(events_before_s, answers_before_s)
        self._store.tidy()
        if count:
            log.info("deleted %d events that are older than serving.keep_events_days", count)
        if events_before_s is not None:
            with self._lock:
                self._memory = self._memory.without(lambda event: (event.time_s or 0) < events_before_s)

    def catch_up(self) -> None:
        """Read the entries that are in the store but not yet in memory. If the store has lost entries, read all of it again."""
        with self._lock, self._watched():
            try:
                while self._read():
                    pass
            except PositionLost:
                log.warning("the event store has lost entries or was replaced: reading all of it again")
                lost, self._position, known, self._memory = self._position, "", self._memory, _Memory()
                try:
                    while self._read():
                        pass
                except BaseException:
                    self._position, self._memory = lost, known  # the next call reads all of it again
                    raise

    @property
    def closing(self) -> bool:
        """Return True once the journal is being closed."""
        return self._stop.is_set()

    def close(self) -> None:
        """Stop the follower thread, wait for the calls that use the store, and close it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock, self._writing:
            self._store.close()

    def _read(self) -> bool:
        """Take the next entries into memory. Return False if there were none."""
        entries, skipped = self._store.since(self._position), 0
        latest = time.time() + FUTURE_S
        for position, entry in entries:
            if isinstance(entry, Forgotten):
                self._forgotten |= {entry.digest}
                self._memory = self._memory.without_user(entry.digest)
            elif entry is None or entry.time_s > latest:
                skipped += 1
            else:
                self._memory.take(entry)
            self._position = position  # only now: an entry is never passed over
        if skipped:
            self.on_skipped(skipped)
            log.warning("skipped %d entries of the event store: of a later version, or not readable", skipped)
        return bool(entries)

    @contextmanager
    def _using(self, *, writes: bool = False) -> Iterator[None]:
        """Hold the store: for one thread at a time, and for none once the journal is being closed."""
        with self._watched(writes=writes), self._writing:
            if self.closing:
                raise BusyError("The event store is closed: the server is stopping.")
            yield

    @contextmanager
    def _watched(self, *, writes: bool = False) -> Iterator[None]:
        """Keep `state` up to date. A file that can be read may refuse what is written, such as on a full disk."""
        try:
            yield
        except StoreInUse:
            raise
        except BusyError as error:
            self.state = str(error)
            if writes and self._store.follow_s is None:
                self._refused_until = time.monotonic() + REFUSED_S
            raise
        if writes or time.monotonic() >= self._refused_until:
            self.state, self._refused_until = "ok", 0.0

    def _follow(self, every_s: float) -> None:
        tidy_s = 0.0
        while not self._stop.wait(every_s):
            try:
                self.catch_up()
                if time.monotonic() >= tidy_s:
                    self._store.tidy()
                    tidy_s = time.monotonic() + TIDY_S
            except BusyError as error:
                log.warning("cannot read the events of other servers, retrying: %s", error.__cause__ or error)
                self._stop.wait(RETRY_S)
            except Exception:  # log unexpected errors with a traceback and keep following
                log.exception("cannot read the events of other servers, retrying")
                self._stop.wait(RETRY_S)


class _Memory:
    """Accepted events in memory: by user, in the order of the store, and what they say of lists."""

    def __init__(self) -> None:
        self.events: dict[str, tuple[HistoryEvent, ...]] = {}
        self.log: list[Accepted] = []
        self.outcomes = Outcomes()

    def take(self, event: Event) -> None:
        """Add an event."""
        self.outcomes.add(event)
        self.log.append((event.user, _take(self.events, event)))

    def without_user(self, digest: str) -> _Memory:
        """Return the memory without a user; this one, if the user is not in it."""
        gone = {user for user in self.events if digest_of(user) == digest}
        return self._kept(lambda user, _: user not in gone, gone) if gone else self

    def without(self, old: Callable[[HistoryEvent], bool]) -> _Memory:
        """Return the memory without some events; this one, if none is in it."""
        return self._kept(lambda _, event: not old(event), set()) if any(old(event) for _, event in self.log) else self

    def _kept(self, keep: Callable[[str, HistoryEvent], bool], gone: set[str]) -> _Memory:
        """Return another memory: concurrent readers keep the complete old one."""
        other = _Memory()
        other.log = [(user, event) for user, event in self.log if keep(user, event)]
        left = ((user, tuple(event for event in events if keep(user, event))) for user, events in self.events.items())
        other.events = {user: events for user, events in left if events}
        other.outcomes = self.outcomes.without_users(gone)
        return other


def _take(events: dict[str, tuple[HistoryEvent, ...]], event: Event) -> HistoryEvent:
    user_events = events.get(event.user, ())
    at = bisect_right(user_events, event.time_s, key=lambda history_event: history_event.time_s or 0)
    history_event = HistoryEvent(event.item_id, event.time_s, event.stars, event.event_type)
    # Replace the tuple instead of changing it: concurrent readers keep the complete old one.
    events[event.user] = taken = (*user_events[:at], history_event, *user_events[at:])
    alike = [at for at, one in enumerate(taken) if one.event_type == event.event_type] if len(taken) > MAX_EVENTS_PER_USER else []
    if len(alike) > MAX_EVENTS_PER_USER:  # by type, so that impressions leave the history
        events[event.user] = (*taken[: alike[0]], *taken[alike[0] + 1 :])
    return history_event
