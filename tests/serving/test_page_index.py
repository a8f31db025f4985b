"""Test the page that the server sends: its first list is that of the API, and its policy allows no script but its own."""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import sha256
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.errors import BusyError
from twotower.serving.page_files import PageFiles
from twotower.serving.page_index import FirstList, PageIndex, first_lists, shown

from .conftest import ranked

Connect = Callable[..., AbstractContextManager[TestClient]]
NOTHING = {"has_price": False, "has_amounts": False, "has_hours": False, "has_locations": False}
NASTY = '</script><script>alert("1")</script> & <b>'


def answer_of(page: str) -> dict[str, Any] | None:
    """Return the list that a page brings for its scripts."""
    found = re.search(r'<script type="application/json" id="answer">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1]) if found else None


def listed(page: str) -> list[str]:
    """Return the ids of the cards of a page."""
    return re.findall(r'<li class="card best" data-id="([^"]+)"', page)


def test_the_page_has_the_list_of_the_api(client: TestClient) -> None:
    answer = client.get("/")
    found = answer_of(answer.text)
    assert found is not None and found["request_id"] == answer.headers["x-request-id"]
    assert [item["item_id"] for item in found["items"]] == listed(answer.text) == ranked(client)
    assert found["source"] == "recent" and len(found["items"]) == 10


@pytest.mark.parametrize("key", ["", "a-key-for-these-tests"])
def test_a_server_that_needs_a_key_to_read_sends_a_page_without_a_list(connect: Connect, key: str) -> None:
    with connect(public=False) as client:
        page = client.get("/", headers={"authorization": f"Bearer {key}"} if key else {})
        assert page.status_code == 200 and answer_of(page.text) is None and not listed(page.text)
        assert 'aria-busy="true"' in page.text


def test_an_overloaded_server_sends_a_page_without_a_list(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect() as client:
        monkeypatch.setattr(client.app.state.service, "overloaded", lambda _: True)  # type: ignore[attr-defined]
        page = client.get("/")
        assert page.status_code == 200 and answer_of(page.text) is None


def test_the_list_counts_as_a_request_and_is_left_out_if_it_cannot_be_had() -> None:
    charged: list[int] = []
    state = {"client": "10.0.0.1", "asks_for": charged.append}

    async def recommend(*_: Any) -> bytes:
        raise BusyError("The queue is full.")

    async def about() -> dict[str, Any]:
        raise AssertionError("without a list, the bundle is not described")

    for clients in ([], ["10.0.0.1"]):
        assert asyncio.run(first_lists(recommend, about, clients.__contains__)(state)) is None
    assert charged == [2]


def test_the_policy_allows_the_style_and_the_script_of_the_page_alone(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    for tag in ("script", "style"):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        assert len(inline) == 1
        digest = b64encode(sha256(inline[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}' 'self';" in policy
    assert policy.count("sha256-") == 2 and "unsafe" not in policy
    assert "sha256-" not in client.get("/v1/about").headers["content-security-policy"]
    assert len(page.headers.get_list("content-security-policy")) == 1


def test_names_of_items_are_text() -> None:
    item = {"rank": 1, "item_id": NASTY, "name": NASTY, "categories": [NASTY], "city": NASTY, "score": 1.0}
    first = FirstList(json.dumps({"items": [item]}).encode(), NOTHING)
    page = bytes(PageIndex(PageFiles()).response(first, packed=False).body).decode()
    assert answer_of(page) == {"items": [item]}
    assert "<script>alert" not in page and page.count("<b>") == 1  # that of the brand


def test_a_page_of_items_without_order_or_columns_has_no_meters() -> None:
    item = {"rank": 1, "item_id": 7, "name": "7", "categories": [], "city": None, "score": None}
    assert [one["share"] for one in shown([item, item])] == [None, None]
    assert [one["share"] for one in shown([{**item, "score": score} for score in (0.1, 0.2)])] == [None, None]
    assert [one["share"] for one in shown([{**item, "score": score} for score in (0.0, -1.0)])] == [0.0, 0.0]
    page = bytes(PageIndex(PageFiles()).response(FirstList(json.dumps({"items": [item]}).encode(), NOTHING), packed=False).body)
    (card,) = re.findall(r'<li class="card best" data-id="7">.*?</li>', page.decode(), re.DOTALL)
    assert re.search(r'<svg viewBox="0 0 30 4"[^>]* hidden>', card)
    assert '<p class="meta" hidden></p>' in card and '<p class="facts" hidden></p>' in card
