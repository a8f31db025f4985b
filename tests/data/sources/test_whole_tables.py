"""Test folders, partitions, snapshots, items from the interactions, further columns, and the account of `prepare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.data.sources.account import account_table
from twotower.data.sources.engine import DuckDBEngine
from twotower.errors import ConfigError, DataError
from twotower.utils.array_files import open_arrays
from twotower.utils.config import parse_config

from .table_rows import Read

DAY = 86_400
START = 1_600_000_000


def events(n: int = 60, user: str = "u{}") -> list[dict[str, Any]]:
    """Return events of six users at five items."""
    return [{"user_id": user.format(k % 6), "item_id": f"i{k % 5}", "time": START + k * DAY, "kind": "buy"} for k in range(n)]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")


def prepared(folder: Path, **data: Any) -> Dataset:
    """Prepare a dataset from tables in a folder."""
    prepare_settings = data.pop("prepare", {})
    values = {"data": {"source": "tables", "path": str(folder), **data}, "prepare": {"text_dim": 0, **prepare_settings}}
    prepare(parse_config(values), folder / "dataset")
    return Dataset.open(folder / "dataset")


@pytest.mark.parametrize("path", ["day", "day/*", "day/*/*.parquet", "**/*.parquet"])
def test_a_folder_is_its_parts_and_never_a_column(path: str, tmp_path: Path) -> None:
    for day in range(3):
        part = tmp_path / "day" / f"user_id=x{day}" / "part-0.parquet"
        part.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(events(4)), part)
    (tmp_path / "day" / "_SUCCESS").touch()
    (tmp_path / "day" / ".part.crc").touch()
    made = Read(tmp_path, interactions={"path": path})
    assert {row[0] for row in made.rows("interactions", "user_id")} == {"u0", "u1", "u2", "u3"}
    again = Read(tmp_path, interactions={"path": path, "partition_columns": ["user_id"]})  # the file has its own
    assert again.kept() == made.kept()


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_partition_columns_on_request(form: str, tmp_path: Path) -> None:
    rows = [{"user_id": "u", "item_id": "i"}]
    for day in ("2023-01-01", "2023-01-02"):
        part = tmp_path / "hive" / f"day={day}" / f"part.{form}"
        part.parent.mkdir(parents=True)
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), part)
        else:
            part.write_text(json.dumps(rows[0]) if form == "jsonl" else "user_id,item_id\nu,i\n")
    table = {"path": "hive", "time": "day"}
    made = Read(tmp_path, interactions={**table, "partition_columns": ["day"]})
    assert [time for (time,) in made.rows("interactions", "time_s")] == [1_672_531_200, 1_672_617_600]
    with pytest.raises(DataError, match=r"Its folder has that name. To use it, set partition_columns: \[day\]"):
        Read(tmp_path, interactions=table)


@pytest.mark.parametrize("name", ["a[1].csv", "a*b.csv", "a?.jsonl", "x=1/e.jsonl", "{a}.parquet"])
def test_names_that_look_like_patterns(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    rows = [{"user_id": "u", "item_id": "i"}]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows[0]) if name.endswith("jsonl") else "user_id,item_id\nu,i\n")
    assert Read(tmp_path, interactions={"path": name}).rows("interactions", "user_id", "item_id") == [("u", "i")]


def test_of_several_snapshots_the_newest_row_counts(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", events())
    for day, ids in (("01", "012345"), ("02", "0123"), ("03", "01")):
        write_csv(tmp_path / f"items-{day}.csv", [{"item_id": f"i{n}", "title": f"of {day}"} for n in ids])
    made = Read(tmp_path, interactions={"path": "e.csv"}, items={"path": "items-*.csv", "name": "title"})
    titles = dict(made.rows("items", "item_id", "name"))
    assert titles == {"i0": "of 03", "i1": "of 03", "i2": "of 02", "i3": "of 02", "i4": "of 01", "i5": "of 01"}
    left = {name: sum(file.left_out.values()) for name, file in made.rejects.files.items()}
    assert left == {"e.csv": 0, "items-01.csv": 4, "items-02.csv": 2, "items-03.csv": 0}


@pytest.mark.parametrize(("value", "names"), [("first", ["old", "only"]), ("last", ["new", "only"])])
def test_items_from_the_interactions(value: str, names: list[str], tmp_path: Path) -> None:
    rows = ["user_id,item_id,title,tags", "u,a,old,x|y", "v,a,new,z", "u,b,,", "w,b,only,q", "w,a,,"]
    (tmp_path / "e.csv").write_text("\n".join(rows))
    items = {
        "from": "interactions",
        "value": value,
        "name": "title",
        "features": [{"name": "tags", "kind": "multi", "separator": "|"}],
    }
    made = Read(tmp_path, interactions={"path": "e.csv"}, items=items)
    assert sorted(made.rows("items", "item_id", "name")) == [("a", names[0]), ("b", names[1])]
    with pytest.raises(DataError, match="set `from: interactions` in place of path"):
        made = Read(tmp_path, interactions={"path": "e.csv"}, items={"path": "e.csv"})
        made.rejects.max_frac = 0.01
        made.rejects.check()
    with pytest.raises(ConfigError, match="set either path or `from: interactions`"):
        Read(tmp_path, interactions={"path": "e.csv"}, items={"path": "e.csv", "from": "interactions"})


def test_stars_weights_quantities_and_positions(tmp_path: Path) -> None:
    header = "user_id,item_id,score,w,n,rank"
    rows = ["u,a,1,2,1,1", "u,b,10,0,3,2", "u,c,5.5,,,", "u,d,11,1,1,1", "u,e,5,-1,1,1", "u,f,5,1,1,0", "u,g,5,1,1,1.5"]
    (tmp_path / "e.csv").write_text("\n".join([header, *rows]))
    columns = {"stars": "score", "stars_scale": [1, 10], "weight": "w", "quantity": "n", "position": "rank"}
    made = Read(tmp_path, interactions={"path": "e.csv", **columns})
    assert made.rows("interactions", "stars", "position") == [(1.0, 1), (5.0, 2), (3.0, None)]
    assert made.rows("interactions", "raw_weight")[:2] == [(2.0,), (0.0,)]
    assert [why for _, _, why in made.rejected()] == [
        "score is not on the 1-10 scale: '11'",
        "w is below 0: '-1'",
        "rank is not a position from 1: '0'",
        "rank is not a position from 1: '1.5'",
    ]


def test_weights_and_positions_reach_the_dataset(tmp_path: Path) -> None:
    rows = [{**row, "w": k % 3, "rank": k % 4 + 1, "kind": "view" if k % 2 else "buy"} for k, row in enumerate(events())]
    write_csv(tmp_path / "e.csv", rows)
    table = {"path": "e.csv", "time": "time", "weight": "w", "position": "rank", "event_type": "kind"}
    dataset = prepared(tmp_path, interactions=table, prepare={"event_weights": {"view": 0.5}})
    found = sorted(zip(dataset.events.time_s.tolist(), dataset.events.weight.tolist(), strict=True))
    assert [weight for _, weight in found] == [(k % 3) * (0.5 if k % 2 else 1.0) for k in range(60)]
    assert (dataset.events.positive == (dataset.events.weight > 0)).all()
    positions = open_arrays(dataset.path / "positions.safetensors")["position"]
    assert sorted(zip(dataset.events.time_s.tolist(), positions.tolist(), strict=True)) == [
        (START + k * DAY, k % 4 + 1) for k in range(60)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"event_weights": {"view": float("nan")}}, "'prepare.event_weights.view': input should be a finite number. Got nan"),
        ({"event_weights": {"impression": 0}}, "'impression' is in event_weights and in impression_types"),
        ({"positive_min_stars": 3, "negative_max_stars": 3}, "negative_max_stars must be below positive_min_stars; got 3 and 3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"prepare": settings})


def test_the_account_of_a_dataset(tmp_path: Path) -> None:
    rows = events(100)
    rows[3]["item_id"], rows[7]["item_id"] = "", "gone"
    write_csv(tmp_path / "a" / "e.csv", rows[:50])
    write_csv(tmp_path / "b" / "e.csv", rows[50:])
    write_csv(tmp_path / "i.csv", [{"item_id": f"i{n}", "empty": "", "colour": "red"} for n in range(5)])
    write_csv(tmp_path / "u.csv", [{"user_id": f"U{n}" if n == 2 else f"u{n}", "age": 30} for n in range(6)])
    dataset = prepared(
        tmp_path,
        max_reject_frac=0.05,
        interactions={"path": "*/e.csv", "time": "time"},
        items={"path": "i.csv", "features": [{"name": "empty", "kind": "categorical"}], "other_columns": False},
        users={"path": "u.csv", "features": [{"name": "age", "kind": "number"}]},
    )
    counts = dataset.manifest.counts.json_values()
    assert counts["files"]["a/e.csv"]["rejected"] == {"item_id is missing": 1} and "rejected" not in counts["files"]["b/e.csv"]
    assert counts["read"] == {"a/e.csv": 50, "b/e.csv": 50, "i.csv": 5, "u.csv": 6}
    for name, file in counts["files"].items():
        assert file["lines"] == file["rows"] + sum(file["skipped"].values()), name
    kept, dropped = counts["kept"]["events"], sum(counts["dropped"]["events"].values())
    assert kept + dropped + 1 == 100 and counts["dropped"]["events"]["item is not in the items table"] == 1
    item, user = counts["matched"]["item"], counts["matched"]["user"]
    assert (item["known"], item["events"], item["unknown_example"]) == (98, 99, "gone")
    assert user["known"] == 99 - 17 and user["alike_example"] == ["u2", "U2"]
    warnings = "\n".join(dataset.manifest.warnings)
    assert "17 of 99 events (17.2%) have user ids that the users table lacks, such as 'u2'" in warnings
    assert "1 user ids look alike in both tables but differ, such as 'u2' and 'U2'" in warnings
    assert "no row of the items table has a value in empty" in warnings and "a/e.csv: 1 of 50 rows were rejected (2.0%)" in warnings
    shown = "\n".join(account_table(counts))
    assert "a/e.csv: 1 rejected: item_id is missing" in shown and "dropped 1 events: item is not in the items table" in shown
    assert "unused columns of interactions: kind" in shown and "unused columns of items: colour" in shown
    assert "first and last time: 2020-09-13 12:26:40 to" in shown


@pytest.mark.parametrize("side", ["items", "users"])
def test_tables_that_do_not_match_are_an_error_with_an_id_of_each_side(side: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", events())
    key = f"{side[:-1]}_id"
    write_csv(tmp_path / "t.csv", [{key: f"{side[0].upper()}{n}"} for n in range(6)])
    with pytest.raises(
        DataError, match=rf"No id of the 60 events is in the {side} table: the events have '{side[0]}0', the table has"
    ):
        prepared(tmp_path, interactions={"path": "e.csv", "time": "time"}, **{side: {"path": "t.csv"}})


JSON_FORMS = {
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "lines with a mark": lambda rows: "\ufeff" + "\n".join(map(json.dumps, rows)),
    "array": json.dumps,
    "array of lines": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]",
    "pretty array": lambda rows: json.dumps(rows, indent=2),
    "pretty objects": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "python dicts": lambda rows: "\n".join(map(repr, rows)),
    "unicode dicts": lambda rows: "\n".join(repr(row).replace(": '", ": u'") for row in rows),
    "old mac": lambda rows: "\r".join(map(json.dumps, rows)),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_of_any_form(form: str, tmp_path: Path) -> None:
    rows = [{**row, "tags": ["a, b", "it's"], "note": None} for row in events(30)]
    (tmp_path / "e.json").write_bytes(JSON_FORMS[form](rows).encode())
    made = Read(tmp_path, interactions={"path": "e.json", "time": "time"})
    assert made.rows("interactions", "user_id", "time_s") == [(row["user_id"], row["time"]) for row in rows] and not made.rejected()


def test_a_broken_element_of_an_array_is_one_reject(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in events(20)]
    lines[7] = lines[7][:-9]
    (tmp_path / "e.json").write_text("[\n" + ",\n".join(lines) + "\n]")
    made = Read(tmp_path, interactions={"path": "e.json"})
    assert len(made.kept()) == 19 and [line for _, line, _ in made.rejected()] == [9]


def test_a_file_without_objects_is_refused_in_one_line(tmp_path: Path) -> None:
    for content in ("", "hello\nworld\n", "[1, 2, 3]"):
        (tmp_path / "e.json").write_text(content)
        with pytest.raises(DataError, match="holds no JSON object that can be read"):
            Read(tmp_path, interactions={"path": "e.json"})


@pytest.mark.parametrize("name", ["e.csv", "e.jsonl"])
def test_rows_are_stored_in_the_order_of_their_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of the stored table has no join, after which rows come in any order: the order of events may be all there is."""
    plans: list[str] = []
    save = DuckDBEngine.save

    def explained(self: DuckDBEngine, rows: Any) -> Any:
        if isinstance(rows, ir.Table) and "reject_reason" in rows.columns and not plans:
            found = self.con.con.execute(f"EXPLAIN CREATE TEMP TABLE explained AS {ibis.to_sql(rows, dialect='duckdb')}")
            plans.append(found.fetchall()[0][1])
        return save(self, rows)

    monkeypatch.setattr(DuckDBEngine, "save", explained)
    rows = [{"user_id": f"u{n}", "item_id": "i", "stars": "3"} for n in range(9)]
    write_csv(tmp_path / "e.csv", rows)
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = Read(tmp_path, interactions={"path": name, "stars": "stars"})
    assert len(plans) == 1 and "Join" not in plans[0]
    assert [row[0] for row in found.rows("interactions", "user_id")] == [f"u{n}" for n in range(9)]
