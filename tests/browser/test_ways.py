"""Test the map, the phone layout, keyboard use and addresses."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from .conftest import asked, cards, draw, ids

slow = pytest.mark.slow
Open = Callable[..., Page]


@slow
def test_the_map_shows_both_lists_by_shape_and_goes_by_mouse_and_keys(visit: Open) -> None:
    page = visit()
    draw(page)
    marks = page.locator("#map .marker.recommended")
    expect(marks).to_have_count(10)
    assert marks.locator("circle").count() == 10 and page.locator("#map .marker.history rect").count() > 0
    cards(page).nth(4).hover()
    expect(page.locator("#map .tip")).to_contain_text(cards(page).nth(4).locator(".name").inner_text())
    lit = page.locator("#map .marker.lit")
    expect(lit).to_have_attribute("data-id", ids(page)[4])
    where = marks.last.get_attribute("transform")
    page.get_by_role("button", name="Zoom in").click()
    assert marks.last.get_attribute("transform") != where
    page.get_by_role("button", name="Fit the recommendations").click()
    assert marks.last.get_attribute("transform") == where
    marks.last.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#map .marker:focus")).to_have_attribute("aria-label", re.compile(r"^2\. "))
    expect(cards(page).nth(1)).to_have_class(re.compile("lit"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_role("heading", level=2)).to_have_text(
        cards(page).nth(1).locator(".name").inner_text()
    )
    page.keyboard.press("Escape")
    box = page.locator("#map .canvas").bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + 8
    before = marks.last.get_attribute("transform")
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    page.wait_for_function(
        "before => document.querySelector('#map .recommended > :last-child').getAttribute('transform') !== before", arg=before
    )
    body = asked(page, lambda: page.get_by_role("button", name="Set the pin to the map centre").click())
    assert len(body["near"]) == 2
    body = asked(page, lambda: page.get_by_role("button", name="Remove the pin").click())
    assert "near" not in body


@slow
def test_a_phone_has_the_map_one_list_at_a_time_and_nothing_beside_the_screen(visit: Open) -> None:
    page = visit(size=(390, 844))
    draw_button = page.get_by_role("button", name="Random user")
    asked(page, draw_button.click)
    expect(cards(page).first).to_be_visible()
    expect(page.locator("#history")).to_be_hidden()
    page.get_by_role("button", name=re.compile("^History")).click()
    expect(page.locator("#history > li").first).to_be_visible()
    expect(page.locator("#list")).to_be_hidden()
    page.get_by_role("button", name="Filters and settings").click()
    expect(page.locator("#popularity")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@slow
def test_the_way_past_the_controls_keeps_the_address(visit: Open) -> None:
    page = visit()
    user = draw(page)
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#list")).to_be_focused()
    assert f"user={user}" in page.url


@slow
def test_everything_is_reached_by_tab_with_a_visible_focus(visit: Open) -> None:
    page = visit()
    draw(page)
    wanted = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [tabindex='0']")]
          .filter((e) => e.checkVisibility() && !e.disabled && e.tabIndex >= 0 && !(e.type === "radio" && !e.checked))
          .map((e, n) => (e.dataset.stop = n))"""
    )
    reached, unseen = set(), []
    for _ in range(len(wanted) + 12):
        page.keyboard.press("Tab")
        stop, seen, what = page.evaluate(
            """() => {
              const e = document.activeElement;
              const shown = e.matches(".segments input") ? e.nextElementSibling : e.matches(".marker") ? e.firstElementChild : e;
              const { outlineStyle, strokeWidth } = getComputedStyle(shown);
              return [e.dataset.stop ?? null, outlineStyle !== "none" || parseFloat(strokeWidth) > 3, e.outerHTML.slice(0, 120)];
            }"""
        )
        reached.add(stop)
        if not seen and stop is not None:
            unseen.append(what)
    missed = [
        page.locator(f"[data-stop='{one}']").evaluate("e => e.outerHTML.slice(0, 120)") for one in wanted if str(one) not in reached
    ]
    assert not missed
    assert not unseen


@slow
def test_addresses_are_read_as_written_and_nonsense_falls_back(visit: Open) -> None:
    page = visit()
    back = page.evaluate(
        """async () => {
          const { START, fromHash, toHash } = await import("/page/url_state.js");
          const full = { ...START, tab: "figures", user: "a&b=c", added: ["x,y", "#1"], near: [48.2, -16.4], k: 30, price: 2,
            categories: ["Bars & Pubs", "Tea, Coffee"], radius: 10, open: true, where: 'city == "A%20B"', seen: true,
            popularity: -0.5, diversity: 0.3 };
          const odd = "#k=9999&popularity=7&near=999,1&price=x&radius=3&tab=nowhere&open=maybe&diversity=";
          return [toHash(START), fromHash(toHash(full)), full, fromHash(odd), START];
        }"""
    )
    assert back[0] == ""
    assert back[1] == back[2]
    assert back[3] == back[4]


@slow
def test_changes_between_two_lists_are_described(visit: Open) -> None:
    page = visit()
    told = page.evaluate(
        """async () => {
          const { compare, inWords } = await import("/page/changes.js");
          const list = (text) => [...text].map((item_id) => ({ item_id }));
          const told = (before, after, how) => {
            const found = compare(list(before), list(after), how);
            return [[...found.moves.values()], found.gone.map((place) => place.item_id).join(""), inWords(found)];
          };
          return [
            told("abcd", "bcae"), told("abcd", "bcde", { taken: ["a"] }), told("ab", "abcd", { longer: true }), told("abcd", "d"),
            told("ab", ""),
          ];
        }"""
    )
    assert told[0] == [[1, 1, -2, "new"], "d", "1 new, 2 up, 1 down, 1 removed"]
    assert told[1] == [[1, 1, 1, "new"], "", "1 new, 3 up"]
    assert told[2] == [[0, 0, 0, 0], "", "no change"]
    assert told[3] == [[3], "abc", "1 up, 3 removed"]
    assert told[4] == [[], "ab", "2 removed"]
