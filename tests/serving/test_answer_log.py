"""Test how `twotower estimate` and exports read a log: a damaged row is one sentence that names the row, in every store."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twotower.cli import main
from twotower.errors import DataError
from twotower.pipeline.answer_log import read_log
from twotower.serving import event_types, redis_store, sqlite_store
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event, LoggedAnswer
from twotower.utils import console

ANSWERS = [LoggedAnswer(f"r{n}", 1_000 + n, "v1", f"u{n}", ["a", "b"], [0.75, 0.25], '{"k":2}') for n in range(1, 8)]
EVENTS = [Event(f"e{n}", f"u{n}", "a", 2_000 + n, "click", 4.0, f"r{n}", 1, "v1") for n in range(1, 8)]
FOURTH = ANSWERS[3]
Write = Callable[[str], None]


@pytest.fixture(params=["sqlite", "redis"])
def log(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Write]:
    """Return the address of a store, and a function that replaces the text of its fourth answer."""
    file = tmp_path / "events.sqlite"
    url = f"sqlite:{file}" if request.param == "sqlite" else request.getfixturevalue("redis_url")
    name = f"{{{uuid.uuid4().hex}}}"
    monkeypatch.setattr(redis_store.RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
    store = open_store(url)
    store.append(EVENTS)
    store.log_answers(ANSWERS)
    store.close()

    def in_sqlite(text: str) -> None:
        opened = sqlite3.connect(file)
        opened.execute("UPDATE answers SET answer = ? WHERE request_id = ?", (text, FOURTH.request_id))
        opened.commit()
        opened.close()

    def in_redis(text: str) -> None:
        import redis

        client = redis.Redis.from_url(url)
        client.hset(f"{name}:events:answers", FOURTH.request_id, text)
        client.close()

    return url, in_sqlite if request.param == "sqlite" else in_redis


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(event_types.answer_as_json(FOURTH)), **fields})


def test_a_log_is_read_whole(log: tuple[str, Write]) -> None:
    assert read_log(log[0]) == (EVENTS, ANSWERS)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"propensity": [0.5, 2.0]}, "the propensity 2.0 for the item 'b'. It must be a number from 0 to 1"),
        ({"propensity": [-0.5, 0.5]}, "the propensity -0.5 for the item 'a'"),
        ({"propensity": [0.5, float("nan")]}, "the propensity nan for the item 'b'"),
        ({"propensity": [0.5, float("inf")]}, "the propensity inf"),
        ({"propensity": [0.5, None]}, "the propensity None"),
        ({"propensity": [0.5, True]}, "the propensity True"),
        ({"propensity": ["x", 0.5]}, "the propensity 'x' for the item 'a'"),
        ({"propensity": [0.5]}, "2 items, but a list of propensities of length 1. Every item needs one"),
        ({"propensity": 0.5}, "the propensity 0.5. It must be a list"),
        ({"items": ["a", 5]}, "the items"),
        ({"items": None}, "the items None"),
        ({"time_s": "late"}, "the time_s 'late'"),
        ({"time_s": -1}, "the time_s -1"),
        ({"time_s": 10**15}, "the time_s 1000000000000000"),
        ({"user": 5}, "the user 5"),
        ({"request": [1]}, "the request '[1]'"),
    ],
)
def test_a_wrong_value_is_named_with_its_answer(log: tuple[str, Write], fields: dict[str, Any], said: str) -> None:
    url, write = log
    write(changed(**fields))
    with pytest.raises(DataError) as raised:
        read_log(url)
    assert str(raised.value).startswith(f"The answer 'r4' of the log has {said}")


@pytest.mark.parametrize("page", [2, 1000])
@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "it is not JSON"), ("{}", "it has no field 'request'"), ("[]", "it is not a JSON object"), ("null", "it is not a JSON")],
)
def test_an_answer_that_cannot_be_read_is_named_by_its_position(
    log: tuple[str, Write], text: str, said: str, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, write = log
    for module in (redis_store, sqlite_store):
        monkeypatch.setattr(module, "ANSWERS_PAGE", page)
    write(text)
    with pytest.raises(DataError, match="The answer at position 4 of the log cannot be read: ") as raised:
        read_log(url)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DROP TABLE answers", "is damaged: no such table: answers. Name the store of a server"),
        ("UPDATE events SET time_s = 'late' WHERE event_id = 'e3'", "The event 'e3' of the log has the time_s 'late'"),
        ("UPDATE events SET stars = -1 WHERE event_id = 'e3'", "The event 'e3' of the log has the stars -1.0"),
        ("UPDATE events SET user = x'00' WHERE event_id = 'e3'", "The event 'e3' of the log has the user b'"),
        ("UPDATE answers SET answer = CAST(x'ff' AS TEXT) WHERE request_id = 'r4'", "is damaged: Could not decode"),
        ("UPDATE answers SET answer = x'' WHERE request_id = 'r4'", "The answer at position 4 of the log cannot be read"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, statement: str, said: str) -> None:
    file = tmp_path / "events.sqlite"
    store = open_store(f"sqlite:{file}")
    store.append(EVENTS)
    store.log_answers(ANSWERS)
    store.close()
    opened = sqlite3.connect(file)
    opened.execute(statement)
    opened.commit()
    opened.close()
    with pytest.raises(DataError) as raised:
        read_log(f"sqlite:{file}")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "The answer at position 4 of the log cannot be read: it is not JSON"),
        (changed(items=[["a"], 5]), "The answer 'r4' of the log has the items"),
        (changed(time_s="late"), "The answer 'r4' of the log has the time_s 'late'"),
        (changed(version=5), "The answer 'r4' of the log has the version 5. It must be a text."),
        (changed(user="\ud800"), "The answer 'r4' of the log has the user"),
    ],
)
def test_an_export_names_a_damaged_answer_and_writes_nothing(
    log: tuple[str, Write], tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url, write = log
    write(text)
    out = tmp_path / "answers.parquet"
    out.write_text("before")
    assert main(["events", "export", url, "--answers", "--out", str(out), "--overwrite"]) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"twotower: error: {said}") and "use a backup of the store" in found and found.count("\n") == 1
    assert out.read_text() == "before" and not list(tmp_path.glob("*.partial"))
    assert main(["events", "export", url, "--out", str(out), "--overwrite"]) == 0, "the events are whole"


def test_an_event_that_names_a_damaged_answer_names_an_unknown_one(log: tuple[str, Write]) -> None:
    url, write = log
    for text in ("{", changed(items=None)):
        write(text)
        store = open_store(url)
        assert store.answers_of(["r3", "r4", "r5"]) == [ANSWERS[2], ANSWERS[4]]
        store.close()


@pytest.mark.parametrize("column", ["user", "item_id", "time_s"])
def test_a_damaged_event_is_named_by_an_export_and_an_update(
    tmp_path: Path, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:{tmp_path / 'events.sqlite'}"
    store = open_store(url)
    store.append(EVENTS)
    store.close()
    with sqlite3.connect(tmp_path / "events.sqlite") as opened:
        opened.execute(f"UPDATE events SET {column} = x'00ff' WHERE event_id = 'e3'")
    assert main(["events", "export", url, "--out", str(tmp_path / "events.parquet")]) == 2
    assert f"The event 'e3' of the log has the {column} b'" in capsys.readouterr().err
    assert not (tmp_path / "events.parquet").exists()


def test_entries_of_redis_that_are_no_events_are_counted(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import redis

    monkeypatch.setattr(console.log, "propagate", True)
    name = f"{{{uuid.uuid4().hex}}}"
    monkeypatch.setattr(redis_store.RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
    store = open_store(redis_url)
    store.append(EVENTS[:1])
    entry = json.dumps({"event_id": "e", "user": "\xff", "item_id": "a", "time_s": 1}, ensure_ascii=False).encode("latin-1")
    with redis.Redis.from_url(redis_url) as client:
        for text in (b"{", entry):
            client.xadd(f"{name}:events", {"v": "1", "event": text})
    store.append(EVENTS[1:])
    store.close()
    assert read_log(redis_url)[0] == EVENTS
    assert "skipped 2 entries of the event store" in caplog.text
