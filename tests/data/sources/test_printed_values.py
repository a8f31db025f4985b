"""Test what programs print into text files: dicts of Python, Excel's line of the separator, words for missing ids."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.sources.file_form import read_sample
from twotower.data.sources.python_values import python_value

from .table_rows import Read

START = 1_600_000_000
PRINTED = {
    "nan": None,
    "NaT": None,
    "inf": "inf",
    "-inf": "-inf",
    "None": None,
    "true": True,
    "datetime.datetime(2020, 1, 2, 3, 4)": "2020-01-02T03:04:00",
    "datetime.datetime(2020, 1, 2, 3, 4, tzinfo=datetime.timezone.utc)": "2020-01-02T03:04:00+00:00",
    "datetime(2020, 1, 2, tzinfo=timezone(timedelta(seconds=3600)))": "2020-01-02T00:00:00+01:00",
    "datetime.datetime(2020, 7, 2, tzinfo=zoneinfo.ZoneInfo(key='Europe/Berlin'))": "2020-07-02T00:00:00+02:00",
    "datetime.date(2020, 1, 2)": "2020-01-02",
    "Timestamp('2020-01-02 00:00:00')": "2020-01-02 00:00:00",
    "Timestamp('2020-01-02 00:00:00+0100', tz='Europe/Berlin')": "2020-01-02 00:00:00+0100",
    "Timestamp('2020-01-02 00:00:00', tz='Europe/Berlin')": "2020-01-02T00:00:00+01:00",
    "Decimal('1.50')": "1.50",
    "UUID('12345678-1234-5678-1234-567812345678')": "12345678-1234-5678-1234-567812345678",
    "ObjectId('5f')": "5f",
    "array([1.5, nan], dtype=float32)": [1.5, None],
    "np.float64(1.5)": 1.5,
    "OrderedDict([('a', nan)])": {"a": None},
    "defaultdict": ValueError,
    "__import__('os').getcwd()": ValueError,
    "datetime.datetime(2020, 13, 2)": ValueError,
    "datetime.datetime(2020, 1, 2, tzinfo=<UTC>)": ValueError,
    "datetime.datetime(2020, 1, 2, tzinfo=mine)": ValueError,
    "{**{}}": ValueError,
    "a" * 3: ValueError,
    "9 ** 9": ValueError,
}


@pytest.mark.parametrize("text", PRINTED)
def test_what_python_prints_is_a_value_or_refused(text: str) -> None:
    wanted = PRINTED[text]
    if wanted is ValueError:
        with pytest.raises(ValueError, match="not a value of Python"):
            python_value(text)
    else:
        assert python_value(text) == wanted
        assert python_value(f"{{'a': {text}}}") == {"a": wanted}
        json.dumps(python_value(text), allow_nan=False)


def test_lines_of_python_dicts_with_printed_values_are_rows(tmp_path: Path) -> None:
    made = [f"datetime.datetime(2020, 1, {k + 1}, 3, 4, 5, 999999)" for k in range(6)]
    lines = [f"{{'user_id': 'u{k}', 'item_id': Decimal('7.0'), 'time': {time}, 'price': nan}}" for k, time in enumerate(made)]
    lines[2] = lines[2].replace("'u2'", "nan")
    lines[3] = lines[3].replace("Decimal('7.0')", "<object at 0x7>")
    (tmp_path / "e.json").write_text("\n".join(lines) + "\n")
    assert read_sample(tmp_path / "e.json").rows.num_rows == 5
    read = Read(tmp_path, interactions={"path": "e.json", "time": "time"})
    assert read.rows("interactions", "user_id", "item_id", "time_s") == [
        (f"u{k}", "7", 1_577_934_245 + (k - 1) * 86_400) for k in (0, 1, 4, 5)
    ]
    assert [(line, reason) for _, line, reason in read.rejected()] == [
        (3, "user_id is missing"),
        (4, "not a row with user_id, item_id, time"),
    ]


def test_a_number_that_is_infinite_is_rejected(tmp_path: Path) -> None:
    lines = [f"{{'user_id': 'u', 'item_id': 'i', 'time': {START}, 'w': {w}}}" for w in ("1.5", "inf", "nan")]
    (tmp_path / "e.json").write_text("\n".join(lines) + "\n")
    read = Read(tmp_path, interactions={"path": "e.json", "time": "time", "weight": "w"})
    assert read.rows("interactions", "raw_weight") == [(1.5,), (None,)]
    assert [reason for *_, reason in read.rejected()] == ["w is out of range: 'inf'"]


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;", "sep=;\r"])
@pytest.mark.parametrize("header", [True, False])
def test_the_line_in_which_excel_names_the_separator_is_no_row(first: str, header: bool, tmp_path: Path) -> None:
    names = ["user_id", "item_id", "time"]
    rows = "".join(f"u{k};a,b;{START + k}\n" for k in range(4))
    (tmp_path / "e.csv").write_text(f"{first}\n" + (";".join(names) + "\n" if header else "") + rows)
    read = Read(tmp_path, interactions={"path": "e.csv", "time": "time"} | ({} if header else {"columns": names}))
    assert read.rows("interactions", "user_id", "item_id", "time_s") == [(f"u{k}", "a,b", START + k) for k in range(4)]
    account = read.rejects.files["e.csv"]
    assert (account.rows, account.lines, account.skipped["comments"]) == (4, 5 + header, 1)
    sample = read_sample(tmp_path / "e.csv")
    assert sample.form is not None
    assert (sample.form.separator, sample.rows.num_rows) == (";", 4)


def test_joined_files_may_repeat_the_line_of_the_separator(tmp_path: Path) -> None:
    part = f"sep=|\nuser_id|item_id|time\nu1|i1|{START}\n"
    (tmp_path / "e.csv").write_text(part * 2)
    read = Read(tmp_path, interactions={"path": "e.csv", "time": "time"})
    assert len(read.kept()) == 2
    assert [(line, reason) for _, line, reason in read.rejected()] == [(5, "repeats the header")]


def test_a_value_that_looks_like_the_line_of_the_separator_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("user_id\nsep=;\n")
    (tmp_path / "e.csv").write_text(f"user_id,item_id,time\nsep=;,i1,{START}\n")
    read = Read(tmp_path, interactions={"path": "e.csv", "time": "time"})
    assert read.rows("interactions", "user_id") == [("sep=;",)]


@pytest.mark.parametrize("word", ["(null)", "[null]", "undefined", "nil", "-", "--", "?", "n.a.", "#NA", "-NaN", "(not set)"])
def test_further_words_for_a_missing_id_are_rejected(word: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id,time\n{word},i1,{START}\nu-1,{word},{START}\nu-1,i?,{START}\n")
    (tmp_path / "e.jsonl").write_text(json.dumps({"user_id": word, "item_id": "i", "time": START}) + "\n")
    read = Read(tmp_path, interactions={"path": "e.*", "time": "time"})
    assert read.rows("interactions", "user_id", "item_id") == [("u-1", "i?")]
    assert {reason for *_, reason in read.rejected()} == {"user_id is missing", "item_id is missing"}


def test_ids_that_a_float_of_32_bits_cannot_hold_are_rejected(tmp_path: Path) -> None:
    ids = pa.array([7.0, 16_777_215.0, 16_777_217.0, 123_456_789.0], pa.float32())
    table = pa.table({"user_id": ids, "item_id": ["i"] * 4, "time": [START] * 4, "w": pa.array([0.1, 2, 3, 1e9], pa.float32())})
    pq.write_table(table, tmp_path / "e.parquet")
    read = Read(tmp_path, interactions={"path": "e.parquet", "time": "time", "weight": "w"})
    assert read.rows("interactions", "user_id", "raw_weight") == [("7", 0.1), ("16777215", 2.0)]
    assert all("too large to be exact" in reason for *_, reason in read.rejected())


@pytest.mark.parametrize("value", [r'"a\"b"', r'"a\",b"', r'"\"a\""', r'"a \"b\", c"'])
def test_quotes_escaped_by_a_backslash_cost_no_other_row_its_quotes(value: str, tmp_path: Path) -> None:
    rows = [f'"u{k}","i {k % 3}",{START + k}' for k in range(20)]
    rows[7] = f'{value},"i 1",{START + 7}'
    (tmp_path / "e.csv").write_text("user_id,item_id,time\n" + "\n".join(rows) + "\n")
    read = Read(tmp_path, interactions={"path": "e.csv", "time": "time"})
    wanted = [f"u{k}" for k in range(20)]
    wanted[7] = value[1:-1].replace("\\", "")
    assert [user for (user,) in read.rows("interactions", "user_id")] == wanted


def test_a_stray_mark_among_quoted_values_rejects_its_line_alone(tmp_path: Path) -> None:
    rows = [f'"u{k}","i {k % 3}",{START + k}' for k in range(20)]
    rows[7] = f'"u"7","i 1",{START + 7}'
    (tmp_path / "e.csv").write_text("user_id,item_id,time\n" + "\n".join(rows) + "\n")
    read = Read(tmp_path, interactions={"path": "e.csv", "time": "time"})
    assert [user for (user,) in read.rows("interactions", "user_id")] == [f"u{k}" for k in range(20) if k != 7]
    assert [line for _, line, _ in read.rejected()] == [9]


ITEMS = {
    "{a,b}": ["a", "b"],
    '{"a b",c,NULL}': ["a b", "c"],
    r'{"say \"x\"","a,b"}': ['say "x"', "a,b"],
    "{}": [],
    "['a', ...]": "tags is not a list of labels",
    "['a', 'b...']": ["a", "b..."],
    "[1 2 ... 9]": "tags is not a list of labels",
    "[nan, 'a']": ["a"],
    "{'name': 'a'}": ["a"],
}


@pytest.mark.parametrize("text", ITEMS)
def test_lists_of_databases_are_read_and_shortened_ones_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id,time\nu,i,{START}\n")
    (tmp_path / "i.jsonl").write_text(json.dumps({"item_id": "i", "tags": text}) + "\n")
    items = {"path": "i.jsonl", "features": [{"name": "tags", "kind": "multi"}]}
    read = Read(tmp_path, interactions={"path": "e.csv", "time": "time"}, items=items)
    wanted = ITEMS[text]
    if isinstance(wanted, str):
        assert [reason.partition(":")[0] for *_, reason in read.rejected()] == [wanted]
    else:
        assert [sorted(tags) for (tags,) in read.rows("items", "tags")] == [sorted(wanted)]


def test_labels_of_categories_have_one_text_and_nan_is_none(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id,time\nu,i0,{START}\n")
    labels = ["1.0", "1", "01", "nan", "NULL", "none", "NA", "\\N", "1.50", "v1.0"]
    (tmp_path / "i.csv").write_text("item_id,c\n" + "".join(f"i{k},{label}\n" for k, label in enumerate(labels)))
    items = {"path": "i.csv", "features": [{"name": "c", "kind": "categorical"}]}
    read = Read(tmp_path, interactions={"path": "e.csv", "time": "time"}, items=items)
    assert [c for (c,) in read.rows("items", "c")] == ["1", "1", "01", None, None, "none", "NA", None, "1.50", "v1.0"]
