"""Test fresh items while serving: accepted events change them, without a failed or mixed answer, the same on every server."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from twotower.bundle.bundle import Bundle, load_bundle
from twotower.bundle.refresh import Refresher
from twotower.bundle.revision import add_items
from twotower.schema import FIRST_ROW

Connect = Callable[..., AbstractContextManager[TestClient]]
NO_USER = {"k": 5}


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return load_bundle(bundle)


def sent(opened: Bundle, n: int, *, seed: int = 3) -> list[dict[str, Any]]:
    """Events of some known and new users after the end of the data, most of them of one rare item."""
    drawn, dataset = np.random.default_rng(seed), opened.dataset
    rare = int(np.argmin(opened.arrays.recent_event_count[FIRST_ROW:])) + FIRST_ROW
    rows = np.where(drawn.random(n) < 0.7, rare, drawn.integers(FIRST_ROW, dataset.n_item_rows, n))
    return [
        {
            "event_id": f"e{seed}-{at}",
            "user": f"new-{at}" if at % 2 else str(dataset.user_ids[FIRST_ROW + at]),
            "item_id": str(dataset.item_ids[row]),
            "time_s": opened.moment_s + 60 * at,
            "stars": None if at % 3 else 4.0,
        }
        for at, row in enumerate(rows.tolist())
    ]


def ask(client: TestClient, opened: Bundle, **more: Any) -> list[Any]:
    """Lists of many users and of a request without a user: ids and scores."""
    users = [str(user) for user in opened.dataset.user_ids[FIRST_ROW : FIRST_ROW + 60]]
    body = {"requests": [*({"user": user, "k": 10, **more} for user in users), {**NO_USER, **more}]}
    answer = client.post("/v1/recommend:batch", json=body).json()
    return [[(item["item_id"], item["score"]) for item in one["items"]] for one in answer["answers"]]


def give(client: TestClient, keyed: dict[str, str], events: list[dict[str, Any]]) -> None:
    assert client.post("/v1/events", json={"events": events}, headers=keyed).json()["accepted"] == len(events)


def refresh(client: TestClient, keyed: dict[str, str]) -> Any:
    answer = client.post("/admin/refresh", headers=keyed)
    assert answer.status_code == 200, answer.text
    return answer.json()


def metric(client: TestClient, name: str) -> float:
    (line,) = (line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
    return float(line.rpartition(" ")[2])


def test_served_lists_equal_those_of_a_bundle_refreshed_offline(connect: Connect, opened: Bundle, keyed: dict[str, str]) -> None:
    events = sent(opened, 60)
    with connect(refresh_s=0) as client:
        frozen = ask(client, opened)
        give(client, keyed, events)
        assert ask(client, opened)[-1] == frozen[-1]  # the fallback list waits for a refresh
        told = refresh(client, keyed)
        assert told["as_of"] == opened.moment_s + 60 * 59 + 1 and told["events"]["counted"] == 60
        served, answer = ask(client, opened), client.post("/v1/recommend", json=NO_USER).json()
        assert answer["as_of"] == told["as_of"] and answer["items"][0]["item_id"] == max(
            (event["item_id"] for event in events), key=[event["item_id"] for event in events].count
        )
        assert client.get("/v1/similar", params={"id": events[0]["item_id"]}).json()["as_of"] == told["as_of"]
        assert client.get("/health/ready").json()["as_of"] == told["as_of"]
        assert metric(client, "twotower_as_of_seconds") == told["as_of"]
        assert metric(client, 'twotower_item_events{use="counted"}') == 60
        assert served != frozen and served[-1] != frozen[-1]
    refresher = Refresher(opened)
    columns = {"users": "user", "item_ids": "item_id", "time_s": "time_s", "event_types": "event_type", "stars": "stars"}
    given: dict[str, list[Any]] = {name: [event.get(key) for event in events] for name, key in columns.items()}
    refresher.add(**given)
    fresh = refresher.bundle_at(int(time.time()))
    assert fresh is not None
    quiet = np.arange(FIRST_ROW, FIRST_ROW + 60)[1::2]  # users without events of their own
    found = fresh.retrieve(opened.dataset.histories(quiet, np.full(len(quiet), fresh.moment_s)), 10)
    for row, items, scores in zip(quiet.tolist(), found.items, found.scores, strict=True):
        names, values = zip(*served[row - FIRST_ROW], strict=True)
        assert list(names) == [str(opened.dataset.item_ids[item]) for item in items]
        np.testing.assert_allclose(values, scores, atol=6e-5)  # four digits


def test_a_refresh_comes_by_itself_and_a_restart_has_it_at_once(connect: Connect, opened: Bundle, keyed: dict[str, str]) -> None:
    events = sent(opened, 30)
    with connect(refresh_s=0.05) as client:
        give(client, keyed, events)
        end = time.monotonic() + 30
        while client.get("/health/ready").json()["as_of"] != events[-1]["time_s"] + 1:
            assert time.monotonic() < end
            time.sleep(0.02)
        lists = ask(client, opened)
    with connect(refresh_s=60) as again:
        assert ask(again, opened) == lists


def test_each_answer_is_of_one_moment_while_items_are_refreshed(connect: Connect, opened: Bundle, keyed: dict[str, str]) -> None:
    events = sent(opened, 24)
    body = {"requests": [{"user": f"unknown-{at}", **NO_USER} for at in range(8)]}  # users without events
    seen, wrong, done = dict[int, Any](), list[Any](), threading.Event()

    def ask_on(client: TestClient) -> None:
        while not done.is_set():
            answer = client.post("/v1/recommend:batch", json=body)
            one = answer.json()
            lists = str([[item["item_id"] for item in part["items"]] for part in one.get("answers", [])])
            if answer.status_code != 200 or seen.setdefault(one["as_of"], lists) != lists or "error" in lists:
                wrong.append(one)

    with connect(refresh_s=0) as client:
        threads = [threading.Thread(target=ask_on, args=(client,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for start in range(0, 24, 4):
                give(client, keyed, events[start : start + 4])
                refresh(client, keyed)
                time.sleep(0.05)
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert not wrong and len(seen) >= 4


def test_a_new_bundle_begins_with_the_accepted_events(
    connect: Connect, opened: Bundle, bundles: tuple[Path, Path], keyed: dict[str, str], tmp_path: Path
) -> None:
    served, file = tmp_path / "served", tmp_path / "new.jsonl"
    shutil.copytree(opened.path, served)
    events = sent(opened, 20)
    with connect(folder=served) as client:
        give(client, keyed, events)
        as_of = refresh(client, keyed)["as_of"]
        file.write_text('{"item_id": "opened-today", "name": "Ama\'s Noodle Bar"}\n')
        add_items(served, file)
        assert client.post("/admin/reload", headers=keyed).status_code == 200
        assert client.post("/v1/recommend", json=NO_USER).json()["as_of"] == as_of
        hot = [{"event_id": f"h{at}", "user": f"h{at}", "item_id": "opened-today", "time_s": as_of + at} for at in range(90)]
        give(client, keyed, hot)
        refresh(client, keyed)
        assert client.post("/v1/recommend", json=NO_USER).json()["items"][0]["item_id"] == "opened-today"
        assert client.post("/admin/reload", json={"bundle": str(bundles[1])}, headers=keyed).status_code == 200
        told = refresh(client, keyed)
        assert told["events"] == {"counted": 20, "in_bundle": 0, "unknown_item": 90, "future": 0, "negative": 0}
        assert told["as_of"] == as_of


def test_servers_of_one_redis_give_the_same_lists(
    connect: Connect, opened: Bundle, keyed: dict[str, str], redis_server: tuple[str, int]
) -> None:
    events = sent(opened, 40)
    url, _ = redis_server
    with connect(events=url, refresh_s=0) as one, connect(events=url, refresh_s=0) as other:
        give(one, keyed, events[:20])
        refresh(one, keyed)
        give(other, keyed, events[20:])
        told = [refresh(client, keyed) for client in (one, other)]
        assert told[0] == told[1] and told[0]["events"]["counted"] == 40
        mine, theirs = ask(one, opened), ask(other, opened)
        assert [[name for name, _ in each] for each in mine] == [[name for name, _ in each] for each in theirs]
        np.testing.assert_allclose(
            [score for each in mine for _, score in each], [score for each in theirs for _, score in each], atol=1.1e-4
        )


def test_a_failed_refresh_is_one_line_and_changes_no_answer(
    connect: Connect, opened: Bundle, keyed: dict[str, str], redis_server: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    url, process = redis_server
    with connect(events=url, refresh_s=0) as client:
        give(client, keyed, sent(opened, 20))
        as_of, lists = refresh(client, keyed)["as_of"], ask(client, opened)
        os.kill(process, signal.SIGKILL)
        caplog.clear()
        answer = client.post("/admin/refresh", headers=keyed)
        assert answer.status_code == 503 and "not refreshed" in answer.json()["error"]["message"]
        lines = [record.getMessage() for record in caplog.records if "refresh failed" in record.getMessage()]
        assert len(lines) == 1 and "\n" not in lines[0] and str(as_of) in lines[0]
        assert ask(client, opened) == lists and client.get("/health/ready").json()["as_of"] == as_of
        assert metric(client, 'twotower_refreshes_total{outcome="failed"}') == 1


def test_a_refresh_needs_the_role_of_an_admin(connect: Connect) -> None:
    with connect() as client:
        assert client.post("/admin/refresh").status_code == 401
    with connect(key=None) as client:
        assert client.post("/admin/refresh").status_code == 403


@pytest.mark.slow
def test_kills_while_items_are_refreshed_lose_nothing(bundle: Path, tmp_path: Path, strength: Any) -> None:
    found = strength.kill_often(bundle, tmp_path, 4, 7, options=("--refresh-s", "0.02"))
    assert found["acknowledged"] and not found["lost"] and not found["tracebacks"]
