"""Test that Spark and DuckDB prepare equal datasets, from a town and, if available, from the real releases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data import prepare as preparing
from twotower.data.dataset import Dataset
from twotower.data.simulator.simulate import simulate
from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import ROW, DuckDBEngine
from twotower.data.sources.spark_engine import SparkEngine
from twotower.data.sources.tables import read_tables
from twotower.data.sources.times import seconds
from twotower.utils.config import parse_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of the pipes to Java
]
LINES = [
    b'{"id": "a", "n": 1}',
    b"",
    b'{"id": "x", "n": "1',
    b"not json at all",
    b'["x"]',
    b"null",
    b'{"id": "x"} {"id": "y"}',
    b'{"id": "x"}, {"id": "y"}',
    b'{"id": "\xff\xfe"}',
    b'{"id": "\x01"}',
    b"{'id': 1}",
    b"  \t ",
    b'{"other": 1}',
    b'{"id": "b", "n": 2.50}\r',
    b'{"n": [3, {}], "id": 7}',
    b'{"id": true, "n": "\\u00e9"}',
    b'{"id": null, "n": 9007199254740993}',
]
TIMES = ["2019-03-04 05:06:07", "2014-01-02", "2009-03", "1551675967", "1551675967000", "soon", "", "2018-02-30", "nan", "-inf"]
VARIANTS: dict[str, dict[str, Any]] = {
    "time": {"min_user_events": 2, "min_item_events": 2, "positive_min_stars": 3},
    "leave_one_out": {
        "split": {"kind": "leave_one_out"},
        "min_user_events": 3,
        "min_item_events": 3,
        "k_core": True,
        "duplicates": "keep_first",
    },
}


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory, lacking: Any) -> Iterator[SparkEngine]:
    """Return one engine for all tests."""
    try:
        import pyspark  # noqa: F401
    except ImportError:
        lacking("needs pyspark: pip install two-tower-rec[spark]")
    if shutil.which("java") is None:
        lacking("needs Java 17 for Spark: there is no `java`")
    engine = SparkEngine("local[2]", tmp_path_factory.mktemp("spark"))
    yield engine
    engine.close()


def prepared(raw: Path, out: Path, spark: SparkEngine | None, **settings: Any) -> Dataset:
    """Prepare a dataset, with Spark if available; the session stays open for the next one."""
    config = parse_config({"data": {"path": str(raw), "max_reject_frac": 1.0}, "prepare": {"text_dim": 4, **settings}})
    if spark is None:
        preparing.prepare(config, out)
    else:
        with mock.patch.object(preparing, "open_engine", return_value=spark), mock.patch.object(spark, "close"):
            preparing.prepare(config, out)
    return Dataset.open(out)


def assert_equal(one: Dataset, other: Dataset) -> None:
    """Return every row of every file, and all counts."""
    for left, right in ((one.events, other.events), (one.item_events, other.item_events)):
        for name in type(left).__slots__:
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert one.items.equals(other.items) and one.users.equals(other.users)
    for left, right in ((one.item_features, other.item_features), (one.user_features, other.user_features)):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    manifests = [each.manifest.model_dump(exclude={"hashes", "config"}) for each in (one, other)]
    assert manifests[0] == manifests[1]
    reports = [each.path / "rejects.jsonl" for each in (one, other)]
    said = [file.read_text() if file.exists() else "" for file in reports]
    assert said[0] == said[1]


def completed(raw: Path, out: Path) -> Path:
    """Write the first rows of a release, with a business and a user for some reviews and tips, so that the rows fit together."""
    shutil.copytree(raw, out)
    out.chmod(0o755)
    business = out / "yelp_academic_dataset_business.json"
    business.chmod(0o644)
    ids = {json.loads(line)["business_id"] for line in business.read_text().splitlines()}
    files = [file for name in ("review", "tip") for file in out.glob(f"*_{name}.json")]
    named = [json.loads(line)["business_id"] for file in files for line in file.read_text().splitlines()]
    with business.open("a") as target:
        target.writelines(json.dumps({"business_id": each}) + "\n" for each in dict.fromkeys(named) if each not in ids)
    for users in out.glob("*_user.json"):  # the heads have no user of a review
        users.chmod(0o644)
        with users.open("a") as target:
            target.write(json.dumps({"user_id": json.loads(files[0].read_text().splitlines()[0])["user_id"]}) + "\n")
    return out


def test_lines_become_the_same_rows(spark: SparkEngine, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\n".join(LINES))
    duck = DuckDBEngine(tmp_path / "spill")
    found, expected = (e.read_json(path, ["id", "n"]).order_by(ROW).to_pyarrow().to_pylist() for e in (spark, duck))
    assert found == expected and len(found) == len(LINES) - 2


def test_lines_of_many_partitions_are_numbered_in_the_order_of_the_file(spark: SparkEngine, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(f'{{"id": "{number}"}}\n' + "\n" * (number % 3) for number in range(20_000)))
    small = "spark.sql.files.maxPartitionBytes"
    before = spark.session.conf.get(small)
    spark.session.conf.set(small, "50000")
    try:
        rows = spark.read_json(path, ["id"]).to_pyarrow().to_pylist()
    finally:
        spark.session.conf.set(small, before)
    assert len(rows) == 20_000 and all(row["id"] == str(row[ROW]) for row in rows)


def test_times_are_the_same_seconds(spark: SparkEngine, tmp_path: Path) -> None:
    found = []
    for engine in (spark, DuckDBEngine(tmp_path / "spill")):
        table = engine.save(pa.table({"at": np.arange(len(TIMES)), "text": TIMES}))
        found.append(table.select("at", s=seconds(table["text"])).order_by("at").to_pyarrow().to_pylist())
    assert found[0] == found[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_town_is_the_same_dataset(variant: str, spark: SparkEngine, tmp_path: Path) -> None:
    simulate(tmp_path / "raw", users=60, businesses=50, events=1_200, seed=3)
    with (tmp_path / "raw" / "yelp_academic_dataset_review.json").open("a") as file:
        file.write('{"user_id": "u", "date": "2019-01-01"}\n{cut off')
    both = [
        prepared(tmp_path / "raw", tmp_path / name, engine, **VARIANTS[variant]) for name, engine in (("a", None), ("b", spark))
    ]
    assert_equal(*both)
    assert len(both[1].events) > 100


@pytest.mark.parametrize("release", ["2015-boston", "2017", "2019-all-tables", "2022"])
def test_a_real_release_is_the_same_dataset(release: str, real_data: Path, spark: SparkEngine, tmp_path: Path) -> None:
    raw = completed(real_data / "yelp-raw" / release, tmp_path / "raw")
    both = [prepared(raw, tmp_path / name, engine) for name, engine in (("a", None), ("b", spark))]
    assert_equal(*both)
    assert len(both[1].events) > 100


def test_other_columns_are_the_same(spark: SparkEngine, tmp_path: Path) -> None:
    rows = [
        {"item_id": "a", "price": 2, "weight": 1.5, "code": "007", "tags": ["x", "y"], "open": True, "none": None},
        {"item_id": "b", "price": None, "weight": 1e3, "code": "1", "tags": [], "open": None, "none": None},
    ]
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "e.jsonl").write_text('{"user_id": "u", "item_id": "a"}')
    source = {"path": str(tmp_path), "interactions": {"path": "e.jsonl"}, "items": {"path": "i.jsonl"}}
    config = parse_config({"data": {"source": "tables", **source}}).data
    duckdb = DuckDBEngine(tmp_path / "spill")
    one, other = (
        read_tables(config, engine, Rejects(tmp_path / "rejects", 0.0)).items.to_pyarrow().sort_by("item_id")
        for engine in (duckdb, spark)
    )
    duckdb.close()
    assert one.schema == other.schema and one.to_pylist() == other.to_pylist()
    assert [row["price"] for row in one.to_pylist()] == [2, None] and one["tags"].to_pylist()[0] == ["x", "y"]


@pytest.mark.parametrize("name", ["e.csv", "e.parquet", "e.json"])
def test_other_tables_than_json_lines_are_the_same(name: str, spark: SparkEngine, tmp_path: Path) -> None:
    rows = [{"user_id": f"u{n % 7}", "item_id": f"i{n % 5}", "t": f"2020-01-{1 + n % 28:02}"} for n in range(90)]
    (tmp_path / "e.csv").write_text("user_id,item_id,t\n" + "".join(f"{','.join(row.values())}\n" for row in rows))
    (tmp_path / "e.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    source = {"path": str(tmp_path), "interactions": {"path": name, "time": "t"}}
    config = parse_config({"data": {"source": "tables", **source}}).data
    duckdb = DuckDBEngine(tmp_path / "spill")
    one, other = (
        read_tables(config, engine, Rejects(tmp_path / "rejects", 0.0)).interactions.to_pyarrow().sort_by("order")
        for engine in (duckdb, spark)
    )
    duckdb.close()
    assert one.num_rows == 90 and one.to_pylist() == other.select(one.column_names).to_pylist()
