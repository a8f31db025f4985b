"""Test the guess of a file's form: times, separators, header, encoding, compression, JSON, Parquet, and what is no table."""

from __future__ import annotations

import bz2
import gzip
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.sources.file_form import read_sample
from twotower.data.sources.guess import guess_dataset
from twotower.data.sources.guess_text import describe
from twotower.data.sources.times import parse_time
from twotower.errors import ConfigError, DataError

from .guessed_logs import ITEMS, STARS, USERS, WHEN, N, events, guess, roles, write

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
