"""Test the page of the HTTP API: complete, without scripts, and allowed by the content security policy."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from starlette.testclient import TestClient

from twotower.serving.api_reference import api_page, read_api


class Tags(HTMLParser):
    """Collects the ids of a page, its links, what it loads, and what a strict policy would block."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.blocked: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.loaded += [given[name] for name in ("src", "href") if name in given and tag != "a"]
        self.blocked += [tag] if tag in ("script", "style", "iframe") or "style" in given else []
        self.blocked += [name for name in given if name.startswith("on")]


def test_the_server_describes_itself_offline(client: TestClient) -> None:
    answer = client.get("/docs")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    tags = Tags(answer.text)
    assert not tags.blocked
    for path in tags.loaded:  # from this server alone
        assert ":" not in path and client.get(f"/{path}").status_code == 200, path
    assert {link for link in tags.links if not link.startswith("#")} == {"./", "openapi.json"}


def test_the_page_has_every_route_and_every_link_leads_somewhere(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    page = client.get("/docs").text
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"<code>{path}</code>" in page
            assert re.sub(r"\s+", " ", operation["description"]).split(",")[0].replace("'", "&#39;") in page, (method, path)
    tags = Tags(page)
    assert len(tags.ids) == len(set(tags.ids))
    assert {link[1:] for link in tags.links if link.startswith("#")} <= set(tags.ids)


def test_routes_are_read_with_their_bounds_and_examples(client: TestClient) -> None:
    api = read_api(client.get("/openapi.json").json())
    routes = {(route.method, route.path): route for route in api.routes}
    events = routes["POST", "/v1/events"]
    assert events.needs_key and events.body is not None and '"event_id"' in events.sent and events.answered
    assert routes["GET", "/v1/about"].needs_key and not routes["GET", "/health/ready"].needs_key
    (k,) = (value for value in routes["GET", "/v1/items/{item_id}/similar"].parameters if value.name == "k")
    assert (k.kind, k.location, k.default, k.bounds) == ("integer", "query", "10", "at least 1, at most 500")
    assert {name for _, fields in api.objects.values() for value in fields for name in value.objects} <= api.objects.keys()


def test_texts_are_escaped() -> None:
    operation = {"description": "<script>", "responses": {"200": {}}, "tags": ["a"]}
    document = {"info": {"title": "t"}, "paths": {"/x": {"get": operation}}}
    page = api_page(document)
    assert "<script" not in page and "&lt;script&gt;" in page
