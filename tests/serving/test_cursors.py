"""Test that long lists can be read to their end, part by part, without a gap or a repetition."""

from __future__ import annotations

import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.serving import cursors


def parts(ask: Any, size: str) -> list[Any]:
    """Return the items of all parts of a list."""
    found: list[Any] = []
    answer = ask({size: 7})
    while True:
        found += answer["items"]
        if answer["next"] is None:
            return found
        assert len(answer["items"]) == 7
        answer = ask({size: 7, "cursor": answer["next"]})


def offered(client: TestClient) -> int:
    app: Any = client.app
    return int(app.state.service.current.engine.recommender.offered.sum())


def ids(items: list[Any]) -> list[str]:
    return [item["item_id"] for item in items]


def recommended(client: TestClient, **asked: Any) -> Any:
    def ask(more: dict[str, Any]) -> Any:
        answer = client.post("/v1/recommend", json={**asked, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    return ask


def test_all_items_are_reached_in_order_of_events(client: TestClient) -> None:
    found = parts(lambda more: client.get("/v1/items", params=more).json(), "limit")
    assert len(set(ids(found))) == len(found) == offered(client)
    assert ids(client.get("/v1/items", params={"limit": 50}).json()["items"]) == ids(found)[:50]


def test_a_search_is_reached_to_its_end(client: TestClient) -> None:
    whole = parts(lambda more: client.get("/v1/items", params={"q": "an", **more}).json(), "limit")
    assert len(whole) > 20 and all("an" in item["name"].lower() for item in whole)


@pytest.mark.parametrize(
    "asked", [{"user": None}, {"user": "known"}, {"user": "known", "popularity_bias": 0.5, "exclude_seen": False}]
)
def test_a_list_goes_on_where_it_ended(client: TestClient, asked: dict[str, Any]) -> None:
    if asked["user"]:
        asked = {**asked, "user": client.get("/v1/users").json()["users"][0]["user"]}
    found = parts(recommended(client, **asked), "k")
    assert len(set(ids(found))) == len(found) > 70
    assert [item["rank"] for item in found] == list(range(1, len(found) + 1))
    assert ids(recommended(client, **asked)({"k": 70})["items"]) == ids(found)[:70]


def test_similar_items_go_on(client: TestClient) -> None:
    (item,) = client.get("/v1/items", params={"limit": 1}).json()["items"]
    found = parts(lambda more: client.get("/v1/similar", params={"id": item["item_id"], **more}).json(), "k")
    assert len(set(ids(found))) == len(found) == offered(client) - 1
    assert item["item_id"] not in ids(found)


def test_a_cursor_is_refused_for_another_request_and_version(client: TestClient) -> None:
    first = recommended(client, user="a")({"k": 5})
    version = first["version"]
    wrong = {
        "is not valid": "x" * 20,
        "belongs to another request": first["next"],
        "belongs to version old; .* is served now": cursors.write("old", "", 5),
    }
    for message, cursor in wrong.items():
        refused = client.post("/v1/recommend", json={"user": "b", "cursor": cursor})
        assert refused.status_code == 422 and refused.json()["error"]["location"] == "cursor"
        assert re.search(message, refused.json()["error"]["message"])
    assert client.get("/v1/items", params={"cursor": cursors.write(version, ["items", "a"], 5)}).status_code == 422
    batch = client.post("/v1/recommend:batch", json={"requests": [{"k": 2}, {"user": "b", "cursor": first["next"]}]}).json()
    assert len(batch["answers"][0]["items"]) == 2 and batch["answers"][1]["error"]["location"] == "requests.1.cursor"


@pytest.mark.parametrize("cursor", ["", "é", "=", "AAAA", "a" * 100, cursors.write("v", "", 10_000), "\x00", "____"])
def test_no_cursor_makes_an_error_of_the_server(client: TestClient, cursor: str) -> None:
    assert client.post("/v1/recommend", json={"cursor": cursor}).status_code == 422
    assert client.get("/v1/items", params={"cursor": cursor}).status_code == 422


def test_a_deep_part_counts_as_the_work_that_it_is() -> None:
    from twotower.serving.schemas import RecommendIn

    assert RecommendIn(k=10).weight == 1
    assert RecommendIn(k=10, cursor=cursors.write("v", "", 5000)).weight > 100


def test_a_list_with_diversity_has_no_further_part(client: TestClient) -> None:
    assert recommended(client, diversity=0.5)({"k": 5})["next"] is None
    cursor = cursors.write(client.get("/health/ready").json()["version"], '{"diversity":0.5}', 5)
    refused = client.post("/v1/recommend", json={"diversity": 0.5, "cursor": cursor})
    assert refused.status_code == 422 and "diversity" in refused.json()["error"]["message"]
