"""Test JSON lines with a list of events each: complete lines in order, or counted rejects."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import DuckDBEngine
from twotower.data.sources.sessions import read_sessions
from twotower.errors import DataError
from twotower.utils.config import DataConfig, parse_config


def read(folder: Path, **settings: Any) -> tuple[list[dict[str, Any]], Rejects]:
    config: DataConfig = parse_config({"data": {"source": "sessions", "path": str(folder), "sessions": settings}}).data
    rejects = Rejects(folder / "rejects.jsonl", 1.0)
    engine = DuckDBEngine(folder / "spill")
    try:
        raw = read_sessions(config, engine, rejects)
        rows = raw.interactions.order_by("order").to_pyarrow().to_pylist()
    finally:
        rejects.close()
        engine.close()
    return rows, rejects


def test_events_keep_their_order_ids_and_types(tmp_path: Path) -> None:
    sessions = [
        {"session": 7, "events": [{"aid": n % 3, "ts": 1661200010000 + 1000 * n, "type": "clicks"} for n in range(40)]},
        {"session": "0012", "events": [{"aid": "a/b", "ts": "2023-01-03T10:00:00Z", "type": "orders"}]},
        {"session": 8, "events": []},
    ]
    (tmp_path / "sessions.jsonl").write_text("\n".join(map(json.dumps, sessions)) + "\n")
    rows, rejects = read(tmp_path)
    assert [(row["user_id"], row["item_id"]) for row in rows] == [*(("7", str(n % 3)) for n in range(40)), ("0012", "a/b")]
    assert [row["time_s"] for row in rows] == [*(1661200010 + n for n in range(40)), 1672740000]
    assert {row["event_type"] for row in rows} == {"clicks", "orders"} and len({row["order"] for row in rows}) == 41
    assert not rejects.rejected and rejects.files["sessions.jsonl"].rows == 3


def test_invalid_lines_are_rejected_with_a_reason(tmp_path: Path) -> None:
    good = {"who": "u", "log": [{"what": "i", "when": 1661200010}]}
    bad = [
        '{"who": "u", "log": [{"what": "i", "when": 16612',
        json.dumps({"log": [{"what": "i", "when": 1661200010}]}),
        json.dumps({"who": "u", "log": "none"}),
        json.dumps({"who": "u", "log": [{"what": "i", "when": 1661200010}, {"when": 1661200010}]}),
        json.dumps({"who": "u", "log": [{"what": "i", "when": "soon"}]}),
    ]
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress("\n".join([json.dumps(good), *bad, json.dumps(good)]).encode()))
    rows, rejects = read(tmp_path, path="log.jsonl.gz", user_id="who", events="log", item_id="what", time="when", event_type=None)
    assert [(row["user_id"], row["item_id"], row["event_type"]) for row in rows] == [("u", "i", "event")] * 2
    found = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in found] == [2, 3, 4, 5, 6] and rejects.files["log.jsonl.gz"].rows == 7
    for row, word in zip(found, ("not a JSON object", "who is missing", "log is not a list", "what", "'soon'"), strict=True):
        assert word in row["reason"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sessions\.jsonl"):
        read(tmp_path)


def test_ids_follow_the_rule_of_all_sources(tmp_path: Path) -> None:
    def line(session: Any, item: Any) -> str:
        return json.dumps({"session": session, "events": [{"aid": item, "ts": 1661200010, "type": "clicks"}]})

    rows = [line(7.0, "8.0"), line("7", 8), line("007", "x"), line("NaN", 8), line(7, "null"), line(" ", 8)]
    (tmp_path / "sessions.jsonl").write_text("\n".join(rows))
    found, rejects = read(tmp_path)
    assert [(row["user_id"], row["item_id"]) for row in found] == [("7", "8"), ("7", "8"), ("007", "x")]
    assert rejects.files["sessions.jsonl"].rejected == {"session is missing": 2, "aid of an event is missing": 1}


def test_ids_and_types_are_unescaped(tmp_path: Path) -> None:
    texts = ['a"b', "a\\b", "caf\u00e9", "a\tb", "7"]
    lines = [json.dumps({"session": text, "events": [{"aid": text, "ts": 1661200010, "type": text}]}) for text in texts]
    (tmp_path / "sessions.jsonl").write_text("\n".join(lines))
    rows, rejects = read(tmp_path)
    assert [(row["user_id"], row["item_id"], row["event_type"]) for row in rows] == [(text,) * 3 for text in texts]
    assert not rejects.rejected


@pytest.mark.parametrize("event", [{"aid": [1]}, {"aid": {"id": 1}}, {"aid": 2.0**53}, {"aid": "x" * 1001}, {"ts": "1900-01-01"}])
def test_what_is_no_id_or_time_rejects_its_line(event: dict[str, Any], tmp_path: Path) -> None:
    good = {"aid": "a", "ts": 1661200010, "type": "clicks"}
    lines = [
        {"session": 1, "events": [good, {**good, **event}]},
        {"session": [2], "events": [good]},
        {"session": 3, "events": [good]},
    ]
    (tmp_path / "sessions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, rejects = read(tmp_path)
    assert [row["user_id"] for row in rows] == ["3"] and rejects.rejected == {"sessions.jsonl": 2}
