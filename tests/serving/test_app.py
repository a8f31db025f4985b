"""Test the responses of every route."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from twotower.bundle.revision import add_items
from twotower.retrieval.recommender import Recommender
from twotower.schema import FIRST_ROW
from twotower.serving import event_schemas, operation_schemas, schemas
from twotower.serving.catalogue import Browser
from twotower.serving.model_version import Engine

from .conftest import ranked, send, some_items

Connect = Callable[..., AbstractContextManager[TestClient]]


def test_an_answer_is_that_of_the_recommender(client: TestClient, bundle: Any) -> None:
    user = client.get("/v1/users/random").json()["users"][0]["user"]
    answer = client.post("/v1/recommend", json={"user": user, "k": 7}).json()
    expected = Recommender.load(bundle).recommend(user=user, k=7)
    assert [(p["rank"], p["item_id"]) for p in answer["items"]] == [(p.rank, p.item_id) for p in expected]
    assert answer["items"][0]["score"] == pytest.approx(expected[0].score, abs=1e-4)
    schemas.AnswerOut.model_validate(answer)
    assert all(place["distance_km"] in (None, round(place["distance_km"] or 0, 2)) for place in answer["items"])
    assert answer["user_known"] and answer["source"] == "model" and 0 < answer["confidence"] < 1 and answer["took_ms"] > 0


def test_a_history_speaks_for_an_unknown_user_and_is_left_out(client: TestClient) -> None:
    items = some_items(client, 3)
    history = [{"item_id": item} for item in items]
    found = ranked(client, user="nobody", history=history, k=300)
    assert found == ranked(client, history=history, k=300) and not set(items) & set(found)
    assert set(items) <= set(ranked(client, history=history, k=300, exclude_seen=False))


def test_a_batch_is_its_requests_one_by_one(client: TestClient) -> None:
    users = [user["user"] for user in client.get("/v1/users?limit=5").json()["users"]]
    requests = [{"user": user, "k": 1 + number, "filter": "price <= 2"} for number, user in enumerate(users)]
    answer = client.post("/v1/recommend:batch", json={"requests": requests}).json()
    schemas.BatchOut.model_validate(answer)
    for request, one in zip(requests, answer["answers"], strict=True):
        assert [place["item_id"] for place in one["items"]] == ranked(client, **request)


def test_an_accepted_event_changes_the_next_answer_and_the_history(client: TestClient, keyed: dict[str, str]) -> None:
    user = client.get("/v1/users/random").json()["users"][0]["user"]
    before, known = ranked(client, user=user), len(client.get(f"/v1/users/{user}/history").json()["events"])
    sent = {"event_id": "e1", "user": user, "item_id": before[0], "stars": 5}
    assert send(client, keyed, sent) == {"accepted": 1, "repeated": 0}
    after = ranked(client, user=user)
    assert before[0] not in after and after != before[1:]
    history = client.get(f"/v1/users/{user}/history").json()
    schemas.HistoryOut.model_validate(history)
    assert len(history["events"]) == known + 1 and history["events"][-1]["item_id"] == before[0]
    assert send(client, keyed, sent, {**sent, "event_id": "e2"}) == {"accepted": 1, "repeated": 1}


def test_events_of_a_set_without_a_clock_have_no_times(bundle: Any) -> None:
    engine = Engine.load(bundle)
    user = str(engine.dataset.user_ids[FIRST_ROW])
    timed, engine.dataset.has_time = Browser(engine, Nobody()).history(user)["events"], False  # type: ignore[arg-type]
    found = Browser(engine, Nobody()).history(user)["events"]  # type: ignore[arg-type]
    assert [event["item_id"] for event in found] == [event["item_id"] for event in timed]
    assert all(event["time_s"] for event in timed) and not any(event["time_s"] for event in found)


class Nobody:
    """Return a journal without events."""

    def of(self, _user: str) -> tuple[Any, ...]:
        return ()

    def is_forgotten(self, _user: str) -> bool:
        return False


def test_an_accepted_event_that_the_bundle_was_made_from_counts_once(client: TestClient, keyed: dict[str, str]) -> None:
    user = client.get("/v1/users/random").json()["users"][0]["user"]
    before = client.get(f"/v1/users/{user}/history").json()["events"]
    last, answer = before[-1], client.post("/v1/recommend", json={"user": user}).json()
    send(client, keyed, {"event_id": "again", "user": user, "item_id": last["item_id"], "time_s": last["time_s"]})
    assert client.get(f"/v1/users/{user}/history").json()["events"] == before
    after = client.post("/v1/recommend", json={"user": user}).json()
    assert (after["items"], after["confidence"]) == (answer["items"], answer["confidence"])
    send(client, keyed, {"event_id": "later", "user": user, "item_id": last["item_id"], "time_s": last["time_s"] + 1})
    assert len(client.get(f"/v1/users/{user}/history").json()["events"]) == len(before) + 1


def test_events_of_a_new_user_make_a_history_that_a_restart_keeps(connect: Connect, keyed: dict[str, str]) -> None:
    with connect() as client:
        items = some_items(client, 2)
        send(client, keyed, *({"event_id": item, "user": "new/one", "item_id": item, "time_s": 5} for item in items))
        first = ranked(client, user="new/one")
        assert client.get("/v1/users?q=NEW").json()["users"] == [{"user": "new/one", "events": 2}]
    with connect() as client:
        assert ranked(client, user="new/one") == first
        events = client.get("/v1/users/new/one/history").json()["events"]
        assert [event["item_id"] for event in events] == items and events[0]["name"]


def test_the_moment_of_a_question_leaves_out_later_events(client: TestClient, keyed: dict[str, str]) -> None:
    (item,) = some_items(client, 1)
    send(client, keyed, {"event_id": "x", "user": "late", "item_id": item, "time_s": 1_000})
    assert item in ranked(client, user="late", time_s=999, k=300)
    assert item not in ranked(client, user="late", time_s=1_001, k=300)


def test_an_event_counts_in_a_question_of_its_own_second_and_spoils_none_of_before(
    client: TestClient, keyed: dict[str, str]
) -> None:
    visited, first, second = some_items(client, 3)
    at = 1_700_000_000
    send(client, keyed, {"event_id": "now", "user": "late", "item_id": visited, "time_s": at})
    told = [{"item_id": first}, {"item_id": second}]
    for moment, events in ((None, 3), (at + 1, 3), (at, 3), (at - 60, 2)):
        body = {"user": "late", "history": told, "k": 300, **({} if moment is None else {"time_s": moment})}
        answer = client.post("/v1/recommend", json=body).json()
        found = [place["item_id"] for place in answer["items"]]
        assert answer["source"] == "model" and not {first, second} & set(found)
        assert (visited in found) == (events == 2), moment


def test_an_event_that_one_server_of_a_redis_accepts_changes_the_answer_of_another(
    connect: Connect, keyed: dict[str, str], redis_url: str
) -> None:
    with connect(events=redis_url) as one, connect(events=redis_url) as other:
        item = some_items(one, 1)[0]
        send(one, keyed, {"event_id": "shared", "user": "of-both", "item_id": item, "time_s": 5})
        end = time.monotonic() + 10
        while other.get("/v1/users/of-both/history").status_code == 404:
            assert time.monotonic() < end, "nothing came"
        assert ranked(other, user="of-both") == ranked(one, user="of-both") and item not in ranked(other, user="of-both", k=300)
    with connect(events=redis_url) as third:
        assert [event["item_id"] for event in third.get("/v1/users/of-both/history").json()["events"]] == [item]


HARD_IDS = ["a/similar", "a", "..", ".", "x/", "a,b", "%2F", "a?b#c", "random", " padded ", "ü 🍜", "a\\b", "a+b", '"']


def test_every_id_is_reachable(connect: Connect, bundle: Any, tmp_path: Path, keyed: dict[str, str]) -> None:
    """Test all the ways to an item and to a user, with ids that URLs give a meaning to."""
    served, file = tmp_path / "served", tmp_path / "new.jsonl"
    shutil.copytree(bundle, served)
    file.write_text("".join(json.dumps({"item_id": item, "name": f"The one {n}"}) + "\n" for n, item in enumerate(HARD_IDS)))
    add_items(served, file)
    with connect(folder=served) as client:
        for number, item in enumerate(HARD_IDS):
            name = f"The one {number}"
            path = f"/v1/items/{quote(item, safe='')}"
            if item not in (".", ".."):  # clients resolve these in a path, encoded or not
                assert client.get(path).json()["name"] == name, item
                assert item not in [one["item_id"] for one in client.get(f"{path}/similar").json()["items"]]
            assert [one["name"] for one in client.get("/v1/items", params={"id": item}).json()["items"]] == [name]
            assert client.get("/v1/similar", params={"id": item}).json()["items"]
            send(client, keyed, {"event_id": "1", "user": item, "item_id": item})
            if item not in (".", ".."):
                assert client.get(f"/v1/users/{quote(item, safe='')}/history").json()["user"] == item
            assert client.get("/v1/history", params={"user": item}).json()["events"][0]["name"] == name
        both = client.get("/v1/items", params={"id": ["nowhere", "a,b", "a"]}).json()["items"]
        assert [one["item_id"] for one in both] == ["a,b", "a"]


def test_unknown_items_of_a_history_are_ignored_and_reported(client: TestClient) -> None:
    known = some_items(client, 2)
    mixed = [{"item_id": item} for item in (known[0], "gone", known[1], "gone", "lost")]
    answer = client.post("/v1/recommend", json={"history": mixed, "k": 300}).json()
    assert answer["unknown_items"] == ["gone", "lost"] and answer["source"] == "model"
    assert [one["item_id"] for one in answer["items"]] == ranked(client, history=[{"item_id": item} for item in known], k=300)
    nothing = client.post("/v1/recommend", json={"history": [{"item_id": "gone"}]}).json()
    assert nothing["source"] == "recent" and nothing["unknown_items"] == ["gone"]
    strict = client.post("/v1/recommend", json={"history": mixed, "strict": True})
    assert strict.status_code == 422 and strict.json()["error"]["location"] == "history.1.item_id"


def test_an_error_of_a_batch_is_that_of_its_list(client: TestClient) -> None:
    bad = {"filter": "nonsense <"}
    answer = client.post("/v1/recommend:batch", json={"requests": [{"k": 2}, bad, {"k": 3}]})
    assert answer.status_code == 200
    schemas.BatchOut.model_validate(answer.json())
    first, second, third = answer.json()["answers"]
    assert (len(first["items"]), len(third["items"])) == (2, 3)
    assert second["error"]["location"] == "requests.1.filter:11" and second["error"]["code"] == "invalid"


def test_head_is_get_without_the_body(client: TestClient) -> None:
    for path in ("/", "/docs", "/v1/about", "/health/ready", "/metrics", "/page/app.js"):
        got, head = client.get(path), client.head(path)
        assert head.status_code == got.status_code == 200 and head.content == b""
        if path not in ("/", "/health/ready", "/metrics"):  # what these say changes from one request to the next
            assert head.headers["content-length"] == got.headers["content-length"]
    assert client.head("/v1/recommend").status_code == 405


def test_large_answers_are_compressed_for_who_takes_gzip(client: TestClient) -> None:
    for limit in (20, 100):
        plain = client.get(f"/v1/items?limit={limit}", headers={"accept-encoding": "identity"})
        packed = client.get(f"/v1/items?limit={limit}", headers={"accept-encoding": "br, gzip;q=0.5"})
        assert packed.headers["content-encoding"] == "gzip" and packed.json() == plain.json()
        assert "content-encoding" not in plain.headers and "accept-encoding" in plain.headers["vary"]
        assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2
    none = client.get("/v1/items?limit=20", headers={"accept-encoding": "gzip;q=0"})
    assert "content-encoding" not in none.headers


def test_items_are_found_by_name(client: TestClient) -> None:
    most = client.get("/v1/items?limit=100").json()["items"]
    name = most[0]["name"]
    found = client.get("/v1/items", params={"q": name[1:].upper(), "limit": 5}).json()["items"]
    assert name in [item["name"] for item in found] and len(found) <= 5
    assert client.get("/v1/items?q=no such name").json() == {"next": None, "items": []}
    one = client.get(f"/v1/items/{most[0]['item_id']}").json()
    schemas.ItemDetailOut.model_validate(one)
    assert one["columns"]["item_id"] == one["item_id"] and {**one, "columns": 0} == {**most[0], "columns": 0}


def test_similar_items_are_others_and_match_the_filter(client: TestClient) -> None:
    (item,) = some_items(client, 1)
    answer = client.get(f"/v1/items/{item}/similar", params={"k": 20, "filter": "price == 2"}).json()
    schemas.SimilarOut.model_validate(answer)
    found = [place["item_id"] for place in answer["items"]]
    assert found and item not in found
    assert {client.get(f"/v1/items/{other}").json()["columns"]["price"] for other in found} == {2}
    scores = [place["score"] for place in answer["items"]]
    assert scores == sorted(scores, reverse=True)


def test_similar_items_can_be_filtered_by_open_now(client: TestClient) -> None:
    name = client.get("/v1/items?limit=1").json()["items"][0]["item_id"]
    assert client.get(f"/v1/items/{name}/similar", params={"filter": "open_now or not open_now"}).status_code == 200


def test_about_says_what_is_served(client: TestClient) -> None:
    about = client.get("/v1/about").json()
    operation_schemas.AboutOut.model_validate(about)
    assert about["version"] == client.get("/health/ready").json()["version"]
    assert about["filters"]["has_price"] and about["filters"]["has_locations"] and about["filters"]["has_hours"]
    assert not about["filters"]["has_zones"]
    assert about["filters"]["categories"][0] == "Restaurants" and about["items"] <= 200


def test_the_page_is_served_under_a_policy_of_its_own_files_only(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert re.search(r'src="page/[0-9a-f]{12}/app.js"', page.text)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["x-frame-options"] == "DENY"
    assert client.get("/page/app.js").status_code == client.get("/page/style.css").status_code == 200


def test_log_lines_are_json_without_users_and_items(client: TestClient) -> None:
    from twotower.serving.json_logs import JsonFormatter

    lines: list[str] = []
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    log = logging.getLogger("twotower")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        (item,) = some_items(client, 1)
        ranked(client, user="who-is-it", history=[{"item_id": item}])
        client.get("/v1/users/who-is-it/history", headers={"x-request-id": "bad id\n"})
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    said = [json.loads(line) for line in lines]
    assert [line["status"] for line in said] == [200, 200, 404]
    assert all(len(line["request_id"]) == 32 and line["took_ms"] > 0 for line in said)
    assert said[2]["route"] == "/v1/users/{user:path}/history" and said[2]["code"] == "not_found"
    assert not any(word in line for line in lines for word in (item, "who-is-it"))


def test_figures_for_prometheus(client: TestClient, keyed: dict[str, str]) -> None:
    (item,) = some_items(client, 1)
    ranked(client, history=[{"item_id": item}], filter="price <= 2")
    send(client, keyed, {"event_id": "a", "user": "u", "item_id": item})
    client.post("/v1/recommend", json={"k": 0})
    text = client.get("/metrics").text
    version = client.get("/v1/about").json()["version"]
    for line in (
        'twotower_requests_total{route="/v1/recommend",status="200"} 1.0',
        'twotower_requests_total{route="/v1/recommend",status="422"} 1.0',
        'twotower_answers_total{source="model"} 1.0',
        'twotower_stage_seconds_count{stage="search"} 1.0',
        'twotower_stage_seconds_count{stage="wait"} 1.0',
        "twotower_filter_share_count 1.0",
        "twotower_batch_size_count 1.0",
        'twotower_errors_total{code="malformed"} 1.0',
        'twotower_errors_total{code="internal"} 0.0',
        'twotower_reloads_total{outcome="refused"} 0.0',
        'twotower_events_total{outcome="accepted"} 1.0',
        f'twotower_bundle{{version="{version}"}} 1.0',
        "twotower_waiting 0.0",
    ):
        assert line in text.splitlines(), line


def test_openapi_has_an_example_of_everything_that_is_sent_that_is_valid(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for kind in (schemas.RecommendIn, schemas.BatchIn, event_schemas.EventsIn):
        example, *_ = document["components"]["schemas"][kind.__name__]["examples"]
        kind.model_validate(example)
    for kind in (schemas.AnswerOut, schemas.ItemOut):
        (example,) = document["components"]["schemas"][kind.__name__]["examples"]
        kind.model_validate(example)
    assert "/" not in document["paths"] and "HTTPBearer" in document["components"]["securitySchemes"]
