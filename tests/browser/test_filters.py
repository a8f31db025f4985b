"""Test filters and sliders: the requests they send, the effects they show, and conditions from the columns of the catalogue."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from .conftest import asked, cards, draw, ids

slow = pytest.mark.slow
Open = Callable[..., Page]


@slow
def test_filters_and_sliders_go_into_the_request_and_the_link(visit: Open, server: str) -> None:
    page = visit()
    draw(page)
    category = page.locator("#category-list label").nth(0).inner_text()
    page.get_by_role("button", name=re.compile("^Category")).click()
    body = asked(page, lambda: page.get_by_role("checkbox", name=category, exact=True).check())
    assert body["filter"] == f'category in ["{category}"]'
    page.keyboard.press("Escape")
    expect(page.locator("#category-panel")).to_be_hidden()
    expect(page.get_by_role("button", name=re.compile("^Category"))).to_be_focused()
    body = asked(page, lambda: page.locator(".segments").get_by_text("$$", exact=True).click())
    assert body["filter"].endswith(" and price <= 2")
    body = asked(page, lambda: page.locator("#radius").fill("5"))
    assert body["filter"].endswith(" and within(25)")
    expect(page.locator("#map path.reach")).to_have_count(1)
    body = asked(page, lambda: page.locator("#open").check())
    assert re.search(r'and open_at\("[A-Z][a-z]{2} \d\d:\d\d"\)$', body["filter"])
    body = asked(page, lambda: page.locator("#popularity_bias").fill("0.6"))
    assert body["popularity_bias"] == 0.6
    expect(page.locator("#popularity_bias")).to_have_attribute("aria-valuetext", "more popular 60 %")
    expect(page.locator("#list-note")).to_have_text("Best match first, popular items raised")
    body = asked(page, lambda: page.locator("#diversity").fill("0.4"))
    assert body["diversity"] == 0.4
    again = visit(address=page.url.removeprefix(server))
    expect(again.locator("#list-column")).to_have_attribute("aria-busy", "false")
    expect(again.locator("#category-text")).to_have_text(category)
    expect(again.locator("#radius-value")).to_have_text("within 25 km")
    assert again.locator("#open").is_checked() and again.locator("#diversity").input_value() == "0.4"
    body = asked(page, lambda: page.get_by_role("button", name="Reset all").click())
    assert "filter" not in body and body["popularity_bias"] == body["diversity"] == 0


@slow
def test_a_dial_tells_how_many_items_it_changed(visit: Open) -> None:
    page = visit()
    draw(page)
    before = ids(page)
    asked(page, lambda: page.locator("#popularity_bias").fill("1"))
    changed = len(set(before) - set(ids(page)))
    expect(page.locator("#popularity_bias-effect")).to_contain_text(f"{changed} of 10 changed")
    expect(page.locator("#diversity-effect")).not_to_contain_text("changed")
    asked(page, lambda: page.locator("#diversity").fill("0.9"))
    expect(page.locator("#diversity-effect")).to_contain_text(re.compile(r"\d+ of 10 changed"))
    asked(page, lambda: page.get_by_role("button", name="Reset all").click())
    expect(page.locator("#popularity_bias-effect")).not_to_contain_text("changed")
    assert ids(page) == before


@slow
def test_the_meter_is_shown_where_the_score_orders_the_list(visit: Open) -> None:
    page = visit()
    draw(page)
    widths = [float(str(fill.get_attribute("width"))) for fill in page.locator("#list .match .fill").all()]
    assert len(widths) == 10 and widths == sorted(widths, reverse=True)
    asked(page, lambda: page.locator("#popularity_bias").fill("-1"))
    body = page.evaluate("document.querySelectorAll('#list .match svg:not([hidden])').length")
    scores = page.evaluate(
        """async () => {
          const body = { user: new URLSearchParams(location.hash.slice(1)).get("user"), k: 10, popularity_bias: -1 };
          const headers = { "content-type": "application/json" };
          const answer = await fetch("v1/recommend", { method: "POST", headers, body: JSON.stringify(body) });
          return (await answer.json()).items.map((item) => item.score);
        }"""
    )
    assert (body == 10) is (scores == sorted(scores, reverse=True))


@slow
def test_a_condition_is_built_from_the_columns_and_values_of_the_catalogue(visit: Open, server: str) -> None:
    page = visit()
    draw(page)
    page.get_by_role("button", name="Filter", exact=True).click()
    column = page.get_by_label("Column")
    expect(column).to_be_focused()
    columns: dict[str, Any] = page.request.get(f"{server}v1/columns").json()
    offered = column.locator("option").evaluate_all("all => all.map((one) => one.value)")
    assert offered == [one["name"] for one in columns["columns"]]
    column.select_option("city")
    value = page.get_by_role("combobox", name="Value")
    city = next(one for one in columns["columns"] if one["name"] == "city")["values"][0]["value"]
    value.press_sequentially(city[1:4].upper())
    option = page.locator("#builder-values [role=option]").first
    expect(option).to_contain_text(city)
    option.click()
    body = asked(page, lambda: page.locator("#builder").get_by_role("button", name="Add").click())
    assert body["filter"] == f'city == "{city}"'
    assert all(city in text for text in page.locator("#list .meta").all_inner_texts())
    expect(page.locator("#chips")).to_contain_text(f"City: {city}")
    column.select_option("price")
    value.fill("cheap")
    page.locator("#builder").get_by_role("button", name="Add").click()
    expect(value).to_have_attribute("aria-invalid", "true")
    value.fill("2")
    body = asked(page, lambda: value.press("Enter"))
    assert body["filter"] == f'city == "{city}" and price <= 2'
    body = asked(page, lambda: page.get_by_role("button", name=f"Remove: City: {city}").click())
    assert body["filter"] == "price <= 2"


@slow
def test_every_example_is_a_filter_of_this_catalogue(visit: Open) -> None:
    page = visit()
    draw(page)
    page.get_by_role("button", name="Filter", exact=True).click()
    examples = page.locator("#builder .chip")
    expect(examples.nth(3)).to_be_visible()
    for text in examples.all_inner_texts():
        if not page.locator("#builder").is_visible():  # a click elsewhere closes it
            page.get_by_role("button", name="Filter", exact=True).click()
        page.locator("#builder").get_by_role("button", name=text, exact=True).click()
        expect(page.get_by_label("Or write it")).to_have_value(text)
        body = asked(page, lambda: page.keyboard.press("Enter"))
        assert body["filter"] == text
        expect(page.locator("#refusal")).to_be_hidden()
        assert cards(page).count() or text == "open_now"
        asked(page, lambda: page.get_by_role("button", name="Reset all").click())


@slow
def test_conditions_are_joined_so_that_all_hold(visit: Open) -> None:
    page = visit()
    written = page.evaluate(
        """async () => {
          const { START, filterOf } = await import("/page/url_state.js");
          const of = (part) => filterOf({ ...START, ...part }, { has_price: true, has_locations: true });
          const either = ["a == 1 or b == 2"];
          return [of({ conditions: either }), of({ conditions: either, price: 2 }), of({ hidden: ['x"y'] }), of({})];
        }"""
    )
    assert written[:3] == ["a == 1 or b == 2", "(a == 1 or b == 2) and price <= 2", 'id not in ["x\\"y"]']
    assert written[3] is None
