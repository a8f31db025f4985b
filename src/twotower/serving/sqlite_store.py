"""Store accepted events in one SQLite file, for the processes of one server.

Every commit of events syncs the write-ahead log (WAL), so acknowledged events survive a killed server and a power failure. Many
events share one commit, which keeps this cheap. Deleted content is overwritten with zeros.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from twotower.bundle.changed_items import ItemChange
from twotower.errors import BusyError, DataError, clause
from twotower.serving.event_types import (
    ANSWERS_PAGE,
    PAGE,
    Entry,
    Event,
    Forgotten,
    LoggedAnswer,
    StoreDamaged,
    answer_as_json,
    answer_from_json,
    digest_of,
    item_changes_of,
    item_values,
)
from twotower.serving.row_faults import readable_answers
from twotower.utils.atomic_files import atomic_file
from twotower.utils.console import log

SQLITE_VERSION = 3
SHARED_WAIT_S = 1.5  # time for the write of another process; below the time in which an event request is answered
_LOCK_WAIT_S = 5.0  # time for the previous server to shut down
_TRY_S = 0.05
_CLEAN_WAIT_S = 5.0  # time for readers to let go of pages that a deletion has left behind
_USED = "The event file {path} is used by another server. Stop that server, or use --events redis://… for several."


def lock_file(path: Path, wait_s: float) -> Callable[[], None]:
    """Keep other servers away from an event file. Return a function that lets them in again.

    Raises
    ------
    DataError
        Another server uses it, or the file cannot be created.
    """
    _create_private(path)
    lock, end = os.open(path, os.O_RDWR), time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # independent of the locks of SQLite
            return lambda: os.close(lock)
        except OSError:
            if time.monotonic() >= end:
                os.close(lock)
                raise DataError(_USED.format(path=path)) from None
            time.sleep(_TRY_S)


class SQLiteStore:
    """Events in one SQLite file.

    Parameters
    ----------
    shared
        Other processes of the same server use it, too. One of them holds a `lock_file`.
    reading
        Only read: a server may use the file at the same time.
    create
        False: the store must exist already.
    """

    follow_s = None

    def __init__(self, path: Path, *, shared: bool = False, reading: bool = False, create: bool = True) -> None:
        self._path, self._release, create = path, None, create and not reading
        if not create and not _is_file(path):
            raise DataError(f"No event store at {path}. Name the store that the server was started with (--events).")
        if not reading:
            _create_private(path)
            self._release = None if shared else lock_file(path, _LOCK_WAIT_S)
        try:
            self._connection = sqlite3.connect(path, timeout=SHARED_WAIT_S, isolation_level=None, check_same_thread=False)
            self._open(reading=reading, create=create)
        except sqlite3.Error as error:
            with suppress(AttributeError, sqlite3.Error):
                self._connection.close()  # it may have made files beside the store
            self._let_go()
            if "locked" in str(error):
                raise DataError(_USED.format(path=path)) from None
            if reading or not create:
                text = f"Cannot use {path} as event store: {clause(error)}. Name the store of a server, or a backup of it."
                raise DataError(text) from None
            if not path.is_dir() and not os.access(path.absolute().parent, os.W_OK | os.X_OK):
                text = f"Cannot use {path} as event store: its folder cannot be written, and SQLite needs files beside it."
                raise DataError(f"{text} Choose a writable folder with --events, or a copy.") from None
            raise DataError(
                f"Cannot use {path} as event store: {clause(error)}. Choose a new or writable SQLite file with --events."
            ) from None

    def _open(self, *, reading: bool, create: bool) -> None:
        run = self._connection.execute
        version, used = run("PRAGMA user_version").fetchone()[0], run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != (0 if create and not used else SQLITE_VERSION):
            raise sqlite3.DatabaseError("it holds other data or has another version")
        if reading:
            run("PRAGMA query_only = ON")
            return
        self._make_private()
        run("PRAGMA secure_delete = ON")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN IMMEDIATE")
        for statement in _TABLES:
            run(statement)
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
            new = [run(_INSERT, _row(event)).rowcount == 1 for event in events]
            run("COMMIT")
        except sqlite3.Error as error:
            self._undo("store events", error)
            raise BusyError("The events were not stored: cannot write to the event file. Send them again later.") from None
        return new

    def since(self, position: str) -> list[Entry]:
        """See `EventStore`."""
        try:
            rows = self._connection.execute(_SELECT, (int(position or 0), PAGE)).fetchall()
        except sqlite3.Error as error:
            raise _unreadable(error) from None
        return [(str(row[0]), Event(*row[1:]) if row[3] else Forgotten(row[1])) for row in rows]

    def log_answers(self, answers: Sequence[LoggedAnswer]) -> list[bool]:
        """See `EventStore`. These commits are not synced: an answer is no promise."""
        run, rows = self._connection.execute, [(a.request_id, a.user, a.time_s, answer_as_json(a)) for a in answers]
        try:
            run("PRAGMA synchronous = NORMAL")
            try:
                run("BEGIN IMMEDIATE")
                new = [run(_INSERT_ANSWER, row).rowcount == 1 for row in rows]
                run("COMMIT")
            finally:
                if not self._connection.in_transaction:
                    run("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            self._undo("log answers", error)
            raise BusyError("The answers were not logged: cannot write to the event file. Check the disk.") from None
        return new

    def _undo(self, what: str, error: sqlite3.Error) -> None:
        log.error("cannot %s: %s", what, error)
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._connection.execute("PRAGMA synchronous = FULL")

    def answers_of(self, request_ids: Sequence[str]) -> list[LoggedAnswer]:
        """See `EventStore`."""
        try:
            found = [self._connection.execute(_SELECT_ANSWER, (one,)).fetchone() for one in request_ids]
        except sqlite3.Error as error:
            raise _unreadable(error) from None
        return readable_answers(row[0] for row in found if row is not None)

    def answers(self, position: str) -> tuple[str, list[LoggedAnswer]]:
        """See `EventStore`."""
        try:
            rows = self._connection.execute(_SELECT_ANSWERS, (int(position or 0), ANSWERS_PAGE)).fetchall()
        except sqlite3.Error as error:
            raise _unreadable(error) from None
        return (str(rows[-1][0]) if rows else position), [answer_from_json(row[1]) for row in rows]

    def forget(self, user: str) -> int:
        """See `EventStore`. Neither the file nor the log beside it holds the user id when this returns."""
        run = self._connection.execute
        try:
            run("BEGIN IMMEDIATE")
            count = run("DELETE FROM events WHERE user = ? AND item_id <> ''", (user,)).rowcount
            run("DELETE FROM answers WHERE user = ?", (user,))
            run(_INSERT, _row(Event(digest_of(user), "", "", int(time.time()))))
            run("COMMIT")
            self._clean()
        except sqlite3.Error as error:
            self._undo("forget a user", error)
            if "malformed" in str(error):
                raise BusyError("The user was not forgotten: the event file is damaged. Restore a backup of it.") from None
            raise BusyError("The user was not forgotten: cannot write to the event file. Try again later.") from None
        return count

    def change_items(self, changes: Mapping[str, ItemChange], reset: Sequence[str]) -> int:
        """See `EventStore`."""
        run = self._connection.execute
        try:
            run("BEGIN IMMEDIATE")
            for item_id in reset:
                run("DELETE FROM item_changes WHERE item_id = ?", (item_id,))
            self._connection.executemany("INSERT OR REPLACE INTO item_changes VALUES (?, ?, ?)", item_values(changes))
            run(_COUNT_CHANGE)
            revision = run(_SELECT_REVISION).fetchone()[0]
            run("COMMIT")
        except sqlite3.Error as error:
            self._undo("change items", error)
            raise BusyError("The items were not changed: cannot write to the event file. Send them again later.") from None
        return int(revision)

    def item_changes(self, known: int) -> tuple[int, dict[str, ItemChange]] | None:
        """See `EventStore`."""
        run = self._connection.execute
        try:
            run("BEGIN")  # both reads see the same state
            found = run(_SELECT_REVISION).fetchone()
            revision = int(found[0]) if found else 0
            rows = [] if revision == known else run("SELECT * FROM item_changes WHERE item_id <> ''").fetchall()
            run("COMMIT")
        except sqlite3.Error as error:
            self._undo("read the changes of items", error)
            raise _unreadable(error) from None
        return None if revision == known else (revision, item_changes_of(rows))

    def expire(self, events_before_s: int | None, answers_before_s: int | None) -> int:
        """See `EventStore`. Notes of forgotten users go with the events of their time."""
        run = self._connection.execute
        try:
            run("BEGIN IMMEDIATE")
            count = 0
            if events_before_s is not None:
                count = run("DELETE FROM events WHERE time_s < ?", (events_before_s,)).rowcount
            if answers_before_s is not None:
                run("DELETE FROM answers WHERE time_s < ?", (answers_before_s,))
            run("COMMIT")
        except sqlite3.Error as error:
            self._undo("delete old events", error)
            raise BusyError("Old events were not deleted: cannot write to the event file. Check the disk.") from None
        return count

    def tidy(self) -> bool:
        """See `EventStore`: `forget` has removed everything."""
        return True

    def _clean(self) -> None:
        """Move the log into the file and empty it: it may hold pages as they were before a deletion."""
        end = time.monotonic() + _CLEAN_WAIT_S
        while self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > end:
                raise sqlite3.OperationalError("a reader holds on to the log")
            time.sleep(_TRY_S)

    def backup(self, path: Path) -> None:
        """See `EventStore`. The file appears at once, complete."""
        try:
            with atomic_file(path) as beside:
                for left in ("", "-journal", "-wal", "-shm"):  # of a backup that was killed
                    beside.with_name(beside.name + left).unlink(missing_ok=True)
                _touch_private(beside)
                target = sqlite3.connect(beside, isolation_level=None)
                try:
                    self._connection.backup(target)
                    target.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
                finally:
                    target.close()
        except (sqlite3.Error, OSError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or clause(error)
            raise DataError(f"Cannot write the backup {path}: {reason}. Choose a writable path with enough space.") from None

    def close(self) -> None:
        """See `EventStore`."""
        self._connection.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._release is not None:
            with suppress(OSError):
                self._release()
            self._release = None


_COLUMNS = "event_id, user, item_id, time_s, event_type, stars, request_id, position_in_list, version"
_TABLES = (
    "CREATE TABLE IF NOT EXISTS events (position INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL, user TEXT NOT NULL,"
    " item_id TEXT NOT NULL, time_s INTEGER NOT NULL, event_type TEXT, stars REAL, request_id TEXT, position_in_list INTEGER,"
    " version TEXT)",
    "CREATE UNIQUE INDEX IF NOT EXISTS once ON events (user, event_id) WHERE item_id <> ''",
    "CREATE UNIQUE INDEX IF NOT EXISTS once_of_a_list ON events (request_id, item_id, event_type) WHERE request_id IS NOT NULL",
    "CREATE TABLE IF NOT EXISTS answers (position INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL UNIQUE, user TEXT,"
    " time_s INTEGER NOT NULL, answer TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS answers_of_a_user ON answers (user)",
    "CREATE TABLE IF NOT EXISTS item_changes (item_id TEXT, column_name TEXT, value TEXT, PRIMARY KEY (item_id, column_name))",
)
_INSERT = f"INSERT INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
_SELECT = f"SELECT position, {_COLUMNS} FROM events WHERE position > ? ORDER BY position LIMIT ?"
_INSERT_ANSWER = "INSERT INTO answers (request_id, user, time_s, answer) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
_COUNT_CHANGE = (  # the row without an item counts the changes
    "INSERT INTO item_changes VALUES ('', '', 1) ON CONFLICT (item_id, column_name) DO UPDATE SET value = value + 1"
)
_SELECT_REVISION = "SELECT value FROM item_changes WHERE item_id = ''"
_SELECT_ANSWER = "SELECT answer FROM answers WHERE request_id = ?"
_SELECT_ANSWERS = "SELECT position, answer FROM answers WHERE position > ? ORDER BY position LIMIT ?"


def _unreadable(error: sqlite3.Error) -> BusyError:
    if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return BusyError("Cannot read the event file now: another process holds it. Try again later.")
    return StoreDamaged(clause(error))


def _row(e: Event) -> tuple[object, ...]:
    return (e.event_id, e.user, e.item_id, e.time_s, e.event_type, e.stars, e.request_id, e.position, e.version)


def _create_private(path: Path) -> None:
    """Create a file that only its owner may read, unless it exists.

    Raises
    ------
    DataError
        The file cannot be created.
    """
    try:
        _touch_private(path)
    except OSError as error:
        raise DataError(f"Cannot use {path} as event store: {error.strerror}. Choose a writable path with --events.") from None


def _touch_private(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False
