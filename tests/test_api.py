"""The Python API: fit from frames, answers as frames, save and load."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import twotower as tt
from twotower.cli import main
from twotower.errors import ConfigError, DataError, RequestError, TwoTowerError

from .shop import FAST, NAMED, shop


@pytest.fixture(scope="module")
def model() -> tt.Model:
    """A model of the shop with texts as ids, from pandas."""
    orders, products = shop()
    return tt.Model(seed=0, verbose=0, **FAST).fit(orders, items=products, **NAMED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tt.Model:
    """A model of the shop with integers as ids, from polars, in a folder that is kept."""
    orders, products = shop(whole=True)
    folder = tmp_path_factory.mktemp("whole") / "run"
    return tt.Model(seed=0, verbose=0, **FAST).fit(pl.from_pandas(orders), items=pl.from_pandas(products), folder=folder, **NAMED)


def test_the_answers_of_the_first_page(model: tt.Model, tmp_path: Path) -> None:
    lists = model.recommend(["C0001", "C0002"], k=10)
    assert isinstance(lists, pd.DataFrame) and list(lists.columns) == ["user", "rank", "item", "name", "score", "source"]
    assert lists["user"].tolist() == ["C0001"] * 10 + ["C0002"] * 10 and lists["rank"].tolist() == [*range(1, 11)] * 2
    _, products = shop()
    assert len(lists.merge(products, left_on="item", right_on="product")) == 20
    cheap = model.recommend(history=["P0001", "P0005"], filter='brand == "Uji" and price <= 20', k=60)
    joined = cheap.merge(products, left_on="item", right_on="product")
    assert set(joined["brand"]) == {"Uji"} and joined["price"].max() <= 20 and "user" not in cheap
    assert model.similar("P0001", k=5)["rank"].tolist() == [1, 2, 3, 4, 5]
    model.save(tmp_path / "shop")
    again = tt.load(tmp_path / "shop")
    pd.testing.assert_frame_equal(again.recommend(history=["P0001"]), model.recommend(history=["P0001"]))
    assert again.report.verdict == model.report.verdict


def test_scores_are_inner_products_of_the_vectors(model: tt.Model) -> None:
    ids, vectors = model.item_vectors()
    users, queries = model.user_vectors(["C0003", "C0004"])
    assert users.tolist() == ["C0003", "C0004"] and vectors.shape == (60, queries.shape[1])
    scores = pd.DataFrame(queries @ vectors.T, index=users, columns=ids)
    for row in model.recommend(["C0003", "C0004"], k=5).itertuples():
        assert scores.loc[row.user, row.item] == pytest.approx(row.score, abs=1e-4)
    everybody, all_vectors = model.user_vectors()
    assert len(everybody) == len(all_vectors) == 200


def test_polars_gives_what_pandas_gives(model: tt.Model) -> None:
    orders, products = shop()
    other = tt.Model(seed=0, verbose=0, **FAST).fit(pl.from_pandas(orders).lazy(), items=pl.from_pandas(products), **NAMED)
    lists = other.recommend(["C0001", "C0002"])
    assert isinstance(lists, pl.DataFrame)
    pd.testing.assert_frame_equal(lists.to_pandas(), model.recommend(["C0001", "C0002"]), check_dtype=False)
    assert other.dataset.fingerprint == model.dataset.fingerprint


def test_integers_stay_integers(whole: tt.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = whole.recommend(1, k=3), whole.recommend(["1"], k=3)
    assert one.equals(other) and one["user"].dtype == pl.Int64 and one["item"].dtype == pl.Int64
    _, products = shop(whole=True)
    assert len(one.join(pl.from_pandas(products), left_on="item", right_on="product")) == 3
    assert whole.recommend(history=[1, "2", np.int64(3)], k=3).equals(whole.recommend(history=["1", 2, 3], k=3))
    assert whole.similar(1).equals(whole.similar("1")) and whole.item_vectors()[0].dtype == np.int64
    bundle = whole.save(tmp_path / "shop")
    assert main(["--quiet", "recommend", str(bundle), "--user", "1", "--k", "3", "--json"]) == 0
    said = [json.loads(line)["item_id"] for line in capsys.readouterr().out.splitlines()]
    assert said == one["item"].to_list()
    assert main(["--quiet", "recommend", str(bundle), "--all", "--out", str(tmp_path / "all.parquet"), "--k", "3"]) == 0
    everybody = pl.read_parquet(tmp_path / "all.parquet")
    assert everybody["user_id"].dtype == pl.Int64
    assert everybody.filter(pl.col("user_id") == 1)["item_id"].to_list() == one["item"].to_list()
    assert tt.load(bundle).recommend(1, k=3).equals(one)


def test_http_answers_with_integers(whole: tt.Model, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from twotower.serving.access import Access
    from twotower.serving.app import create_app
    from twotower.serving.service import Service
    from twotower.utils.config_serving import Limits

    service = Service(whole.save(tmp_path / "shop"), f"sqlite:{tmp_path / 'events.db'}", Limits(rate=0))
    with TestClient(create_app(service, Access(public=True))) as client:
        lists = [client.post("/v1/recommend", json={"user": user, "k": 3}).json() for user in (1, "1")]
        assert [one["item_id"] for one in lists[0]["items"]] == whole.recommend(1, k=3)["item"].to_list()
        assert lists[0]["items"] == lists[1]["items"] and lists[0]["user_known"]
        assert client.get("/v1/users/1/history").json()["user"] == 1


@pytest.mark.parametrize(
    "users",
    [
        pd.Series(["C0001", "C0002"], index=[7, 3]),
        pd.Series(["C0001", "C0002"], dtype="category"),
        pl.Series(["C0001", "C0002"]),
        pd.Index(["C0001", "C0002"]),
        np.array(["C0001", "C0002"]),
        np.array(["C0001", "C0002"], dtype=object),
        pa.array(["C0001", "C0002"]),
        ("C0001", "C0002"),
        (user for user in ["C0001", "C0002"]),
        pd.DataFrame({"customer": ["C0001", "C0002"]}),
        pl.LazyFrame({"customer": ["C0001", "C0002"]}),
        {"customer": ["C0001", "C0002"]},
    ],
    ids=lambda users: f"{type(users).__module__}.{type(users).__name__}",
)
def test_users_come_in_any_list(model: tt.Model, users: Any) -> None:
    found = model.recommend(users, k=2)
    kind = type(users).__module__.partition(".")[0]
    if kind == "polars":
        assert isinstance(found, pl.DataFrame)
    found = found.to_pandas() if not isinstance(found, pd.DataFrame) else found
    pd.testing.assert_frame_equal(found, model.recommend(["C0001", "C0002"], k=2), check_dtype=False)


def test_unknown_users_fall_back_or_raise(model: tt.Model) -> None:
    found = model.recommend(["C0001", "new"], k=2)
    assert found["source"].tolist() == ["model", "model", "recent", "recent"]
    with pytest.raises(RequestError, match=r"1 of 2 users are unknown: 'new'"):
        model.recommend(["C0001", "new"], strict=True)
    assert len(model.recommend([])) == 0


def test_a_frame_of_histories(model: tt.Model) -> None:
    histories = pd.DataFrame({"customer": ["x", "y", "x"], "product": ["P0001", "P0002", "P0003"]})
    found = model.recommend(histories, k=3)
    assert found["user"].unique().tolist() == ["x", "y"]
    alone = model.recommend(history=["P0001", "P0003"], k=3)
    assert found[found["user"] == "x"]["item"].tolist() == alone["item"].tolist()
    several = model.recommend(history=[["P0001", "P0003"], ["P0002"]], k=3)
    assert several["item"].tolist() == found["item"].tolist() and several["history"].tolist() == [0] * 3 + [1] * 3
    timed = histories.assign(ordered_at=pd.to_datetime(["2024-07-03", "2024-07-01", "2024-07-01"]))
    assert model.folder is not None
    late = tt.load(model.folder).recommend(timed.iloc[::-1], k=3)  # the order of the times counts, not that of the rows
    assert late[late["user"] == "x"]["item"].tolist() == model.recommend(timed, k=3).query("user == 'x'")["item"].tolist()
    unknown = pd.concat([histories, pd.DataFrame({"customer": ["x"], "product": ["gone"]})])
    assert model.recommend(unknown, k=3)["item"].tolist() == found["item"].tolist()
    with pytest.raises(RequestError, match=r"1 unknown items: 'gone'"):
        model.recommend(unknown, strict=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "Neither users nor a history"),
        ({"users": ["C0001", None]}, r"users\[1\] is None"),
        ({"users": ["C0001", float("nan")]}, r"users\[1\] is nan"),
        ({"users": pd.Series(["C0001", pd.NA])}, r"users\[1\]"),
        ({"users": iter(())}, "an iterator without elements"),
        ({"users": np.array([["C0001"]])}, "2 dimensions"),
        ({"users": [["C0001"]]}, r"users\[0\] is a list"),
        ({"users": pd.DataFrame({"other": [1]})}, "users has no column 'customer'"),
        ({"users": ["C0001", "C0002"], "history": ["P0001"]}, "2 users are given with one history"),
        ({"history": ["P0001", "gone"]}, "Unknown item 'gone'"),
        ({"users": "C0001", "k": 0}, "k is 0"),
        ({"users": "C0001", "filter": "brand =="}, "filter|brand"),
    ],
)
def test_wrong_requests_are_one_error_with_a_sentence(model: tt.Model, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(TwoTowerError, match=said):
        model.recommend(**arguments)


def wrong_frames() -> dict[str, tuple[Any, str]]:
    """Frames that cannot be fitted, and what is said."""
    orders, _ = shop()
    with Path(__file__).open() as file:
        file.readline()
    twice = orders[["customer", "product", "ordered_at", "ordered_at"]]
    mixed = orders.assign(customer=[1, "b"] * (len(orders) // 2)).astype({"customer": object})
    missing = orders.assign(customer=orders["customer"].where(orders.index % 2 == 0))
    return {
        "column": (orders.rename(columns={"customer": "buyer_name"}), "no column 'customer'"),
        "empty": (orders.iloc[:0], "has no rows"),
        "series": (orders["customer"], "is a pandas Series, not a table"),
        "array": (orders.to_numpy(), "is a numpy ndarray, not a table"),
        "path": ("orders.csv", "is the path 'orders.csv', not a table"),
        "closed file": (file, "is a closed file, not a table"),
        "none": (None, "is None, not a table"),
        "list": ([1, 2], "is a list, not a table"),
        "twice": (twice, "has the column 'ordered_at' twice"),
        "mixed": (mixed, "'customer' of events mixes types"),
        "missing ids": (missing, "customer is missing"),
        "lengths": ({"customer": ["a"], "product": ["x", "y"], "ordered_at": [1]}, "different lengths"),
    }


@pytest.mark.parametrize("name", list(wrong_frames()))
def test_wrong_frames_are_one_error_with_a_sentence(name: str) -> None:
    frame, said = wrong_frames()[name]
    untouched = tt.Model(verbose=0, **FAST)
    with pytest.raises(DataError, match=said):
        untouched.fit(frame, **{role: column for role, column in NAMED.items() if role != "name"})
    with pytest.raises(TwoTowerError, match="not fitted"):
        untouched.recommend("C0001")


def equal_frames() -> dict[str, Any]:
    """The orders of the shop in other forms."""
    orders, _ = shop()
    arrow = pa.Table.from_pandas(orders, preserve_index=False)
    return {
        "category": orders.astype({"customer": "category", "product": "category"}),
        "index": orders.set_index("customer"),
        "zone": orders.assign(ordered_at=orders["ordered_at"].dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")),
        "arrow": arrow,
        "dictionary": arrow.set_column(0, "customer", arrow["customer"].dictionary_encode()),
        "reader": arrow.to_reader(),
        "dict": {name: arrow[name].to_pylist() for name in arrow.column_names},
        "numpy": {name: orders[name].to_numpy() for name in orders},
        "categorical polars": pl.from_pandas(orders).with_columns(pl.col("customer").cast(pl.Categorical)),
        "chunks": pa.concat_tables([arrow.slice(0, 1000), arrow.slice(1000)]),
    }


@pytest.mark.parametrize("name", list(equal_frames()))
def test_other_forms_of_a_frame_give_the_same_dataset(name: str, model: tt.Model, tmp_path: Path) -> None:
    from twotower.api.roles import describe_frames, named_frames
    from twotower.pipeline.stages import prepare_stage

    _, products = shop()
    described = describe_frames(named_frames(equal_frames()[name], products, None), NAMED, {})
    manifest = prepare_stage(model.settings(described.data), tmp_path / "dataset", described.tables)
    assert manifest.hashes["events.safetensors"] == model.dataset.manifest.hashes["events.safetensors"]
    assert manifest.n_items == 60


def test_a_duckdb_relation(model: tt.Model, tmp_path: Path) -> None:
    import duckdb

    from twotower.api.roles import describe_frames, named_frames
    from twotower.pipeline.stages import prepare_stage

    orders, products = shop()
    with duckdb.connect() as connection:
        relation = connection.from_df(orders.astype({"customer": object, "product": object}))
        described = describe_frames(named_frames(relation, products, None), NAMED, {})
        manifest = prepare_stage(model.settings(described.data), tmp_path / "dataset", described.tables)
    assert manifest.hashes["events.safetensors"] == model.dataset.manifest.hashes["events.safetensors"]
    with pytest.raises(DataError, match="cannot be read"):
        described = describe_frames(named_frames(relation, products, None), NAMED, {})


def test_floats_with_gaps_and_nullable_integers_are_integer_ids(tmp_path: Path) -> None:
    from twotower.api.roles import describe_frames, named_frames
    from twotower.pipeline.stages import prepare_stage

    orders, products = shop(whole=True)
    gap = orders.astype({"customer": float})
    gap.loc[5, "customer"] = np.nan
    for frame in (gap, gap.convert_dtypes(), pl.from_pandas(gap)):
        described = describe_frames(named_frames(frame, products, None), NAMED, {})
        manifest = prepare_stage(tt.Model(**FAST).settings(described.data), tmp_path / "dataset", described.tables)
        assert manifest.id_types == {"user_id": "int64", "item_id": "int64"}
        assert manifest.counts.read["events"] == len(orders)


def test_items_may_lack_some_and_other_columns_may_be_odd() -> None:
    orders, products = shop()
    odd = products.iloc[:50].assign(thing=[object() for _ in range(50)], when=pd.Timestamp("2024-01-01", tz="UTC"))
    few = tt.Model(verbose=0, **FAST).fit(orders, items=odd, **NAMED)
    assert few.dataset.n_items == 50 and "thing" not in few.dataset.items.column_names
    with pytest.raises(DataError, match="items has no rows"):
        tt.Model(verbose=0, **FAST).fit(orders, items=products.iloc[:0], **NAMED)


def test_without_times_the_rows_are_the_order() -> None:
    orders, _ = shop()
    bare = tt.Model(verbose=0, **FAST).fit(orders[["customer", "product"]])
    assert bare.dataset.manifest.config.prepare.split.kind == "leave_one_out"
    assert "name" not in bare.recommend("C0001")


def test_settings_are_those_of_scikit_learn() -> None:
    from sklearn.base import clone

    made = tt.Model(seed=3, training={"num_epochs": 2})
    assert clone(made).get_params() == made.get_params() and made.get_params()["training__num_epochs"] == 2
    assert made.set_params(training__num_epochs=5, seed=1) is made
    assert (made.settings().training.num_epochs, made.settings().seed) == (5, 1)
    with pytest.raises(ConfigError, match="Did you mean 'num_epochs'"):
        made.set_params(training__num_epoch=5)
    with pytest.raises(ConfigError, match="has no parameter 'trainin'"):
        made.set_params(trainin={})
    with pytest.raises(ConfigError, match="Unknown setting"):
        tt.Model(training={"epochs": 1})
    assert made.get_params()["training"] == {"num_epochs": 5}
    assert pickle.loads(pickle.dumps(made)).get_params() == made.get_params()


def test_a_config_file_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 4\ntraining: {num_epochs: 3, batch_size: 64}\n")
    settings = tt.Model(config=tmp_path / "c.yaml", training={"num_epochs": 7}).settings()
    assert (settings.seed, settings.training.num_epochs, settings.training.batch_size) == (4, 7, 64)
    assert tt.Model(2, config={"seed": 4}).settings().seed == 2


def test_what_is_fitted_cannot_be_pickled_and_is_not_overwritten(whole: tt.Model) -> None:
    with pytest.raises(TwoTowerError, match=r"model.save\(path\)"):
        pickle.dumps(whole)
    orders, _ = shop()
    with pytest.raises(DataError, match=r"already contains dataset, model, bundle, report\.json"):
        tt.Model(verbose=0, **FAST).fit(orders, folder=whole.folder)
    assert whole.folder is not None and tt.load(whole.folder).report.data == whole.report.data


def test_what_things_say_they_are(model: tt.Model, whole: tt.Model) -> None:
    assert not hasattr(tt.Model(), "report") and not hasattr(tt.Model(), "dataset")
    assert repr(tt.Model(seed=0)) == "Model(seed=0)" and "not fitted" in tt.Model()._repr_html_()
    assert "3,000 events of 200 users at 60 items" in repr(model) and model.report.verdict in repr(model)
    assert "<table>" in model.report._repr_html_() and "train_loss" in model.report._repr_html_()
    for thing in (whole.dataset, whole.recommender):
        assert "200 users" in repr(thing) and "60 items" in thing._repr_html_()


def test_describe_shows_the_guess() -> None:
    orders, products = shop()
    shown = tt.describe(orders)
    assert dict(zip(shown["column"], shown["role"], strict=True)) == {"customer": "user", "product": "item", "ordered_at": "time"}
    both = tt.describe(pl.from_pandas(orders), items=pl.from_pandas(products))
    assert isinstance(both, pl.DataFrame) and set(both["table"]) == {"events", "items"}
    with pytest.raises(DataError, match="not a table"):
        tt.describe([1, 2])


def test_importing_loads_nothing_heavy() -> None:
    for code, heavy in {"dir(tt)": "torch pandas pyarrow pydantic ibis", "tt.Model(seed=1)": "torch pandas ibis sklearn"}.items():
        whole = f"import sys, twotower as tt; {code}; print([name for name in '{heavy}'.split() if name in sys.modules])"
        assert subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True).stdout == "[]\n"
