"""Test what is left of forgotten users and old events in Redis: in its keys, on its disk, and after a killed process."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from twotower.cli import main
from twotower.errors import BusyError
from twotower.serving import redis_deletion
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event, LoggedAnswer, StoreInUse, answer_as_json
from twotower.serving.stored_rows import every_event
from twotower.utils.console import log

STREAM, IDS = "{twotower}:events", "{twotower}:event_ids"
BESIDE, LOCK, DUE = f"{STREAM}:without", f"{STREAM}:without:lock", f"{STREAM}:rewrite_due"
Connect = Callable[..., AbstractContextManager[TestClient]]
Redis = tuple[str, Any]
"""Address of a Redis of one test, and a client."""


@pytest.fixture
def redis(redis_server: tuple[str, int]) -> Iterator[Redis]:
    import redis as library

    with library.Redis.from_url(redis_server[0], decode_responses=True) as client:
        yield redis_server[0], client


@pytest.fixture
def store(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(redis_deletion, "COPY_PAGE", 2)
    store = open_store(redis[0])
    yield store
    store.close()


def event(event_id: str, user: str, **more: Any) -> Event:
    return Event(event_id, user, "b", 100, **more)


def users_of(store: Any) -> list[str]:
    return [one.user for page in every_event(store) for one in page]


def everything(client: Any) -> str:
    """Return all keys of Redis with their content."""
    read = {
        "string": client.get,
        "set": client.smembers,
        "hash": client.hgetall,
        "zset": lambda key: client.zrange(key, 0, -1),
        "stream": client.xrange,
    }
    return str([(key, read[client.type(key)](key)) for key in client.keys("*")])


def until(true: Callable[[], Any], within_s: float = 20) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("user", ["customer-17", "cus*[t]?^-o\\mer", "1:c", "kündin 🍜"])
def test_a_forgotten_user_is_in_no_key(store: Any, redis: Redis, user: str) -> None:
    like = [f"{user}8", user[:-1], "x", f"1{user}"]
    store.append([event(f"e{n}", one) for n in range(3) for one in (user, *like)])
    store.append([event("listed", user, event_type="buy", request_id="r"), event("listed", "x", event_type="buy", request_id="s")])
    store.log_answers([LoggedAnswer(f"r{n}", n, "v", one, ["b"], [1.0], "{}") for n, one in enumerate([user, *like, user])])
    store.expire(int(time.time()) + 5, None)
    ids_of_an_earlier_release = [f"{len(one)}:{one}old" for one in (user, *like)]
    redis[1].sadd(IDS, *ids_of_an_earlier_release)
    store.append([event(f"e{n}", one) for n in range(2) for one in (user, *like)])
    assert store.forget(user) == 2
    assert f"{len(user)}:{user}" not in everything(redis[1]) and users_of(store) == like * 2
    assert redis[1].smembers(IDS) == {f"{len(one)}:{one}{end}" for one in like for end in ("e0", "e1", "old")}
    assert [one.user for one in store.answers("")[1]] == like
    assert store.append([event("e0", user), event("e0", "x")]) == [True, False], "who comes back is a new user"


def whole_answer(user: str) -> str:
    return answer_as_json(LoggedAnswer("r", 5, "v", user, ["b"], [1.0], "{}"))


@pytest.mark.parametrize("user", ["customer-17", 'we"ird\\user', "kündin 🍜"])
def test_an_unreadable_entry_goes_with_the_user_that_it_names(store: Any, redis: Redis, user: str) -> None:
    other, answers, url = f"{user}8", f"{STREAM}:answers", redis[0]
    store.append([event("1", user), event("1", other)])
    text, compact = json.dumps({"event_id": "x", "user": user, "item_id": "b"}), whole_answer(user)
    theirs = [text[:-5].encode(), compact.encode()[:-3], b"\xff" + text.encode(), b"[" + text.encode() + b"]"]
    kept = [b"{", b"[]", b"null", b"5", b"\xff\xfe", whole_answer(other).encode()[:-3], b'{"user":["%s"]' % b"x"]
    import redis as library

    with library.Redis.from_url(url) as client:
        for number, entry in enumerate([*theirs, *kept]):
            client.xadd(STREAM, {"v": "1", "event": entry})
            client.hset(answers, f"r{number}", entry)
            client.zadd(f"{STREAM}:answer_times", {f"r{number}": number})
        assert store.forget(user) == 1 + len(theirs)
        assert [fields[b"event"] for _, fields in client.xrange(STREAM) if b"event" in fields][1:] == kept
        assert [client.hget(answers, name) for name in client.zrange(f"{STREAM}:answer_times", 0, -1)] == kept
        assert client.hlen(answers) == len(kept)
        found = repr([client.xrange(STREAM), client.hgetall(answers)])
        assert repr(f'"{user}"'.encode())[2:-1] not in found and users_of(store) == [other]
    assert store.forget(other) == 2


def test_a_server_forgets_beside_unreadable_entries(connect: Connect, keyed: dict[str, str], redis: Redis) -> None:
    url, client = redis
    with connect(events=url, refresh_s=0) as server:
        item = server.get("/v1/items?limit=1").json()["items"][0]["item_id"]
        body = {"events": [{"event_id": "1", "user": user, "item_id": item} for user in ("u", "stays")]}
        assert server.post("/v1/events", json=body, headers=keyed).status_code == 200
        for name, text in {"a": "{", "b": whole_answer("u")[:-2], "c": "[]"}.items():
            client.hset(f"{STREAM}:answers", name, text)
        client.xadd(STREAM, {"v": "1", "event": '{"event_id": "2", "user": "u"'})
        answer = server.delete("/v1/users/u", headers=keyed)
        assert answer.status_code == 200 and answer.json()["events"] == 2
        assert set(client.hkeys(f"{STREAM}:answers")) == {"a", "c"}


def test_retention_leaves_no_ids(store: Any, redis: Redis) -> None:
    store.append([event(str(n), f"u{n}", event_type="buy", request_id=f"r{n}") for n in range(5)])
    redis[1].xadd(STREAM, {"v": "2", "event": "of a later server"})
    time.sleep(1.1)  # Redis counts whole seconds here
    moment = int(time.time())
    time.sleep(max(0.0, moment + 1 - time.time()))
    store.append([event("late", "u")])
    assert store.expire(moment, None) == 6 and users_of(store) == ["u"]
    assert redis[1].smembers(IDS) == {"1:ulate"}


def slow_rewrite(client: Any) -> None:
    """Begin a rewrite of the append-only file that takes a second or two."""
    until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
    client.config_set("rdb-key-save-delay", 400_000)
    client.bgrewriteaof()


def on_disk(folder: Path, client: Any, users: list[str]) -> set[str]:
    """Return the users that are in the append-only file, once no rewrite is in progress."""
    until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
    content = b"".join(path.read_bytes() for path in folder.rglob("*.aof"))
    return {user for user in users if user.encode() in content}


def test_the_file_of_redis_is_rewritten_after_the_last_user(store: Any, redis: Redis, tmp_path: Path) -> None:
    users = [f"customer-{n}" for n in range(4)]
    store.append([event("1", user) for user in users] + [event("1", "stays")])
    assert on_disk(tmp_path, redis[1], users) == set(users) and store.tidy()
    slow_rewrite(redis[1])
    for user in users:
        store.forget(user)
    assert not store.tidy() and redis[1].exists(DUE), "a rewrite that began before holds them"
    until(store.tidy)
    assert not redis[1].exists(DUE) and store.tidy()
    assert on_disk(tmp_path, redis[1], users) == set() and users_of(store) == ["stays"]


def test_a_server_asks_again_while_a_rewrite_is_in_progress(redis: Redis, tmp_path: Path) -> None:
    journal = Journal(open_store(redis[0]))
    try:
        journal.append([[event("1", "customer-1")]])
        slow_rewrite(redis[1])
        began = time.monotonic()
        assert journal.forget("customer-1") == 1 and time.monotonic() - began < 1
        until(lambda: not redis[1].exists(DUE))
        assert on_disk(tmp_path, redis[1], ["customer-1"]) == set()
    finally:
        journal.close()


def test_the_command_waits_until_the_last_user_leaves_the_disk(
    redis: Redis, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    users = [str(name) for name in pq.read_table(bundle / "dataset" / "users.parquet")["user_id"][:3].to_pylist()]
    store = open_store(redis[0])
    store.append([event("1", user) for user in users])
    command = ["forget", str(tmp_path / "bundle"), "--events", redis[0], *(word for user in users for word in ("--user", user))]
    with monkeypatch.context() as patch:
        patch.setattr("twotower.pipeline.forget.TIDY_WAIT_S", 0.2)
        patch.setattr(redis_deletion.RedisDeletion, "rewrite", lambda _: False)
        assert main(command) == 2 and "run `redis-cli BGREWRITEAOF` later" in capsys.readouterr().err
    assert redis[1].exists(DUE)
    slow_rewrite(redis[1])
    assert main(command) == 0 and not redis[1].exists(DUE)
    assert on_disk(tmp_path, redis[1], users) == set()
    store.close()


def test_what_keeps_redis_from_rewriting_is_logged(
    store: Any, redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, logger=log.name)
    url, client = redis
    client.acl_setuser("limited", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-bgrewriteaof"])
    limited = open_store(url.replace("redis://", "redis://limited:secret@"))
    limited.forget("u")
    assert limited.tidy() and not client.exists(DUE), "asking again cannot help"
    assert "its append-only file may hold forgotten users until Redis rewrites it" in caplog.text
    limited.close()
    store.forget("u")
    caplog.clear()
    monkeypatch.setattr(store._deletion._client, "bgrewriteaof", refuse)
    assert not store.tidy()
    said = len(caplog.records)
    assert "cannot ask Redis to rewrite its append-only file, retrying: no memory for a fork" in caplog.text
    assert not store.tidy() and len(caplog.records) == said, "once"
    monkeypatch.undo()
    assert store.tidy() and not client.exists(DUE)


def refuse() -> None:
    import redis

    raise redis.ResponseError("no memory for a fork")


KILLED = """
import sys, time
from twotower.serving import redis_deletion
from twotower.serving.event_store import open_store
redis_deletion.COPY_PAGE, redis_deletion.LEASE_S = 1, 2.0
store, calls = open_store(sys.argv[1]), []
copy = store._deletion._copy
def slow(**arguments):
    if len(calls) == 2:
        print("copying", flush=True)
        time.sleep(60)
    calls.append(1)
    return copy(**arguments)
store._deletion._copy = slow
store.forget("u")
"""


def test_a_killed_process_blocks_nobody_for_long_and_leaves_nothing(store: Any, redis: Redis) -> None:
    users = ["a", "u", "b", "u", "c"]
    store.append([event(str(n), user) for n, user in enumerate(users)])
    with subprocess.Popen([sys.executable, "-c", KILLED, redis[0]], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None and killed.stdout.readline() == "copying\n"
        killed.kill()
    assert redis[1].exists(BESIDE, LOCK) == 2 and redis[1].pttl(LOCK) <= 2000
    with pytest.raises(
        BusyError, match=r"another process forgets a user of this store, or was killed.*Try again in [12] seconds\."
    ):
        store.forget("u")
    journal = Journal(open_store(redis[0]), follow=False)
    with pytest.raises(StoreInUse):
        journal.forget("u")
    assert journal.state == "ok", "Redis works"
    journal.close()
    assert store.expire(5_000_000_000, None) == 0 and users_of(store) == users, "the copy would bring them back"
    until(lambda: not redis[1].exists(BESIDE, LOCK), within_s=6)
    assert users_of(store) == users, "the copy never took the place of the stream"
    assert store.forget("u") == 2 and users_of(store) == ["a", "b", "c"] and not redis[1].exists(BESIDE, LOCK)
    assert redis_deletion.LEASE_S <= 15 and redis[1].ttl(STREAM) == -1, "the stream itself never ends"


@pytest.mark.parametrize("step", ["copy", "sscan"])
def test_a_process_that_stood_still_for_too_long_gives_up(
    store: Any, redis: Redis, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store.append([event(str(n), user) for n, user in enumerate(["a", "u", "b", "v", "c", "u", "v"])])
    owner = store._deletion if step == "copy" else store._deletion._client
    name = "_copy" if step == "copy" else "sscan"
    real, calls, other = getattr(owner, name), list[int](), open_store(redis[0])

    def still(*positional: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if step == "copy" else 1):
            redis[1].delete(LOCK)  # as after its time
            monkeypatch.setattr(owner, name, real)
            assert other.forget("v") == 2
        return real(*positional, **named)

    monkeypatch.setattr(owner, name, still)
    with pytest.raises(BusyError, match=r"stood still for 15 seconds. Try again\."):
        store.forget("u")
    assert users_of(store) == ["a", "u", "b", "c", "u"] and not redis[1].exists(BESIDE, LOCK)
    assert store.forget("u") == 2 and users_of(store) == ["a", "b", "c"]
    other.close()


def test_a_copy_that_is_lost_does_not_take_the_place_of_the_stream(
    store: Any, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = ["a", "b", "u", "c", "d"]
    store.append([event(str(n), user) for n, user in enumerate(users)])
    real = store._deletion._copy

    def lossy(**named: Any) -> Any:
        redis[1].delete(BESIDE)
        return real(**named)

    monkeypatch.setattr(store._deletion, "_copy", lossy)
    with pytest.raises(BusyError):
        store.forget("u")
    assert users_of(store) == users
