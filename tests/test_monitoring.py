"""Alerts, dashboard and page name figures that a server has, in expressions that Prometheus can read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from twotower.serving.prometheus import Meters

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
ALERTS: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "twotower.json").read_text())
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
VARIABLES = {"$__rate_interval": "5m", "$job": "twotower", "$instance": ".*"}
BY_SCRAPE = {"up"}  # Prometheus makes it itself
LABELS_OF_SCRAPE = {"job", "instance"}
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
CONSTANT = {"process_start_time_seconds"}


def expressions() -> list[str]:
    for_dashboard = []
    for query in QUERIES:
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        for_dashboard.append(query)
    return [alert["expr"] for alert in ALERTS] + for_dashboard


@pytest.fixture(scope="module")
def figures() -> dict[str, set[str]]:
    """Return the labels of every series that a server gives, by name; of all series of a histogram."""
    meters = Meters(lambda: 0, lambda: True)
    meters.request("/v1/recommend", 200, 0.1)
    meters.bundle("1")
    meters.batch(1, 0.1)
    meters.refresh("refreshed", 0.1)
    meters.items(1, 0, {"counted": 1, "unknown_item": 0})
    meters._answers.labels("model").inc()
    meters._stages.labels("search").observe(0.1)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(meters.text().decode()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(expression: str) -> list[Any]:
    """Return the selectors of an expression, wherever they stand in it."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        for name in ("expr", "lhs", "rhs", "args", "vector_selector", "selector"):
            below = getattr(node, name, None)
            for one in below if isinstance(below, list) else [below]:
                if one is not None and not isinstance(one, str):
                    visit(one)

    visit(promql_parser.parse(expression))
    assert found or "time()" in expression, expression
    return found


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_asks_for_what_a_server_gives(expression: str, figures: dict[str, set[str]]) -> None:
    names = set(re.findall(r"\b(?:twotower|process)_[a-z_]+", expression))
    assert names or "up{" in expression
    found = selectors(expression)
    assert {one.name for one in found} >= names, "a selector was not found in the tree"
    for one in found:
        assert one.name in figures.keys() | BY_SCRAPE, f"{one.name} is no figure of a server"
        labels = {matcher.name for matcher in one.matchers.matchers}
        assert labels <= figures.get(one.name, set()) | LABELS_OF_SCRAPE, expression


def test_every_figure_of_a_server_is_shown_or_watched(figures: dict[str, set[str]]) -> None:
    shown = {re.sub(r"_(total|bucket|count|sum)$", "", one.name) for expression in expressions() for one in selectors(expression)}
    given = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in figures}
    assert given - shown == set(), "add a panel to deploy/grafana/twotower.json or an alert to deploy/prometheus/alerts.yaml"


@pytest.mark.parametrize("page", ["monitoring.md", "serving.md"])
def test_a_page_names_figures_that_exist(page: str, figures: dict[str, set[str]]) -> None:
    named = set(re.findall(r"\b(?:twotower|process)_[a-z_]+", (ROOT / "docs" / page).read_text()))
    families = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in figures}
    assert named and named <= figures.keys() | families | {"twotower_workers"}  # only of a server with several


def test_values_of_labels_are_those_that_a_server_writes() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src" / "twotower").rglob("*.py"))
    for expression in expressions():
        for one in selectors(expression):
            for matcher in one.matchers.matchers:
                if matcher.name not in LABELS_OF_SCRAPE | {"status"}:
                    assert f'"{matcher.value}"' in source or f"{matcher.value}:" in source, expression


def test_alerts_are_complete_and_the_page_lists_them() -> None:
    names = [alert["alert"] for alert in ALERTS]
    assert len(names) == len(set(names)) >= 15
    for alert in ALERTS:
        assert re.fullmatch(r"Twotower[A-Z]\w+", alert["alert"])
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"].keys() == {"summary", "action"} and all(alert["annotations"].values())
        assert alert["annotations"]["summary"].rstrip(".") in PAGE, alert["alert"]
    assert re.findall(r"^\| `(Twotower\w+)`", PAGE, re.M) == names


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and DASHBOARD["uid"] and DASHBOARD["schemaVersion"] >= 36
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) and all(x + 8 <= 24 for x, _ in places)
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == variables


def test_the_tool_of_prometheus_accepts_the_rules_and_their_tests(lacking: Any) -> None:
    if (promtool := shutil.which("promtool")) is None:
        lacking("needs promtool, which comes with Prometheus")
    assert promtool is not None
    folder = DEPLOY / "prometheus"
    for words in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]):
        done = subprocess.run([promtool, *words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
