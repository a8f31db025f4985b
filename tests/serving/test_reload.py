"""Test reloads: each response from one version, no response lost, invalid bundles rejected."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.bundle.revision import add_items, remove_items

Connect = Callable[..., AbstractContextManager[TestClient]]
Folders = tuple[Path, Path]


def reload(client: TestClient, keyed: dict[str, str], folder: Path | None) -> Any:
    return client.post("/admin/reload", json={"bundle": folder and str(folder)}, headers=keyed)


def test_answers_under_way_are_each_of_one_bundle_while_two_take_turns(
    connect: Connect, bundles: Folders, keyed: dict[str, str]
) -> None:
    with connect() as client:
        users = [user["user"] for user in client.get("/v1/users?limit=8").json()["users"]]
        asked = {"requests": [{"user": user, "k": 5} for user in users]}
        expected: dict[str, Any] = {}
        for folder in bundles:
            assert reload(client, keyed, folder).status_code == 200
            answer = client.post("/v1/recommend:batch", json=asked).json()
            expected[answer["version"]] = [[place["item_id"] for place in one["items"]] for one in answer["answers"]]
        assert len(expected) == 2 and len({str(lists) for lists in expected.values()}) == 2
        done, wrong, seen = threading.Event(), [], []

        def ask() -> None:
            while not done.is_set():
                answer = client.post("/v1/recommend:batch", json=asked)
                body = answer.json()
                lists = [[place["item_id"] for place in one["items"]] for one in body.get("answers", [])]
                if answer.status_code != 200 or lists != expected[body["version"]]:
                    wrong.append(body)
                seen.append(body.get("version"))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(6):
                version, end = reload(client, keyed, bundles[number % 2]).json()["version"], time.monotonic() + 30
                came = len(seen)
                while version not in seen[came:] and not wrong:  # until a response has come from it
                    assert time.monotonic() < end
                    time.sleep(0.001)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not wrong and set(seen) == set(expected)


def test_items_come_and_go_without_a_restart(connect: Connect, bundle: Path, keyed: dict[str, str], tmp_path: Path) -> None:
    served, file = tmp_path / "served", tmp_path / "new.jsonl"
    shutil.copytree(bundle, served)
    file.write_text('{"item_id": "opened-today", "name": "Ama\'s Noodle Bar"}\n')
    only = {"filter": 'id in ["opened-today"]', "k": 5}
    with connect(folder=served) as client:
        assert client.post("/v1/recommend", json=only).json()["items"] == []
        add_items(served, file)
        assert reload(client, keyed, None).status_code == 200
        assert [place["name"] for place in client.post("/v1/recommend", json=only).json()["items"]] == ["Ama's Noodle Bar"]
        assert [item["item_id"] for item in client.get("/v1/items?q=noodle bar").json()["items"]][:1] == ["opened-today"]
        remove_items(served, ["opened-today"])
        assert reload(client, keyed, None).status_code == 200
        assert client.post("/v1/recommend", json=only).json()["items"] == []
        assert "opened-today" not in [item["item_id"] for item in client.get("/v1/items?q=noodle bar").json()["items"]]
        assert client.get("/v1/items/opened-today").status_code == 200, "in histories it still counts"


def test_a_bad_bundle_is_refused_and_the_one_before_goes_on(
    connect: Connect, bundle: Path, keyed: dict[str, str], tmp_path: Path
) -> None:
    with connect() as client:
        version = client.get("/health/ready").json()["version"]
        cut = tmp_path / "cut"
        shutil.copytree(bundle, cut)
        weights = next(cut.rglob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1])
        for folder in (tmp_path / "nowhere", cut):
            answer = reload(client, keyed, folder)
            assert answer.status_code == 422 and str(folder) in answer.json()["error"]["message"]
        assert "is not a bundle" in reload(client, keyed, Path("a\0b")).json()["error"]["message"]
        assert client.post("/v1/recommend", json={"k": 1}).json()["version"] == version
        assert 'twotower_reloads_total{outcome="refused"} 3.0' in client.get("/metrics").text


def test_a_bundle_that_loads_and_cannot_answer_is_refused(
    connect: Connect, keyed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from twotower.serving.model_version import Engine

    def broken(*_: Any) -> Any:
        raise KeyError("a tensor of another shape")

    with connect() as client:
        version = client.get("/health/ready").json()["version"]
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "answer", broken)
            answer = reload(client, keyed, None)
        assert answer.status_code == 422 and "fails on a test request" in answer.json()["error"]["message"]
        assert client.post("/v1/recommend", json={"k": 1}).json()["version"] == version


def test_without_a_folder_the_same_is_read_again_and_events_stay(
    connect: Connect, bundles: Folders, keyed: dict[str, str], tmp_path: Path
) -> None:
    served = tmp_path / "served"
    shutil.copytree(bundles[0], served)
    with connect(folder=served) as client:
        item = client.get("/v1/items?limit=1").json()["items"][0]["item_id"]
        event = {"event_id": "a", "user": "new", "item_id": item}
        client.post("/v1/events", json={"events": [event]}, headers=keyed)
        shutil.rmtree(served)
        shutil.copytree(bundles[1], served)
        found = reload(client, keyed, None).json()
        assert found["version"] != found["previous_version"]
        places = client.post("/v1/recommend", json={"user": "new", "k": 300}).json()
        assert places["version"] == found["version"] and item not in [place["item_id"] for place in places["items"]]
