"""Test that the first list needs one response of the server, and that the scripts of the page find it as they would draw it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from .conftest import KEY, PHONE, WIDE, cards, serving

slow = pytest.mark.slow
Open = Callable[..., Page]
MAX_BYTES = 16_000  # of the response, compressed; 14,600 bytes come without waiting for the browser
ABORT: Callable[[Route], None] = lambda route: route.abort("connectionrefused")  # noqa: E731
NO_SCRIPTS = (("**/page/**", ABORT),)
PARTS = "#list-title, #list-note, #list .rank, #list .name, #list .meta, #list .fill, #list .acts *"
LOOK = """(parts) => [...document.querySelectorAll(parts)].map((part) => {
    const { x, y, width, height } = part.getBoundingClientRect();
    const box = [x, y, width, height].map((one) => Math.round(one));
    return [part.tagName, part.getAttribute("aria-label") ?? part.textContent, part.title ?? "", ...box];
  })"""


def test_the_first_list_needs_the_page_alone(visit: Open, server: str) -> None:
    page = visit(size=PHONE, refused=(0,), routes=(("**/page/**", ABORT), ("**/v1/**", ABORT)))
    expect(cards(page)).to_have_count(10)
    expect(cards(page).first).to_be_visible()
    expect(page.locator("#list-note")).to_contain_text("what most people chose lately")
    assert page.evaluate("getComputedStyle(document.querySelector('.tabs')).position") == "fixed", "the style comes with it"
    size = int(page.request.get(server, headers={"accept-encoding": "gzip"}).headers["content-length"])
    assert size <= MAX_BYTES


@slow
@pytest.mark.parametrize("size", [PHONE, WIDE])
def test_the_scripts_draw_the_list_as_the_server_does(visit: Open, size: tuple[int, int]) -> None:
    sent = visit(size=size, refused=(0,), routes=NO_SCRIPTS).evaluate(LOOK, PARTS)
    for address in ("", "#seen=1"):  # taken over; requested and drawn: the same list, as nothing is known of the user
        page = visit(address=address, size=size, routes=(("**/v1/items?**", ABORT),), refused=(0,))  # without prices and hours
        expect(page.locator("#response")).to_be_visible()
        assert page.evaluate(LOOK, PARTS) == sent, address


def asks(page: Page) -> list[str]:
    """Return the addresses below v1/ that a page has requested."""
    return page.evaluate("performance.getEntriesByType('resource').map((one) => one.name).filter((one) => one.includes('/v1/'))")


@slow
def test_the_list_that_came_with_the_page_is_not_requested_again(visit: Open) -> None:
    page = visit(size=PHONE)  # its map, which requests more items, is closed
    expect(page.locator("#response")).to_be_visible()
    expect(page.locator("#list .facts > *").first).to_be_visible()
    assert not [one for one in asks(page) if "recommend" in one]
    page.get_by_text("About this list").click()
    expect(page.locator("#response dl")).to_contain_text("most chosen lately")


@slow
def test_a_link_to_a_state_never_shows_the_list_that_came_with_the_page(visit: Open) -> None:
    bare = visit(address="#seen=1", refused=(0,), routes=NO_SCRIPTS)
    expect(bare.locator("#list-column")).to_be_hidden()
    waiting: list[Any] = []
    page = visit(address="#seen=1", size=PHONE, routes=(("**/v1/recommend", lambda route: waiting.append(route)),))
    expect(page.locator("#list > li.skeleton")).to_have_count(10)
    expect(cards(page)).to_have_count(0)
    expect(page.locator("#list-title")).to_have_text("For you")
    for route in waiting:
        route.continue_()
    page.unroute("**/v1/recommend")
    expect(cards(page)).to_have_count(10)


@slow
def test_a_server_that_needs_a_key_is_asked_with_it(visit: Open, bundle: Path) -> None:
    with serving(bundle) as address:
        bare = visit(of=address, refused=(0,), routes=NO_SCRIPTS)
        expect(bare.locator("#list > li")).to_have_count(0)
        page = visit(of=address, refused=(401,), script="window.prompt = () => '" + KEY + "';")
        expect(cards(page)).to_have_count(10)
