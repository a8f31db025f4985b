"""What an item is called: the word of `data.items.noun` in lists, reasons, the report and over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import twotower as tt
from twotower.cli import main
from twotower.errors import ConfigError
from twotower.search.filters.example import example_filter
from twotower.search.filters.item_filter import ItemFilter
from twotower.utils.config import parse_config

from .shop import FAST, NAMED, shop


@pytest.fixture(scope="module")
def model() -> tt.Model:
    orders, products = shop()
    return tt.Model(seed=0, verbose=0, data={"items": {"noun": "dish"}}, **FAST).fit(orders, items=products, **NAMED)


def test_lists_reasons_and_report_have_the_word(model: tt.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "at 60 dishes" in repr(model) and "60 dishes" in repr(model.dataset)
    reasons = {reason for row in model.recommend("C0001", k=20, explain=True)["reasons"] for reason in row}
    assert "dish id" in reasons and not any(reason.startswith("item ") for reason in reasons)
    page = model.report.save(tmp_path / "report.html").read_text()
    assert "60</b> dishes" in page and "target dish" in page and "rare dishes" in page
    bundle = model.save(tmp_path / "shop")
    assert main(["--quiet", "recommend", str(bundle), "--user", "C0001", "--k", "3"]) == 0
    head = capsys.readouterr().out.splitlines()[0].split()
    assert head == ["rank", "dish", "score"], "columns without content are left out"
    assert main(["--quiet", "recommend", str(bundle), "--user", "C0001", "--filter", "price > 1000"]) == 0
    assert "no dish matches" in capsys.readouterr().out


def test_the_server_tells_the_word_and_a_filter_of_its_columns(model: tt.Model, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from twotower.serving.access import Access
    from twotower.serving.app import create_app
    from twotower.serving.service import Service
    from twotower.utils.config_serving import Limits

    service = Service(model.save(tmp_path / "shop"), f"sqlite:{tmp_path / 'events.db'}", Limits(rate=0))
    with TestClient(create_app(service, Access(public=True))) as client:
        about = client.get("/v1/about").json()
        example = about["filters"]["example"]
        answer = client.post("/v1/recommend", json={"user": "C0001", "filter": example}).json()
    assert (about["noun"], about["nouns"]) == ("dish", "dishes")
    assert "brand ==" in example and "price <=" in example and answer["items"]
    assert len(model.recommend("C0001", filter=example)) == len(answer["items"])


def test_the_word_needs_no_table(tmp_path: Path) -> None:
    assert parse_config({"data": {"source": "yelp", "items": {"noun": "place"}}}).data.items.noun == "place"
    for wrong in ({}, {"item_id": "id"}, {"noun": "place", "item_id": "id"}, {"noun": ""}, {"noun": "<b>"}, {"noun": 3}):
        with pytest.raises(ConfigError):
            parse_config({"data": {"items": wrong}})
    orders, _ = shop(users=60, items=30, events=900)
    settings = {**FAST, "data": {"items": {"noun": "tea"}}, "training": {"max_steps": 2, "recipe": "fixed"}}
    bare = tt.Model(verbose=0, **settings).fit(orders, user="customer", item="product", time="ordered_at")
    assert "teas" in repr(bare)
    saved = json.loads((bare.save(tmp_path / "bare") / "dataset" / "manifest.json").read_text())
    assert saved["config"]["data"]["items"]["noun"] == "tea"
    assert tt.load(tmp_path / "bare").dataset.noun == "tea"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"item_id": ["a", "b"], "name": ["x", "x"]}, ""),
        ({"genre": [["pop", "rock"], ["pop"], ["pop"]], "year": [1990, 2000, None]}, 'genre == "pop" and year <= 2000'),
        ({"said": ['a "b"', 'a "b"', "c"], "is_open": [1, 0, 1]}, ""),
        ({"two words": ["x", "x"], "same": [3, 3]}, ""),
        ({"rating": [1.0, 2.0, float("nan")], "price": [10, 20, 30]}, "price <= 20"),
    ],
)
def test_an_example_of_a_filter_is_one(columns: dict[str, list[object]], expected: str) -> None:
    import pyarrow as pa

    table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
    found = example_filter(table, None, {"item_id", "name"})
    assert found == expected
    if found:
        assert ItemFilter(table).compile(found).any()
