"""Test that Milvus, asked with the expression of a filter, returns the items of the filter, on a catalogue of odd values."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.schema import FIRST_ROW, FeatureSpec
from twotower.search.filters import milvus_expression as module
from twotower.search.filters.item_filter import ItemFilter
from twotower.search.filters.milvus_expression import ROW, StoredColumns

N = 240
TEXTS = [
    "Tampa",
    "TAMPA",
    "İzmir",
    "straße",
    'say "hi"',
    "it's",
    "back\\slash",
    "a,b",
    "",
    "50%",
    "two\nlines",
    "null",
    "true",
    None,
]
NUMBERS = [1.0, 2.5, -3.0, 0.1 + 0.2, 1e300, 2.0**53, float("nan"), None, 0.0]
TAGS = ["Bars", "bars", "WiFi=free", "Öl", None]


def items() -> pa.Table:
    """Return a catalogue whose columns have odd names, types and values."""
    draw = random.Random(5)
    lists = [None if draw.random() < 0.2 else draw.choices(TAGS, k=draw.randrange(4)) for _ in range(N)]
    return pa.table(
        {
            "item_id": [f"i{n}" for n in range(N)],
            "city": draw.choices(TEXTS, k=N),
            "in": pa.array(draw.choices([1, 2, 3, None], k=N), pa.int64()),
            "price now": draw.choices(NUMBERS, k=N),
            "größe": pa.array(draw.choices(["S", "M", None], k=N)).dictionary_encode(),
            "outdoor": draw.choices([True, False, None], k=N),
            "categories": pa.array(lists, pa.list_(pa.string())),
            "sizes": pa.array([None if n % 7 == 0 else [n % 3, n % 5] for n in range(N)], pa.list_(pa.int32())),
            "latitude": [None if n % 11 == 0 else draw.uniform(-80, 80) for n in range(N)],
            "longitude": [None if n % 11 == 0 else draw.uniform(-180, 180) for n in range(N)],
            "hours": [None if n % 6 == 0 else "".join(draw.choices("01", k=168)) for n in range(N)],
            "novel": ["long " * 2000 if n == 3 else "short" for n in range(N)],
        }
    )


SPECS = (
    FeatureSpec(name="location", side="item", kind="geo", columns=("latitude", "longitude")),
    FeatureSpec(name="hours", side="item", kind="hours", columns=("hours",)),
    FeatureSpec(name="categories", side="item", kind="multi", columns=("categories",)),
)


@pytest.fixture(scope="module")
def catalogue() -> ItemFilter:
    return ItemFilter(items(), SPECS)


@pytest.fixture(scope="module")
def stored(catalogue: ItemFilter) -> StoredColumns:
    return StoredColumns(catalogue)


@pytest.fixture(scope="module")
def matching(stored: StoredColumns, tmp_path_factory: Any, lacking: Any) -> Iterator[Callable[[str], set[int]]]:
    """Return a function from an expression to the rows that Milvus Lite finds."""
    try:
        from pymilvus import DataType, MilvusClient
    except ImportError:
        lacking("needs pymilvus and milvus-lite: pip install two-tower-rec[milvus]")
    client = MilvusClient(str(tmp_path_factory.mktemp("milvus") / "odd.db"))
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field(ROW, DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    stored.add_fields(schema)
    index = MilvusClient.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="IP")
    client.create_collection("odd", schema=schema, index_params=index)
    columns = {ROW: list(range(FIRST_ROW, N + FIRST_ROW)), "vector": [[1.0, 0.0]] * N, **stored.fields(np.arange(N))}
    client.insert("odd", [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
    client.load_collection("odd")

    def found(expression: str) -> set[int]:
        return {row[ROW] for row in client.query("odd", filter=expression or f"{ROW} >= 0", output_fields=[ROW], limit=N)}

    yield found
    client.close()


def drawn(draw: random.Random, depth: int = 3) -> Any:
    """Return a random filter as JSON."""
    if depth and draw.random() < 0.5:
        parts = [drawn(draw, depth - 1) for _ in range(draw.randrange(4))]
        return draw.choice([{"and": parts}, {"or": parts}, {"not": drawn(draw, depth - 1)}])
    bound = draw.choice(["min", "max", "above", "below"])
    texts = [text for text in TEXTS if text is not None]
    return draw.choice(
        [
            {"city": draw.choices(texts, k=draw.randrange(3))},
            {"in": {bound: draw.choice([1, 2, 2.5, -1])}},
            {"price now": {bound: draw.choice([1, 0.30000000000000004, 2**53, 1e300, -3])}},
            {"price now": draw.choices([1, 2.5, 0.30000000000000004, 2**53 + 1], k=2)},
            {"größe": {"none": ["s"]}},
            {"outdoor": draw.choice(["true", "false", "TRUE"])},
            {
                "categories": {
                    draw.choice(["any", "all", "none"]): draw.choices(["BARS", "wifi=free", "öl", "x"], k=draw.randrange(1, 3))
                }
            },
            {"sizes": {draw.choice(["any", "none"]): draw.choices([0, 1, 4, 9], k=2)}},
            {"id": draw.choices([f"I{n}" for n in range(N)], k=3)},
            {"within": {"km": draw.choice([0, 300, 4000, 19_000]), "near": [draw.uniform(-89, 89), draw.uniform(-180, 180)]}},
            {"within": draw.choice([200, 9000])},
            {"open": draw.choice(["now", "Fri 19:30"])},
            {"seen": draw.random() < 0.5},
            {"novel": "short"},
        ]
    )


def exact(filter_: Any) -> bool:
    """Return True if Milvus can say all of a filter."""
    text = str(filter_)
    return not any(word in text for word in ("within", "'id'", "novel", "hi", "it's", "back", "lines", "%"))


def test_random_filters_find_their_items(catalogue: ItemFilter, stored: StoredColumns, matching: Callable[[str], set[int]]) -> None:
    draw = random.Random(11)
    said, equal = 0, 0
    for _ in range(400):
        filter_ = drawn(draw)
        context = {"home": (10.0, 179.0), "now": draw.randrange(10**9), "seen": np.array([2, 5, 5, 77])}
        mask = catalogue.compile(filter_, **context)
        expression = stored.expression(catalogue.resolve(filter_, **context))
        found = matching(expression)
        wanted = set(np.flatnonzero(mask).tolist())
        assert wanted <= found, (filter_, expression)
        if exact(filter_):
            said += 1
            assert wanted == found, (filter_, expression)
        equal += wanted == found
    assert said > 150 and equal > 250


def test_a_box_holds_its_circle_at_poles_and_the_180th_meridian(
    catalogue: ItemFilter, stored: StoredColumns, matching: Callable[[str], set[int]]
) -> None:
    draw = random.Random(2)
    for _ in range(60):
        near = [
            draw.choice([-90, -89.9, 0, 60, 90, draw.uniform(-90, 90)]),
            draw.choice([-180, 180, 179.9, draw.uniform(-180, 180)]),
        ]
        filter_ = {"within": {"km": draw.choice([1, 100, 2500, 12_000, 25_000]), "near": near}}
        found = matching(stored.expression(catalogue.resolve(filter_)))
        assert set(np.flatnonzero(catalogue.compile(filter_)).tolist()) <= found, filter_


def test_what_is_too_long_is_left_to_the_caller(catalogue: ItemFilter, stored: StoredColumns) -> None:
    assert "novel" not in stored.columns and "item_id" not in stored.columns
    assert stored.expression(catalogue.resolve('novel == "short"')) == ""
    assert stored.expression(catalogue.resolve('novel == "short" and outdoor == "true"')).count("in [") == 1
    assert stored.expression(catalogue.resolve('novel == "short" or outdoor == "true"')) == ""
    many = np.arange(FIRST_ROW, FIRST_ROW + module.MAX_ROWS + 1)
    assert stored.expression(catalogue.resolve("not seen", seen=many)) == ""


def test_times_of_several_zones_are_left_to_the_caller() -> None:
    table = items().append_column("timezone", pa.array(["Europe/Berlin", "America/New_York"] * (N // 2)))
    catalogue = ItemFilter(table, SPECS)
    stored = StoredColumns(catalogue)
    assert stored.expression(catalogue.resolve("open_now", now=0)) == ""
