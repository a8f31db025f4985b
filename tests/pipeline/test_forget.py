"""Test that a forgotten user is in no file of a run, and that the run can be trained on."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from twotower.bundle.bundle import load_bundle
from twotower.bundle.forgetting import USER_TABLE
from twotower.cli import main
from twotower.data.dataset import Dataset
from twotower.data.forgetting import _mentions
from twotower.pipeline.new_data import source_of_files, source_of_store
from twotower.pipeline.run_folder import locked
from twotower.pipeline.stages import run_all
from twotower.schema import FIRST_ROW, UNKNOWN
from twotower.serving.event_export import export_events
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event
from twotower.serving.kept_versions import KeptVersions
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import parse_config

from ..shop import FAST, shop
from .conftest import content

USER = "C0007"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a shop, with impressions and a table of customers."""
    root = tmp_path_factory.mktemp("forget")
    orders, products = shop(users=60, items=30, events=900)
    orders["kind"] = "order"
    seen = orders.iloc[::5].assign(kind="impression", product="P0003")
    pd.concat([orders, seen]).to_csv(root / "orders.csv", index=False)
    products.to_csv(root / "products.csv", index=False)
    names = sorted(orders["customer"].unique())
    pd.DataFrame({"customer": names, "town": [f"town of {name}" for name in names]}).to_csv(root / "customers.csv", index=False)
    interactions = {"path": "orders.csv", "user_id": "customer", "item_id": "product", "time": "ordered_at", "event_type": "kind"}
    users = {"path": "customers.csv", "user_id": "customer", "features": [{"name": "town", "kind": "categorical"}]}
    data = {"source": "tables", "path": str(root), "interactions": interactions, "users": users}
    data["items"] = {"path": "products.csv", "item_id": "product", "name": "title"}
    settings: dict[str, Any] = {**FAST, "evaluation": {**FAST["evaluation"], "baselines": []}, "data": data}
    run_all(parse_config(settings), root / "run")
    return root / "run"


def holding(folder: Path, text: str) -> list[str]:
    """Return the files of a folder that hold a text: as bytes, or in a column of a Parquet file."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            table = path.suffix == ".parquet" and any(text in str(column.to_pylist()) for column in pq.read_table(path).columns)
            if table or text.encode() in path.read_bytes():
                found.append(str(path.relative_to(folder)))
    return found


def test_a_forgotten_user_is_in_no_file_of_a_run_and_the_run_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Dataset.open(run / "dataset")
    row = int(before.user_rows([USER])[0])
    others = {str(user): before.events.offsets[n + 1] - before.events.offsets[n] for n, user in enumerate(before.user_ids)}
    assert "dataset/users.parquet" in holding(run, USER)
    assert main(["forget", str(run), "--user", USER, "--user", "nobody"]) == 0
    assert "users in the bundle: 1; users in the dataset: 1" in capsys.readouterr().out
    assert holding(run, USER) == []
    for dataset in (Dataset.open(run / "dataset"), load_bundle(run / "bundle").dataset):
        sizes = np.diff(dataset.events.offsets)
        assert sizes[row] == 0 and dataset.n_users == before.n_users and len(dataset.item_events) == len(before.item_events)
        assert {str(user): size for user, size in zip(dataset.user_ids, sizes, strict=True) if str(user) in others} == {
            user: size for user, size in others.items() if user != USER
        }
        assert dataset.negatives is not None and np.diff(dataset.negatives.offsets)[row] == 0
        kept = dataset.manifest.counts.kept
        assert kept.events == len(dataset.events) and kept.anonymous_events == len(dataset.item_events) - len(dataset.events)
    weights = load_checkpoint(run / "model" / "best.pt")["model"]
    table = weights[USER_TABLE]
    assert len(table) <= row or torch.equal(table[row], table[UNKNOWN])
    orders, _ = shop(users=60, items=30, events=900)
    last = orders["ordered_at"].max()
    later = orders[orders["customer"] != USER].tail(200).assign(kind="order")
    later["ordered_at"] = last + pd.to_timedelta(np.arange(1, 201), unit="h")
    later.to_csv(run.parent / "later.csv", index=False)
    assert main(["update", str(run), "--data", str(run.parent / "later.csv"), "--set", "updating.max_worse_frac=1"]) == 0
    assert str(Dataset.open(run / "dataset").user_rows([USER])[0]) == str(UNKNOWN)
    assert main(["forget", str(run), "--user", USER]) == 0
    assert "users in the bundle: 0; users in the dataset: 0" in capsys.readouterr().out


def test_an_export_is_read_as_its_store(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, base = f"sqlite:{tmp_path / 'e'}", Dataset.open(run / "dataset")
    item = str(base.item_ids[FIRST_ROW])
    store = open_store(url)
    store.append(
        [Event("1", "u", item, 1_800_000_000, stars=4.0), Event("2", "v", item, 5, "impression", request_id="r", position=3)]
    )
    export_events(url, tmp_path / "events.parquet")
    of_store, of_file = source_of_store(url, base), source_of_files([tmp_path / "events.parquet"], base)
    assert of_store.tables["events"].equals(of_file.tables["events"]) and of_store.data == of_file.data
    assert source_of_store(str(tmp_path / "events.parquet"), base).tables["events"].equals(of_file.tables["events"])
    assert of_file.tables["events"].to_pylist()[0]["event_type"] == "order", "the first type of the run"
    assert of_file.tables["events"].to_pylist()[1]["request"] == "r"
    store.close()
    export_events(url, tmp_path / "answers.parquet", answers=True)
    assert main(["update", str(run), "--events", str(tmp_path / "answers.parquet")]) == 2
    assert "is not an export of events" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["copied", "moved", "behind a link"])
def test_a_run_uses_its_own_dataset_wherever_it_lies(run: Path, tmp_path: Path, how: str) -> None:
    """What is forgotten in a copy stays in the original, and is in no file of the copy; both can be trained on."""
    user, places = "C0011", [tmp_path / "original", tmp_path / "copy"]
    for place in places:
        shutil.copytree(run, place)
    if how == "moved":
        shutil.rmtree(places[0])
    elif how == "behind a link":
        (tmp_path / "link").symlink_to(places[1], target_is_directory=True)
    given = tmp_path / "link" if how == "behind a link" else places[1]
    assert user in Dataset.open(places[1] / "dataset").user_ids
    assert main(["forget", str(given), "--user", user]) == 0
    assert holding(places[1], user) == []
    assert how == "moved" or "dataset/users.parquet" in holding(places[0], user)
    orders, _ = shop(users=60, items=30, events=900)
    later = orders[orders["customer"] == "C0012"].assign(
        kind="order", ordered_at=orders["ordered_at"].max() + pd.Timedelta(days=90)
    )
    later.to_csv(tmp_path / "later.csv", index=False)
    for place in places[how == "moved" :]:
        assert main(["update", str(place), "--data", str(tmp_path / "later.csv"), "--set", "updating.max_worse_frac=1"]) == 0
        assert (user in Dataset.open(place / "dataset").user_ids) == (place == places[0])


def test_what_killed_commands_left_and_kept_versions_are_cleaned_too(run: Path, tmp_path: Path) -> None:
    user, shop_run = "C0021", tmp_path / "shop"
    shutil.copytree(run, shop_run)
    shutil.copytree(run / "dataset", shop_run / ".dataset.39286146997f.new")
    shutil.copytree(run / "bundle", shop_run / ".bundle.39286146997f.new")
    shutil.copytree(run, tmp_path / ".shop.update")
    versions = shop_run / "bundle.versions"
    served = load_bundle(run / "bundle").manifest.seal[:12]
    for name in ("158cb78f084a", served, ".158cb78f084b.new", "dropped"):
        shutil.copytree(run / "bundle", versions / name)
    (versions / "history.json").write_text(json.dumps(["158cb78f084a", served]))
    (shop_run / "model" / ".metrics.jsonl.partial").write_text(user)
    assert main(["forget", str(shop_run / "model"), "--user", user]) == 0  # the part stands for the run
    assert holding(tmp_path, user) == []
    (kept,) = KeptVersions(versions, 3).paths()
    assert load_bundle(kept).manifest.seal[:12] == kept.name
    assert sorted(path.name for path in versions.iterdir()) == sorted([kept.name, "history.json"])


def test_a_run_that_changes_is_not_touched(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop_run = tmp_path / "shop"
    shutil.copytree(run, shop_run)
    with locked(shop_run):
        assert main(["forget", str(shop_run / "bundle"), "--user", USER]) == 2, "an update may be about to replace it"
        assert "Another command is changing" in capsys.readouterr().err
        assert main(["forget", str(shop_run), "--user", "C0022"]) == 2
        assert "Another command is changing" in capsys.readouterr().err
    with locked(shop_run, shared=True):  # an update that reads it
        assert main(["forget", str(shop_run), "--user", "C0022"]) == 2
    assert "dataset/users.parquet" in holding(shop_run, "C0022")
    (shop_run / "model" / "manifest.json").write_text('{"kind": "other"}')
    assert main(["forget", str(shop_run), "--user", "C0022"]) == 2
    assert "is neither a run nor a bundle" in capsys.readouterr().err


def test_a_mistyped_store_or_user_is_refused_and_nothing_is_made(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:{tmp_path / 'typo.sqlite'}"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    commands = [
        ["forget", str(run), "--user", "C0030", "--events", url],
        ["update", str(run), "--events", url],
        ["events", "export", url, "--out", str(tmp_path / "out.parquet")],
        ["events", "backup", url, "--out", str(tmp_path / "out.sqlite")],
        ["estimate", str(run / "bundle"), "--log", url],
    ]
    for command in commands:
        assert main(command) == 2, command
        assert f"No event store at {url.removeprefix('sqlite:')}" in capsys.readouterr().err, command
    assert main(["forget", str(run), "--user", "C0030", "--user", "\udcff"]) == 2
    assert "The user '\\udcff' is not UTF-8 text" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize("name", ["Zoë Müller", "日本の客", "tab\tuser", 'we"ird\\user', "😀", "a/b", "plain"])
def test_rejected_rows_of_a_user_are_found_however_they_are_written(name: str) -> None:
    cell = io.StringIO()
    csv.writer(cell).writerow([name, "p1"])
    for text in (cell.getvalue(), json.dumps({"user": name}), json.dumps({"user": name}, ensure_ascii=False), f"{name},p1"):
        for whole in (True, False):
            line = json.dumps({"file": "a.csv", "line": 3, "reason": "not a time", "text": text}, ensure_ascii=whole)
            assert _mentions(line, ["someone else", name]) and not _mentions(line, ["someone else"])


@pytest.mark.parametrize("name", ["ex.csv", "ex", "ex.parquet.gz"])
def test_an_export_has_the_name_of_its_format(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(f"sqlite:{tmp_path / 'e'}").close()
    assert main(["events", "export", f"sqlite:{tmp_path / 'e'}", "--out", str(tmp_path / name)]) == 2
    assert "must end with .parquet" in capsys.readouterr().err and not (tmp_path / name).exists()
    assert main(["events", "export", f"sqlite:{tmp_path / 'e'}", "--out", str(tmp_path / "EX.PARQUET")]) == 0


def test_a_killed_forget_is_repeated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed when the checkpoints know the new dataset, and before it takes its place."""
    user, shop_run = "C0023", tmp_path / "shop"
    shutil.copytree(run, shop_run)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("twotower.utils.atomic_files.replace_folder", killed)
    assert main(["forget", str(shop_run), "--user", user]) != 0
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["export", str(shop_run / "model"), "--out", str(tmp_path / "bundle")]) == 2
    assert "repeat `twotower forget`" in capsys.readouterr().err
    assert main(["forget", str(shop_run), "--user", user]) == 0
    assert holding(shop_run, user) == []
    assert main(["export", str(shop_run / "model"), "--out", str(tmp_path / "bundle")]) == 0


def test_a_store_is_not_replaced_by_its_copy_or_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server would go on in a file that has no name any more, and lose what it accepts."""
    file = tmp_path / "store.parquet"
    store = open_store(f"sqlite:{file}")
    (tmp_path / "link.parquet").symlink_to(file)
    (tmp_path / "hard.parquet").hardlink_to(file)
    for out in ("store.parquet", "link.parquet", "hard.parquet"):
        for command in ("backup", "export"):
            assert main(["events", command, f"sqlite:{file}", "--out", str(tmp_path / out), "--overwrite"]) == 2
            assert f"{tmp_path / out} is the store itself" in capsys.readouterr().err
    assert store.append([Event("1", "u", "a", 5)]) == [True]
    store.close()
    assert open_store(f"sqlite:{tmp_path / 'link.parquet'}").forget("u") == 1


WRONG = {
    "a long name": ("events export sqlite:{long} --out {to}/x.parquet", "No event store at aaa"),
    "no folder": ("events export {store} --out {to}/no/x.parquet", "x.parquet: No such file or directory. Choose"),
    "no folder for a backup": ("events backup {store} --out {to}/no/x", "the backup {to}/no/x: No such file or directory. Choose"),
    "no database": (
        "events export sqlite:{to}/text --out {to}/x.parquet",
        "not a database. Name the store of a server",
    ),
    "half a database": ("forget {run} --user u --events sqlite:{to}/half", "half as event store: database disk image is malformed"),
    "an empty user": ("forget {run} --events {store} --user=", "A user is empty"),
    "a password": ("update {run} --events redis://:secret@localhost:1", "The address has a password"),
    "a part of the run": ("update {run} --events {store} --out {run}/inside", "inside is part of {run}, which is updated"),
    "an empty file": ("update {run} --data {to}/empty.parquet", "Parquet file size is 0 bytes. Replace the file."),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_get_one_sentence_and_change_nothing(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shop_run, to = tmp_path / "shop", tmp_path / "to"
    shutil.copytree(run, shop_run)
    to.mkdir()
    store = open_store(f"sqlite:{to / 'store'}")
    store.append([Event("1", "u", "a", 5)])
    store.close()
    (to / "text").write_text("not a database")
    (to / "empty.parquet").touch()
    whole = (to / "store").read_bytes()
    (to / "half").write_bytes(whole[: len(whole) // 2])
    given = {"run": str(shop_run), "to": str(to), "store": f"sqlite:{to / 'store'}", "long": "a" * 300}
    before = content(tmp_path)
    command, said = WRONG[name]
    assert main([word.format(**given) for word in command.split()]) == 2
    found = capsys.readouterr().err
    assert said.format(**given) in found and found.count("\n") == 1 and "secret" not in found
    assert {name: value for name, value in content(tmp_path).items() if not name.endswith(".lock")} == before
