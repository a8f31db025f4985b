"""Test the map: its ground, pins that do not hide one another, keys, the pin of the request, and tiles by opt-in."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from .conftest import asked, cards, draw, ids

slow = pytest.mark.slow
Open = Callable[..., Page]


def ready(page: Page) -> Page:
    """Return the page once its map is drawn with the ground."""
    expect(page.locator("#map .marker").first).to_be_visible()
    expect(page.locator("#map path.covered").first).to_be_attached()
    return page


@slow
def test_the_map_has_a_ground_and_asks_no_other_server(visit: Open, server: str) -> None:
    page = visit()
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    draw(page)
    ready(page)
    expect(page.locator("#map path.land").first).to_be_attached()
    expect(page.locator("#map .city").first).to_be_attached()
    assert page.locator("#map path.dot").count() > 20
    expect(page.locator("#map")).to_contain_text("Natural Earth")
    assert urls and all(url.startswith(server) for url in urls)


@slow
def test_pins_tell_both_lists_by_shape_and_go_by_keys(visit: Open) -> None:
    page = visit()
    draw(page)
    ready(page)
    assert page.locator("#map .pin.best").count() and page.locator("#map .pin").count()
    card = cards(page).nth(0)
    card.locator(".meta").hover()
    expect(page.locator("#map .tip")).to_contain_text(card.locator(".name").inner_text())
    expect(page.locator("#map .marker.lit")).to_have_attribute("data-id", ids(page)[0])
    first = page.locator("#map .marker[tabindex='0']")
    expect(first).to_have_count(1)
    expect(first).to_have_attribute("aria-label", re.compile(r"^1\. "))
    first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#map .marker:focus")).not_to_have_attribute("aria-label", re.compile(r"^1\. "))
    page.keyboard.press("ArrowLeft")
    expect(first).to_be_focused()
    while page.locator("#map .marker:focus .more").count():
        page.keyboard.press("ArrowRight")  # a shared pin zooms
    name = str(page.locator("#map .marker:focus").get_attribute("aria-label"))
    page.keyboard.press("Enter")
    title = page.get_by_role("dialog").get_by_role("heading", level=2)
    expect(title).not_to_have_text("…")  # until the item is there
    assert title.inner_text() in name
    page.keyboard.press("Escape")


@slow
def test_pins_do_not_hide_one_another_and_every_item_is_in_one(visit: Open) -> None:
    def crowd(found: dict[str, Any]) -> None:
        for n, item in enumerate(found["items"]):
            item["latitude"], item["longitude"] = 40 + (n % 5) * 0.0004, -75 + (n % 3) * 0.0004

    def answer(route: Route) -> None:
        body = route.fetch().json()
        crowd(body)
        route.fulfill(json=body)

    page = visit(address="#k=40", routes=(("**/v1/recommend", answer),))
    expect(cards(page)).to_have_count(40)
    ready(page)
    for _ in range(4):
        boxes = [box for box in (pin.bounding_box() for pin in page.locator("#map .pin .shape").all()) if box]
        for one, other in itertools.combinations(boxes, 2):
            apart = max(abs(one["x"] - other["x"]) / one["width"], abs(one["y"] - other["y"]) / one["height"])
            assert apart >= 0.85, (one, other)
        labels = "; ".join(str(pin.get_attribute("aria-label")) for pin in page.locator("#map .marker").all())
        assert sorted(int(rank) for rank in re.findall(r"(\d+)\. ", labels)) == list(range(1, 41))
        page.get_by_role("button", name="Zoom in").click()
    for _ in range(8):
        page.get_by_role("button", name="Zoom in").click()
    page.locator("#map .marker:has(.more)").first.press("Enter")  # items at one location: a list
    page.locator("#map .several button").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()


@slow
def test_the_map_moves_at_once_for_those_who_want_no_motion(visit: Open) -> None:
    page = visit(motion="reduce")
    draw(page)
    ready(page)
    page.locator("#map").focus()
    places = page.evaluate(
        """async () => {
          const pane = document.querySelector("#map .leaflet-map-pane");
          const seen = new Set([pane.style.transform]);
          const key = { key: "ArrowRight", code: "ArrowRight", keyCode: 39, bubbles: true };
          document.querySelector("#map").dispatchEvent(new KeyboardEvent("keydown", key));
          for (let n = 0; n < 40; n++) {
            await new Promise(requestAnimationFrame);
            seen.add(pane.style.transform);
          }
          return seen.size;
        }"""
    )
    assert places == 2


@slow
def test_groups_are_never_nearer_than_the_gap(visit: Open) -> None:
    page = visit()
    nearest, members = page.evaluate(
        """async () => {
          const { grouped } = await import("/page/geo.js");
          let seed = 7;
          const next = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
          const points = Array.from({ length: 400 }, () => ({ x: 500 * next(), y: 400 * next() }));
          const groups = grouped(points, 34);
          const far = groups.flatMap((a, n) => groups.slice(n + 1).map((b) => Math.hypot(a.x - b.x, a.y - b.y)));
          return [Math.min(...far), groups.reduce((sum, group) => sum + group.members.length, 0)];
        }"""
    )
    assert nearest >= 34 and members == 400


@slow
def test_the_pin_is_the_location_of_the_request(visit: Open) -> None:
    page = visit()
    draw(page)
    ready(page)
    body = asked(page, lambda: page.get_by_role("button", name="Set the pin to the map centre").click())
    assert len(body["near"]) == 2
    expect(page.locator("#map .drop")).to_be_visible()
    body = asked(page, lambda: page.get_by_role("button", name="Remove the pin").click())
    assert "near" not in body
    expect(page.locator("#map .drop")).to_have_count(0)


@slow
def test_tiles_are_loaded_only_if_the_page_names_them(visit: Open) -> None:
    asked_for: list[str] = []

    def with_tiles(route: Route) -> None:
        answer = route.fetch()
        tag = '<meta name="map-tiles" content="https://tiles.example.org/{z}/{x}/{y}.png" data-attribution="© Example &lt;b&gt;">'
        headers = answer.headers | {
            "content-security-policy": answer.headers["content-security-policy"].replace(
                "img-src", "img-src https://tiles.example.org"
            )
        }
        route.fulfill(body=answer.text().replace("</head>", tag + "</head>"), headers=headers)

    def tile(route: Route) -> None:
        asked_for.append(route.request.url)
        route.fulfill(body='<svg xmlns="http://www.w3.org/2000/svg"/>', content_type="image/svg+xml")

    page = visit(routes=(("**/tiles.example.org/**", tile), (re.compile(r":\d+/$"), with_tiles)))  # type: ignore[arg-type]
    expect(page.locator("#map")).to_contain_text("© Example <b>")
    expect(page.locator("#map img.leaflet-tile").first).to_be_attached()
    assert asked_for
    assert not page.locator("#map path.land").count()
