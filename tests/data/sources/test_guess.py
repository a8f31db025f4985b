"""Test the guess: the format of a file, its role in the dataset, the roles of its columns, and open questions."""

from __future__ import annotations

import bz2
import gzip
import json
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.prepare import RESERVED_FEATURES
from twotower.data.sources.file_form import read_sample
from twotower.data.sources.guess import DatasetGuess, guess_dataset, guess_table
from twotower.data.sources.guess_features import RESERVED_FEATURES as AVOIDED
from twotower.data.sources.guess_text import describe
from twotower.data.sources.times import parse_time
from twotower.errors import ConfigError, DataError
from twotower.utils.config import parse_config

N = 400
START = datetime(2023, 1, 25, 13, 5, 9, tzinfo=UTC)
RNG = random.Random(5)
USERS = [f"C{RNG.randrange(30):04d}" for _ in range(N)]
ITEMS = [f"P{RNG.randrange(50):04d}" for _ in range(N)]
WHEN = [START + timedelta(hours=7 * n) for n in range(N)]
STARS = [RNG.randint(1, 5) for _ in range(N)]
CITIES = ["Wien", "Graz", "Linz"]


def write(
    path: Path, rows: Sequence[Sequence[object]], header: list[str] | None, separator: str = ",", encoding: str = "utf-8"
) -> Path:
    lines = [separator.join(map(str, row)) for row in [*([header] if header else []), *rows]]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path


def events(times: Callable[[datetime], object] = lambda at: at.strftime("%Y-%m-%d %H:%M:%S")) -> list[list[object]]:
    return [[user, item, times(at), stars] for user, item, at, stars in zip(USERS, ITEMS, WHEN, STARS, strict=True)]


def guess(*paths: Path, **named: str) -> DatasetGuess:
    return guess_dataset([read_sample(path) for path in paths], **named)


def roles(found: DatasetGuess) -> dict[str, str | None]:
    assert found.interactions is not None and not found.questions, found.questions
    return {role: found.interactions.column(role) for role in ("user", "item", "time", "rating")}


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


FORMS = [
    *("%Y-%m-%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S.%fZ", "%Y-%m-%d %I:%M %p", "%Y-%m-%dT%H:%M:%S+02:00", "%Y/%m/%d %H:%M"),
    *("%s", "%s000", "%s000000", "%s000000000", "%Y%m%d", "%Y%m", "%Y%m%d%H", "%Y%m%d%H%M%S", "%Y%m%dT%H%M%S", "%d.%m.%Y"),
    *("%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%d/%m/%y", "%a %b %d %H:%M:%S +0000 %Y", "%m %d, %Y", "%d-%b-%Y", "%B %d, %Y"),
]


@pytest.mark.parametrize("form", FORMS)
def test_the_format_of_times_is_found_as_the_reader_needs_it(form: str, tmp_path: Path) -> None:
    rows = events(lambda at: at.strftime(form.replace("%s", str(int(at.timestamp())))))
    found = guess(write(tmp_path / "log.tsv", rows, ["user", "item", "time", "stars"], "\t"))
    assert roles(found)["time"] == "time"
    setting = found.to_config()["interactions"].get("time_format")
    for at, row in zip(WHEN, rows, strict=True):
        kept = at if "%s" in form else datetime.strptime(at.strftime(form), form)
        utc = kept.replace(tzinfo=kept.tzinfo or UTC).astimezone(UTC) - timedelta(hours=2 * form.endswith("+02:00"))
        assert parse_time(str(row[2]), setting) == int(utc.timestamp())


def test_days_and_months_that_could_be_swapped_give_a_question(tmp_path: Path) -> None:
    rows = events(lambda at: f"0{at.day % 9 + 1}/0{at.hour % 9 + 1}/2023")
    found = guess(write(tmp_path / "log.csv", rows, ["user", "item", "time", "stars"]))
    (question,) = found.questions
    assert "'%d/%m/%Y' and '%m/%d/%Y'" in question and "time_format" in question
    with pytest.raises(DataError, match="%d/%m/%Y"):
        found.to_config()
    answered = guess(tmp_path / "log.csv", time_format="%m/%d/%Y")
    assert not answered.questions and answered.to_config()["interactions"]["time_format"] == "%m/%d/%Y"
    with pytest.raises(ConfigError, match="has no year"):
        guess(tmp_path / "log.csv", time_format="%m/%d")


@pytest.mark.parametrize("value", ["44927.5", "a while ago", "W03/2023"])
def test_a_time_in_an_unknown_format_gives_a_question(value: str, tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", events(lambda _: value), ["user", "item", "time", "stars"])
    (question,) = guess(path).questions
    assert "time" in question and value in question and "--time none" in question
    assert roles(guess(path, time="none"))["time"] is None


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::", " ", "||", "\x01"])
def test_separators_are_found(separator: str, tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", events(lambda at: int(at.timestamp())), ["user", "item", "time", "stars"], separator)
    found = guess(path)
    assert roles(found) == {"user": "user", "item": "item", "time": "time", "rating": "stars"}
    own = {} if separator in ",;\t|" else {"separator": separator}
    assert {key: value for key, value in found.to_config()["interactions"].items() if key == "separator"} == own


@pytest.mark.parametrize("separator", ["::", "\t", ","])
def test_a_file_without_header_gives_a_question_that_can_be_answered(separator: str, tmp_path: Path) -> None:
    rows = [[int(u[1:]), int(i[1:]), s, int(at.timestamp())] for u, i, at, s in zip(USERS, ITEMS, WHEN, STARS, strict=True)]
    path = write(tmp_path / "ratings.dat", rows, None, separator)
    found = guess(path)
    assert len(found.questions) == 2 and all("no header" in question for question in found.questions)
    found = guess(path, user="column_1", item="column_2")
    assert roles(found) == {"user": "column_1", "item": "column_2", "time": "column_4", "rating": "column_3"}
    assert found.to_config()["interactions"]["columns"] == [f"column_{n}" for n in (1, 2, 3, 4)]


def test_ids_of_known_shape_tell_a_file_without_header(tmp_path: Path) -> None:
    rows = [
        [f"A{u[1:]}KQ7X2ZPLM", f"B0{i}ABC", float(s), int(at.timestamp())]
        for u, i, at, s in zip(USERS, ITEMS, WHEN, STARS, strict=True)
    ]
    assert roles(guess(write(tmp_path / "ratings_Books.csv", rows, None))) == {
        "user": "column_1",
        "item": "column_2",
        "time": "column_4",
        "rating": "column_3",
    }


@pytest.mark.parametrize(("suffix", "squeeze"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_files_are_read(suffix: str, squeeze: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", events(), ["user", "item", "time", "stars"])
    squeezed = tmp_path / f"log.csv{suffix}"
    squeezed.write_bytes(squeeze(path.read_bytes()))
    assert roles(guess(squeezed))["user"] == "user"
    squeezed.write_bytes(squeeze(path.read_bytes() * 3)[:200])
    with pytest.raises(DataError, match=r"log\.csv"):
        read_sample(squeezed)


@pytest.mark.parametrize(
    ("encoding", "named"), [("utf-8-sig", "utf-8"), ("utf-16", "utf-16"), ("latin-1", "latin-1"), ("utf-8", "utf-8")]
)
def test_encodings_are_found(encoding: str, named: str, tmp_path: Path) -> None:
    rows = [[*row, "Café Müller"] for row in events()]
    sample = read_sample(write(tmp_path / "log.csv", rows, ["user", "item", "time", "stars", "shop"], encoding=encoding))
    assert sample.form is not None and sample.form.encoding == named
    assert sample.rows.column_names[0] == "user" and sample.rows["shop"][0].as_py() == "Café Müller"


def test_quotes_that_are_text_are_found(tmp_path: Path) -> None:
    rows = [[*row, '"open' if n == 50 else 'Tea "green"' if n == 60 else "tea"] for n, row in enumerate(events())]
    sample = read_sample(write(tmp_path / "log.tsv", rows, ["user", "item", "time", "stars", "title"], "\t"))
    assert sample.form is not None and sample.form.quote == "" and sample.rows.num_rows == N
    rows = [[*row, '"Tea, ""green""\nsecond line"'] for row in events()]
    sample = read_sample(write(tmp_path / "log.csv", rows, ["user", "item", "time", "stars", "title"]))
    assert sample.form is not None and sample.form.quote == '"' and sample.rows.num_rows == N


def test_every_form_of_json_is_read(tmp_path: Path) -> None:
    rows = [dict(zip(("user", "item", "time", "stars"), row, strict=True)) for row in events()]
    texts = {
        "JSON lines": "\n".join(map(json.dumps, rows)),
        "JSON array": json.dumps(rows),
        "Python dicts": "\n".join(map(repr, rows)),
        "JSON over several lines": "\n".join(json.dumps(row, indent=2) for row in rows),
    }
    for kind, text in texts.items():
        path = tmp_path / "log.json"
        path.write_text(text)
        sample = read_sample(path)
        assert sample.form is not None and sample.form.kind == kind and sample.rows.num_rows == N
        assert roles(guess_dataset([sample]))["rating"] == "stars"


def test_parquet_files_and_folders_of_parts_are_read(tmp_path: Path) -> None:
    table = pa.table({"user": USERS, "item": ITEMS, "time": pa.array(WHEN), "stars": STARS})
    (tmp_path / "parts").mkdir()
    pq.write_table(table, tmp_path / "parts" / "part-0.parquet")
    (tmp_path / "parts" / "_SUCCESS").touch()
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=50)
    for path in (tmp_path / "parts", tmp_path / "log.parquet"):
        assert roles(guess(path)) == {"user": "user", "item": "item", "time": "time", "rating": "stars"}


def test_sequence_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("0 4 5 6\n1 9 5\n2 7\n3\n")
    assert guess(tmp_path / "train.txt").to_config() == {
        "source": "sequences",
        "path": str(tmp_path),
        "sequences": {"train": "train.txt"},
    }


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04....", "zip"),
        (b"SQLite format 3\0", "SQLite"),
        (b"abc\0\xff\xfe\0\x01" * 40, "binary"),
        (b"a,a\n1,2\n", "twice"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_sample(tmp_path / "log.csv")


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


def test_damaged_files_give_one_line_or_a_guess(tmp_path: Path) -> None:
    rng = random.Random(7)
    header = ["user", "item", "time", "stars"]
    rows = [dict(zip(header, row, strict=True)) for row in events()[:60]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    files = {
        "log.csv": write(tmp_path / "log.csv", events()[:60], header).read_bytes(),
        "log.json": "\n".join(map(json.dumps, rows)).encode(),
        "log.csv.gz": gzip.compress(write(tmp_path / "log.csv", events()[:60], header).read_bytes()),
        "log.parquet": (tmp_path / "log.parquet").read_bytes(),
    }
    marks = [b'"', b"\n", b"\r", b",", b"\0", b"\xff", b"{", b"\\ud800", b"]"]
    for _ in range(200):
        name, content = rng.choice(list(files.items()))
        damaged = bytearray(content[: rng.randrange(len(content))] if rng.random() < 0.3 else content)
        for _ in range(rng.randint(1, 20)):
            place = rng.randrange(len(damaged) + 1)
            damaged[place : place + rng.randrange(3)] = rng.choice([*marks, bytes([rng.randrange(256)])])
        (tmp_path / name).write_bytes(damaged)
        try:
            found = guess(tmp_path / name)
            assert describe(found) and (found.questions or found.to_config())
        except DataError as error:
            assert "\n" not in str(error)


def test_reserved_feature_names_are_avoided() -> None:
    assert {name for names in RESERVED_FEATURES.values() for name in names} <= AVOIDED
    users = pa.table({"user_id": sorted(set(USERS)), "state": [("WI", "IL")[n % 2] for n in range(len(set(USERS)))]})
    config = guess_dataset({"log": pa.table({"user_id": USERS, "item_id": ITEMS}), "users": users}).to_config()
    assert config["users"]["features"] == [{"name": "state_2", "kind": "categorical", "columns": ["state"]}]
