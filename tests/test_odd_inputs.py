"""Odd and wrong inputs of the Python API: each is read as it is meant, or is one error of ours with a sentence."""

from __future__ import annotations

import datetime
import decimal
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import twotower as tt
from twotower.api.roles import describe_frames, named_columns, named_frames
from twotower.errors import ConfigError, DataError, RequestError, TwoTowerError
from twotower.pipeline.stages import prepare_stage

from .shop import FAST, NAMED, shop

ORDERS, PRODUCTS = shop(users=60, items=30, events=900)
WHOLE, WHOLE_PRODUCTS = shop(whole=True, users=60, items=30, events=900)
COLUMNS = {role: column for role, column in NAMED.items() if role != "name"}
HERE = Path(__file__)


@pytest.fixture(scope="module")
def model() -> tt.Model:
    fast = {**FAST, "training": {"max_steps": 4, "recipe": "fixed"}}
    return tt.Model(seed=0, verbose=0, **fast).fit(ORDERS, items=PRODUCTS, **NAMED)


def levels(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_axis(pd.MultiIndex.from_tuples([("a", name) for name in frame.columns]), axis=1)


def closed_file() -> Any:
    with tempfile.TemporaryFile("w+") as file:
        pass
    return file


def used(values: Any) -> Any:
    made = iter(values)
    list(made)
    return made


def read_stream() -> pa.RecordBatchReader:
    reader = pa.Table.from_pandas(ORDERS).to_reader()
    reader.read_all()
    return reader


def closed_relation() -> Any:
    import duckdb

    connection = duckdb.connect()
    relation = connection.from_arrow(pa.Table.from_pandas(ORDERS, preserve_index=False))
    connection.close()
    return relation


def ids(values: Any) -> pd.DataFrame:
    return ORDERS.assign(customer=values)


WRONG_FITS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "truth values as users": (lambda: {"events": ids(ORDERS.index % 2 == 0)}, "'customer' of events has truth values"),
    "truth values as items": (
        lambda: {"events": ORDERS.assign(product=True), "name": None},
        "'product' of events has truth values",
    ),
    "fractions as ids": (lambda: {"events": ids(WHOLE["customer"] + 0.5)}, "numbers that are not whole"),
    "all ids missing": (lambda: {"events": ids(np.nan)}, "customer is missing"),
    "lists as ids": (lambda: {"events": ids([[one] for one in ORDERS["customer"]])}, "is a list, not an id"),
    "dicts as ids": (lambda: {"events": ids([{"a": one} for one in ORDERS["customer"]])}, "has no single values"),
    "intervals as ids": (lambda: {"events": ids(pd.cut(WHOLE["customer"], 5))}, "has no single values"),
    "complex ids": (lambda: {"events": ids(WHOLE["customer"].astype(complex))}, "holds what no table can hold: complex"),
    "huge integers": (lambda: {"events": ids([2**70 + int(one) for one in WHOLE["customer"]])}, "more than 64 bits"),
    "bytes that are no text": (lambda: {"events": ids([b"\xff" + one.encode() for one in ORDERS["customer"]])}, "no text in UTF-8"),
    "durations as ids": (lambda: {"events": ids(pd.to_timedelta(WHOLE["customer"], unit="D"))}, "durations or times of day"),
    "half a character": (lambda: {"events": ids(pd.Series(["\ud800x"] * len(ORDERS), dtype=object))}, "not valid Unicode"),
    "columns with levels": (lambda: {"events": levels(ORDERS)}, "columns of the frame have 2 levels"),
    "items with levels": (lambda: {"items": levels(PRODUCTS)}, "columns of the frame have 2 levels"),
    "no columns": (lambda: {"events": pd.DataFrame()}, "has no rows"),
    "empty dict": (lambda: {"events": {}}, "has no rows"),
    "empty polars": (lambda: {"events": pl.DataFrame()}, "has no rows"),
    "a read stream": (read_stream, "may have been read before"),
    "a used iterator": (lambda: {"events": {"customer": used("ab"), "product": ["x"], "ordered_at": [1]}}, "used before"),
    "a closed relation": (closed_relation, "cannot be read"),
    "a closed file": (closed_file, "a closed file, not a table"),
    "a lazy frame that fails": (lambda: {"events": pl.from_pandas(ORDERS).lazy().with_columns(pl.col("zzz"))}, "cannot be read"),
    "a generator": (lambda: {"events": (row for row in [{"customer": 1}])}, "is a generator, not a table"),
    "rows as dicts": (lambda: {"events": ORDERS.to_dict("records")}, "is a list, not a table"),
    "a record array": (lambda: {"events": ORDERS.to_records(index=False)}, "numpy recarray, not a table"),
    "a groupby": (lambda: {"events": ORDERS.groupby("customer")}, "not a table"),
    "items as a Series": (lambda: {"items": PRODUCTS["product"]}, "items is a pandas Series"),
    "items as a path": (lambda: {"items": "products.csv"}, "items is the path"),
    "users as a list": (lambda: {"users": [1, 2]}, "users is a list"),
    "a column as a list": (lambda: {"user": ["customer"]}, "user is a list. It must be the name of one column"),
    "a column as a Series": (lambda: {"user": ORDERS["customer"]}, "user is a Series"),
    "one column twice": (lambda: {"item": "customer"}, "was named as user and as item"),
    **{
        f"{column} as {role}": (lambda named=named: named, f"{column!r} was named as {other} and as {role}")  # type: ignore[misc]
        for role, column, other in (
            ("time", "customer", "user"),
            ("text", "product", "item"),
            ("rating", "ordered_at", "time"),
            ("name", "product", "item"),
        )
        for named in ({role: column},)
    },
    "the name in events": (lambda: {"name": "customer"}, "items has no column 'customer', which was named as name"),
    "the user in items": (lambda: {"user": "title"}, "events has no column 'title', which was named as user"),
    "the time in items": (lambda: {"time": "price"}, "events has no column 'price', which was named as time"),
    "no ids with items": (lambda: {"events": ORDERS.assign(product=None)}, "product is missing"),
    "rows by column": (lambda: {"events": ORDERS.to_dict()}, r"events\['customer'\] is a dict"),
    "unknown column": (lambda: {"user": "buyer_name"}, "no column 'buyer_name'"),
    "unknown name": (lambda: {"name": "titel"}, "no column 'titel', which was named as name. Did you mean 'title'"),
    "items of another table": (lambda: {"items": WHOLE_PRODUCTS}, "No id of the 900 events is in the items table"),
    "items twice": (lambda: {"items": pd.concat([PRODUCTS, PRODUCTS])}, "repeats an earlier row"),
    "times that are none": (lambda: {"events": ORDERS.assign(ordered_at=True)}, "ordered_at is not a time"),
    "no times": (lambda: {"events": ORDERS.assign(ordered_at=pd.NaT)}, "ordered_at is missing"),
    "ratings that are none": (lambda: {"events": ORDERS.assign(r="good"), "rating": "r"}, "r is not a number: 'good'"),
    "a file as the folder": (lambda: {"folder": HERE}, "is a file. folder must be a folder"),
    "a number as the folder": (lambda: {"folder": 3}, "folder is 3. It must be a path"),
}


@pytest.mark.parametrize("name", WRONG_FITS)
def test_what_cannot_be_fitted_is_one_sentence(name: str) -> None:
    make, said = WRONG_FITS[name]
    made = make()
    given = {"events": ORDERS, "items": PRODUCTS, **NAMED, **(made if isinstance(made, dict) else {"events": made})}
    with pytest.raises(DataError, match=said) as caught:
        tt.Model(verbose=0, **FAST).fit(**given)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_a_setting_that_names_a_missing_column_is_one_sentence() -> None:
    settings = {**FAST, "data": {"items": {"features": [{"name": "colour", "kind": "categorical"}]}}}
    with pytest.raises(DataError, match=r"items has no column 'colour', which data.items uses"):
        tt.Model(verbose=0, **settings).fit(ORDERS, items=PRODUCTS, **NAMED)


WRONG_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "seed": (lambda: tt.Model(seed="x"), "seed"),
    "verbose": (lambda: tt.Model(verbose="loud"), "verbose is 'loud'"),
    "very verbose": (lambda: tt.Model(verbose=3), "verbose is 3. It must be 0, 1 or 2"),
    "one callback": (lambda: tt.Model(callbacks=tt.Callback()), "must be a list of callbacks"),
    "a class as callback": (lambda: tt.Model(callbacks=[tt.Callback]), "is the class Callback"),  # type: ignore[list-item]
    "a number as callback": (lambda: tt.Model().set_params(callbacks=[3]), "is a int"),
    "a list as section": (lambda: tt.Model(training=[1]), "Settings are a list"),
    "a number as config": (lambda: tt.Model(config=3), "Settings are a int"),
    "a name that is none": (lambda: tt.register_loss(3), "It must be a text"),
    "no name": (lambda: tt.register_loss(len), "The name of a loss is len"),
    "a tower that is none": (lambda: tt.register_tower("mine")(dict), "is the class dict. It must be a subclass of Module"),
    "a baseline that is none": (lambda: tt.register_baseline("mine")(dict), "must be a subclass of Baseline"),
    "an index that is none": (lambda: tt.register_index("mine")(dict), "must be a subclass of Index"),
    "a board": (lambda: tt.TensorBoardLogger(5), "folder of TensorBoardLogger is 5"),  # type: ignore[arg-type]
    "an entry that is none": (lambda: tt.register_pooling("mine")(3), "must be a function or a class"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_wrong_settings_are_one_sentence(name: str) -> None:
    make, said = WRONG_MODELS[name]
    with pytest.raises(ConfigError, match=said):
        make()


NO_CHOICE = pd.Series([True, False])
WRONG_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"k is {k!r}"[:30]: ({"users": "C0001", "k": k}, "k is .*It must be an integer")
        for k in ("5", 2.5, 5.0, None, True, [3], np.array([3, 4]), pd.Series([3]), float("nan"), -1)
    },
    "unknown column": ({"users": "C0001", "filter": "colour == 'x'"}, "Unknown column 'colour'"),
    "a Series as filter": ({"users": "C0001", "filter": PRODUCTS["brand"] == "Uji"}, "The filter is a Series"),
    "an expression as filter": ({"users": "C0001", "filter": pl.col("brand") == "Uji"}, "The filter is a Expr"),
    "a function as filter": ({"users": "C0001", "filter": len}, "The filter is a builtin"),
    "a list as filter": ({"users": "C0001", "filter": ["brand == 'Uji'"]}, "JSON filter must be an object"),
    "a text as near": ({"users": "C0001", "near": "Boston"}, "Got location 'Boston'"),
    "one number as near": ({"users": "C0001", "near": 5}, "Got location 5"),
    "half a place": ({"users": "C0001", "near": (None, 0)}, "A location is latitude and longitude"),
    "diversity": ({"users": "C0001", "diversity": "much"}, "diversity is 'much'"),
    "no diversity": ({"users": "C0001", "diversity": None}, "diversity is None"),
    "popularity": ({"users": "C0001", "popularity_bias": np.array([0, 1])}, "popularity_bias is a ndarray"),
    "strict": ({"users": "C0001", "strict": NO_CHOICE}, "strict is a Series. It must be True or False"),
    "explain": ({"users": "C0001", "explain": np.array([1, 2])}, "explain is a ndarray"),
    "exclude_seen": ({"users": "C0001", "exclude_seen": "no"}, "exclude_seen is 'no'"),
    **{
        f"user {number}, a {type(one).__name__}": ({"users": [one]}, "An id is a text or an integer")
        for number, one in enumerate(
            (True, float("nan"), pd.NA, pd.NaT, object(), len, pl.col("x"), 1.5, ("a",), {"a": 1}, b"\xff", np.True_)
        )
    },
    "a class": ({"users": str}, "An id is a text or an integer"),
    "half a character": ({"users": ["\ud800"]}, r"users\[0\] is '\\ud800', which is not valid Unicode"),
    **{
        f"a {type(one).__name__}": ({"users": one}, f"users is a {type(one).__name__}")
        for one in (bytearray(b"C0001"), memoryview(b"C0001"))
    },
    "an unknown user with a history": ({"users": "new", "history": ["P0001"], "strict": True}, "1 of 1 users are unknown: 'new'"),
    "a masked user": ({"users": np.ma.array(["C0001"], mask=[True])}, r"users\[0\] is None"),
    "columns with levels": ({"users": levels(ORDERS)}, "2 levels"),
    "a column twice": ({"users": ORDERS[["customer", "customer"]]}, "'customer' twice"),
    "a closed file": ({"users": closed_file()}, "a closed file"),
    "a used generator": ({"users": used(one for one in ["C0001"])}, "used before"),
    "a read stream": ({"users": read_stream()}, "read before"),
    "a frame and a history": ({"users": ORDERS.head(), "history": ["P0001"]}, "Pass one of them"),
    "users and a frame": ({"users": ["C0001"], "history": ORDERS.head()}, "Pass one of them"),
    "a matrix as history": ({"history": np.array([["P0001"]])}, "2 dimensions"),
    "a missing item": ({"history": [None]}, r"history\[0\] is None"),
    "a period as time": ({"users": ORDERS.head().assign(ordered_at=pd.Period("2024-01"))}, "not all times"),
    "a time too far": ({"users": ORDERS.head().assign(ordered_at=10**18)}, "Got time"),
    "a missing time": ({"users": ORDERS.head().assign(ordered_at=pd.NaT)}, "not all times"),
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_what_cannot_be_answered_is_one_sentence(name: str, model: tt.Model) -> None:
    arguments, said = WRONG_REQUESTS[name]
    with pytest.raises(TwoTowerError, match=said):
        model.recommend(**arguments)


def test_other_methods_say_what_is_wrong(model: tt.Model, tmp_path: Path) -> None:
    for k in ("5", 0, None, True):
        with pytest.raises(RequestError, match=r"k is .*It must be an integer"):
            model.similar("P0001", k=k)
    for item in (None, ["P0001"], PRODUCTS, float("nan"), object()):
        with pytest.raises(RequestError, match="The item is"):
            model.similar(item)
    for path in (3, None, b"x", ""):
        for use in (model.save, model.report.save, tt.load):
            with pytest.raises(DataError, match="must be a path"):
                use(path)
    (tmp_path / "file").write_text("")
    for use in (model.save, model.report.save):
        with pytest.raises(DataError, match="Cannot write"):
            use(tmp_path / "file" / "below")
    for other in (None, model.report):
        with pytest.raises(DataError, match="Compare two models"):
            tt.compare(model, other)
    with pytest.raises(DataError, match="user is a list"):
        tt.describe(ORDERS, user=["customer"])


def _hash(orders: Any, products: Any, folder: Path, **named: Any) -> tuple[str, int]:
    described = describe_frames(named_frames(orders, products, None), named_columns({**COLUMNS, **named}), {})
    manifest = prepare_stage(tt.Model(**FAST).settings(described.data), folder / "dataset", described.tables)
    return manifest.hashes["events.safetensors"], manifest.counts.read["events"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """Hash and number of the events of both shops."""
    folder = tmp_path_factory.mktemp("plain")
    return {"text": _hash(ORDERS, None, folder), "whole": _hash(WHOLE, WHOLE_PRODUCTS, folder)}


READ_AS_MEANT: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "numbered columns": lambda: (ORDERS.set_axis([0, 1, 2], axis=1), {"user": 0, "item": 1, "time": 2}),
    "iterators": lambda: ({name: iter(ORDERS[name].tolist()) for name in ORDERS}, {}),
    "UUIDs": lambda: (ids([uuid.UUID(int=int(one[1:])) for one in ORDERS["customer"]]), {}),
    "a saved index": lambda: (pl.from_pandas(ORDERS).with_columns(pl.lit(1).alias("")), {}),
    "ArrowDtype": lambda: (ORDERS.convert_dtypes(dtype_backend="pyarrow"), {}),
    "index levels": lambda: (ORDERS.set_index(["customer", "product"]), {}),
    "an enum": lambda: (pl.from_pandas(ORDERS).with_columns(pl.col("customer").cast(pl.Enum(sorted(set(ORDERS["customer"]))))), {}),
    "times as text": lambda: (ORDERS.assign(ordered_at=ORDERS["ordered_at"].astype(str)), {}),
    "bytes": lambda: (ids([one.encode() for one in ORDERS["customer"]]), {}),
}


OTHER_IDS: dict[str, Callable[[int], Any]] = {
    "UUID": lambda number: uuid.UUID(int=number),
    "Decimal": decimal.Decimal,
    "bytes": lambda number: f"c{number}".encode(),
    "date": lambda number: datetime.date(2000, 1, 1) + datetime.timedelta(number),
    "Timestamp": lambda number: pd.Timestamp("2000-01-01") + pd.Timedelta(days=number),
}


@pytest.mark.parametrize("name", OTHER_IDS)
def test_ids_of_other_types_can_be_asked_and_joined(name: str, tmp_path: Path) -> None:
    as_id = OTHER_IDS[name]
    orders = WHOLE.assign(**{column: [as_id(int(one)) for one in WHOLE[column]] for column in ("customer", "product")})
    products = WHOLE_PRODUCTS.assign(product=[as_id(int(one)) for one in WHOLE_PRODUCTS["product"]])
    fast = {**FAST, "training": {"max_steps": 2, "recipe": "fixed"}}
    made = tt.Model(seed=0, verbose=0, **fast).fit(orders, items=products, **NAMED)
    for one in (made, tt.load(made.save(tmp_path / "shop"))):
        found = one.recommend(orders["customer"].head(2), k=3)
        assert set(found["source"]) == {"model"}
        assert len(found.merge(products, left_on="item", right_on="product")) == 6
        assert set(found["user"]) == set(orders["customer"].head(2))
        assert one.recommend(history=[as_id(1)], k=1)["item"][0] in set(products["product"])
    ids_found, _ = made.item_vectors()
    assert set(ids_found) <= set(products["product"])


def test_answers_to_arrow_join_with_large_texts_and_subclasses_stay_pandas() -> None:
    class Mine(pd.DataFrame):
        """A frame of another package."""

    arrow = [pa.Table.from_pandas(one, preserve_index=False) for one in (ORDERS, PRODUCTS)]
    fast = {**FAST, "training": {"max_steps": 2, "recipe": "fixed"}}
    made = tt.Model(seed=0, verbose=0, **fast).fit(arrow[0], items=arrow[1], **NAMED)
    assert made.recommend("C0001", k=3).join(arrow[1], "item", "product", join_type="inner").num_rows == 3
    assert isinstance(made.recommend(Mine(ORDERS.head())), pd.DataFrame)
    with pytest.raises(DataError, match="events has no rows"):
        made.update(arrow[0].slice(0, 0))


@pytest.mark.parametrize("name", READ_AS_MEANT)
def test_odd_forms_are_read_as_they_are_meant(name: str, plain: dict[str, tuple[str, int]], tmp_path: Path) -> None:
    frame, named = READ_AS_MEANT[name]()
    assert _hash(frame, None, tmp_path, **named) == plain["text"]


@pytest.mark.parametrize(
    "customers",
    [
        WHOLE["customer"].astype("Int64"),
        WHOLE["customer"].astype("category"),
        pd.arrays.SparseArray(WHOLE["customer"]),
        [decimal.Decimal(int(one)) for one in WHOLE["customer"]],
        WHOLE["customer"].astype(float),
    ],
    ids=["Int64", "category", "sparse", "decimal", "float"],
)
def test_integers_in_other_clothes_are_the_same_ids(customers: Any, plain: dict[str, tuple[str, int]], tmp_path: Path) -> None:
    assert _hash(WHOLE.assign(customer=customers), WHOLE_PRODUCTS, tmp_path) == plain["whole"]


def test_columns_that_no_table_can_hold_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = pl.from_pandas(PRODUCTS).with_columns(pl.struct("brand", "price").alias("both"))
    meant = _hash(ORDERS, PRODUCTS, tmp_path)
    assert _hash(ORDERS, odd, tmp_path) == meant
    assert "'both' of items has the type struct" in caplog.text
    mixed: dict[str, Any] = {name: PRODUCTS[name].tolist() for name in PRODUCTS} | {"mixed": [1, "x"] * 15}
    assert _hash(ORDERS, mixed, tmp_path) == meant
