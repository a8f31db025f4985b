"""Test the main journeys through the page: choose a user, edit the history, read the list, its reasons and the details."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from .conftest import asked, cards, draw, ids

slow = pytest.mark.slow
Open = Callable[..., Page]


def test_the_page_opens_with_items_for_an_unknown_user_under_a_strict_policy(visit: Open, server: str) -> None:
    page = visit()
    expect(cards(page)).to_have_count(10)
    expect(page.locator("#list-note")).to_contain_text("what most people chose lately")
    expect(page.locator("#history-state")).to_contain_text("No history yet")
    expect(cards(page).first.locator(".why")).to_be_hidden()  # the list does not come from the model
    policy = page.request.get(server).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "style=" not in page.request.get(server).text(), "inline styles would break the policy"


@slow
def test_a_drawn_user_has_a_history_a_list_and_a_link_that_reopens_both(visit: Open, server: str) -> None:
    page = visit()
    user = draw(page)
    expect(page.locator("#history-note")).to_contain_text(user)
    expect(page.locator("#list-note")).to_have_text("Best match first")
    expect(page.locator("#response dl")).to_be_hidden()  # figures for operators are behind a detail
    page.get_by_text("About this list").click()
    expect(page.locator("#response dl")).to_contain_text(re.compile(r"confidence\s*[1-9]\d? %"))
    expect(page.locator("#response dl")).to_contain_text(re.compile(r"\d ms in the server, .*\d ms round trip"))
    again = visit(address=page.url.removeprefix(server))
    expect(cards(again)).to_have_count(10)
    assert ids(again) == ids(page)
    page.go_back()
    expect(page.locator("#history-state")).to_contain_text("No history yet")


@slow
def test_a_user_is_found_and_chosen_with_the_keyboard_alone(visit: Open) -> None:
    page = visit()
    field = page.get_by_role("combobox", name="Search for a user by id")
    field.focus()
    page.keyboard.press("ArrowDown")
    options = page.locator("#user-list [role=option]:not(.note)")
    expect(options.nth(3)).to_be_visible()
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    expect(options.nth(1)).to_have_attribute("aria-selected", "true")
    expect(field).to_have_attribute("aria-activedescendant", "user-list-1")
    chosen = options.nth(1).locator(".mono").inner_text()
    page.keyboard.press("Escape")
    expect(page.locator("#user-list")).to_be_hidden()
    field.fill(chosen[:6])
    expect(options.first).to_contain_text(chosen[:6])
    field.fill(chosen)
    body = asked(page, lambda: page.keyboard.press("Enter"))  # at once: Enter refers to the typed text, not to the old results
    assert body["user"] == chosen
    field.fill(body["user"][:1])
    page.keyboard.press("Escape")
    field.fill("nobody is called like this")
    expect(page.locator("#user-list")).to_contain_text("No user id contains")


@slow
def test_from_an_empty_history_every_added_item_changes_the_list(visit: Open) -> None:
    page = visit()
    expect(cards(page)).to_have_count(10)
    before = ids(page)
    page.locator("body").press("/")
    field = page.get_by_role("combobox", name="Add an item by name")
    expect(field).to_be_focused()
    field.fill("a")
    expect(page.locator("#item-list [role=option]").first).to_have_attribute("aria-selected", "true")
    body = asked(page, lambda: page.keyboard.press("Enter"))
    assert len(body["history"]) == 1 and "user" not in body
    expect(page.locator("#history > li.added")).to_have_count(1)
    expect(page.locator("#moved")).to_contain_text("After adding")
    expect(page.locator("#live")).to_contain_text("After adding")
    assert ids(page) != before
    asked(page, lambda: page.get_by_role("button", name="Undo").click())
    expect(page.locator("#history > li")).to_have_count(0)
    assert ids(page) == before


@slow
def test_a_card_joins_the_history_and_the_rest_say_where_they_went(visit: Open) -> None:
    page = visit()
    draw(page)
    before = ids(page)
    add = cards(page).nth(2).get_by_role("button", name=re.compile("^Add "))
    add.focus()
    body = asked(page, lambda: page.keyboard.press("Enter"))
    assert body["history"] == [{"item_id": before[2]}]
    expect(page.locator("#history > li").first).to_have_attribute("data-id", before[2])
    after = ids(page)
    assert before[2] not in after, "a visited item is not recommended"
    for rank, (card, one) in enumerate(zip(cards(page).all(), after, strict=True)):
        step = before.index(one) - rank if one in before else None
        sign = "new" if step is None else f"▲{step}" if step > 0 else f"▼{-step}" if step < 0 else ""
        assert card.locator(".move > [aria-hidden]").inner_text() == sign
    gone = [one for one in before if one not in after and one != before[2]]
    expect(page.locator("#moved .chip")).to_have_count(min(len(gone), 6))
    assert not gone or f"{len(gone)} removed" in page.locator("#moved").inner_text()
    expect(cards(page).nth(2).locator(".add")).to_be_focused()  # keyboard users continue from there
    asked(page, lambda: page.locator("#history > li").first.get_by_role("button", name=re.compile("from the history")).click())
    assert ids(page) == before


@slow
def test_cards_travel_unless_motion_is_unwanted(visit: Open) -> None:
    moving = "() => document.querySelector('#list').getAnimations({subtree: true}).length"
    for motion, wanted in (("no-preference", True), ("reduce", False)):
        page = visit(motion=motion)
        expect(cards(page)).to_have_count(10)
        page.evaluate(
            f"new MutationObserver(() => window.travelled = Math.max(window.travelled ?? 0, ({moving})())).observe("
            "document.querySelector('#moved'), {childList: true, attributes: true})"
        )
        asked(page, lambda page=page: cards(page).nth(0).locator(".add").click())  # type: ignore[misc]
        assert (page.evaluate("window.travelled") > 0) is wanted, motion


@slow
def test_more_is_the_same_list_going_on(visit: Open) -> None:
    page = visit()
    draw(page)
    before = ids(page)
    asked(page, lambda: page.get_by_role("button", name="Show 10 more").click())
    expect(cards(page)).to_have_count(20)
    assert ids(page)[:10] == before
    assert not [text for text in page.locator("#list .move > [aria-hidden]").all_inner_texts() if text]


@slow
def test_reasons_are_sentences_and_light_the_events_they_name(visit: Open) -> None:
    page = visit()
    draw(page)
    card = cards(page).nth(0)
    words = card.locator(".because .words").inner_text()
    assert re.match(r"Because|Near|Popular|Liked|Often|Fits|In an|New|Its ", words), words
    card.get_by_role("button", name=re.compile("^Why this item")).click()
    reasons = card.locator(".reasons li")
    expect(reasons.first).to_be_visible()
    said = reasons.locator(".label").all_inner_texts()
    assert not [text for text in said if re.search(r"=|_|\bTrue\b|\bFalse\b", text)], said
    assert all(re.fullmatch(r"[+−]\d\.\d{3}", text) for text in reasons.locator(".figure").all_inner_texts())
    known = card.locator(".reasons li[data-id]").first
    known.hover()
    expect(known).to_have_class(re.compile("lit"))
    card.get_by_role("button", name=re.compile("^Why this item")).click()
    expect(card.locator(".reasons")).to_be_hidden()


@slow
def test_what_is_unwanted_leaves_the_list_and_comes_back(visit: Open) -> None:
    page = visit()
    draw(page)
    before = ids(page)
    card = cards(page).nth(1)
    categories = card.locator(".meta").inner_text()
    card.get_by_role("button", name=re.compile("^Not interested")).click()
    body = asked(page, card.get_by_role("button", name="Hide this item").click)
    assert body["filter"] == f'id not in ["{before[1]}"]'
    expect(cards(page)).to_have_count(10)
    assert before[1] not in ids(page)
    expect(page.locator("#history > li.added")).to_have_count(0)
    asked(page, lambda: page.get_by_role("button", name="Undo").click())
    assert ids(page) == before
    card = cards(page).nth(1)
    card.get_by_role("button", name=re.compile("^Not interested")).click()
    more = card.get_by_role("button", name=re.compile("^No more ")).first
    category = more.inner_text().removeprefix("No more ")
    assert category in categories
    body = asked(page, more.click)
    assert body["filter"] == f'category not in ["{category}"]'
    assert not [text for text in page.locator("#list .meta").all_inner_texts() if category in text.split(" · ")[1].split(", ")]
    body = asked(page, lambda: page.get_by_role("button", name=f"Remove: Category: not {category}").click())
    assert "filter" not in body


@slow
def test_prices_and_opening_hours_are_on_the_cards(visit: Open) -> None:
    page = visit()
    draw(page)
    facts = page.locator("#list .facts")
    expect(facts.filter(has_text=re.compile(r"Open until|Closed, opens|Always open|Closed")).first).to_be_visible()
    expect(facts.filter(has_text=re.compile(r"\${1,4}")).first).to_be_visible()


@slow
def test_an_item_opened_at_once_after_another_was_closed_is_shown(visit: Open) -> None:
    """The dialog's close event comes after the second opening, and must not cancel its requests."""
    page = visit()
    cards(page).nth(1).locator(".name").click()
    sheet = page.get_by_role("dialog")
    expect(sheet.locator(".cards > li:not(.skeleton)")).to_have_count(8)
    page.evaluate("""() => {
        document.querySelector("dialog[open]").close();
        document.querySelector("#list > li.best .name").click();
    }""")
    expect(sheet.get_by_role("heading", level=2)).to_have_text(cards(page).nth(0).locator(".name").inner_text())
    expect(sheet.locator(".cards > li:not(.skeleton)")).to_have_count(8)


@slow
def test_an_item_opens_with_similar_items_and_closes_with_the_focus_back(visit: Open) -> None:
    page = visit()
    draw(page)
    name = cards(page).nth(1).locator(".name")
    name.click()
    sheet = page.get_by_role("dialog")
    expect(sheet.get_by_role("heading", level=2)).to_have_text(name.inner_text())
    expect(sheet.locator(".cards > li:not(.skeleton)")).to_have_count(8)
    page.keyboard.press("Escape")
    expect(sheet).to_be_hidden()
    expect(name).to_be_focused()
    name.click()
    body = asked(page, sheet.locator(".cards .add:enabled").first.click)
    assert len(body["history"]) == 1
    expect(sheet).to_be_hidden()
    name = cards(page).nth(0).locator(".name")
    name.click()
    body = asked(page, sheet.get_by_role("button", name="Use this location").click)
    assert len(body["near"]) == 2
    expect(page.locator("#map .drop")).to_have_count(1)
    expect(page.locator("#chips")).to_contain_text("Around the pin")
