"""Test `twotower estimate` on the log of a real server: what the server itself gets is estimated exactly."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.cli import main
from twotower.errors import DataError
from twotower.pipeline.estimate import estimate_bundle
from twotower.serving.event_store import open_store
from twotower.serving.event_types import LoggedAnswer
from twotower.serving.stored_rows import every_answer
from twotower.utils.config_serving import Limits

Connect = Callable[..., AbstractContextManager[TestClient]]
Keyed = dict[str, str]
USERS, EXPLORE = 60, 0.3


@pytest.fixture
def log(connect: Connect, keyed: Keyed, tmp_path: Path) -> str:
    """Return the store of a server that has explored: 60 users and guests see a list each, and choose every third item of some."""
    with connect(limits=Limits(rate=0, explore=EXPLORE)) as client:
        known = [one["user"] for one in client.get("/v1/users", params={"limit": USERS // 2}).json()["users"]]
        item = client.get("/v1/items", params={"limit": 1}).json()["items"][0]["item_id"]
        for n in range(USERS):
            body: dict[str, Any] = {"user": known[n]} if n < len(known) else {"user": f"g{n}", "history": [{"item_id": item}]}
            answer = client.post("/v1/recommend", json={**body, "k": 6, "filter": "within(2000)"}).json()
            shown, name = [one["item_id"] for one in answer["items"]], answer["request_id"]
            assert all(one["propensity"] == pytest.approx(0.7) or one["propensity"] < 0.2 for one in answer["items"])
            events: list[dict[str, Any]] = [{"request_id": name, "shown": shown}]
            events += [{"request_id": name, "item_id": item} for item in shown[:: 3 if n % 2 else 6]]
            assert client.post("/v1/events", json={"events": events}, headers=keyed).status_code == 200
        unseen = client.post("/v1/recommend", json={"k": 6, "user": "unseen"})
        assert unseen.status_code == 200
    return f"sqlite:{tmp_path / 'events.sqlite'}"


def test_the_server_s_own_policy_is_estimated_exactly(log: str, bundle: Path) -> None:
    found = estimate_bundle(bundle, log, explore=EXPLORE)
    one = found.estimates
    assert found.lists == found.users == USERS, "a list that was not shown does not count"
    assert one.logged.value == 1.5 and one.ips == one.logged and one.support == pytest.approx(1, abs=1e-6)
    assert one.snips.value == pytest.approx(1.5) and one.dr.value == pytest.approx(1.5, abs=0.2)


def test_another_model_is_estimated_with_intervals(
    log: str, bundles: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(bundles[1]), "--log", log, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lists"] == USERS and 0 <= found["support"] <= 1.5
    for name in ("ips", "snips", "dr"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"] or found["support"] == 0
    assert main(["estimate", str(bundles[1]), "--log", log]) == 0
    said = capsys.readouterr().out
    assert "60 lists of 60 users" in said and "snips" in said


def test_a_log_that_says_nothing_is_one_sentence(
    log: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(bundle), "--log", f"sqlite:{tmp_path / 'none'}"]) == 2
    empty = open_store(f"sqlite:{tmp_path / 'empty'}")
    empty.close()
    assert main(["estimate", str(bundle), "--log", f"sqlite:{tmp_path / 'empty'}"]) == 2
    said = capsys.readouterr().err
    assert "No event store at" in said and "has 0 answers" in said
    source, copy = open_store(log, reading=True), open_store(f"sqlite:{tmp_path / 'early'}")
    early = [LoggedAnswer(a.request_id, 1_000, a.version, a.user, a.items, a.propensity, a.request) for a in every_answer(source)]
    copy.log_answers(early)
    source.close()
    copy.close()
    with pytest.raises(DataError, match="are older than its last event"):
        estimate_bundle(bundle, f"sqlite:{tmp_path / 'early'}")


def edited(log: str, edit: Callable[[dict[str, Any]], None]) -> str:
    """Change every answer of a log."""
    store = sqlite3.connect(log.removeprefix("sqlite:"))
    for position, text in store.execute("SELECT position, answer FROM answers").fetchall():
        answer = json.loads(text)
        edit(answer)
        store.execute("UPDATE answers SET answer = ? WHERE position = ?", (json.dumps(answer), position))
    store.commit()
    store.close()
    return log


def test_items_with_propensity_0_are_counted(log: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited(log, lambda answer: answer.update(propensity=[0.0, *answer["propensity"][1:]]))
    assert main(["estimate", str(bundle), "--log", log, "--explore", str(EXPLORE)]) == 0
    assert "Shown items with propensity 0: 60." in capsys.readouterr().out
    edited(log, lambda answer: answer.update(propensity=[0.0] * len(answer["propensity"])))
    assert main(["estimate", str(bundle), "--log", log, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["snips"] == {"value": None, "low": None, "high": None} and found["ips"]["value"] == 0
    assert found["zero_propensity"] == 60 * 6 and found["support"] == 0
    assert main(["estimate", str(bundle), "--log", log]) == 0
    said = capsys.readouterr().out
    assert "snips    undefined: the log could show none of its items" in said and "nan" not in said


def test_a_request_that_is_not_valid_or_cannot_be_answered_is_one_sentence(
    log: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(log, lambda answer: answer["request"].update(filter="nothing == 1"))
    assert main(["estimate", str(bundle), "--log", log]) == 2
    assert "can answer 0 of the 60 requests of the log" in capsys.readouterr().err
    edited(log, lambda answer: answer["request"].update(k=0))
    assert main(["estimate", str(bundle), "--log", log]) == 2
    assert "of the log has a request that is not valid: k: " in capsys.readouterr().err
