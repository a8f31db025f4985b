"""Open the store of accepted events: SQLite for one server, Redis for several.

sqlite:PATH     one file; used by the processes of one server
redis://…       a stream of events; used by several servers
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from twotower.errors import ConfigError
from twotower.serving.event_types import EventStore
from twotower.serving.redis_store import RedisStore
from twotower.serving.sqlite_store import SQLiteStore, lock_file
from twotower.utils.run_parts import keep_sealed


def open_store(url: str, *, shared: bool = False, reading: bool = False, create: bool = True) -> EventStore:
    """Open the event store at `url`.

    Parameters
    ----------
    shared
        Other processes of the same server use it, too. One of them holds a `lock_store`.
    reading
        Only read: servers go on using it.
    create
        False: a file must exist already.

    Raises
    ------
    ConfigError
        The URL is neither sqlite:PATH nor redis://….
    DataError
        The store cannot be opened, or another server uses it.
    """
    if url.startswith("sqlite:") and len(url) > len("sqlite:"):
        path = Path(url.removeprefix("sqlite:"))
        if not reading:
            keep_sealed(path)
        return SQLiteStore(path, shared=shared, reading=reading, create=create)
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
        Another server uses it, the file cannot be created, or it would be inside a bundle.
    """
    if not url.startswith("sqlite:"):
        return lambda: None  # it is made for several servers
    path = Path(url.removeprefix("sqlite:"))
    keep_sealed(path)
    return lock_file(path, 0.0)
