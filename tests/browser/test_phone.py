"""Test the page on a phone, and that nothing jumps while it loads."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from .conftest import PHONE, SMALL, WIDE, asked, cards, draw

slow = pytest.mark.slow
Open = Callable[..., Page]
SHIFTS = """
  window.shifts = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts += entry.value;
  }).observe({ type: "layout-shift", buffered: true });
"""


@slow
@pytest.mark.parametrize("size", [PHONE, SMALL])
def test_the_first_recommendation_is_within_the_first_360_pixels(visit: Open, size: tuple[int, int]) -> None:
    page = visit(size=size)
    for step in ("opened", "user"):
        if step == "user":
            draw(page)
        expect(cards(page)).to_have_count(10)
        box = cards(page).first.bounding_box()
        assert box and box["y"] + box["height"] <= 360, (step, box)
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]


@slow
@pytest.mark.parametrize("size", [PHONE, SMALL])
def test_nothing_of_the_head_lies_on_anything_else(visit: Open, size: tuple[int, int]) -> None:
    page = visit(size=size)
    draw(page)
    covered = page.evaluate(
        """() => {
          const names = ".brand svg, .brand b, #theme, [role=tab], .who input, .who button, .tools button";
          const parts = [...document.querySelectorAll(names)];
          return parts.filter((part) => {
            const { x, y, width, height, right } = part.getBoundingClientRect();
            const top = document.elementFromPoint(x + width / 2, y + height / 2);
            const inside = part.scrollWidth <= part.clientWidth + 1 || part.matches("svg, input, b");
            return !top || !(part.contains(top) || top.contains(part)) || right > innerWidth || !inside;
          }).map((part) => part.outerHTML.slice(0, 100));
        }"""
    )
    assert not covered


@slow
def test_filters_history_and_map_are_sheets_over_the_list(visit: Open) -> None:
    page = visit(size=PHONE)
    draw(page)
    for hidden in ("#controls", "#history", "#map"):
        expect(page.locator(hidden)).to_be_hidden()
    assert not page.locator("#map > *").count(), "the map is loaded when it is opened"
    page.get_by_role("button", name=re.compile("^Filters")).click()
    sheet = page.get_by_role("dialog", name="Filters and settings")
    asked(page, lambda: sheet.get_by_text("$$", exact=True).click())
    expect(sheet).to_be_visible()
    sheet.get_by_role("button", name="Show the list").click()
    expect(sheet).to_be_hidden()
    expect(page.get_by_role("button", name=re.compile("^Filters"))).to_contain_text("1")
    expect(page.get_by_role("button", name=re.compile("^Filters"))).to_be_focused()
    page.get_by_role("button", name=re.compile("^History")).click()
    history = page.get_by_role("dialog", name="History")
    expect(history.locator("#history > li").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(history).to_be_hidden()
    page.get_by_role("button", name=re.compile("^Map")).click()
    expect(page.get_by_role("dialog", name="Map").locator(".marker").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(cards(page).first).to_be_visible()


@slow
def test_a_sheet_opened_at_once_after_another_was_closed_has_its_section(visit: Open) -> None:
    """The dialog's close event comes after the second opening, and must move no section out of it."""
    page = visit(size=PHONE)
    draw(page)
    page.get_by_role("button", name=re.compile("^Filters")).click()
    page.evaluate("""() => {
        document.querySelector("dialog[open]").close();
        document.querySelector('[data-sheet="history-column"]').click();
    }""")
    history = page.get_by_role("dialog", name="History")
    expect(history.locator("#history > li").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(history).to_be_hidden()
    page.get_by_role("button", name=re.compile("^Filters")).click()
    expect(page.get_by_role("dialog", name="Filters and settings").get_by_text("$$", exact=True)).to_be_visible()


@slow
def test_esc_closes_a_panel_before_its_sheet(visit: Open) -> None:
    page = visit(size=PHONE)
    draw(page)
    page.get_by_role("button", name=re.compile("^Filters")).click()
    page.locator("#category-button").click()
    expect(page.locator("#category-panel")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#category-panel")).to_be_hidden()
    expect(page.get_by_role("dialog", name="Filters and settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#sheet")).to_be_hidden()


@slow
@pytest.mark.parametrize("size", [WIDE, (1280, 800), (900, 700), PHONE])
def test_nothing_jumps_while_the_page_loads_and_changes(visit: Open, size: tuple[int, int]) -> None:
    page = visit(size=size, script=SHIFTS)
    draw(page)
    if size[0] > 1180:
        asked(page, lambda: page.locator("#popularity_bias").fill("1"))
        expect(page.locator("#map path.covered").first).to_be_attached()
    expect(page.locator("#response")).to_be_visible()
    page.wait_for_timeout(300)  # for what comes late
    assert page.evaluate("window.shifts") < 0.02


@slow
@pytest.mark.parametrize("size", [WIDE, (1280, 800), (1190, 700)])
def test_names_and_values_of_the_controls_do_not_overlap(visit: Open, size: tuple[int, int]) -> None:
    page = visit(size=size)
    expect(page.locator("#popularity_bias-value")).to_have_text("learned")
    wide = page.evaluate(
        """() => [...document.querySelectorAll(".control > .name")]
          .filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.innerText)"""
    )
    assert wide == []
