"""Store accepted events: in SQLite for one server, in Redis for several.

For every store: when `append` returns, the events are on disk; an event id of a user is stored once, even if it is sent again;
`since` returns all entries in the order in which they were accepted.

    sqlite:PATH     one file with a write-ahead log (WAL), synced at every commit; used by the processes of one server
    redis://…       a stream of events and a set of their ids, changed together by one script. Redis must sync before it
                    responds, or a power failure loses the last second: `appendonly yes` and `appendfsync always`

Servers of several versions may share one Redis. An entry has a version: fields that a reader does not know are ignored, and an
entry of a later version is skipped, counted, and read after the reader has been upgraded.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from twotower.errors import BusyError, ConfigError, DataError
from twotower.utils.console import log

PAGE = 10_000  # events read at once
SQLITE_VERSION = 2
ENTRY_VERSION = 1  # of an event in a stream; raise it when older servers could not read new entries correctly
REDIS_TIMEOUT_S = 0.9  # twice this is below the time in which an event request is answered
_LOCK_WAIT_S = 5.0  # time for the previous server to shut down
SHARED_WAIT_S = 1.5  # the same for the write of another process; below the time in which an event request is answered
_USED = "The event file {path} is used by another server. Stop that server, or use --events redis://… for several."


@dataclass(frozen=True, slots=True)
class Event:
    """An accepted event.

    Attributes
    ----------
    event_id
        Chosen by the client; events of one user with the same id are the same event.
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


Entry = tuple[str, Event | None]
"""The position of an entry and its event; None for an entry that cannot be read."""


class PositionLost(Exception):
    """The entry at a position no longer exists: the store has been emptied, or replaced by a copy that lacks it."""


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

    def since(self, position: str) -> list[Entry]:
        """Return up to `PAGE` entries after `position` ("" is the beginning), in order.

        Raises
        ------
        PositionLost
            The entry at `position` no longer exists. Read again from the beginning.
        BusyError
            The store does not respond.
        """
        ...

    def close(self) -> None:
        """Close the store."""
        ...


def open_store(url: str, *, shared: bool = False) -> EventStore:
    """Open the event store at `url`.

    Parameters
    ----------
    shared
        Other processes of the same server use it, too. One of them holds a `lock_store`.

    Raises
    ------
    ConfigError
        The URL is neither sqlite:PATH nor redis://….
    DataError
        The store cannot be opened, or another server uses it.
    """
    if url.startswith("sqlite:") and len(url) > len("sqlite:"):
        return SQLiteStore(Path(url.removeprefix("sqlite:")), shared=shared)
    if url.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(url)
    scheme = url.partition(":")[0]  # the rest may contain a password
    quoted = repr(scheme) if re.fullmatch(r"[\w.+-]{1,16}", scheme) and ":" in url else "given"
    raise ConfigError(f"The event store {quoted} is not known. Use sqlite:PATH or redis://HOST:PORT/NUMBER.")


def lock_store(url: str) -> Callable[[], None]:
    """Keep other servers away from the event store of several processes. Return a function that lets them in again.

    Raises
    ------
    DataError
        Another server uses it, or the file cannot be created.
    """
    if not url.startswith("sqlite:"):
        return lambda: None  # it is made for several servers
    _create_private(path := Path(url.removeprefix("sqlite:")))
    lock = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # independent of the locks of SQLite
    except OSError:
        os.close(lock)
        raise DataError(_USED.format(path=path)) from None
    return lambda: os.close(lock)


class SQLiteStore:
    """Events in one SQLite file.

    Every commit syncs the write-ahead log (WAL), so acknowledged events survive a killed server and a power failure. Many events
    share one commit, which keeps this cheap.
    """

    follow_s = None

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        _create_private(path)
        wait_s = SHARED_WAIT_S if shared else _LOCK_WAIT_S
        try:
            self._connection = sqlite3.connect(path, timeout=wait_s, isolation_level=None, check_same_thread=False)
            self._open(shared=shared)
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise DataError(_USED.format(path=path)) from None
            raise DataError(
                f"Cannot use {path} as event store: {error}. Choose a new or writable SQLite file with --events."
            ) from None

    def _open(self, *, shared: bool) -> None:
        run = self._connection.execute
        version, used = run("PRAGMA user_version").fetchone()[0], run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != (SQLITE_VERSION if used else 0):
            raise sqlite3.DatabaseError("it holds other data or has another version")
        self._make_private()
        if not shared:
            run("PRAGMA locking_mode = EXCLUSIVE")  # two servers sharing a file would not see each other's events
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN IMMEDIATE")
        run(
            "CREATE TABLE IF NOT EXISTS events (position INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL,"
            " user TEXT NOT NULL, item_id TEXT NOT NULL, time_s INTEGER NOT NULL, event_type TEXT, stars REAL,"
            " UNIQUE (user, event_id))"
        )
        run(f"PRAGMA user_version = {SQLITE_VERSION}")
        run("COMMIT")

    def _make_private(self) -> None:
        """Let only the owner read the file; the files beside it get the same rights."""
        file = self._connection.execute("PRAGMA database_list").fetchone()[2]
        if file and os.stat(file).st_uid == os.geteuid():
            os.chmod(file, 0o600)

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

    def since(self, position: str) -> list[Entry]:
        """See `EventStore`."""
        try:
            rows = self._connection.execute(_SELECT, (int(position or 0), PAGE)).fetchall()
        except sqlite3.Error as error:
            raise BusyError(f"Cannot read the event file: {error}. Check the disk.") from None
        return [(str(row[0]), Event(*row[1:])) for row in rows]

    def close(self) -> None:
        """See `EventStore`."""
        self._connection.close()


_INSERT = (
    "INSERT INTO events (event_id, user, item_id, time_s, event_type, stars) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (user, event_id) DO NOTHING"
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
        for i = 2, #ARGV, 2 do
            new[#new + 1] = redis.call('SADD', KEYS[2], ARGV[i])
            if new[#new] == 1 then redis.call('XADD', KEYS[1], '*', 'v', ARGV[1], 'event', ARGV[i + 1]) end
        end
        return new
    """

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError("The Redis client is not installed. Run `pip install redis`, or use sqlite:PATH.") from None
        self._failed = redis.RedisError
        options: dict[str, Any] = {"socket_timeout": REDIS_TIMEOUT_S, "socket_connect_timeout": REDIS_TIMEOUT_S}
        try:  # no retries: the client of the server is told in time, and sends the events again
            self._client: Any = redis.Redis.from_url(url, decode_responses=True, retry=Retry(NoBackoff(), 0), **options)
        except ValueError:  # its text, and the address, may contain a part of the password
            text = "The address of the event store is not valid; it is not shown because it may contain a password. "
            raise ConfigError(f"{text}Use redis://HOST:PORT/NUMBER or redis://:PASSWORD@HOST:PORT/NUMBER.") from None
        try:
            self._client.ping()
        except redis.RedisError as error:
            raise DataError(f"Cannot connect to Redis at {without_password(url)}: {error}. Check the address.") from None
        self._append = self._client.register_script(self._SCRIPT)
        self._warn(url)

    def _warn(self, url: str) -> None:
        try:
            found = {**self._client.config_get("appendonly"), **self._client.config_get("appendfsync")}
        except self._failed:
            return  # reading the configuration may be forbidden
        if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
            log.warning(
                "Redis at %s may lose acknowledged events: set `appendonly yes` and `appendfsync always`", without_password(url)
            )

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See `EventStore`."""
        arguments = [part for e in events for part in (_unique(e), json.dumps(asdict(e)))]
        try:
            return [bool(new) for new in self._append(keys=self._KEYS, args=[ENTRY_VERSION, *arguments])]
        except self._failed as error:
            log.error("cannot store events: %s", error)
            raise BusyError("The events were not stored: Redis does not respond. Send them again later.") from None

    def since(self, position: str) -> list[Entry]:
        """See `EventStore`. The entry at `position` is read again: if it is missing, the stream is another one."""
        try:
            rows = self._client.xrange(self._KEYS[0], min=position or "-", count=PAGE + bool(position))
        except self._failed as error:
            raise BusyError(f"Redis does not respond: {error}. Try again later.") from None
        if position:
            if not rows or rows[0][0] != position:
                raise PositionLost
            rows = rows[1:]
        return [(at, read_entry(fields)) for at, fields in rows]

    def close(self) -> None:
        """See `EventStore`."""
        self._client.close()


def read_entry(fields: Any) -> Event | None:
    """Return the event of a stream entry; None if the entry is of a later version or cannot be read.

    Examples
    --------
    >>> read_entry({"v": "1", "event": '{"event_id": "a", "user": "u", "item_id": "b", "time_s": 5, "of_a_later_server": 1}'}).user
    'u'
    >>> read_entry({"v": "2", "event": "{}"}) is None
    True
    """
    try:
        if int(fields["v"]) > ENTRY_VERSION:
            return None
        found = json.loads(fields["event"])
        event = Event(**{name: found[name] for name in Event.__slots__ if name in found})
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    texts = (event.event_id, event.user, event.item_id)
    right = all(isinstance(text, str) for text in texts) and type(event.time_s) is int and event.time_s >= 0
    right &= isinstance(event.event_type, str | None) and isinstance(event.stars, int | float | None)
    return event if right and type(event.stars) is not bool else None


def _unique(event: Event) -> str:
    """Return the user and the id of an event as one text that no other pair has."""
    return f"{len(event.user)}:{event.user}{event.event_id}"


def _create_private(path: Path) -> None:
    """Create a file that only its owner may read, unless it exists.

    Raises
    ------
    DataError
        The file cannot be created.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise DataError(f"Cannot use {path} as event store: {error.strerror}. Choose a writable path with --events.") from None


def without_password(url: str) -> str:
    """Return the address without user, password and query."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
