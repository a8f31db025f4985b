"""Test keyboard use, addresses and the description of changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from .conftest import draw

slow = pytest.mark.slow
Open = Callable[..., Page]


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
              const pin = e.matches(".marker") && e.querySelector(".shape");
              const shown = e.matches(".segments input") ? e.nextElementSibling : pin || e;
              return [e.dataset.stop ?? null, getComputedStyle(shown).outlineStyle !== "none", e.outerHTML.slice(0, 120)];
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
          const full = { ...START, tab: "evaluation", user: "a&b=c", added: ["x,y", "#1"], near: [48.2, -16.4], k: 30,
            price: 2, categories: ["Bars & Pubs", "Tea, Coffee"], radius: 10, open: true, conditions: ['a == "A%20B"', "b <= 2"],
            hidden: ["#2"], seen: true, popularity_bias: -0.5, diversity: 0.3 };
          const odd = "#k=9999&popularity_bias=7&near=999,1&price=x&radius=3&tab=nowhere&open=maybe&diversity=";
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
