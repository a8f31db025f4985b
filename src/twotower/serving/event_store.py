"""Where accepted events are kept: one small protocol, SQLite for one server, Redis for several.

Promises of every store: when `append` returns, the events are on the disk; an event id counts once, whoever sends it again; `since`
gives all of them, in the order they were accepted.

    sqlite:PATH     one file, written ahead (WAL) and synced at every commit; one server holds it at a time
    redis://…       a stream and a set of the ids seen, changed together by one script. The Redis must write as it answers, or a
                    power cut takes the last second: `appendonly yes` and `appendfsync always`
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
_LOCK_WAIT_S = 5.0  # for a server that is just ending


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes
    ----------
    event_id
        Chosen by the sender; the same id is the same event.
    time_s
        Seconds since 1970.
    event_type
        One of the bundle's kinds of events; None: the first.
    """

    event_id: str
    user: str
    item_id: str
    time_s: int
    event_type: str | None = None
    stars: float | None = None


class EventStore(Protocol):
    """Keeps accepted events; used by one thread at a time.

    Attributes
    ----------
    follow_s
        Seconds after which to look for events that other servers accepted; None where no other can.
    """

    @property
    def follow_s(self) -> float | None: ...

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Keep the events whose id is new; say of each whether it was. On return they are on the disk.

        Raises
        ------
        BusyError
            The store does not answer or cannot write. Some may have been kept: to send them again is safe.
        """
        ...

    def since(self, position: str) -> tuple[list[Event], str]:
        """Up to `PAGE` events accepted after `position` ("" is the beginning), in order, and the position after them."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def open_store(url: str) -> EventStore:
    """The store that `url` names.

    Raises
    ------
    ConfigError
        It is neither sqlite:PATH nor redis://….
    DataError
        It cannot be opened, or another server holds it.
    """
    if url.startswith("sqlite:") and len(url) > len("sqlite:"):
        return SQLiteStore(Path(url.removeprefix("sqlite:")))
    if url.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(url)
    raise ConfigError(f"Events go to sqlite:PATH or to redis://HOST:PORT/NUMBER. Got {url!r}.")


class SQLiteStore:
    """Events in one SQLite file.

    Every commit syncs the log of writes (WAL), so neither a killed server nor a power cut takes what was acknowledged; many
    events go into one commit, which is what makes that cheap.
    """

    follow_s = None

    def __init__(self, path: Path) -> None:
        try:
            self._connection = sqlite3.connect(path, timeout=_LOCK_WAIT_S, isolation_level=None, check_same_thread=False)
            self._open()
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise DataError(
                    f"One server holds a file of events at a time. {path} is held by another. Stop it, or use --events redis://…"
                ) from None
            raise DataError(f"Events must go to a SQLite file that can be written. {path}: {error}. Choose another.") from None

    def _open(self) -> None:
        run = self._connection.execute
        version, used = run("PRAGMA user_version").fetchone()[0], run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != (SQLITE_VERSION if used else 0):
            raise sqlite3.DatabaseError("it holds something else, or is of another version")
        run("PRAGMA locking_mode = EXCLUSIVE")  # two servers with one file would not see each other's events
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
            log.error("events not kept: %s", error)
            if self._connection.in_transaction:
                run("ROLLBACK")
            raise BusyError("Events must be written before they count. The file of events takes none. Try again later.") from None
        return new

    def since(self, position: str) -> tuple[list[Event], str]:
        """See `EventStore`."""
        try:
            rows = self._connection.execute(_SELECT, (int(position or 0), PAGE)).fetchall()
        except sqlite3.Error as error:
            raise BusyError(f"The file of events must be readable. It is not: {error}. Check the disk.") from None
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
    _KEYS = ("{twotower}:events", "{twotower}:event_ids")  # braces: of a cluster, one node has both
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
            raise ConfigError("Events in Redis need its client. Install it: pip install redis.") from None
        self._failed = redis.RedisError
        try:
            self._client: Any = redis.Redis.from_url(url, decode_responses=True, socket_timeout=5, socket_connect_timeout=2)
            self._client.ping()
        except (redis.RedisError, ValueError) as error:
            raise DataError(
                f"Events must go to a Redis that answers. {_without_password(url)}: {error}. Check the address."
            ) from None
        self._append = self._client.register_script(self._SCRIPT)
        self._warn(url)

    def _warn(self, url: str) -> None:
        try:
            found = {**self._client.config_get("appendonly"), **self._client.config_get("appendfsync")}
        except self._failed:
            return  # whoever runs it may not let us look
        if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
            log.warning(
                "%s may lose what it acknowledged: set `appendonly yes` and `appendfsync always` there", _without_password(url)
            )

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See `EventStore`."""
        arguments = [part for e in events for part in (e.event_id, json.dumps(asdict(e)))]
        try:
            return [bool(new) for new in self._append(keys=self._KEYS, args=arguments)]
        except self._failed as error:
            log.error("events not kept: %s", error)
            raise BusyError("Events must be written before they count. Redis does not answer. Try again later.") from None

    def since(self, position: str) -> tuple[list[Event], str]:
        """See `EventStore`."""
        try:
            rows = self._client.xrange(self._KEYS[0], min=f"({position}" if position else "-", count=PAGE)
        except self._failed as error:
            raise BusyError(f"Redis does not answer: {error}. Try again later.") from None
        return [Event(**json.loads(fields["event"])) for _, fields in rows], rows[-1][0] if rows else position

    def close(self) -> None:
        """See `EventStore`."""
        self._client.close()


def _without_password(url: str) -> str:
    """The address without a password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
