"""Delete users and old events from the keys of an event store in Redis.

A deleted entry of a stream leaves its bytes in its block. So the stream is copied without a user, and the copy takes its place. One
process at a time copies. It holds a lease that it renews at every step: if it dies, lease and copy end by themselves.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from twotower.errors import BusyError
from twotower.serving.event_types import Event, StoreInUse, digest_of, event_from_json
from twotower.utils.console import log

LEASE_S = 15.0  # after which a process that has died no longer keeps others from forgetting
COPY_PAGE = 1000  # entries that one script copies or deletes
_STOPPED = f"The user was not forgotten: this process stood still for {LEASE_S:g} seconds. Try again."
_NEVER = "Redis does not let this user run BGREWRITEAOF: its append-only file may hold forgotten users until Redis rewrites it (%s)"


def unique_id(event: Event) -> str:
    """Return the user and the id of an event as one text that no other pair has."""
    return f"{_prefix(event.user)}{event.event_id}"


def _prefix(user: str) -> str:
    """Return the beginning of the `unique_id` of all events of a user, and of no other."""
    return f"{len(user)}:{user}"


def _names(text: Any) -> tuple[str, ...]:
    """Return the names under which an event counts once; none if it cannot be read."""
    event = event_from_json(text)
    return () if event is None else (unique_id(event),) if event.once is None else (unique_id(event), event.once)


def _is_of(user: str, text: str) -> bool:
    """Return True if an answer is of a user. One that cannot be read is, if it names the user."""
    try:
        return bool(json.loads(text)["user"] == user)
    except (ValueError, KeyError, TypeError, RecursionError):
        return any(named in text for named in _namings(user))


def _namings(user: str) -> list[str]:
    """Return the ways in which the JSON of an entry names its user."""
    return sorted({f'"user":{space}{json.dumps(user, ensure_ascii=whole)}' for space in ("", " ") for whole in (True, False)})


class RedisDeletion:
    """Deletions from a stream of events, a set of their ids, and a hash of answers with a sorted set of their times.

    Parameters
    ----------
    client
        Client of Redis.
    keys
        Stream and set.
    answers
        Hash and sorted set.
    """

    def __init__(self, client: Any, keys: tuple[str, str], answers: tuple[str, str]) -> None:
        import redis

        self._failed = redis.RedisError
        self._client, self._stream, self._ids, self._answers = client, *keys, answers
        self._beside = f"{self._stream}:without"
        self._lock, self._due = f"{self._beside}:lock", f"{self._stream}:rewrite_due"
        self._copy, self._delete, self._renew, self._drop = map(client.register_script, (_COPY_WITHOUT, _DELETE, _RENEW, _DROP))
        self._said = ""

    def forget(self, user: str, version: int) -> int:
        """Delete the events, ids and answers of a user. Return the number of events.

        Parameters
        ----------
        version
            Version of the entry that records that the user was forgotten.

        Raises
        ------
        StoreInUse
            Another process forgets a user.
        BusyError
            This process stood still for longer than its lease.
        """
        with self._alone() as token:
            self._forget_answers(user, token)
            for page in self._pages(token, lambda at: self._client.sscan(self._ids, at, _pattern(user), COPY_PAGE)):
                if page:  # also ids whose events were deleted before
                    self._client.srem(self._ids, *page)
            count = self._copy_without(user, version, token)
            self._client.set(self._due, token)
        return count

    def _forget_answers(self, user: str, token: str) -> None:
        for page in self._pages(token, lambda at: self._client.hscan(self._answers[0], at, None, COPY_PAGE)):
            theirs = [name for name, text in page.items() if _is_of(user, text)]
            if theirs:
                self._client.hdel(self._answers[0], *theirs)
                self._client.zrem(self._answers[1], *theirs)

    def _copy_without(self, user: str, version: int, token: str) -> int:
        self._client.delete(self._beside)
        position, copied, count = "-", 0, 0
        while position:
            arguments = [position, COPY_PAGE, user, version, digest_of(user), token, _lease_ms(), copied, *_namings(user)]
            found = self._copy(keys=[self._stream, self._beside, self._lock], args=arguments)
            if found is None:
                raise BusyError(_STOPPED)
            position, copied, *gone = found
            names = [name for text in gone for name in _names(text)]
            if names:
                self._client.srem(self._ids, *names)
            count += len(gone)
        return count

    def _pages(self, token: str, scan: Callable[[int], tuple[int, Any]]) -> Iterator[Any]:
        """Yield the pages of a scan, and renew the lease for each."""
        at, begun = 0, False
        while at or not begun:
            begun = True
            if not self._renew(keys=[self._lock], args=[token, _lease_ms()]):
                raise BusyError(_STOPPED)
            at, page = scan(at)
            yield page

    @contextmanager
    def _alone(self) -> Iterator[str]:
        """Hold the lease; yield its token."""
        token = uuid.uuid4().hex
        if not self._client.set(self._lock, token, nx=True, px=_lease_ms()):
            left_s = max(1, math.ceil(self._client.pttl(self._lock) / 1000))
            raise StoreInUse(
                "The user was not forgotten: another process forgets a user of this store, or was killed while it did. "
                f"Try again in {left_s} seconds."
            )
        try:
            yield token
        finally:
            with suppress(self._failed):  # then it ends by itself
                self._drop(keys=[self._lock], args=[token])

    def expire(self, before_s: int) -> int:
        """Delete the events that were accepted before a time, and their ids. Return the number of events.

        While a user is being forgotten nothing is deleted, or the copy would bring it back.
        """
        count, end = 0, f"({1000 * before_s}-0"
        while page := self._client.xrange(self._stream, max=end, count=COPY_PAGE):
            arguments = [part for at, fields in page for part in (at, *(*_names(fields.get("event")), "", "")[:2])]
            found = self._delete(keys=[self._stream, self._ids, self._lock], args=arguments)
            if found is None:
                break
            count += int(found)
        return count

    def rewrite(self) -> bool:
        """Ask Redis to rewrite its append-only file, if a user was forgotten since a rewrite began.

        Returns
        -------
        bool
            False if Redis cannot begin now.
        """
        try:
            token = self._client.get(self._due)
            if token is None:
                return True
            self._client.bgrewriteaof()
        except self._failed as error:
            if "already in progress" in str(error):
                return False  # it began before the last deletion
            if "unknown command" not in str(error).lower() and "permission" not in str(error).lower():
                self._say(error)
                return False
            log.warning(_NEVER, error)
        with suppress(self._failed):
            self._drop(keys=[self._due], args=[token])  # unless another user was forgotten meanwhile
        self._said = ""
        return True

    def _say(self, error: Exception) -> None:
        if str(error) != self._said:
            log.error("cannot ask Redis to rewrite its append-only file, retrying: %s", error)
        self._said = str(error)


def _pattern(user: str) -> str:
    return re.sub(r"([\\*?\[\]^-])", r"\\\1", _prefix(user)) + "*"


def _lease_ms() -> int:
    return int(1000 * LEASE_S)


_COPY_WITHOUT = """
    if redis.call('GET', KEYS[3]) ~= ARGV[6] or redis.call('XLEN', KEYS[2]) ~= tonumber(ARGV[8]) then return false end
    local rows, last, result = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2]), '', {'', tonumber(ARGV[8])}
    for _, row in ipairs(rows) do
        local theirs = false
        for i = 1, #row[2], 2 do
            if row[2][i] == 'event' then
                local read, event = pcall(cjson.decode, row[2][i + 1])
                if read and type(event) == 'table' and event['user'] then
                    theirs = event['user'] == ARGV[3]
                else  -- it cannot be read
                    for j = 9, #ARGV do theirs = theirs or string.find(row[2][i + 1], ARGV[j], 1, true) ~= nil end
                end
                if theirs then result[#result + 1] = row[2][i + 1] end
            end
        end
        if not theirs then
            redis.call('XADD', KEYS[2], row[1], unpack(row[2]))
            result[2] = result[2] + 1
        end
        last = row[1]
    end
    if #rows == tonumber(ARGV[2]) then
        result[1] = '(' .. last
        redis.call('PEXPIRE', KEYS[3], ARGV[7])
        redis.call('PEXPIRE', KEYS[2], 2 * ARGV[7])
    else
        if result[2] > 0 then
            redis.call('PERSIST', KEYS[2])
            redis.call('RENAME', KEYS[2], KEYS[1])
        else
            redis.call('DEL', KEYS[1])
        end
        local lowest = last
        if lowest ~= '' then redis.pcall('XSETID', KEYS[1], lowest) end
        redis.call('XADD', KEYS[1], '*', 'v', ARGV[4], 'forgotten', ARGV[5])
    end
    return result
"""
_DELETE = """
    if redis.call('EXISTS', KEYS[3]) == 1 then return false end
    local count = 0
    for i = 1, #ARGV, 3 do
        if redis.call('XDEL', KEYS[1], ARGV[i]) == 1 then
            count = count + 1
            for j = i + 1, i + 2 do
                if ARGV[j] ~= '' then redis.call('SREM', KEYS[2], ARGV[j]) end
            end
        end
    end
    return count
"""
_RENEW = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('PEXPIRE', KEYS[1], ARGV[2])"
_DROP = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1])"
