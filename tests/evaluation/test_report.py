"""Test the report files: stable JSON, and a self-contained HTML page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from twotower.data.dataset import Dataset
from twotower.errors import DataError
from twotower.evaluation.evaluator import judge
from twotower.evaluation.report import _plots, _strip, _ticks, read_report, render, write_report
from twotower.utils.config import EvaluationConfig
from twotower.utils.documents import Interval, Report

CURVES = [{"step": s, "epoch": 0, "loss": 5 - s / 100, "lr": 1e-3} for s in (50, 100, 150)]
CURVES += [{"step": 60, "NDCG@10": 0.02}, {"step": 120, "NDCG@10": 0.035}, {"step": 150, "NDCG@10": 0.03, "loss": math.nan}]
VOID = {"meta", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Check that tags close in order, and collect text and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report(dataset: Dataset) -> Any:
    settings = EvaluationConfig(
        ks=[5, 10], bootstrap_resamples=30, tune_baselines=False, baselines=["popular", "item_knn", "ease"], max_ease_items=1
    )
    judged = judge([], dataset, settings).json_values()
    own = judged["systems"]["item_knn"]
    judged["systems"]["two-tower"] = own  # as if a model had done as well as item-kNN
    judged["differences"] = {name: own for name in ("popular", "item_knn", "oracle")}
    for key in ("beyond", "seconds", "settings"):
        judged[key]["two-tower"] = judged[key]["item_knn"]
    for groups in judged["slices"].values():
        for entry in groups.values():
            entry["systems"]["two-tower"] = entry["systems"]["item_knn"]
    return judged


def made(report: Any, **changes: Any) -> Report:
    return Report.model_validate({**report, **changes})


def test_two_files_and_the_json_is_stable(report: Any, tmp_path: Path) -> None:
    write_report(made(report, curves=CURVES), tmp_path / "a" / "b")
    text = (tmp_path / "a" / "b" / "report.json").read_text()
    shuffled = dict(reversed(list({**report, "curves": CURVES}.items())))
    write_report(made(shuffled), tmp_path / "c")
    assert text == (tmp_path / "c" / "report.json").read_text()
    read = json.loads(text)
    assert read["systems"] == report["systems"] and read["curves"][-1]["loss"] is None
    assert read["verdict"] == report["verdict"]
    assert read_report(tmp_path / "c" / "report.json") == made(report, curves=CURVES)
    (tmp_path / "c" / "report.json").write_text(text.replace('"left_out"', '"left out"'))
    with pytest.raises(DataError, match=r"report\.json is damaged or of another version: left_out: Field required") as caught:
        read_report(tmp_path / "c" / "report.json")
    assert "\n" not in str(caught.value)


def test_the_page_stands_alone_and_says_what_matters(report: Any, tmp_path: Path) -> None:
    write_report(made(report, verdict="better <b>&", curves=CURVES), tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    words = " ".join(" ".join(page.text).split())
    assert page.links == [] and not re.search(r"<script|<link|@import|url\(|https?:", html)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    for expected in (
        "better <b>&",
        "iALS" if "ials" in report["systems"] else "item-kNN",
        "History length",
        "Beyond accuracy",
        "learning rate",
    ):
        assert expected in words
    assert "left out: " in words and "max_ease_items = 1" in words
    for name in ("two-tower", "item_knn", "popular", "oracle"):
        for metric in ("NDCG@10", "Recall@5"):
            assert f"{report['systems'][name][metric]['value']:.4f}" in words


def test_without_a_model_and_without_curves(report: Any) -> None:
    alone = made(report, differences={}, systems={"popular": report["systems"]["popular"]})
    words = " ".join(Page(render(alone)).text)
    assert "minus the others" not in words and "Training" not in words


def test_the_page_has_the_health_advice_if_there_is_some(report: Any, tmp_path: Path) -> None:
    write_report(made(report, advice=["Step 60: a rank of 1 < 3 & <no> more.", "Step 90: 2."]), tmp_path)
    words = " ".join(" ".join(Page((tmp_path / "report.html").read_text()).text).split())
    assert "Training health" in words and "a rank of 1 < 3 & <no> more." in words and "Step 90: 2." in words
    assert json.loads((tmp_path / "report.json").read_text())["advice"][1] == "Step 90: 2."
    assert "Training health" not in render(made(report))


def test_a_report_without_any_hit_is_rendered(report: Any) -> None:
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    systems = {name: dict.fromkeys(figures, nothing) for name, figures in report["systems"].items()}
    assert "0.0000" in render(made(report, systems=systems, differences={}, curves=[CURVES[0]]))


def test_tone_follows_the_intervals(report: Any) -> None:
    def page(low: float, high: float) -> str:
        figure = {"value": (low + high) / 2, "low": low, "high": high}
        far = {"NDCG@10": {"value": -1.0, "low": -1.0, "high": -1.0}}
        differences = {"popular": {"NDCG@10": figure}, "oracle": far, "two-tower, refreshed every 7 days": far}
        found = re.search(r'class="verdict (\w+)"', render(made(report, differences=differences)))
        assert found
        return found[1]

    assert (page(0.1, 0.2), page(-0.1, 0.2), page(-0.2, -0.1)) == ("good", "neutral", "bad")


def test_positions_on_the_axis() -> None:
    strip = _strip({"a": Interval(value=1.0, low=0.5, high=2.0), "b": Interval(value=-2.0, low=-2.0, high=-2.0)})
    a, b = strip["rows"]
    assert 0 < b["at"] < strip["origin"] < a["from"] < a["at"] < a["from"] + a["width"] < 100 and b["width"] == 0
    assert (a["at"] - strip["origin"]) == pytest.approx((strip["origin"] - b["at"]) / 2, abs=0.02)
    assert [t["label"] for t in strip["ticks"]] == ["−2", "−1", "0", "1", "2"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.013, 0.0271), (3, 3.5), (0, 1e-6), (12_000, 99_000)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = _ticks(low, high, 4)
    assert 2 <= len(ticks) <= 5 and all(low - 1e-12 <= t <= high + 1e-12 for t in ticks)


def test_curves_show_what_was_logged_and_the_best_step() -> None:
    plots = {plot["title"]: plot for plot in _plots(CURVES, "NDCG@10")}
    assert list(plots) == ["NDCG@10", "loss", "learning rate"]
    assert plots["NDCG@10"]["best"]["value"] == 0.035 and plots["NDCG@10"]["best"]["step"] == 120
    assert plots["loss"]["path"].count(",") == 3  # the NaN is left out
