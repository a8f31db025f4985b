"""Test what event stores do when they are shared, cannot be opened, or fail."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from twotower.errors import BusyError, ConfigError, DataError
from twotower.serving import event_store as module
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event
from twotower.serving.redis_store import RedisStore
from twotower.utils.console import log

EVENT = Event("a", "u", "b", 1)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, logger=log.name)
    return caplog


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_processes_of_one_server_share_a_file(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'e'}"
    one, other = open_store(url, shared=True), open_store(url, shared=True)
    assert one.append([EVENT]) == [True] and other.append([EVENT]) == [False]
    assert [event for _, event in other.since("")] == [EVENT]
    one.close()
    other.close()


@pytest.mark.usefixtures("open_umask")
def test_a_locked_store_keeps_other_servers_away(tmp_path: Path) -> None:
    path = tmp_path / "e"
    release = module.lock_store(f"sqlite:{path}")
    assert path.stat().st_mode & 0o777 == 0o600, "only the owner may read it"
    with pytest.raises(DataError, match="used by another server"):
        module.lock_store(f"sqlite:{path}")
    release()
    module.lock_store(f"sqlite:{path}")()
    module.lock_store("redis://127.0.0.1:1")()


def test_any_thread_may_write(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path / 'e'}")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(store.append, [EVENT]).result() == [True]
    store.close()


@pytest.mark.parametrize("protected", ["append", "since"])
def test_a_file_that_fails_is_one_sentence(tmp_path: Path, logged: pytest.LogCaptureFixture, protected: str) -> None:
    store: Any = open_store(f"sqlite:{tmp_path / 'e'}")
    if protected == "append":
        store._connection.execute("PRAGMA query_only = 1")
        with pytest.raises(BusyError, match=r"were not stored: cannot write to the event file. Send them again later"):
            store.append([EVENT])
        assert "cannot store events: attempt to write a readonly database" in logged.text
        store._connection.execute("PRAGMA query_only = 0")
        assert store.append([EVENT]) == [True]
    else:
        store._connection.execute("DROP TABLE events")
        with pytest.raises(BusyError, match=r"Cannot read the event file: no such table: events. Check the disk"):
            store.since("")
    store.close()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("mysql://user:secret@host", "'mysql'"),
        ("x+y-z.1:", "'x+y-z.1'"),
        ("secret", "given"),
        (f"{'x' * 17}:", "given"),
        ("my secret:", "given"),
        (":secret", "given"),
    ],
)
def test_an_unknown_store_is_named_by_its_scheme_alone(url: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_store(url)
    assert str(refused.value) == f"The event store {named} is not known. Use sqlite:PATH or redis://HOST:PORT/NUMBER."


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "rediss://127.0.0.1:1", "unix:///nowhere/redis.sock"])
def test_every_address_of_redis_is_tried(url: str) -> None:
    with pytest.raises(DataError, match=f"Cannot connect to Redis at {url}: .*Check the address"):
        open_store(url)


def test_a_redis_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DataError, match="Cannot connect to Redis"):
        open_store(f"redis://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(("sync", "warns"), [("always", False), ("everysec", True)])
def test_a_redis_that_may_lose_events_is_warned_about(
    redis_url: str, logged: pytest.LogCaptureFixture, sync: str, warns: bool
) -> None:
    import redis

    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        before = client.config_get("appendfsync")["appendfsync"]
        client.config_set("appendfsync", sync)
        try:
            open_store(redis_url).close()
        finally:
            client.config_set("appendfsync", before)
    text = f"Redis at {redis_url.partition('?')[0]} may lose acknowledged events: set `appendonly yes` and `appendfsync always`"
    assert (text in logged.text) == warns and bool(logged.records) == warns


def test_a_redis_that_fails_is_one_sentence(
    redis_url: str, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{{{uuid.uuid4().hex}}}"
    monkeypatch.setattr(RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
    store: Any = open_store(redis_url)
    store._client.set(f"{name}:events", "of another type")
    with pytest.raises(BusyError, match=r"were not stored: Redis does not respond. Send them again later"):
        store.append([EVENT])
    assert "The events were not stored: WRONGTYPE" in logged.text
    with pytest.raises(BusyError, match=r"Redis does not respond: WRONGTYPE.*Try again later"):
        store.since("")
    store.close()
