"""Test explicit negatives and impressions while serving: no history, no popularity, and what is disliked is not recommended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.bundle.bundle import load_bundle
from twotower.data.prepare import prepare
from twotower.errors import RequestError
from twotower.pipeline.stages import train_stage
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import HistoryEvent
from twotower.utils.config import parse_config

Connect = Callable[..., AbstractContextManager[TestClient]]
START, DAY = 1_600_000_000, 86_400
ITEMS = 12


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of a shop: u0 bought p0, p1 and p2, dislikes p3, gave p4 one star, and was shown p5."""
    root = tmp_path_factory.mktemp("shop")
    rows: list[tuple[object, ...]] = [
        (f"u{user}", f"p{(user + k) % ITEMS}", START + DAY * (user + 2 * k), "buy", 5) for user in range(10) for k in range(3)
    ]
    rows += [("u0", "p3", START + DAY, "dislike", ""), ("u0", "p4", START + DAY, "buy", 1), ("u0", "p5", START, "impression", "")]
    text = "\n".join(",".join(map(str, row)) for row in rows)
    (root / "e.csv").write_text(f"user_id,item_id,t,kind,stars\n{text}\n")
    table = {"path": "e.csv", "time": "t", "event_type": "kind", "stars": "stars"}
    tower = {"embedding_dim": 8, "hidden_dims": [8]}
    settings = {
        "data": {"source": "tables", "path": str(root), "interactions": table},
        "prepare": {"event_weights": {"dislike": -1}, "negative_max_stars": 2, "split": {"valid": 0, "test": 0}},
        "model": {"user_tower": tower, "item_tower": tower},
        "training": {"max_steps": 1},
    }
    prepare(parse_config(settings), root / "data")
    train_stage(parse_config(settings), root / "data", root / "run", bundle=root / "bundle")
    return root / "bundle"


def listed(client: TestClient, **body: Any) -> dict[str, float]:
    """Return item and score of every recommended item, best first."""
    answer = client.post("/v1/recommend", json={"k": ITEMS, **body})
    assert answer.status_code == 200, answer.text
    return {item["item_id"]: item["score"] for item in answer.json()["items"]}


def post(client: TestClient, keyed: dict[str, str], *events: dict[str, Any]) -> int:
    sent = [{"event_id": f"e{n}-{event}", **event} for n, event in enumerate(events)]
    answer = client.post("/v1/events", json={"events": sent}, headers=keyed)
    assert answer.status_code in (200, 202), answer.text
    return int(answer.json()["accepted"])


def test_what_a_user_dislikes_in_the_data_is_not_recommended(shop: Path, connect: Connect) -> None:
    with connect(folder=shop) as client:
        assert set(listed(client, user="u0")) == {f"p{n}" for n in range(5, ITEMS)}, "p5 was only shown"
        assert set(listed(client, user="u0", exclude_seen=False)) == {f"p{n}" for n in range(ITEMS)}
        shown = client.get("/v1/users/u0/history").json()["events"]
        assert [event["item_id"] for event in shown] == ["p0", "p1", "p2"]


@pytest.mark.parametrize("event", [{"event_type": "dislike"}, {"event_type": "buy", "stars": 2}, {"stars": 0}])
def test_an_accepted_dislike_leaves_its_item_out_and_changes_nothing_else(
    shop: Path, connect: Connect, keyed: dict[str, str], event: dict[str, Any]
) -> None:
    with connect(folder=shop) as client:
        before, others = listed(client, user="u0"), listed(client, user="u1")
        history = client.get("/v1/users/u0/history").json()
        assert post(client, keyed, {"user": "u0", "item_id": "p7", **event}) == 1
        wanted = {item: score for item, score in before.items() if item != "p7"}
        assert "p7" in before and listed(client, user="u0") == pytest.approx(wanted)
        assert client.get("/v1/users/u0/history").json() == history and listed(client, user="u1") == others
        fresh = client.post("/admin/refresh", headers=keyed).json()
        assert fresh["events"] == {"counted": 0, "in_bundle": 0, "negative": 1, "unknown_item": 0, "future": 0}
        assert listed(client, user="u0") == pytest.approx(wanted) and listed(client, user="u1") == others


def test_an_accepted_impression_changes_nothing(shop: Path, connect: Connect, keyed: dict[str, str]) -> None:
    with connect(folder=shop) as client:
        before = listed(client, user="u0")
        shown = [{"user": "u0", "item_id": f"p{n}", "event_type": "impression"} for n in range(ITEMS)]
        assert post(client, keyed, *shown) == ITEMS and listed(client, user="u0") == before
        assert client.post("/admin/refresh", headers=keyed).json()["events"]["negative"] == ITEMS
        assert listed(client, user="u0") == before


def test_a_new_user_who_only_dislikes_gets_the_list_of_unknown_users_without_it(
    shop: Path, connect: Connect, keyed: dict[str, str]
) -> None:
    with connect(folder=shop) as client:
        everybody = listed(client)
        first = next(iter(everybody))
        post(client, keyed, {"user": "new", "item_id": first, "event_type": "dislike"})
        answer = client.post("/v1/recommend", json={"user": "new", "k": ITEMS}).json()
        assert answer["source"] == "recent" and [item["item_id"] for item in answer["items"]] == list(everybody)[1:]


def test_a_history_may_name_dislikes(shop: Path, connect: Connect) -> None:
    with connect(folder=shop) as client:
        bought = [{"item_id": "p8"}, {"item_id": "p9"}]
        plain = listed(client, history=bought)
        mixed = listed(client, history=[{"item_id": "p1", "stars": 1}, *bought])
        wanted = {item: score for item, score in plain.items() if item != "p1"}
        assert "p1" in plain and mixed == pytest.approx(wanted)
    recommender, ours = Recommender.load(shop), [HistoryEvent("p8"), HistoryEvent("p9")]
    for kind, left_out in (("dislike", True), ("impression", False)):
        found = recommender.recommend(history=[HistoryEvent("p1", event_type=kind), *ours], k=ITEMS)
        assert {item.item_id: item.score for item in found} == pytest.approx(wanted if left_out else plain)
    with pytest.raises(RequestError, match="Did you mean 'dislike'"):
        recommender.recommend(history=[HistoryEvent("p1", event_type="dislikes")])


def test_impressions_leave_the_purchases_in_memory(
    shop: Path, connect: Connect, keyed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.serving.event_journal.MAX_EVENTS_PER_USER", 5)
    with connect(folder=shop) as client:
        post(client, keyed, {"user": "new", "item_id": "p1", "event_type": "buy"})
        post(client, keyed, *({"user": "new", "item_id": f"p{n}", "event_type": "impression"} for n in range(ITEMS)))
        events = client.get("/v1/users/new/history").json()["events"]
        assert [event["item_id"] for event in events] == ["p1"]


def test_the_bundle_holds_what_it_leaves_out(shop: Path) -> None:
    bundle = load_bundle(shop)
    assert bundle.dataset.negatives is not None and len(bundle.dataset.negatives) == 3
    assert bundle.dataset.item_train_count.sum() == 30
