"""Test what the server says about the columns of the catalogue: names, kinds, values, and examples that hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from twotower.errors import RequestError
from twotower.search.filters.item_filter import ItemFilter
from twotower.serving.column_schemas import ColumnsOut
from twotower.serving.columns import Columns

Connect = Callable[..., AbstractContextManager[TestClient]]
ODD = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "name": ['He said "no"', "back\\slash", None, "line\nbreak"],
        "two words": ["x", "x", "y", "y"],
        "open": ["x", "x", "y", "y"],
        "class": ["x", "x", "y", "y"],
        "tags": [["Café", "new"], ["cafe"], [], None],
        "brand": ['12" disc', '12" disc', "Ñandú", "Ñandú"],
        "price": [1.5, None, float("nan"), 40.0],
        "nothing": pa.array([None] * 4, pa.float64()),
        "flag": [True, False, True, None],
        "hours": ["1" * 168, "0" * 168, None, "1" * 168],
        "latitude": [1.0, 2.0, 3.0, 4.0],
        "longitude": [1.0, 2.0, 3.0, 4.0],
    }
)


def test_only_columns_that_a_text_can_name_are_told() -> None:
    told = Columns(ItemFilter(ODD)).about()
    assert [(one["name"], one["kind"]) for one in told["columns"]] == [
        ("name", "text"),
        ("open", "text"),
        ("tags", "list"),
        ("brand", "text"),
        ("price", "number"),
        ("nothing", "number"),
    ]
    price = told["columns"][4]
    assert (price["items"], price["min"], price["max"]) == (2, 1.5, 40)
    assert price["values"] == [{"value": 1.5, "items": 1}, {"value": 40, "items": 1}]
    assert told["columns"][5]["min"] is None
    ColumnsOut.model_validate(told)


def test_every_example_holds_for_some_items() -> None:
    filter_ = ItemFilter(ODD)
    examples = Columns(filter_).about()["examples"]
    assert 'brand == "12\\" disc"' in examples and 'open == "x"' in examples
    for text in examples:
        assert filter_.compile(text).any(), text


def test_values_are_found_without_case_and_accents() -> None:
    columns = Columns(ItemFilter(ODD))
    assert columns.values("tags", "CAFE", 10) == [{"value": "Café", "items": 1}, {"value": "cafe", "items": 1}]
    assert columns.values("brand", "nandu", 10) == [{"value": "Ñandú", "items": 2}]
    assert len(columns.values("name", "", 2)) == 2
    for name in ("price", "two words", "nowhere"):
        with pytest.raises(RequestError, match="name, open, tags, brand"):
            columns.values(name, "", 10)


def test_the_routes_tell_columns_values_and_items_with_columns(connect: Connect) -> None:
    with connect() as client:
        told = client.get("/v1/columns").json()
        ColumnsOut.model_validate(told)
        city = next(one for one in told["columns"] if one["name"] == "city")["values"][0]
        values = client.get("/v1/values", params={"column": "city", "q": city["value"][:3].upper()}).json()["values"]
        assert city in values
        assert client.get("/v1/values?column=nowhere").status_code == 422
        for text in told["examples"]:
            answer = client.post("/v1/recommend", json={"filter": text, "k": 1})
            assert answer.status_code == 200 and answer.json()["items"], text
        ids = [item["item_id"] for item in client.get("/v1/items?limit=3").json()["items"]]
        found = client.get("/v1/items", params={"id": [*ids, "nowhere"], "columns": True}).json()["items"]
        assert [item["columns"]["item_id"] for item in found] == ids
        assert "columns" not in client.get("/v1/items", params={"id": ids}).json()["items"][0]
