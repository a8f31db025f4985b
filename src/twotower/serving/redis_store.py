"""Store accepted events in Redis, for several servers: a stream of events and a set of their ids, changed together by one script.

Redis must sync before it responds, or a power failure loses the last second: `appendonly yes` and `appendfsync always`.

Servers of several versions may share one Redis. An entry has a version: fields that a reader does not know are ignored, and an
entry of a later version is skipped, counted, and read after the reader has been upgraded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twotower.bundle.changed_items import ItemChange
from twotower.errors import BusyError, ConfigError, DataError, clause
from twotower.serving.event_types import (
    ANSWERS_PAGE,
    PAGE,
    Entry,
    Event,
    Forgotten,
    LoggedAnswer,
    PositionLost,
    answer_as_json,
    answer_from_json,
    event_from_json,
    is_text,
    item_changes_of,
    item_values,
)
from twotower.serving.redis_deletion import RedisDeletion, unique_id
from twotower.serving.row_faults import readable_answers
from twotower.utils.console import log

ENTRY_VERSION = 1  # of an event in a stream; raise it when older servers could not read new entries correctly
REDIS_TIMEOUT_S = 0.9  # twice this is below the time in which an event request is answered


class RedisStore:
    """Events in a Redis stream, for several servers."""

    follow_s = 0.1
    _KEYS = ("{twotower}:events", "{twotower}:event_ids")  # the braces keep all keys on one node of a cluster

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError("The Redis client is not installed. Run `pip install redis`, or use sqlite:PATH.") from None
        self._failed = redis.RedisError
        options: dict[str, Any] = {"socket_timeout": REDIS_TIMEOUT_S, "socket_connect_timeout": REDIS_TIMEOUT_S}
        options["encoding_errors"] = "surrogateescape"  # a damaged entry must not hide the others of its page
        try:  # no retries: the client of the server is told in time, and sends the events again
            self._client: Any = redis.Redis.from_url(url, decode_responses=True, retry=Retry(NoBackoff(), 0), **options)
        except ValueError:  # its text, and the address, may contain a part of the password
            text = "The address of the event store is not valid; it is not shown because it may contain a password. "
            raise ConfigError(f"{text}Use redis://HOST:PORT/NUMBER or redis://:PASSWORD@HOST:PORT/NUMBER.") from None
        try:
            self._client.ping()
        except redis.RedisError as error:
            raise DataError(f"Cannot connect to Redis at {without_password(url)}: {clause(error)}. Check the address.") from None
        self._append = self._client.register_script(_APPEND)
        self._answers, self._answer_times = f"{self._KEYS[0]}:answers", f"{self._KEYS[0]}:answer_times"
        self._deletion = RedisDeletion(self._client, self._KEYS, (self._answers, self._answer_times))
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
        arguments = [part for e in events for part in (unique_id(e), e.once or "", json.dumps(asdict(e)))]
        with self._answering("The events were not stored", "Send them again later."):
            return [bool(new) for new in self._append(keys=self._KEYS, args=[ENTRY_VERSION, *arguments])]

    @contextmanager
    def _answering(self, what: str, then: str = "Try again later.") -> Iterator[None]:
        try:
            yield
        except self._failed as error:
            log.error("%s: %s", what, error)
            raise BusyError(f"{what}: Redis does not respond. {then}") from None

    def since(self, position: str) -> list[Entry]:
        """See `EventStore`. The entry at `position` is read again: if it is missing, the stream is another one."""
        try:
            rows = self._client.xrange(self._KEYS[0], min=position or "-", count=PAGE + bool(position))
        except self._failed as error:  # the cause is for the log alone: it has the address
            raise BusyError("The events were not read: Redis does not respond. Try again later.") from error
        if position:
            if not rows or rows[0][0] != position:
                raise PositionLost
            rows = rows[1:]
        return [(at, read_entry(fields)) for at, fields in rows]

    def log_answers(self, answers: Sequence[LoggedAnswer]) -> list[bool]:
        """See `EventStore`."""
        with self._answering("The answers were not logged"), self._client.pipeline(transaction=True) as pipe:
            for answer in answers:
                pipe.hsetnx(self._answers, answer.request_id, answer_as_json(answer))
                pipe.zadd(self._answer_times, {answer.request_id: answer.time_s}, nx=True)
            return [bool(new) for new in pipe.execute()[::2]]

    def answers_of(self, request_ids: Sequence[str]) -> list[LoggedAnswer]:
        """See `EventStore`."""
        with self._answering("The lists of the events were not found"):
            return readable_answers(self._client.hmget(self._answers, list(request_ids)) if request_ids else [])

    def answers(self, position: str) -> tuple[str, list[LoggedAnswer]]:
        """See `EventStore`. Answers that arrive meanwhile may be left out."""
        begin = int(position or 0)
        with self._answering("The answers were not read"):
            names = self._client.zrange(self._answer_times, begin, begin + ANSWERS_PAGE - 1)
            found = self._client.hmget(self._answers, names) if names else []
        return str(begin + len(names)), [answer_from_json(text) for text in found if text is not None]

    def forget(self, user: str) -> int:
        """See `EventStore`."""
        with self._answering("The user was not forgotten"):
            return self._deletion.forget(user, ENTRY_VERSION)

    def change_items(self, changes: Mapping[str, ItemChange], reset: Sequence[str]) -> int:
        """See `EventStore`."""
        changed, revision = (f"{self._KEYS[0]}:{name}" for name in ("item_changes", "item_revision"))
        with self._answering("The items were not changed", "Send them again later."):
            gone = {(item_id,) for item_id in reset}
            old = [one for one in self._client.hkeys(changed) if _item_and_column(one)[:1] in gone] if gone else []
            with self._client.pipeline(transaction=True) as pipe:
                if old:
                    pipe.hdel(changed, *old)
                values = {json.dumps([item_id, column]): value for item_id, column, value in item_values(changes)}
                if values:
                    pipe.hset(changed, mapping=values)
                pipe.incr(revision)
                return int(pipe.execute()[-1])

    def item_changes(self, known: int) -> tuple[int, dict[str, ItemChange]] | None:
        """See `EventStore`."""
        changed, revision = (f"{self._KEYS[0]}:{name}" for name in ("item_changes", "item_revision"))
        with self._answering("The changes of items were not read"):
            if int(self._client.get(revision) or 0) == known:
                return None
            with self._client.pipeline(transaction=True) as pipe:
                number, found = pipe.get(revision).hgetall(changed).execute()
        named = ((_item_and_column(name), value) for name, value in found.items())
        return int(number or 0), item_changes_of((*name, value) for name, value in named if len(name) == 2)

    def expire(self, events_before_s: int | None, answers_before_s: int | None) -> int:
        """See `EventStore`. Events count by the time at which they were accepted."""
        with self._answering("Old events were not deleted"):
            old = self._client.zrangebyscore(self._answer_times, "-inf", f"({answers_before_s}") if answers_before_s else []
            if old:
                self._client.hdel(self._answers, *old)
                self._client.zrem(self._answer_times, *old)
            if events_before_s is None:
                return 0
            return self._deletion.expire(events_before_s)

    def tidy(self) -> bool:
        """See `EventStore`: the append-only file holds forgotten users until Redis rewrites it."""
        return self._deletion.rewrite()

    def backup(self, path: Path) -> None:
        """See `EventStore`.

        Raises
        ------
        ConfigError
            Always: Redis makes its own backups.
        """
        raise ConfigError(f"Cannot write {path}: Redis makes its own backups. Use `redis-cli BGSAVE`, and copy its files.")

    def close(self) -> None:
        """See `EventStore`."""
        self._client.close()


_APPEND = """
    local new = {}
    for i = 2, #ARGV, 3 do
        local fresh = redis.call('SISMEMBER', KEYS[2], ARGV[i]) == 0
        if ARGV[i + 1] ~= '' then fresh = fresh and redis.call('SISMEMBER', KEYS[2], ARGV[i + 1]) == 0 end
        if fresh then
            redis.call('SADD', KEYS[2], ARGV[i])
            if ARGV[i + 1] ~= '' then redis.call('SADD', KEYS[2], ARGV[i + 1]) end
            redis.call('XADD', KEYS[1], '*', 'v', ARGV[1], 'event', ARGV[i + 2])
        end
        new[#new + 1] = fresh and 1 or 0
    end
    return new
"""


def read_entry(fields: Any) -> Event | Forgotten | None:
    """Return the content of a stream entry; None if the entry is of a later version or cannot be read.

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
        if isinstance(fields.get("forgotten"), str):
            return Forgotten(fields["forgotten"])
        return event_from_json(fields["event"])
    except (KeyError, TypeError, ValueError):
        return None


def _item_and_column(name: str) -> tuple[str, ...]:
    """Return the item and the column that a change is named by; () if the name cannot be read."""
    try:
        item_id, column = json.loads(name)
    except (ValueError, TypeError):
        return ()
    return (item_id, column) if is_text(item_id) and is_text(column) else ()


def without_password(url: str) -> str:
    """Return the address without user, password and query."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
