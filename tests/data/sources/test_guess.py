"""Test the guess: the role of a file, the roles of its columns, and open questions."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from twotower.data.prepare import RESERVED_FEATURES
from twotower.data.sources.guess import guess_dataset, guess_table
from twotower.data.sources.guess_features import RESERVED_FEATURES as AVOIDED
from twotower.data.sources.guess_text import columns_of, describe
from twotower.errors import DataError
from twotower.utils.config import parse_config

from .guessed_logs import CITIES, ITEMS, RNG, STARS, USERS, WHEN, N, events, guess, roles, write


@pytest.mark.parametrize(
    "header",
    [
        ["customer", "product", "ordered_at", "rating"],
        ["user_id", "item_id", "timestamp", "stars"],
        ["userId", "movieId", "timestamp", "rating"],
        ["uid", "sku", "ts", "score"],
        ["visitorid", "itemid", "date", "rating"],
        ["reviewerID", "asin", "reviewTime", "overall"],
        ["Klant-Nr", "Artikel", "Datum", "Beoordeling"],
        ["Kundennummer", "Artikelnummer", "Bestelldatum", "Bewertung"],
        ["usuario_id", "producto_id", "fecha", "puntuación"],
        ["id_cliente", "id_produto", "data", "avaliação"],
        ["client", "produit", "date", "note"],
        ["用户id", "商品id", "时间", "评分"],
        ["ユーザー", "商品", "日時", "評価"],
        ["пользователь", "товар", "дата", "оценка"],
        ["user_id:token", "item_id:token", "timestamp:float", "rating:float"],
        ["USER ID", "ISBN", "Date", "Book-Rating"],
        ["member", "track_id", "played_at", "rating"],
        ["müşteri", "ürün", "tarih", "puan"],
        ["account_id", "listing_id", "created_at", "grade"],
    ],
)
def test_columns_are_found_by_names_in_many_languages(header: list[str], tmp_path: Path) -> None:
    order = [2, 0, 3, 1]  # not in the usual order
    path = write(tmp_path / "log.csv", [[row[place] for place in order] for row in events()], [header[place] for place in order])
    assert roles(guess(path)) == dict(zip(("user", "item", "time", "rating"), header, strict=True))


def test_ids_of_many_words_are_found_by_the_name_of_their_column(tmp_path: Path) -> None:
    rows = [[f"Anna Maria de la Cruz {row[0]}", f"The little book of tea, volume {row[1]}", row[2]] for row in events()]
    found = roles(guess(write(tmp_path / "log.csv", rows, ["user", "item", "time"])))
    assert found == {"user": "user", "item": "item", "time": "time", "rating": None}


def test_long_ids_are_found_by_name_and_shown_in_no_time(tmp_path: Path) -> None:
    rows = [[f"{row[0]}{'x' * 20_000}", f"{row[1]}{'漢字' * 1_000}", row[2]] for row in events()[:50]]
    found = guess(write(tmp_path / "log.csv", rows, ["user", "item", "time"]))
    assert roles(found)["user"] == "user" and roles(found)["item"] == "item"
    began = time.process_time()
    assert all(columns_of(line) <= 80 for line in describe(found).splitlines())
    assert time.process_time() - began < 5, "one pass over a text"


def test_numbers_that_are_probably_times_are_asked_about(tmp_path: Path) -> None:
    rows = [[row[0], row[1], 1_577_836_800 + 3_600 * place] for place, row in enumerate(events())]
    path = write(tmp_path / "log.csv", rows, ["user", "item", "seen"])
    question = "the values of seen are epoch seconds, and its name does not say so. If they are the times of the events, name it"
    assert any(question in asked for asked in guess(path).questions)
    assert roles(guess(path, time="seen"))["time"] == "seen" and not guess(path, time="seen").questions
    assert not guess(path, time="none").questions
    ids = write(tmp_path / "ids.csv", rows, ["user", "item", "order_id"])
    assert not guess(ids).questions, "an id is no time"


@pytest.mark.parametrize("text", ["user,item,time\n", "user,item,time\nu1,i1\n"])
def test_a_file_without_a_complete_row_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError, match=r"log.csv has column names and no complete row\."):
        guess(tmp_path / "log.csv")


def test_three_tables_are_distinguished_by_names_and_values(tmp_path: Path) -> None:
    items = [
        [
            f"P{n:04d}",
            f"Tea {n}",
            ["Uji", "Assam"][n % 2],
            "green|hot" if n % 3 else "black|hot|strong",
            4.5 + n,
            48.2 + n / 100,
            16.4,
            f"0{1000 + n % 4}",
        ]
        for n in range(50)
    ]
    users = [[f"C{n:04d}", f"2022-0{n % 9 + 1}-03", CITIES[n % 3], 20 + n] for n in range(30)]
    paths = [
        write(tmp_path / "a.csv", items, ["product", "title", "brand", "tags", "price", "lat", "lng", "zip"]),
        write(tmp_path / "b.csv", users, ["customer", "joined", "city", "age"]),
        write(tmp_path / "c.csv", events(), ["customer", "product", "ordered_at", "rating"]),
    ]
    found = guess(*paths)
    assert found.to_config() == {
        "source": "tables",
        "path": str(tmp_path),
        "interactions": {"path": "c.csv", "user_id": "customer", "item_id": "product", "time": "ordered_at", "stars": "rating"},
        "items": {
            "path": "a.csv",
            "item_id": "product",
            "name": "title",
            "features": [
                {"name": "brand", "kind": "categorical"},
                {"name": "tags", "kind": "multi", "separator": "|"},
                {"name": "price", "kind": "number"},
                {"name": "location", "kind": "geo", "columns": ["lat", "lng"]},
                {"name": "zip", "kind": "categorical"},
            ],
        },
        "users": {
            "path": "b.csv",
            "user_id": "customer",
            "since": "joined",
            "features": [{"name": "city", "kind": "categorical"}, {"name": "age", "kind": "number"}],
        },
    }


def test_tables_without_shared_names_are_joined_by_their_values(tmp_path: Path) -> None:
    goods = write(tmp_path / "goods.csv", [[f"P{n:04d}", f"Tea {n}"] for n in range(50)], ["code", "label"])
    log = write(tmp_path / "log.csv", [row[:3] for row in events()], ["klant", "artikel", "datum"])
    found = guess(log, goods)
    assert found.items is not None and found.items.column("item") == "code" and found.items.column("name") == "label"


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (["user_id", "customer_id", "item_id"], "user"),
        (["user_id", "sku", "product_id"], "item"),
        (["a", "b", "c"], "user"),
        (["user", "time", "shop_branch"], "item"),
    ],
)
def test_an_open_choice_is_a_question_and_not_a_guess(header: list[str], wanted: str, tmp_path: Path) -> None:
    rows: list[list[object]] = [[f"x{RNG.randrange(40)}", f"y{RNG.randrange(40)}", f"z{RNG.randrange(40)}"] for _ in range(N)]
    found = guess(write(tmp_path / "log.csv", rows, header))
    assert any(f"--{wanted}" in question for question in found.questions)
    with pytest.raises(DataError):
        found.to_config()


def test_two_tables_of_interactions_are_a_question(tmp_path: Path) -> None:
    one = write(tmp_path / "ratings.csv", events(), ["userId", "movieId", "timestamp", "rating"])
    two = write(tmp_path / "tags.csv", [row[:3] for row in events()], ["userId", "movieId", "timestamp"])
    assert "ratings.csv and tags.csv" in guess(one, two).questions[0]


def test_two_names_of_one_thing_are_no_question() -> None:
    found = guess_table(pa.table({"user_id": USERS, "customer_id": [f"u{user}" for user in USERS], "item_id": ITEMS}))
    assert not found.questions and found.column("user") == "user_id"


def test_named_columns_win_and_unknown_ones_are_refused() -> None:
    table = pa.table({"user_id": USERS, "seller": ITEMS[::-1], "item_id": ITEMS, "score": STARS})
    assert guess_table(table, user="seller").column("user") == "seller"
    with pytest.raises(DataError, match="Did you mean 'seller'"):
        guess_table(table, user="seler")
    with pytest.raises(DataError, match="Did you mean 'user'"):
        guess_table(table, usr="seller")


@pytest.mark.parametrize(
    ("values", "scale"), [(range(1, 6), None), (range(1, 11), [1, 10]), (range(101), [0, 100]), (range(-10, 11), [-10, 10])]
)
def test_the_scale_of_ratings_is_found(values: range, scale: list[int] | None) -> None:
    rating = [values[n % len(values)] for n in range(N)]
    config = guess_dataset({"log": pa.table({"user": USERS, "item": ITEMS, "rating": rating})}).to_config()
    assert config["interactions"].get("stars_scale") == scale and config["interactions"]["stars"] == "rating"


def test_lists_of_events_are_sessions(tmp_path: Path) -> None:
    lists = [
        [{"aid": int(item[1:]), "ts": 1661200010000 + n, "type": ("clicks", "orders")[n % 2]} for n in range(3)] for item in ITEMS
    ]
    rows = [json.dumps({"session": n, "events": events}) for n, events in enumerate(lists)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    found = guess(tmp_path / "train.jsonl")
    keys = {"user_id": "session", "events": "events", "item_id": "aid", "time": "ts", "event_type": "type"}
    assert found.to_config() == {"source": "sessions", "path": str(tmp_path), "sessions": {"path": "train.jsonl", **keys}}
    assert "aid" in describe(found) and parse_config({"data": found.to_config()})


def test_items_and_users_may_be_in_the_interactions_file(tmp_path: Path) -> None:
    rows: list[list[object]] = []
    for user, item, at in zip(USERS, ITEMS, WHEN, strict=True):
        place = int(item[1:])
        shown: list[object] = [f"Tea {item}", ("Uji", "Assam")[place % 2], CITIES[int(user[1:]) % 3], at.date()]
        rows.append([user, item, *shown, 40 + place / 100, 16 + place / 10])
    header = ["CustomerID", "StockCode", "Description", "Brand", "City", "InvoiceDate", "lat", "lon"]
    config = guess(write(tmp_path / "log.csv", rows, header)).to_config()
    assert config["items"] == {
        "from": "interactions",
        "item_id": "StockCode",
        "name": "Description",
        "features": [{"name": "Brand", "kind": "categorical"}, {"name": "location", "kind": "geo", "columns": ["lat", "lon"]}],
    }
    assert config["users"] == {
        "from": "interactions",
        "user_id": "CustomerID",
        "features": [{"name": "City", "kind": "categorical"}],
    }
    assert parse_config({"data": config}).data.items is not None


@pytest.mark.parametrize("odd", [-1, 0])
def test_a_number_that_may_mean_not_rated_gives_a_question(odd: int) -> None:
    table = pa.table({"user_id": USERS, "anime_id": ITEMS, "rating": [odd if n % 3 else n % 10 + 1 for n in range(N)]})
    (question,) = guess_table(table).questions
    assert f"rating is {odd} in 66 % of the rows" in question and "--rating none" in question
    assert guess_table(table, rating="none").column("rating") is None and guess_table(table, rating="rating").column("rating")


def test_orders_and_nested_objects_are_no_users() -> None:
    for name, values in (("order_id", USERS), ("user", [json.dumps({"id": user}) for user in USERS])):
        assert any("--user" in question for question in guess_table(pa.table({name: values, "product_id": ITEMS})).questions)


def test_commas_in_names_are_no_labels() -> None:
    items = pa.table({"sku": sorted(set(ITEMS)), "Description": [f"HEART {n}, T-LIGHT, RED" for n in range(len(set(ITEMS)))]})
    found = guess_dataset({"log": pa.table({"user_id": USERS, "sku": ITEMS}), "items": items})
    assert found.items is not None and found.items.column("name") == "Description"


def test_event_types_quantities_and_texts_are_found() -> None:
    table = pa.table(
        {
            "visitorid": USERS,
            "itemid": ITEMS,
            "event": [("view", "addtocart", "transaction")[n % 3] for n in range(N)],
            "qty": [n % 4 for n in range(N)],
            "review_text": [f"a very good thing number {n}" for n in range(N)],
        }
    )
    found = guess_table(table)
    assert {role: found.column(role) for role in ("event_type", "quantity", "text")} == {
        "event_type": "event",
        "quantity": "qty",
        "text": "review_text",
    }


def test_random_logs_are_guessed_right_or_give_a_question(tmp_path: Path) -> None:
    rng = random.Random(11)
    users, items = (
        ("customer", "uid", "KlantNr", "reviewerID", "id_usuario"),
        ("sku", "movieId", "StockCode", "track_id", "producto"),
    )
    ids = (
        str,
        lambda n: f"{n}.0",
        lambda n: f"X{n:05d}",
        lambda n: f"{random.Random(n).getrandbits(64):016x}",
        lambda n: f"{n:08d}",
    )
    extra: dict[str, Callable[[int], object]] = {
        "order_id": lambda n: n // 2,
        "price": lambda n: n % 90 + 0.25,
        "shop": lambda n: "AB"[n % 2],
        "zip": lambda n: f"0{n % 30 + 1000}",
    }
    for _ in range(40):
        user, item = rng.choice(users), rng.choice(items)
        name_user, name_item = rng.choice(ids), rng.choice(ids)
        size, form = rng.randint(60, 300), rng.choice(("%Y-%m-%d %H:%M:%S", "%Y-%m-%d", "%d.%m.%Y %H:%M", "%Y%m%d"))
        columns: dict[str, list[object]] = {
            user: [name_user(rng.randrange(40)) for _ in range(size)],
            item: [name_item(rng.randrange(60)) for _ in range(size)],
            "created": [at.strftime(form) for at in WHEN[:size]],
            "score": [rng.randint(1, 10) for _ in range(size)],
        }
        columns |= {name: [make(n) for n in range(size)] for name, make in rng.sample(sorted(extra.items()), 2)}
        names = rng.sample(sorted(columns), len(columns))
        rows = [[columns[name][n] for name in names] for n in range(size)]
        found = guess(write(tmp_path / "log.csv", rows, names, rng.choice(",;\t|")))
        assert roles(found) == {"user": user, "item": item, "time": "created", "rating": "score"}


def test_reserved_feature_names_are_avoided() -> None:
    assert {name for names in RESERVED_FEATURES.values() for name in names} <= AVOIDED
    users = pa.table({"user_id": sorted(set(USERS)), "state": [("WI", "IL")[n % 2] for n in range(len(set(USERS)))]})
    config = guess_dataset({"log": pa.table({"user_id": USERS, "item_id": ITEMS}), "users": users}).to_config()
    assert config["users"]["features"] == [{"name": "state_2", "kind": "categorical", "columns": ["state"]}]
