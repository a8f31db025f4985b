"""Test that items are added, changed and removed while a server runs: durably, on every server, and exactly."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from starlette.testclient import TestClient

from twotower.bundle.bundle import load_bundle
from twotower.bundle.changed_items import ItemChange, changed
from twotower.bundle.revision import add_items, remove_items
from twotower.bundle.signature import sign_bundle
from twotower.schema import UNKNOWN
from twotower.serving import event_journal, redis_store
from twotower.serving.event_store import open_store
from twotower.serving.updater import Trial
from twotower.utils.config_serving import Limits
from twotower.utils.console import log

Connect = Callable[..., AbstractContextManager[TestClient]]
Keyed = dict[str, str]


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the address of an empty event store."""
    if request.param == "sqlite":
        return f"sqlite:{tmp_path / 'store.sqlite'}"
    name = f"{{{uuid.uuid4().hex}}}"
    monkeypatch.setattr(redis_store.RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
    return str(request.getfixturevalue("redis_url"))


def change(client: TestClient, keyed: Keyed, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/items", json=body, headers=keyed)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refresh(client: TestClient, keyed: Keyed) -> dict[str, Any]:
    return dict(client.post("/admin/refresh", headers=keyed).json())


NO_ANSWERS = Limits(rate=0, keep_answers_days=0)  # answers are logged later, and would be refused at any moment


def listed(client: TestClient, **body: Any) -> list[str]:
    return [item["item_id"] for item in client.post("/v1/recommend", json={"k": 100, **body}).json()["items"]]


def columns(client: TestClient, item_id: str) -> dict[str, Any]:
    return dict(client.get(f"/v1/items/{item_id}").json()["columns"])


def test_items_are_added_changed_removed_and_reset(connect: Connect, keyed: Keyed, url: str) -> None:
    with connect(events=url, refresh_s=0) as client:
        first, second, third = (item["item_id"] for item in client.get("/v1/items?limit=3").json()["items"])
        before, lists = columns(client, first), listed(client)
        new = {**before, "item_id": "new/one", "name": "A new one"}
        body = {"items": [new, {"item_id": first, "name": "Renamed"}], "remove": [second]}
        assert change(client, keyed, **body) == {"accepted": 3, "items_changed": 1}
        assert client.get("/v1/items/new%2Fone").status_code == 404 and columns(client, first) == before, "not yet"
        assert refresh(client, keyed)["items_changed"] == 1

        def check(client: TestClient) -> None:
            assert columns(client, first) == {**before, "name": "Renamed"}
            assert columns(client, "new%2Fone") == new
            assert second not in listed(client) and "new/one" in listed(client, filter='name == "A new one"')
            assert client.get("/v1/items?q=a new one").json()["items"][0]["item_id"] == "new/one"
            history = [{"item_id": second}, {"item_id": "new/one"}]
            assert client.post("/v1/recommend", json={"history": history}).json()["unknown_items"] == []
            assert client.get("/health/ready").json()["items_changed"] == 1
            assert "twotower_items_changed 1.0" in client.get("/metrics").text

        check(client)
        event = {"event_id": "1", "user": "u", "item_id": "new/one"}
        assert client.post("/v1/events", json={"events": [event]}, headers=keyed).status_code == 200
        assert refresh(client, keyed)["events"]["counted"] == 1, "a new item has events"
    with connect(events=url, refresh_s=0) as client:  # after a restart, or another server of the store
        check(client)
        assert client.get("/v1/users/u/history").json()["events"][0]["name"] == "A new one"
        assert client.post("/admin/reload", headers=keyed).status_code == 200
        check(client)
        assert change(client, keyed, items=[{"item_id": second, "name": "Back"}], reset=["new/one", first])["items_changed"] == 2
        assert client.delete(f"/v1/items/{third}", headers=keyed).json() == {"accepted": 1, "items_changed": 3}
        refresh(client, keyed)
        assert columns(client, first) == before and client.get("/v1/items/new%2Fone").status_code == 404
        assert columns(client, second)["name"] == "Back"
        assert set(listed(client)) == set(lists) - {third}


def test_lists_equal_those_of_the_bundle_written_with_the_same_items(
    connect: Connect, keyed: Keyed, bundle: Path, tmp_path: Path
) -> None:
    loaded = load_bundle(bundle)
    ids = [str(one) for one in loaded.dataset.item_ids[2:12]]
    rows = [{**loaded.dataset.items.slice(at, 1).to_pylist()[0], "item_id": f"new {at}"} for at in range(5)]
    shutil.copytree(bundle, tmp_path / "written")
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    add_items(tmp_path / "written", tmp_path / "new.jsonl")
    remove_items(tmp_path / "written", ids[:3])
    asked = [{"history": [{"item_id": one}], "k": 50, "exclude_seen": False} for one in ids[3:]]
    with connect(folder=tmp_path / "written", events=f"sqlite:{tmp_path / 'a'}", refresh_s=0) as client:
        expected = [client.post("/v1/recommend", json=one).json()["items"] for one in asked]
    with connect(events=f"sqlite:{tmp_path / 'b'}", refresh_s=0) as client:
        change(client, keyed, items=rows, remove=ids[:3])
        refresh(client, keyed)
        found = [client.post("/v1/recommend", json=one).json()["items"] for one in asked]
    for one, other in zip(found, expected, strict=True):
        assert [item["item_id"] for item in one] == [item["item_id"] for item in other]
        np.testing.assert_array_equal([item["score"] for item in one], [item["score"] for item in other])


def test_odd_changes_are_served_too(connect: Connect, keyed: Keyed, url: str) -> None:
    with connect(events=url, refresh_s=0) as client:
        (known,) = (item["item_id"] for item in client.get("/v1/items?limit=1").json()["items"])
        change(client, keyed, items=[{"item_id": "bare"}], remove=[known])
        change(client, keyed, items=[{"item_id": known, "name": "again"}])
        refresh(client, keyed)
        assert columns(client, "bare")["name"] is None and known in listed(client)
        assert client.delete("/v1/items/" + 300 * "x", headers=keyed).status_code == 404
        event = {"event_id": "1", "user": "u", "item_id": "bare"}
        assert client.post("/v1/events", json={"events": [event]}, headers=keyed).status_code == 200
        change(client, keyed, reset=["bare"])
    with connect(events=url, refresh_s=0) as client:
        assert client.get("/v1/items/bare").status_code == 404, "the store is still that of this bundle"


def test_a_second_version_gets_the_changes_after_a_reload(
    connect: Connect, keyed: Keyed, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(bundles[0], tmp_path / "copy")
    remove_items(tmp_path / "copy", [str(load_bundle(bundles[0]).dataset.item_ids[9])])
    with connect(refresh_s=0, trial=Trial(bundles[1], 0.5)) as client:
        (known,) = (item["item_id"] for item in client.get("/v1/items?limit=1").json()["items"])
        change(client, keyed, remove=[known])
        body = {"bundle": str(tmp_path / "copy")}
        assert client.post("/admin/reload", json=body, headers=keyed).status_code == 200
        refresh(client, keyed)
        assert not any(known in listed(client, user=f"u{number}") for number in range(12)), "of both versions"


def test_an_old_change_does_not_bring_back_what_a_later_bundle_removed(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "later")
    name = str(load_bundle(bundle).dataset.item_ids[2])
    remove_items(tmp_path / "later", [name])
    fresh, _ = changed(load_bundle(tmp_path / "later"), {name: ItemChange({"name": "x"})})
    assert not fresh.arrays.offered[2]
    again, _ = changed(load_bundle(tmp_path / "later"), {name: ItemChange({"name": "x"}, removed=False)})
    assert again.arrays.offered[2]


def test_only_sent_columns_are_checked(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    items = loaded.dataset.items
    odd = items.set_column(items.column_names.index("latitude"), "latitude", pa.array([200.0] * len(items)))
    loaded.dataset.__dict__["items"] = odd
    name = str(items["item_id"][0])
    fresh, problems = changed(loaded, {name: ItemChange({"name": "x"})})
    assert problems == [] and fresh.dataset.items["name"][0].as_py() == "x"


def test_a_changed_column_changes_its_feature_alone(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    first, other = loaded.dataset.items.slice(0, 2).to_pylist()
    moved = {name: other[name] for name in ("latitude", "longitude")}
    fresh, problems = changed(loaded, {first["item_id"]: ItemChange(moved)})
    assert problems == [] and fresh.dataset.n_items == loaded.dataset.n_items
    same = (fresh.arrays.vectors == loaded.arrays.vectors).all(axis=1)
    assert np.flatnonzero(~same).tolist() == [2]
    back, _ = changed(fresh, {first["item_id"]: ItemChange({name: first[name] for name in moved})})
    np.testing.assert_allclose(back.arrays.vectors, loaded.arrays.vectors, atol=1e-6)
    for name, values in loaded.dataset.item_features.items():
        np.testing.assert_array_equal(back.dataset.item_features[name], values, name)


@pytest.mark.parametrize(
    ("body", "location", "said"),
    [
        ({"items": [{"item_id": "a", "nmae": "x"}]}, "items.0", "no column 'nmae'.*name"),
        ({"items": [{"item_id": "a"}, {"item_id": "b", "latitude": 91}]}, "items.1", "latitude is 91"),
        ({"items": [{"item_id": "a"}, {"item_id": "a"}]}, "items.1", "named twice"),
        ({"items": [{"item_id": "a"}], "remove": ["a"]}, "remove.0", "named twice"),
        ({"items": [{"name": "x"}]}, "items.0.item_id", "required"),
        ({"items": [{"item_id": "a", "name": {"x": 1}}]}, "items.0", "name is"),
        ({}, None, "from 1 to 1,000 items"),
        ({"remove": ["a"] * 1001}, None, "from 1 to 1,000 items"),
        ({"item": []}, "item", "not permitted"),
        ({"items": [{"item_id": "a", "categories": "[" * 3000}]}, "items.0", "categories is .* must be a list"),
        ({"items": [{"item_id": "a", "latitude": "1_0"}]}, "items.0", "latitude is '1_0'"),
        ({"remove": ["a"], "reset": ["a"]}, "reset.0", "named twice"),
    ],
)
def test_what_cannot_be_an_item_is_refused_and_nothing_is_stored(
    client: TestClient, keyed: Keyed, body: dict[str, Any], location: str | None, said: str
) -> None:
    answer = client.post("/v1/items", json=body, headers=keyed)
    error = answer.json()["error"]
    assert answer.status_code == 422 and error.get("location") == location, error
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(error["message"])
    assert refresh(client, keyed)["items_changed"] == 0


def test_changes_need_a_key_that_may_write(client: TestClient) -> None:
    assert client.post("/v1/items", json={"remove": ["a"]}).status_code == 401
    assert client.delete("/v1/items/a").status_code == 401


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, logger=log.name)
    yield caplog


def test_a_change_that_another_catalogue_cannot_have_is_passed_over(
    connect: Connect, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    url = f"sqlite:{tmp_path / 'store'}"
    store = open_store(url)
    store.change_items({"a": ItemChange({"colour": "red"}), "b": ItemChange({"name": "B"})}, [])
    store.close()
    with connect(events=url, refresh_s=0) as client:
        assert client.get("/v1/items/a").status_code == 404 and columns(client, "b")["name"] == "B"
    assert any("1 changed items are not served with" in text and "colour" in text for text in logged.messages)


def test_changes_outlive_retention_and_forgotten_users(url: str) -> None:
    store = open_store(url)
    store.change_items({"b": ItemChange({"name": "B"}, removed=True)}, [])
    store.expire(2**40, 2**40)
    store.forget("b")
    assert store.item_changes(0) == (1, {"b": ItemChange({"name": "B"}, removed=True)}) and store.item_changes(1) is None
    store.close()


def served(client: TestClient) -> list[Any]:
    """Return the engines of the served versions."""
    current = client.app.state.service.current  # type: ignore[attr-defined]
    return [one.engine for one in (current, current.rival, current.shadow) if one is not None]


@pytest.mark.parametrize("share", [0.5, None], ids=["split", "shadow"])
def test_both_versions_get_a_change_at_their_refresh(
    connect: Connect, keyed: Keyed, bundles: tuple[Path, Path], url: str, share: float | None
) -> None:
    with connect(events=url, refresh_s=0, trial=Trial(bundles[1], share)) as client:
        (known,) = (item["item_id"] for item in client.get("/v1/items?limit=1").json()["items"])
        change(client, keyed, items=[{"item_id": "bare", "name": "A bare one"}])
        assert client.delete(f"/v1/items/{known}", headers=keyed).status_code == 200
        assert [engine.row("bare") for engine in served(client)] == [UNKNOWN, UNKNOWN]
        refresh(client, keyed)
        for engine in served(client):
            offered = engine.recommender.offered
            assert engine.row("bare") != UNKNOWN and offered[engine.row("bare")] and not offered[engine.row(known)]
        assert not any(known in listed(client, user=f"u{number}") for number in range(6))
        change(client, keyed, reset=["bare", known])
        refresh(client, keyed)
        assert all(engine.row("bare") == UNKNOWN and known in listed(client) for engine in served(client))


def test_a_signed_bundle_is_served_with_changes_and_stays_as_it_was_signed(
    connect: Connect, keyed: Keyed, bundle: Path, tmp_path: Path, url: str
) -> None:
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    shutil.copytree(bundle, tmp_path / "signed")
    sign_bundle(tmp_path / "signed", tmp_path / "key")
    before = {path: path.read_bytes() for path in (tmp_path / "signed").rglob("*") if path.is_file()}
    for again in range(2):
        with connect(folder=tmp_path / "signed", events=url, refresh_s=0, trusted_key=tmp_path / "pub") as client:
            if not again:
                change(client, keyed, items=[{"item_id": "bare", "name": "A bare one"}])
                refresh(client, keyed)
            assert client.get("/v1/items/bare").json()["name"] == "A bare one"
            assert client.post("/admin/reload", headers=keyed, json={}).status_code == 200
            assert client.get("/v1/items/bare").status_code == 200
    assert {path: path.read_bytes() for path in (tmp_path / "signed").rglob("*") if path.is_file()} == before


def test_a_file_that_has_become_read_only_is_told_and_lists_go_on(
    connect: Connect, keyed: Keyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(events=f"sqlite:{tmp_path / 'e'}", refresh_s=0, limits=NO_ANSWERS) as client:
        (known,) = (item["item_id"] for item in client.get("/v1/items?limit=1").json()["items"])
        journal = client.app.state.service.journal  # type: ignore[attr-defined]
        journal._store._connection.execute("PRAGMA query_only = 1")
        refused = client.post("/v1/items", json={"remove": [known]}, headers=keyed)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["message"] == (
            "The items were not changed: cannot write to the event file. Send them again later."
        )
        assert client.delete(f"/v1/items/{known}", headers=keyed).status_code == 503
        refresh(client, keyed)  # reads the file
        ready = client.get("/health/ready")
        assert ready.status_code == 200 and "cannot write to the event file" in ready.json()["events"]
        assert "twotower_event_store_up 0.0" in client.get("/metrics").text
        assert known in listed(client)
        monkeypatch.setattr(event_journal, "REFUSED_S", 0.0)
        assert client.delete(f"/v1/items/{known}", headers=keyed).status_code == 503
        refresh(client, keyed)
        assert client.get("/health/ready").json()["events"] == "ok", "after a time without writes nothing more is known"
        journal._store._connection.execute("PRAGMA query_only = 0")
        assert client.delete(f"/v1/items/{known}", headers=keyed).status_code == 200
        assert client.get("/health/ready").json()["events"] == "ok"
        refresh(client, keyed)
        assert known not in listed(client)


def test_changes_that_cannot_be_read_are_left_out(connect: Connect, keyed: Keyed, url: str) -> None:
    with connect(events=url, refresh_s=0) as client:
        change(client, keyed, items=[{"item_id": "bare", "name": "A bare one"}, {"item_id": "worn", "name": "Worn"}])
        if url.startswith("sqlite:"):
            with sqlite3.connect(url.removeprefix("sqlite:")) as opened:
                opened.execute("UPDATE item_changes SET value = '{' WHERE item_id = 'worn'")
        else:
            import redis

            key = f"{redis_store.RedisStore._KEYS[0]}:item_changes"
            with redis.Redis.from_url(url) as store:
                store.hset(key, json.dumps(["worn", "name"]), b"\xff{")
                store.hset(key, "{", "1")
        assert refresh(client, keyed)["items_changed"] == 1
        assert client.get("/v1/items/bare").json()["name"] == "A bare one"
        change(client, keyed, reset=["worn"])
        refresh(client, keyed)
        assert client.get("/v1/items/worn").status_code == 404
