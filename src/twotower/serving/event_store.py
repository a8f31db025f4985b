"""Store accepted events: in SQLite for one server, in Redis for several.

For every store: when `append` returns, the events are on disk; an event id is stored once, even if it is sent again; `since`
returns all events in the order in which they were accepted.

    sqlite:PATH     one file with a write-ahead log (WAL), synced at every commit; used by one server at a time
    redis://…       a stream of events and a set of their ids, changed together by one script. Redis must sync before it
                    responds, or a power failure loses the last second: `appendonly yes` and `appendfsync always`
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from twotower.errors import BusyError, ConfigError, DataError
from twotower.utils.console import log

PAGE = 10_000  # events read at once
SQLITE_VERSION = 1
_LOCK_WAIT_S = 5.0  # time for the previous server to shut down


@dataclass(frozen=True, slots=True)
class Event:
    """An accepted event.

    Attributes
    ----------
    event_id
        Chosen by the client; events with the same id are the same event.
    time_s
        Seconds since 1970.
    event_type
        One of the bundle's event types; None: the first.
    """

    event_id: str
    user: str
    item_id: str
    time_s: int
    event_type: str | None = None
    stars: float | None = None


class EventStore(Protocol):
    """Interface of event stores. Used by one thread at a time.

    Attributes
    ----------
    follow_s
        Interval in seconds for reading the events that other servers accepted; None if the store serves one server only.
    """

    @property
    def follow_s(self) -> float | None: ...

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Store the events whose id is new. Return for each event whether it was new. On return they are on disk.

        Raises
        ------
        BusyError
            The store does not respond or cannot write. Some events may be stored; sending all again is safe.
        """
        ...

    def since(self, position: str) -> tuple[list[Event], str]:
        """Return up to `PAGE` events accepted after `position` ("" is the beginning), in order, and the position after them."""
        ...

    def close(self) -> None:
        """Close the store."""
        ...


def open_store(url: str) -> EventStore:
    """Open the event store at `url`.

    Raises
    ------
    ConfigError
        The URL is neither sqlite:PATH nor redis://….
    DataError
        The store cannot be opened, or another server uses it.
    """
    if url.startswith("sqlite:") and len(url) > len("sqlite:"):
        return SQLiteStore(Path(url.removeprefix("sqlite:")))
    if url.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(url)
    raise ConfigError(f"Invalid event store {url!r}. Use sqlite:PATH or redis://HOST:PORT/NUMBER.")


class SQLiteStore:
    """Events in one SQLite file.

    Every commit syncs the write-ahead log (WAL), so acknowledged events survive a killed server and a power failure. Many events
    share one commit, which keeps this cheap.
    """

    follow_s = None

    def __init__(self, path: Path) -> None:
        try:
            self._connection = sqlite3.connect(path, timeout=_LOCK_WAIT_S, isolation_level=None, check_same_thread=False)
            self._open()
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise DataError(
                    f"The event file {path} is used by another server. Stop that server, or use --events redis://… for several."
                ) from None
            raise DataError(
                f"Cannot use {path} as event store: {error}. Choose a new or writable SQLite file with --events."
            ) from None

    def _open(self) -> None:
        run = self._connection.execute
        version, used = run("PRAGMA user_version").fetchone()[0], run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != (SQLITE_VERSION if used else 0):
            raise sqlite3.DatabaseError("it holds other data or has another version")
        run("PRAGMA locking_mode = EXCLUSIVE")  # two servers sharing a file would not see each other's events
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN IMMEDIATE")
        run(
            "CREATE TABLE IF NOT EXISTS events (position INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE,"
            " user TEXT NOT NULL, item_id TEXT NOT NULL, time_s INTEGER NOT NULL, event_type TEXT, stars REAL)"
        )
        run(f"PRAGMA user_version = {SQLITE_VERSION}")
        run("COMMIT")

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See `EventStore`."""
        run = self._connection.execute
        try:
            run("BEGIN IMMEDIATE")
            new = [run(_INSERT, (e.event_id, e.user, e.item_id, e.time_s, e.event_type, e.stars)).rowcount == 1 for e in events]
            run("COMMIT")
        except sqlite3.Error as error:
            log.error("cannot store events: %s", error)
            if self._connection.in_transaction:
                run("ROLLBACK")
            raise BusyError("The events were not stored: cannot write to the event file. Send them again later.") from None
        return new

    def since(self, position: str) -> tuple[list[Event], str]:
        """See `EventStore`."""
        try:
            rows = self._connection.execute(_SELECT, (int(position or 0), PAGE)).fetchall()
        except sqlite3.Error as error:
            raise BusyError(f"Cannot read the event file: {error}. Check the disk.") from None
        return [Event(*row[1:]) for row in rows], str(rows[-1][0]) if rows else position

    def close(self) -> None:
        """See `EventStore`."""
        self._connection.close()


_INSERT = (
    "INSERT INTO events (event_id, user, item_id, time_s, event_type, stars) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (event_id) DO NOTHING"
)
_SELECT = (
    "SELECT position, event_id, user, item_id, time_s, event_type, stars FROM events WHERE position > ? ORDER BY position LIMIT ?"
)


class RedisStore:
    """Events in a Redis stream, for several servers."""

    follow_s = 0.1
    _KEYS = ("{twotower}:events", "{twotower}:event_ids")  # the braces keep both keys on one node of a cluster
    _SCRIPT = """
        local new = {}
        for i = 1, #ARGV, 2 do
            new[#new + 1] = redis.call('SADD', KEYS[2], ARGV[i])
            if new[#new] == 1 then redis.call('XADD', KEYS[1], '*', 'event', ARGV[i + 1]) end
        end
        return new
    """

    def __init__(self, url: str) -> None:
        try:
            import redis
        except ImportError:
            raise ConfigError("The Redis client is not installed. Run `pip install redis`, or use sqlite:PATH.") from None
        self._failed = redis.RedisError
        try:
            self._client: Any = redis.Redis.from_url(url, decode_responses=True, socket_timeout=5, socket_connect_timeout=2)
            self._client.ping()
        except (redis.RedisError, ValueError) as error:
            raise DataError(f"Cannot connect to Redis at {_without_password(url)}: {error}. Check the address.") from None
        self._append = self._client.register_script(self._SCRIPT)
        self._warn(url)

    def _warn(self, url: str) -> None:
        try:
            found = {**self._client.config_get("appendonly"), **self._client.config_get("appendfsync")}
        except self._failed:
            return  # reading the configuration may be forbidden
        if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
            log.warning(
                "Redis at %s may lose acknowledged events: set `appendonly yes` and `appendfsync always`", _without_password(url)
            )

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See `EventStore`."""
        arguments = [part for e in events for part in (e.event_id, json.dumps(asdict(e)))]
        try:
            return [bool(new) for new in self._append(keys=self._KEYS, args=arguments)]
        except self._failed as error:
            log.error("cannot store events: %s", error)
            raise BusyError("The events were not stored: Redis does not respond. Send them again later.") from None

    def since(self, position: str) -> tuple[list[Event], str]:
        """See `EventStore`."""
        try:
            rows = self._client.xrange(self._KEYS[0], min=f"({position}" if position else "-", count=PAGE)
        except self._failed as error:
            raise BusyError(f"Redis does not respond: {error}. Try again later.") from None
        return [Event(**json.loads(fields["event"])) for _, fields in rows], rows[-1][0] if rows else position

    def close(self) -> None:
        """See `EventStore`."""
        self._client.close()


def _without_password(url: str) -> str:
    """Return the address without its user and password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
