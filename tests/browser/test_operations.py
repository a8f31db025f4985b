"""Test the tab of operators: what is served, and refreshes and reloads with the key."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from .conftest import KEY, cards, draw

slow = pytest.mark.slow
Open = Callable[..., Page]


@slow
def test_the_tab_tells_version_load_and_errors(visit: Open, server: str) -> None:
    page = visit(refused=(422,))
    draw(page)
    page.evaluate("fetch('v1/recommend', {method: 'POST', headers: {'content-type': 'application/json'}, body: '{\"k\": 0}'})")
    page.get_by_role("tab", name="Operations").click()
    panel = page.get_by_role("tabpanel", name="Operations")
    version = page.request.get(f"{server}health/ready").json()["version"]
    expect(panel).to_contain_text("Ready")
    expect(panel.locator("dl").first).to_contain_text(version)
    expect(panel.locator("dl").nth(1)).to_contain_text(re.compile(r"99th percentile\s*[\d.,]+ ms"))
    expect(panel.locator("tbody")).to_contain_text(["malformed", "refreshes"])


@slow
def test_a_reload_needs_the_key_and_a_wrong_folder_changes_nothing(visit: Open, server: str, bundle: Path) -> None:
    page = visit(address="#tab=operations", refused=(401, 403, 422))
    page.on("dialog", lambda dialog: dialog.dismiss())
    panel = page.get_by_role("tabpanel", name="Operations")
    panel.get_by_role("button", name="Reload").click()
    expect(panel.locator(".outcome:not(:empty)")).to_contain_text("The API key is missing")
    panel.get_by_label("Key with the role admin").fill(KEY)
    panel.get_by_label("Folder of the bundle").fill(str(bundle / "nowhere"))
    panel.get_by_role("button", name="Reload").click()
    expect(panel.locator(".outcome.bad")).to_contain_text("nowhere")
    panel.get_by_label("Folder of the bundle").fill("")
    panel.get_by_role("button", name="Reload").click()
    version = page.request.get(f"{server}health/ready").json()["version"]
    expect(panel.locator(".outcome:not(:empty)")).to_contain_text(f"Version {version} was read again", timeout=30_000)
    panel.get_by_role("button", name="Refresh the items now").click()
    expect(panel.locator(".outcome:not(:empty)")).to_contain_text("Refreshed: 0 accepted events counted", timeout=30_000)
    assert KEY not in page.url


@slow
def test_outcomes_by_version_need_the_key(visit: Open, server: str) -> None:
    page = visit(address="#tab=operations", refused=(422,))
    panel = page.get_by_role("tabpanel", name="Operations")
    expect(panel).to_contain_text("Enter the key with the role admin below")
    panel.get_by_label("Key with the role admin").fill(KEY)
    panel.get_by_role("button", name="Refresh the items now").click()
    version = page.request.get(f"{server}health/ready").json()["version"]
    expect(panel.get_by_role("rowheader", name=version)).to_be_visible(timeout=30_000)
    panel.get_by_role("button", name="Serve the second version alone").click()
    expect(panel.locator(".outcome.bad")).to_contain_text("no second version")


@slow
def test_two_users_are_compared_side_by_side(visit: Open) -> None:
    page = visit(address="#tab=operations")
    for n, label in enumerate(("First user", "Second user")):
        field = page.get_by_role("combobox", name=label)
        field.click()
        option = page.locator(f"#compare-list-{n} [role=option]:not(.note)").nth(n)
        expect(option).to_be_visible()
        option.click()
        expect(page.locator(".side").nth(n).locator("li")).to_have_count(10)
    both = page.locator(".side").first.locator(".both").count()
    expect(page.locator(".comparison")).to_contain_text(f"{both} items of 10 in both lists" if both != 1 else "1 item of 10")
    assert page.locator(".side").nth(1).locator(".both").count() == both


@slow
def test_metrics_are_read_as_prometheus_writes_them(visit: Open) -> None:
    page = visit()
    expect(cards(page)).to_have_count(10)
    read = page.evaluate(
        r"""async () => {
          const { Metrics } = await import("/page/metrics.js");
          const text = [
            '# HELP a_total x', 'a_total{code="b\"c",way="1"} 2.0', 'a_total{code="d",way="1"} 5.0',
            'a_total{code="d",way="2"} 1.0', "up 1.5e3",
            'h_bucket{le="0.1",route="/r"} 5.0', 'h_bucket{le="0.2",route="/r"} 10.0', 'h_bucket{le="+Inf",route="/r"} 10.0',
          ].join("\n");
          const metrics = new Metrics(text);
          const of = { route: "/r" };
          const none = metrics.quantile("h", 0.5, { route: "/x" });
          return [metrics.by("a_total", "code"), metrics.value("up"), metrics.quantile("h", 0.75, of), none];
        }"""
    )
    assert read[0][0] == ["d", 6] and read[1] == 1500
    assert read[2] == pytest.approx(0.15) and read[3] is None
