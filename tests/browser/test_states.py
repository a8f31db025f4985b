"""Test the states of the page (loading, empty, failed), its evaluation tab, its themes and its accessibility."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from .conftest import draw

slow = pytest.mark.slow
Open = Callable[..., Page]
AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")
PHONE = (390, 844)
STATE = "#seen=1"  # the page requests the list of an address with a state
SYSTEMS = {"two-tower": 0.08, "item_knn": 0.05, "popular": 0.02, "oracle": 0.25}
METRICS = ("NDCG@10", "Recall@20")


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.005, "high": value + 0.005}


REPORT = {
    "verdict": "Better than item-kNN, the best baseline (+0.0300 NDCG@10; 95 % interval +0.0200 to +0.0400).",
    "protocol": {"metric": "NDCG@10", "queries": 600, "users": 90, "catalogue": 200, "split": "time"},
    "systems": {name: {metric: interval(value * (1 + n)) for n, metric in enumerate(METRICS)} for name, value in SYSTEMS.items()},
    "differences": {
        name: {"NDCG@10": interval(0.08 - value), "Recall@20": interval(0.001)}
        for name, value in SYSTEMS.items()
        if name != "two-tower"
    },
    "beyond": {name: {"coverage@10": 0.5, "gini@10": 0.8} for name in SYSTEMS},
}


def changed(change: Callable[[dict[str, Any]], None]) -> Callable[[Route], None]:
    """Return a route handler that changes the response of the server."""

    def answer(route: Route) -> None:
        body = route.fetch().json()
        change(body)
        route.fulfill(json=body)

    return answer


def with_report(about: dict[str, Any]) -> None:
    about["metrics"] = {"report": REPORT}


def without_places(about: dict[str, Any]) -> None:
    about["filters"] |= {"has_locations": False, "has_price": False, "has_hours": False}


def nowhere(found: dict[str, Any]) -> None:
    for item in found.get("items", found.get("events", [])):
        item |= {"latitude": None, "longitude": None}


def shown(page: Page) -> Page:
    """Return the page after its list is shown."""
    expect(page.locator("#list > li.best").first).to_be_visible()
    expect(page.locator("#list-column")).to_have_attribute("aria-busy", "false")
    return page


def drawn(page: Page) -> Page:
    """Return the page after the list of a random user is shown."""
    draw(page)
    return page


def write(page: Page, condition: str) -> None:
    """Add a condition as text."""
    if not page.locator("#builder").is_visible():
        page.get_by_role("button", name="Filter", exact=True).click()
    page.get_by_label("Or write it").fill(condition)
    page.get_by_label("Or write it").press("Enter")


@slow
def test_figures_are_a_table_of_systems_with_intervals(visit: Open) -> None:
    page = visit(address="#tab=evaluation", routes=(("**/v1/about", changed(with_report)),))
    panel = page.get_by_role("tabpanel", name="Evaluation")
    expect(panel.get_by_role("heading", level=2)).to_contain_text("Better than item-kNN, the best baseline")
    rows = panel.locator(".panel").nth(0).locator("tbody tr")
    assert [row.locator("th").inner_text() for row in rows.all()] == ["oracle", "two-tower", "item-kNN", "popular"]
    expect(rows.nth(1)).to_contain_text("0.0800")
    expect(rows.nth(1)).to_contain_text("0.0750 – 0.0850")
    fill, least = (float(str(rows.nth(n).locator(".fill").get_attribute("width"))) for n in (1, 2))
    assert fill / least == pytest.approx(0.08 / 0.05, rel=1e-3), "bars are in proportion"
    panel.get_by_label("Metric").select_option("Recall@20")
    expect(rows.nth(1)).to_contain_text("0.1600")
    page.get_by_role("tab", name="Evaluation").press("ArrowLeft")
    expect(page.get_by_role("tabpanel", name="For you")).to_be_visible()
    expect(page.get_by_role("tab", name="For you")).to_be_focused()


@slow
def test_figures_say_how_to_get_a_report_where_there_is_none(visit: Open) -> None:
    def bare(about: dict[str, Any]) -> None:
        about["metrics"] = {"metrics": {"metric": "NDCG@10", "value": 0.0712, "step": 9}}

    page = visit(address="#tab=evaluation", routes=(("**/v1/about", changed(bare)),))
    expect(page.locator("#evaluation")).to_contain_text("NDCG@10 0.0712")
    expect(page.locator("#evaluation")).to_contain_text("twotower evaluate")


@slow
def test_a_catalogue_without_coordinates_has_no_map_and_works(visit: Open, picture: Callable[[Page, str], None]) -> None:
    routes = (("**/v1/about", changed(without_places)), ("**/v1/recommend", changed(nowhere)), ("**/history", changed(nowhere)))
    page = drawn(visit(routes=routes))
    for hidden in ("#map", "#radius", "[data-filter=price]", "#open"):
        expect(page.locator(hidden)).to_be_hidden()
    expect(page.locator("#list > li.best")).to_have_count(10)
    assert not page.locator("#map > *").count(), "the library of the map is not loaded"
    picture(page, "no-coordinates")


@slow
def test_items_without_coordinates_are_listed_and_counted(visit: Open) -> None:
    def some(found: dict[str, Any]) -> None:
        nowhere({"items": found["items"][::2]})

    page = shown(visit(address=STATE, routes=(("**/v1/recommend", changed(some)),)))
    expect(page.locator("#legend")).to_contain_text("5 of 10 recommended have a location")
    expect(page.locator("#list > li.best")).to_have_count(10)


@slow
def test_the_page_calls_items_what_the_bundle_calls_them(visit: Open) -> None:
    def songs(about: dict[str, Any]) -> None:
        about |= {"noun": "story", "nouns": "stories"}

    page = shown(visit(routes=(("**/v1/about", changed(songs)),)))
    expect(page.locator("#catalogue")).to_contain_text("stories")
    expect(page.get_by_role("combobox", name="Add a story by name")).to_be_visible()


@slow
def test_long_names_are_clamped_and_whole_in_the_details(visit: Open) -> None:
    long = "A very long name of an item that goes on and on " * 8

    def lengthen(found: dict[str, Any]) -> None:
        found["items"][0]["name"] = long
        found["items"][1]["name"] = "x" * 300

    page = shown(visit(address=STATE, routes=(("**/v1/recommend", changed(lengthen)),)))
    for n in (0, 1):
        name = page.locator("#list > li.best .name").nth(n)
        box = name.bounding_box()
        assert box and box["height"] < 60, "two lines"
    expect(page.locator("#list > li.best .name").first).to_have_attribute("title", long)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@slow
def test_until_the_first_answer_comes_skeletons_stand_in(visit: Open, picture: Callable[[Page, str], None]) -> None:
    waiting: list[Route] = []
    page = visit(address=STATE, routes=(("**/v1/recommend", lambda route: waiting.append(route)),))
    expect(page.locator("#list > li.skeleton")).to_have_count(10)
    expect(page.locator("#list-column")).to_have_attribute("aria-busy", "true")
    picture(page, "loading")
    for route in waiting:
        route.continue_()
    page.unroute("**/v1/recommend")
    shown(page)


@slow
def test_a_server_that_is_gone_is_waited_for_and_the_page_goes_on(visit: Open, picture: Callable[[Page, str], None]) -> None:
    page = drawn(visit(refused=(0,)))
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    page.locator("#list > li.best .add").first.click()
    banner = page.locator("#banner")
    expect(banner).to_contain_text("The server cannot be reached")
    expect(page.locator("#list > li.best")).to_have_count(10)
    picture(page, "server-gone")
    page.unroute("**/v1/**")
    expect(banner).to_be_hidden(timeout=5_000)  # by itself
    expect(page.locator("#history > li.added")).to_have_count(1)


@slow
def test_a_page_that_opens_without_its_server_opens_when_it_comes(visit: Open) -> None:
    page = visit(refused=(0,), routes=(("**/v1/about", lambda route: route.abort("connectionrefused")),))
    expect(page.locator("#banner")).to_contain_text("The server cannot be reached")
    expect(page.locator("#list > li.best")).to_have_count(10)  # they came with the page
    page.unroute("**/v1/about")
    page.get_by_role("button", name="Retry now").click()
    shown(page)
    expect(page.locator("#banner")).to_be_hidden()


@slow
def test_a_request_above_the_rate_is_repeated_after_the_stated_time(visit: Open) -> None:
    page = drawn(visit(refused=(429,)))
    banner = page.locator("#banner")
    asked_s: list[float] = []
    error = {"error": {"code": "rate", "message": "At most 100 requests a second."}, "request_id": "r1"}
    page.on("request", lambda request: asked_s.append(time.monotonic()) if request.url.endswith("/v1/recommend") else None)
    page.route("**/v1/recommend", lambda route: route.fulfill(status=429, headers={"retry-after": "3"}, json=error))
    page.locator("#seen").check()
    expect(banner).to_contain_text("Too many requests at once.")
    expect(banner).to_contain_text(re.compile(r"Next retry in [123] s\."))
    page.unroute("**/v1/recommend")
    expect(banner).to_be_hidden(timeout=10_000)
    assert asked_s[1] - asked_s[0] > 2.9


@slow
def test_a_filter_that_is_refused_is_answered_at_the_filter(visit: Open, picture: Callable[[Page, str], None]) -> None:
    page = drawn(visit(refused=(422,)))
    write(page, "prise <= 2")
    refusal = page.locator("#refusal")
    expect(refusal).to_contain_text("prise")
    expect(page.locator("#list-column")).to_have_class(re.compile("stale"))
    picture(page, "refused")
    page.get_by_role("button", name="Prise: at most 2", exact=True).click()
    expect(page.get_by_label("Or write it")).to_have_value("prise <= 2")  # a condition can be corrected
    page.get_by_label("Or write it").fill("price <= 2")
    page.get_by_label("Or write it").press("Enter")
    expect(refusal).to_be_hidden()
    expect(page.locator("#list-column")).not_to_have_class(re.compile("stale"))


@slow
def test_a_refusal_that_says_where_is_marked_there(visit: Open) -> None:
    page = shown(visit(refused=(422,)))
    error = {"error": {"code": "invalid", "message": "Unknown column.", "location": 10}, "request_id": "r1"}
    page.route("**/v1/recommend", lambda route: route.fulfill(status=422, json=error))
    write(page, "a == 1 or b == 2")
    expect(page.locator("#refusal pre")).to_be_visible()
    assert page.locator("#refusal pre").inner_text().rstrip() == "a == 1 or b == 2\n         ^"


@slow
def test_an_empty_list_offers_to_reset_the_filters(visit: Open, picture: Callable[[Page, str], None]) -> None:
    page = drawn(visit())
    write(page, 'name == "no item is called this"')
    expect(page.locator("#list-state")).to_contain_text("No item matches these filters")
    picture(page, "empty")
    page.get_by_role("button", name="Reset filters and settings").click()
    expect(page.locator("#list > li.best")).to_have_count(10)


@slow
def test_a_server_error_is_shown_with_its_request_id(visit: Open) -> None:
    error = {"error": {"code": "internal", "message": "Internal server error."}, "request_id": "r-42"}
    page = visit(address=STATE, refused=(500,), routes=(("**/v1/recommend", lambda route: route.fulfill(status=500, json=error)),))
    expect(page.locator("#list-state")).to_contain_text("Internal server error.")
    expect(page.locator("#list-state")).to_contain_text("r-42")
    page.unroute("**/v1/recommend")
    page.get_by_role("button", name="Try again").click()
    shown(page)


@slow
def test_links_to_what_is_not_there_still_open(visit: Open) -> None:
    page = shown(visit(address="#user=nobody-at-all&added=no-such-place", refused=(404,)))
    expect(page.locator("#list-note")).to_contain_text("This user is unknown")
    expect(page.locator("#toast")).to_contain_text("not in the catalogue")
    assert "added" not in page.url


@slow
def test_the_theme_follows_the_system_until_it_is_chosen_and_is_kept(visit: Open) -> None:
    page = shown(visit(scheme="dark"))
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    button = page.get_by_role("button", name=re.compile("^Theme: system"))
    button.click()
    light = page.evaluate(paper)
    assert light != dark
    page.reload()
    assert page.evaluate(paper) == light
    expect(page.get_by_role("button", name=re.compile("^Theme: light"))).to_be_visible()


def audit(page: Page, rules: dict[str, Any]) -> list[str]:
    """Return the violations that axe finds after all animations, one line per kind of violation.

    A pin of the map may be partly covered: its item is in the list too (WCAG 2.5.8, exception "equivalent").
    """
    page.evaluate("Promise.all(document.getAnimations().map(one => one.finished.catch(() => null)))")
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    if page.evaluate("typeof axe") == "undefined":
        page.evaluate(AXE)
    found = page.evaluate("rules => axe.run(document, {runOnly: rules})", rules)
    places = {fault["id"]: [node["html"] for node in fault["nodes"]] for fault in found["violations"]}
    places["target-size"] = [html for html in places.get("target-size", ()) if "leaflet-marker-icon" not in html]
    return [f"{name}: {html[0][:160]}" for name, html in places.items() if html]


def why(page: Page) -> None:
    draw(page)
    page.locator("#list > li.best .why").first.click()
    page.locator("#list .reasons li").first.wait_for()
    page.locator("#list > li.best .add").nth(1).click()
    page.locator("#moved b").wait_for()


def sheet(page: Page) -> None:
    page.locator("#list > li.best .name").first.click()
    page.locator("#details .cards > li:not(.skeleton)").first.wait_for()


def history(page: Page) -> None:
    page.keyboard.press("Escape")
    if not page.locator("#item-find").is_visible():
        page.get_by_role("button", name=re.compile("^History")).click()
    page.locator("#item-find").fill("a")
    page.locator("#item-list [role=option]:not(.note)").first.wait_for()


def filters(page: Page) -> None:
    for _ in range(3):
        page.keyboard.press("Escape")
    if not page.locator("#builder-button").is_visible():
        page.get_by_role("button", name=re.compile("^Filters")).click()
    page.locator("#builder-button").click()
    page.locator("#builder .chip").first.wait_for()


def ground(page: Page) -> None:
    for _ in range(3):
        page.keyboard.press("Escape")
    if not page.locator("#map").is_visible():
        page.get_by_role("button", name=re.compile("^Map")).click()
    page.locator("#map path.covered").first.wait_for(state="attached")


def operations(page: Page) -> None:
    page.get_by_role("tab", name="Operations").click()
    page.locator("#operations .panel dl").first.wait_for()


def figures(page: Page) -> None:
    for _ in range(2):
        page.keyboard.press("Escape")
    page.get_by_role("tab", name="Evaluation").click()
    page.locator("#evaluation tbody tr").first.wait_for()


RULES: dict[str, Any] = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
LOOKS: dict[str, Any] = {"type": "rule", "values": ["color-contrast", "target-size"]}  # all that differs in the dark or on a phone
VIEWS: dict[str, Callable[[Page], object]] = {
    "start": shown,
    "why": why,
    "sheet": sheet,
    "history": history,
    "filters": filters,
    "map": ground,
    "figures": figures,
    "operations": operations,
}


@slow
@pytest.mark.parametrize("looks", ["light", "dark", "phone"])
def test_every_view_is_accessible_and_pictured(visit: Open, picture: Callable[[Page, str], None], looks: str) -> None:
    how = {"size": PHONE} if looks == "phone" else {"scheme": looks}
    page, found = visit(**how, routes=(("**/v1/about", changed(with_report)),)), {}
    for name, go in VIEWS.items():  # each goes on from the one before
        go(page)
        picture(page, f"{name}-{looks}")
        found[name] = audit(page, RULES if looks == "light" else LOOKS)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the screen"
    assert not any(found.values()), json.dumps(found, indent=1)
