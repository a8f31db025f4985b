"""Inspect files without a configuration, and prepare them from the same guess."""

from __future__ import annotations

import json
import random
import re
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
import yaml

from twotower.cli import main
from twotower.utils.config import load_config


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with orders.csv, products.csv and customers.csv, which is the working folder."""
    rng, start = random.Random(3), datetime(2023, 1, 1)
    rows = [
        f"C{rng.randrange(40):03d},P{rng.randrange(30):03d},{start + timedelta(hours=n)},{rng.randint(1, 5)}" for n in range(600)
    ]
    rows += ["C001,,2023-01-05 00:00:00,4", "c001,P001.0,2023-01-05 00:00:00,4"]
    (tmp_path / "orders.csv").write_text("\n".join(["customer,product,ordered_at,rating", *rows]) + "\n")
    goods = [
        f"P{n:03d},Tea {n},{('Uji', 'Assam')[n % 2]},{('green|hot', 'black', 'cold|green')[n % 3]},{n + 0.5}" for n in range(30)
    ]
    (tmp_path / "products.csv").write_text("\n".join(["product,title,brand,tags,price", *goods]) + "\n")
    people = [f"C{n:03d},2022-01-{n % 28 + 1:02d},{('AT', 'DE')[n % 2]}" for n in range(40)]
    (tmp_path / "customers.csv").write_text("\n".join(["customer,joined,country", *people]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILES = ["orders.csv", "products.csv", "customers.csv"]


@pytest.mark.usefixtures("shop")
def test_inspect_shows_columns_the_account_and_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *FILES]) == 0
    out, err = capsys.readouterr()
    shown, _, config = out.partition("\ndata:\n")
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert re.search(r"^customer +user +text +0 % C0\d\d", shown, re.M) and re.search(r"^tags +feature +multi", shown, re.M)
    assert "601 events of 41 users at 31 items" in shown
    assert re.search(r"^  orders\.csv +602 +1 +0$", shown, re.M) and "1 rejected: product is missing" in shown
    text = " ".join(shown.split())
    assert "first and last time: 2023-01-01 00:00:00 to 2023-01-25 23:00:00 UTC" in text
    assert "events whose item is in the items table: 600 of 601" in text and "such as 'P001.0' and 'P001'" in text
    assert "events whose user is in the users table: 600 of 601" in text and "such as 'c001' and 'C001'" in text
    assert yaml.safe_load(f"data:\n{config}")["data"]["items"]["name"] == "title"
    assert err.strip() == "Next: twotower run --data orders.csv --data products.csv --data customers.csv --out runs/orders"


def test_the_configuration_prepares_the_same_dataset_as_the_files(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *FILES, "--out", "shop.yaml"]) == 0
    assert "Next: twotower run --config shop.yaml --out runs/shop" in capsys.readouterr().err
    assert load_config(shop / "shop.yaml").data.items is not None
    assert main(["prepare", "--config", "shop.yaml", "--out", "one"]) == 0
    given = [word for file in FILES for word in ("--data", file)]
    assert main(["prepare", *given, "--out", "two"]) == 0
    err = capsys.readouterr().err.splitlines()
    (guessed,) = (line for line in err if line.startswith("Guessed: "))
    assert "orders.csv is interactions (user customer, item product, time ordered_at, rating rating); products" in guessed
    assert "Check and change it: twotower inspect orders.csv products.csv customers.csv --out shop.yaml" in err
    one, two = (json.loads((shop / name / "manifest.json").read_text()) for name in ("one", "two"))
    assert one["hashes"] == two["hashes"] and one["n_items"] == 30
    assert main(["prepare", "--data", ".", "--out", "three"]) == 0, "of a folder, the tables directly in it"
    assert json.loads((shop / "three" / "manifest.json").read_text())["hashes"] == one["hashes"]


def test_a_configuration_is_not_replaced_by_default(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "shop.yaml").write_text("mine")
    assert main(["inspect", *FILES, "--out", "shop.yaml"]) == 2
    assert "--overwrite" in capsys.readouterr().err and (shop / "shop.yaml").read_text() == "mine"
    assert main(["inspect", *FILES, "--out", "shop.yaml", "--overwrite"]) == 0


def test_a_question_ends_the_command_and_an_option_answers_it(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (shop / "orders.csv").read_text().splitlines()
    (shop / "log.csv").write_text("\n".join(["who,what,when,rating", *lines[1:600]]) + "\n")
    for command in (["inspect", "log.csv"], ["prepare", "--data", "log.csv", "--out", "set"]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert "twotower: error: log.csv has no column name for the user" in err and "--user COLUMN" in err
        assert "Traceback" not in out + err and not (shop / "set").exists()
    assert main(["prepare", "--data", "log.csv", "--user", "who", "--item", "what", "--out", "set"]) == 0
    assert "twotower inspect log.csv --user who --item what --out shop.yaml" in capsys.readouterr().err
    assert json.loads((shop / "set" / "manifest.json").read_text())["config"]["data"]["interactions"]["time"] == "when"
    assert main(["prepare", "--user", "who", "--out", "other"]) == 2 and "--data" in capsys.readouterr().err


def test_without_times_the_split_needs_none(shop: Path) -> None:
    lines = [",".join(line.split(",")[:2]) for line in (shop / "orders.csv").read_text().splitlines()]
    (shop / "pairs.csv").write_text("\n".join(lines[:600]) + "\n")
    assert main(["prepare", "--data", "pairs.csv", "--out", "set"]) == 0
    assert json.loads((shop / "set" / "manifest.json").read_text())["config"]["prepare"]["split"]["kind"] == "leave_one_out"


def test_settings_win_over_the_guess_and_a_described_configuration_is_not_guessed(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shop / "train.yaml").write_text("training: {num_epochs: 3}\nprepare: {min_item_events: 2}\n")
    command = ["prepare", "--config", "train.yaml", "--set", "data.interactions.stars=null", "--data", "orders.csv", "--out", "set"]
    assert main(command) == 0
    made = json.loads((shop / "set" / "manifest.json").read_text())["config"]
    assert made["prepare"]["min_item_events"] == 2 and made["data"]["interactions"]["stars"] is None
    (shop / "own.yaml").write_text(
        "data: {source: tables, interactions: {path: orders.csv, user_id: customer, item_id: product}}\n"
    )
    capsys.readouterr()
    assert main(["prepare", "--config", "own.yaml", "--data", "orders.csv", "--out", "set2"]) == 2
    assert "already describes the data" in capsys.readouterr().err
    command = ["prepare", "--config", "own.yaml", "--data", str(shop), "--set", "prepare.split.kind=leave_one_out", "--out", "set2"]
    assert main(command) == 0


def test_a_folder_of_parquet_holds_parts_or_tables(shop: Path) -> None:
    (shop / "parts").mkdir()
    (shop / "tables").mkdir()
    orders, products = pc.read_csv("orders.csv"), pc.read_csv("products.csv")
    for number in range(3):
        pq.write_table(orders.slice(number * 200, 200), shop / "parts" / f"part-{number}.parquet")
    pq.write_table(orders, shop / "tables" / "orders.parquet")
    pq.write_table(products, shop / "tables" / "products.parquet")
    for name, items in (("parts", None), ("tables", "products.parquet")):
        assert main(["prepare", "--data", name, "--out", f"set-{name}"]) == 0
        manifest = json.loads((shop / f"set-{name}" / "manifest.json").read_text())
        assert (manifest["config"]["data"]["items"] or {}).get("path") == items
        assert sum(manifest["counts"]["read"].values()) >= 600


def test_a_yelp_folder_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--users", "60", "--businesses", "50", "--events", "900", "--out", str(tmp_path / "town")]) == 0
    for command in (["prepare", "--out", str(tmp_path / "set"), "--data"], ["inspect"]):
        assert main([*command, str(tmp_path / "town")]) == 0
        assert "Guessed" not in capsys.readouterr().err
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["config"]["data"]["source"] == "yelp"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "No file or folder"),
        (lambda folder: folder.mkdir(), "0 files of tables"),
        (lambda folder: (folder.mkdir(), (folder / "manifest.json").write_text("{}")), "already prepared"),
    ],
)
def test_what_is_no_raw_data_is_refused(make: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "raw")  # type: ignore[operator]
    for command in (
        ["inspect", str(tmp_path / "raw")],
        ["prepare", "--data", str(tmp_path / "raw"), "--out", str(tmp_path / "set")],
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("shop")
def test_run_trains_a_model_from_files_alone(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["training.max_steps=4", "training.recipe=fixed", "evaluation.baselines=[popular]", "prepare.text_dim=4"]
    settings = [word for setting in tiny for word in ("--set", setting)]
    assert main(["run", "--data", "orders.csv", "--data", "products.csv", *settings, "--out", "run"]) == 0
    out, err = capsys.readouterr()
    assert "Report: run/report.html" in out and "Guessed: orders.csv is interactions" in err
    assert main(["recommend", "run/bundle", "--history", "P001,P002", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["name"].startswith("Tea ")
