"""Test the feedback loop: events that name the list they are about, exports, retention, and users who are forgotten."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from starlette.testclient import TestClient

from twotower.bundle.signature import sign_bundle
from twotower.cli import main
from twotower.errors import BusyError
from twotower.serving.batching import Batcher
from twotower.serving.event_export import export_events, since_of
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event
from twotower.serving.feedback import FLUSH_S, Feedback
from twotower.serving.kept_versions import KeptVersions, kept_beside
from twotower.serving.prometheus import Meters
from twotower.serving.redis_store import RedisStore
from twotower.serving.schemas import RecommendIn
from twotower.serving.service import Service
from twotower.serving.stored_rows import every_answer, every_event
from twotower.utils.config_serving import Limits
from twotower.utils.console import log

Connect = Callable[..., AbstractContextManager[TestClient]]
Keyed = dict[str, str]


def answered(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/recommend", json={"k": 5, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def post(client: TestClient, keyed: Keyed, *events: dict[str, Any]) -> Any:
    return client.post("/v1/events", json={"events": events}, headers=keyed)


def a_user(client: TestClient) -> str:
    return str(client.get("/v1/users/random").json()["users"][0]["user"])


def rows(path: Path | io.BytesIO) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_impressions_and_outcomes_name_their_list_and_count_once(connect: Connect, keyed: Keyed, tmp_path: Path) -> None:
    with connect() as client:
        answer = answered(client, user=a_user(client))
        shown, clicked = ids(answer), {"request_id": answer["request_id"], "item_id": ids(answer)[1]}
        assert post(client, keyed, {"request_id": answer["request_id"], "shown": shown}, clicked).json() == {
            "accepted": 6,
            "repeated": 0,
        }
        again = {**clicked, "event_id": "another-id"}
        assert post(client, keyed, {"request_id": answer["request_id"], "shown": shown[::-1]}, again).json()["repeated"] == 6
        (version,) = client.get("/admin/versions", headers=keyed).json()["versions"]
    assert version["outcomes"]["lists"] == 1 and version["outcomes"]["click_through"]["value"] == 1.0
    export_events(f"sqlite:{tmp_path / 'events.sqlite'}", tmp_path / "events.parquet")
    found = rows(tmp_path / "events.parquet")
    assert [(row["item_id"], row["position"]) for row in found[:5]] == [(item, n) for n, item in enumerate(shown, 1)]
    assert {row["request"] for row in found} == {answer["request_id"]} and found[0]["event_type"] == "impression"
    assert (found[5]["item_id"], found[5]["position"]) == (shown[1], 2) and found[5]["event_type"] != "impression"


def test_each_list_of_a_batch_has_its_own_name(client: TestClient, keyed: Keyed) -> None:
    user = a_user(client)
    answers = client.post("/v1/recommend:batch", json={"requests": [{"user": user, "k": 3}, {"k": 3}]}).json()["answers"]
    assert answers[0]["request_id"] != answers[1]["request_id"] and answers[0]["version"] == answers[1]["version"]
    other = next(item for item in ids(answers[1]) if item not in ids(answers[0]))
    wrong = post(client, keyed, {"request_id": answers[0]["request_id"], "item_id": other})
    assert wrong.status_code == 422 and "is not in the list" in wrong.text
    assert post(client, keyed, {"request_id": answers[1]["request_id"], "item_id": other, "user": "guest"}).json()["accepted"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"request_id": "of-no-answer"}, "Unknown request_id 'of-no-answer'"),
        ({"item_id": "of-no-bundle"}, "Unknown item"),
        ({"user": "somebody-else"}, "made for another user"),
        ({"position": 6}, "outside the list"),
        ({"position": True}, "valid integer"),
        ({"time_s": 1_000_000}, "before the list was made"),
        ({"shown": ["a", "b"]}, "either item_id or shown"),
        ({"item_id": None}, "either item_id or shown"),
        ({"item_id": None, "shown": []}, "shown"),
        ({"request_id": None}, "needs event_id and user"),
        ({"request_id": None, "event_id": "a", "user": "u", "position": 1}, "belong to a list"),
        ({"event_type": "teleport"}, "Unknown event type"),
    ],
)
def test_what_does_not_fit_its_list_is_one_sentence_and_stores_nothing(
    client: TestClient, keyed: Keyed, change: dict[str, Any], words: str
) -> None:
    answer = answered(client, user=a_user(client))
    right = {"request_id": answer["request_id"], "item_id": ids(answer)[0]}
    wrong = {name: value for name, value in {**right, **change}.items() if value is not None}
    refused = post(client, keyed, right, wrong)
    assert refused.status_code == 422 and words in refused.json()["error"]["message"], refused.text
    assert refused.json()["error"]["location"].startswith("events.1") and "\n" not in refused.json()["error"]["message"]
    assert post(client, keyed, right).json() == {"accepted": 1, "repeated": 0}, "the first of both was not stored"


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_the_first_list_of_an_id_counts_in_every_process(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:{tmp_path / 'e'}" if kind == "sqlite" else request.getfixturevalue("redis_url")
    name = f"{{{uuid.uuid4().hex}}}"
    monkeypatch.setattr(RedisStore, "_KEYS", (f"{name}:events", f"{name}:ids"))
    items = [SimpleNamespace(item_id="a")]

    async def both() -> None:
        processes = []
        for _ in range(2):
            journal = Journal(open_store(url, shared=True), follow=False)
            writes = Batcher("events", max_waiting=9, max_batch=9)
            meters = Meters(lambda: 0.0, lambda: True)
            processes.append(Feedback(journal, Limits(), meters, writes, lambda _: nullcontext()))
        one, other = processes
        one.answered("r", "v", RecommendIn(user="one"), items, [1.0])
        assert (await one._lists({"r"}))["r"].user == "one", "at once"
        other.answered("r", "v", RecommendIn(user="two"), items, [1.0])
        for _ in range(2):
            assert [(await process._lists({"r"}))["r"].user for process in processes] == ["one", "one"]
            await asyncio.sleep(5 * FLUSH_S)
        assert one._first == {"r"} and other._first == set() and "r" not in other._recent
        monkeypatch.setattr(one.journal._store, "log_answers", refuse)
        one.answered("s", "v", RecommendIn(user="one"), items, [1.0])
        assert (await one._lists({"s"}))["s"].user == "one", "the store has none, so it is the first"
        for process in processes:
            process.writes.close()
            process.journal.close()

    def refuse(_: Any) -> list[bool]:
        raise BusyError("the disk is full")

    asyncio.run(both())


def test_answers_are_found_after_a_restart_and_not_without_a_log(connect: Connect, keyed: Keyed) -> None:
    with connect() as client:
        answer = answered(client, user=a_user(client))
    outcome = {"request_id": answer["request_id"], "item_id": ids(answer)[0]}
    with connect() as client:
        assert post(client, keyed, outcome).json()["accepted"] == 1
    with connect(limits=Limits(rate=0, keep_answers_days=0)) as client:
        refused = post(client, keyed, outcome)
        assert refused.status_code == 422 and "keep_answers_days" in refused.text


def test_the_export_over_http_needs_a_key_and_has_the_same_rows(connect: Connect, keyed: Keyed, tmp_path: Path) -> None:
    with connect() as client:
        answer = answered(client, user=a_user(client))
        post(client, keyed, {"request_id": answer["request_id"], "shown": ids(answer)})
        post(client, keyed, {"event_id": "1", "user": "u", "item_id": ids(answer)[0], "time_s": 86_400, "stars": 4})
        assert client.get("/v1/events/export").status_code == 401
        whole = client.get("/v1/events/export", headers=keyed)
        late = client.get("/v1/events/export", params={"since": "2020-01-01"}, headers=keyed)
        answers = client.get("/v1/events/export/answers", headers=keyed)
        for since in ("yesterday", "2999-01-01", "-5", ""):
            wrong = client.get("/v1/events/export", params={"since": since}, headers=keyed)
            assert wrong.status_code == 422 and "since is" in wrong.json()["error"]["message"]
        url = f"sqlite:{tmp_path / 'events.sqlite'}"
        assert main(["events", "export", url, "--out", str(tmp_path / "e.parquet")]) == 0, "while the server runs"
        assert main(["events", "export", url, "--out", str(tmp_path / "e.parquet")]) == 2, "it exists"
        assert main(["events", "backup", url, "--out", str(tmp_path / "copy.sqlite")]) == 0
    assert rows(io.BytesIO(whole.content)) == rows(tmp_path / "e.parquet") and len(rows(tmp_path / "e.parquet")) == 6
    assert len(rows(io.BytesIO(late.content))) == 5
    (logged,) = rows(io.BytesIO(answers.content))
    assert logged["items"] == ids(answer) and logged["propensity"] == [1.0] * 5 and logged["version"] == answer["version"]
    copy = open_store(f"sqlite:{tmp_path / 'copy.sqlite'}")
    assert len([event for page in every_event(copy) for event in page]) == 6 and len(list(every_answer(copy))) == 1
    copy.close()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("copy.sqlite*")} == {0o600}


def test_a_store_that_does_not_respond_is_named_without_its_address(
    connect: Connect, keyed: Keyed, redis_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    url, pid = redis_server
    with connect(events=url) as client:
        assert client.get("/v1/events/export", headers=keyed).status_code == 200
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 20
        while (ready := client.get("/health/ready")).json()["events"] == "ok":
            assert time.monotonic() < end
            time.sleep(0.05)
        found = [ready, *(client.get(f"/v1/events/export{part}", headers=keyed) for part in ("", "/answers"))]
        found.append(client.delete("/v1/users/u", headers=keyed))
    assert [answer.status_code for answer in found] == [200, 503, 503, 503]
    assert {answer.json()["error"]["code"] for answer in found[1:]} == {"busy"}
    port = url.rpartition(":")[2]
    for answer in found:
        assert port not in answer.text and "127.0.0.1" not in answer.text and ".. " not in answer.text
    assert "cannot export events or answers: Cannot connect to Redis" in caplog.text and port in caplog.text
    assert ".. " not in caplog.text


def test_old_events_and_answers_are_deleted(connect: Connect, keyed: Keyed, tmp_path: Path) -> None:
    url, now = f"sqlite:{tmp_path / 'events.sqlite'}", int(time.time())
    with connect() as client:
        item = ids(answered(client))[0]
        old = {"event_id": "1", "user": "u", "item_id": item, "time_s": now - 40 * 86_400}
        post(client, keyed, old, {"event_id": "2", "user": "u", "item_id": item, "time_s": now - 86_400})
    time.sleep(1.1)  # times are whole seconds: the answer is older than this one
    with connect(limits=Limits(rate=0, keep_events_days=30, keep_answers_days=1e-9)) as client:
        end = time.monotonic() + 10
        while len(client.get("/v1/users/u/history").json()["events"]) > 1:
            assert time.monotonic() < end
            time.sleep(0.02)
        store = open_store(url, reading=True)
        assert [event.event_id for page in every_event(store) for event in page] == ["2"] and not list(every_answer(store))
        store.close()


def test_a_store_of_another_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'events.sqlite'}"
    store = open_store(url)
    store.append([Event("1", "u", "of-another-shop", 5)])
    store.close()
    with pytest.raises(Exception, match=r"belongs to another bundle.*'of-another-shop'"):
        Service(bundle, url, Limits())


def every_byte(folder: Path, text: str) -> list[str]:
    """Return the files of a folder that hold a text: as bytes, or in a column of a Parquet file."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        held = text.encode() in path.read_bytes()
        if path.suffix == ".parquet":
            held |= any(text in str(column.to_pylist()) for column in pq.read_table(path).columns)
        if held:
            found.append(path.name)
    return found


def test_a_forgotten_user_is_nowhere(connect: Connect, bundle: Path, keyed: Keyed, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    with connect(folder=tmp_path / "bundle") as client:
        user, other = (str(one["user"]) for one in client.get("/v1/users", params={"limit": 2}).json()["users"])
        before, theirs = answered(client, user=other), client.get(f"/v1/users/{other}/history").json()
        answer = answered(client, user=user)
        post(client, keyed, {"request_id": answer["request_id"], "shown": ids(answer)})
        post(client, keyed, {"event_id": f"{user}-1", "user": user, "item_id": ids(answer)[0]})
        post(client, keyed, {"event_id": "2", "user": other, "item_id": ids(before)[0]})
        assert every_byte(tmp_path, user) and client.get(f"/v1/users/{user}/history").status_code == 200
        assert client.delete(f"/v1/users/{user}").status_code == 401
        gone = client.delete(f"/v1/users/{user}", headers=keyed)
        assert gone.json() == {"user": user, "events": 6, "in_bundle": False}
        export = client.get("/v1/events/export", headers=keyed)
        (tmp_path / "export.parquet").write_bytes(export.content)
        assert every_byte(tmp_path, user) == []
        assert client.get(f"/v1/users/{user}/history").status_code == 404
        assert user not in {one["user"] for one in client.get("/v1/users", params={"limit": 100, "q": user}).json()["users"]}
        fresh = answered(client, user=user)
        assert fresh["source"] == "recent" and not fresh["user_known"]
        assert client.get(f"/v1/users/{other}/history").json()["events"][:-1] == theirs["events"]
        assert [row["user_id"] for row in rows(tmp_path / "export.parquet")] == [other]
        post(client, keyed, {"event_id": "3", "user": user, "item_id": ids(before)[1]})
        returned = client.get(f"/v1/users/{user}/history").json()["events"]
        assert [event["item_id"] for event in returned] == [ids(before)[1]], "who comes back is a new user"


def test_a_bundle_written_while_its_user_was_forgotten_is_cleaned_when_it_is_loaded(
    connect: Connect, bundle: Path, keyed: Keyed, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    with connect(folder=tmp_path / "bundle") as client:
        user = str(client.get("/v1/users", params={"limit": 1}).json()["users"][0]["user"])
        version = client.get("/health/ready").json()["version"]
        assert client.delete(f"/v1/users/{user}", headers=keyed).json()["in_bundle"] is False
        shutil.rmtree(tmp_path / "bundle")
        shutil.copytree(bundle, tmp_path / "bundle")  # as an update does that had begun before
        KeptVersions(kept_beside(tmp_path / "bundle"), 3).add(tmp_path / "bundle", version)
        assert every_byte(tmp_path / "bundle", user) and every_byte(kept_beside(tmp_path / "bundle"), user)
        assert client.post("/admin/reload", headers=keyed).status_code == 200
        assert every_byte(tmp_path / "bundle", user) == []
        assert client.delete(f"/v1/users/{user}", headers=keyed).status_code == 200
        assert every_byte(tmp_path, user) == []
        assert client.get(f"/v1/users/{user}/history").status_code == 404


def test_a_signed_bundle_that_still_holds_a_forgotten_user_is_told(
    connect: Connect, bundle: Path, keyed: Keyed, tmp_path: Path
) -> None:
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    pair = Ed25519PrivateKey.generate()
    private.write_bytes(pair.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(pair.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    shutil.copytree(bundle, tmp_path / "bundle")
    sign_bundle(tmp_path / "bundle", private)
    with connect(folder=tmp_path / "bundle", trusted_key=public) as client:
        user = str(client.get("/v1/users", params={"limit": 1}).json()["users"][0]["user"])
        assert client.delete(f"/v1/users/{user}", headers=keyed).json() == {"user": user, "events": 0, "in_bundle": True}
        assert client.delete("/v1/users/unknown", headers=keyed).json()["in_bundle"] is False


def test_a_user_who_was_never_seen_can_be_forgotten(client: TestClient, keyed: Keyed) -> None:
    for _ in range(2):
        assert client.delete("/v1/users/a%2Fb", headers=keyed).json() == {"user": "a/b", "events": 0, "in_bundle": False}
    assert client.delete("/v1/users", params={"user": ".."}, headers=keyed).json()["user"] == ".."


def test_since_is_a_day_a_time_or_seconds() -> None:
    assert since_of("2024-01-01") == since_of("2024-01-01T00:00Z") == since_of("2024-01-01T01:00+01:00") == 1_704_067_200
    assert since_of("1704067200") == 1_704_067_200


def test_forget_on_the_command_line_cleans_bundle_and_store(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    user = str(pq.read_table(bundle / "dataset" / "users.parquet")["user_id"][0])
    url = f"sqlite:{tmp_path / 'e.sqlite'}"
    store = open_store(url)
    store.append([Event("1", user, "b", 5), Event("2", "another", "b", 5)])
    store.close()
    assert main(["forget", str(tmp_path / "bundle"), "--user", user, "--events", url]) == 0
    assert "users in the bundle: 1; users in the dataset: 0; events in the store: 1" in capsys.readouterr().out
    assert every_byte(tmp_path, user) == [] and every_byte(tmp_path, "another") == ["e.sqlite"]
    assert main(["forget", str(tmp_path / "bundle" / "dataset"), "--user", user]) == 2
    assert "neither a run nor a bundle" in capsys.readouterr().err
