"""Test what event stores do when they are shared, cannot be opened, or fail."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twotower.errors import BusyError, ConfigError, DataError
from twotower.serving import event_store as module
from twotower.serving import late_store, sqlite_store
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event, LoggedAnswer
from twotower.serving.redis_store import REDIS_TIMEOUT_S, RedisStore
from twotower.serving.sqlite_store import SHARED_WAIT_S, lock_file
from twotower.serving.stored_rows import every_answer
from twotower.utils.console import log

EVENT = Event("a", "u", "b", 1)
ANSWER = LoggedAnswer("r", 1, "v", "u", ["b"], [1.0], '{"k":1}')


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


def test_a_server_waits_for_the_one_before_it(tmp_path: Path) -> None:
    release = lock_file(tmp_path / "e", 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lock_file, tmp_path / "e", 60)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        release()
        waiting.result(timeout=60)()


def test_a_file_that_another_program_writes_to_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e"
    store: Any = open_store(f"sqlite:{path}", shared=True)
    assert store._connection.execute("PRAGMA busy_timeout").fetchone()[0] == 1000 * SHARED_WAIT_S
    store.close()
    monkeypatch.setattr(sqlite_store, "SHARED_WAIT_S", 0.05)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DataError, match="used by another server"):
            open_store(f"sqlite:{path}", shared=True)
        other.execute("ROLLBACK")
    other.close()


def test_events_of_one_request_are_stored_all_or_none(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path / 'e'}")
    wrong: Any = object()
    with pytest.raises(BusyError):
        store.append([EVENT, Event("b", "u", "b", wrong)])
    assert store.since("") == [] and store.append([EVENT]) == [True]
    store.close()


SENTENCES = {
    "log_answers": "The answers were not logged: cannot write to the event file. Check the disk.",
    "forget": "The user was not forgotten: cannot write to the event file. Try again later.",
    "expire": "Old events were not deleted: cannot write to the event file. Check the disk.",
}


@pytest.mark.parametrize("what", SENTENCES)
def test_what_a_full_file_refuses_is_one_sentence_and_works_later(
    tmp_path: Path, logged: pytest.LogCaptureFixture, what: str
) -> None:
    store: Any = open_store(f"sqlite:{tmp_path / 'e'}")
    store.append([EVENT])
    store.log_answers([ANSWER])
    calls = {"log_answers": ([replace(ANSWER, request_id="s")],), "forget": ("u",), "expire": (2, 2)}
    store._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(BusyError) as refused:
        getattr(store, what)(*calls[what])
    assert str(refused.value) == SENTENCES[what] and "attempt to write a readonly database" in logged.text
    assert store._connection.execute("PRAGMA synchronous").fetchone()[0] == 2, "events are synced again"
    store._connection.execute("PRAGMA query_only = 0")
    assert getattr(store, what)(*calls[what]) == {"log_answers": [True], "forget": 1, "expire": 1}[what]
    assert [one.request_id for one in every_answer(store)] == (["r", "s"] if what == "log_answers" else [])
    store.close()


@pytest.mark.parametrize("call", [("answers_of", ["r"]), ("answers", "")])
def test_answers_that_cannot_be_read_are_one_sentence(tmp_path: Path, call: tuple[str, Any]) -> None:
    store: Any = open_store(f"sqlite:{tmp_path / 'e'}")
    store._connection.execute("DROP TABLE answers")
    with pytest.raises(BusyError, match=r"Cannot read the event file: no such table: answers. Check the disk"):
        getattr(store, call[0])(call[1])
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
    with pytest.raises(BusyError, match=r"The events were not read: Redis does not respond. Try again later") as refused:
        store.since("")
    assert "WRONGTYPE" in str(refused.value.__cause__)
    store.log_answers([ANSWER])
    assert store._client.exists(f"{name}:events:answers", f"{name}:events:answer_times") == 2, "other servers read these keys"
    for key in ("answers", "answer_times"):
        store._client.set(f"{name}:events:{key}", "of another type")
    failing = {
        "The answers were not logged": lambda: store.log_answers([ANSWER]),
        "The lists of the events were not found": lambda: store.answers_of(["r"]),
        "The answers were not read": lambda: store.answers(""),
        "Old events were not deleted": lambda: store.expire(None, 5),
        "The user was not forgotten": lambda: store.forget("u"),
    }
    for what, call in failing.items():
        with pytest.raises(BusyError, match=f"{what}: Redis does not respond. Try again later"):
            call()
    store.close()


def test_the_client_of_redis_gives_up_in_time(redis_url: str) -> None:
    store: Any = open_store(redis_url)
    options = store._client.connection_pool.connection_kwargs
    assert options["socket_timeout"] == options["socket_connect_timeout"] == REDIS_TIMEOUT_S
    assert options["retry"].get_retries() == 0
    store.close()


def test_a_worker_waits_for_a_store_that_cannot_be_opened(
    tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_store, "AGAIN_S", 0.0)
    url = f"sqlite:{tmp_path / 'e'}"
    journal = Journal(open_store(url, shared=True))
    journal.append([[EVENT]])
    (tmp_path / "e").rename(tmp_path / "away")
    (tmp_path / "e").mkdir()
    store = late_store.opened_or_late(lambda: open_store(url, shared=True), journal.follow_s)
    journal.in_another_process(store, Silent())
    assert len(journal.of(EVENT.user)) == 1, "what was read before is there"
    assert journal.state.startswith("The event store cannot be opened") and str(tmp_path) not in journal.state
    calls: list[Callable[[], Any]] = [
        lambda: journal.append([[EVENT]]),
        lambda: journal.forget("u"),
        lambda: journal.change_items({}, []),
        lambda: journal.item_changes(0),
        lambda: journal.log_answers([[]]),
        lambda: journal.answers_of([["r"]]),
        lambda: journal.expire(1, 1),
        lambda: store.answers(""),
        lambda: store.backup(tmp_path / "copy"),
    ]
    for call in calls:
        with pytest.raises(BusyError, match="the log of the server has the reason"):
            call()
    assert "Is a directory" in logged.text and logged.text.count("events are refused") == 1 and store.tidy()
    (tmp_path / "e").rmdir()
    (tmp_path / "away").rename(tmp_path / "e")
    assert journal.append([[EVENT]]) == [0] and journal.state == "ok"
    assert store.answers("") == ("", []) and journal.answers_of([["r"]]) == [[]] and store.tidy()
    store.backup(tmp_path / "copy")
    assert journal.forget(EVENT.user) == 1
    journal.close()


class Silent:
    """No news of other processes."""

    def tell(self) -> None:
        """See `News`."""

    def latest(self) -> int:
        """See `News`."""
        return 0


def test_a_store_in_a_folder_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who may not write there; these tests may run as root."""
    (tmp_path / "e").write_text("not a database, of more than a hundred bytes" * 5)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(DataError, match=r"its folder cannot be written, and SQLite needs files beside it"):
        open_store(f"sqlite:{tmp_path / 'e'}")
