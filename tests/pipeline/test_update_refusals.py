"""Test updates that end early: nothing is published that does not fit, and a killed update goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from twotower.cli import main
from twotower.pipeline import update as module
from twotower.pipeline.new_data import NewSource, source_of_files
from twotower.pipeline.run_folder import locked, run_manifest
from twotower.pipeline.stages import Watch, run_all
from twotower.pipeline.update import update
from twotower.trainers.callbacks import Callback, Training
from twotower.utils.atomic_files import replace_folder
from twotower.utils.config import parse_config

from .conftest import SETTINGS, base_of, content, copied, go_on, same_weights


def older(root: Path) -> None:
    orders = pd.read_csv(root / "orders.csv")
    orders["ordered_at"] = pd.to_datetime(orders["ordered_at"], format="mixed") - pd.Timedelta(days=400)
    orders.to_csv(root / "new" / "orders.csv", index=False)


def another_schema(root: Path) -> None:
    new = pd.read_csv(root / "new" / "orders.csv")
    new.rename(columns={"ordered_at": "when"}).to_csv(root / "new" / "orders.csv", index=False)


def another_kind_of_file(root: Path) -> None:
    pd.DataFrame({"city": ["a", "b"], "rain": [1, 2]}).to_csv(root / "new" / "weather.csv", index=False)


def another_type(root: Path) -> None:
    items = pd.read_csv(root / "new" / "products.csv")
    items.assign(price="cheap").to_csv(root / "new" / "products.csv", index=False)


def half_the_catalogue(root: Path) -> None:
    pd.read_csv(root / "new" / "products.csv")[:20].to_csv(root / "new" / "products.csv", index=False)


def other_items(root: Path) -> None:
    (root / "new" / "products.csv").unlink()
    new = pd.read_csv(root / "new" / "orders.csv")
    new.assign(product=[f"X{at % 40}" for at in range(len(new))]).to_csv(root / "new" / "orders.csv", index=False)


def from_the_future(root: Path) -> None:
    new = pd.read_csv(root / "new" / "orders.csv")
    new.assign(ordered_at="2090-01-01").to_csv(root / "new" / "orders.csv", index=False)


def nothing_there(root: Path) -> None:
    shutil.rmtree(root / "new")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (older, "is older than the run"),
        (another_schema, "ordered_at"),
        (another_kind_of_file, "another schema"),
        (another_type, "price"),
        (half_the_catalogue, "has 20 of the 55 items"),
        (other_items, "is about other items"),
        (from_the_future, "later than this machine's clock"),
        (nothing_there, "No file or folder"),
    ],
)
def test_wrong_data_get_one_sentence_and_change_nothing(
    shop_run: Path, spoil: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(shop_run.parent)
    before = content(shop_run)
    assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("twotower: error: ") and said in lines[-1]
    assert content(shop_run) == before
    assert not list(shop_run.parent.glob(".*.update"))


def test_a_clock_that_has_gone_back_is_told(
    shop_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_600_000_000.0)  # 2020
    assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new")]) == 2
    assert "it has gone back" in capsys.readouterr().err


def test_a_worse_model_is_not_published(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The towers alone rank here, so that ruined ones are not saved by popularity."""
    data = run_manifest(origin / "run" / "model").config.data.model_dump(mode="json")
    training = {**SETTINGS["training"], "max_steps": 160}
    alone = {**SETTINGS, "data": data, "training": training, "model": {**SETTINGS["model"], "popularity_prior": 0.0}}
    run = tmp_path / "run"
    run_all(parse_config(alone), run)
    before = content(run)
    ruin = ["--set", "updating.learning_rate=1.0", "--set", "updating.replay_frac=0", "--set", "updating.num_epochs=6"]
    assert main(["update", str(run), "--data", str(origin / "new"), *ruin]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "The new model is worse on the newest events" in said and "not published" in said
    assert content(run) == before and not list(tmp_path.glob(".*.update"))
    assert main(["update", str(run), "--data", str(origin / "new")]) == 0


class Stop(Callback):
    """Ends the process's work at a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, training: Training) -> None:
        if training.step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_update_ends_as_the_uninterrupted_one_to_the_bit(shop_run: Path, origin: Path, tmp_path: Path) -> None:
    before = content(shop_run)
    with pytest.raises(KeyboardInterrupt):
        go_on(shop_run, watch=Watch(callbacks=[Stop(2)]))
    assert content(shop_run) == before
    steps = go_on(shop_run).steps
    whole = copied(origin, tmp_path / "whole")
    assert go_on(whole).steps == steps > 2
    assert content(shop_run / "bundle") == content(whole / "bundle")
    assert content(shop_run / "dataset") == content(whole / "dataset")
    assert same_weights(shop_run / "model" / "best.pt", whole / "model" / "best.pt")


def test_one_update_at_a_time(shop_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(shop_run):
        assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new")]) == 2
    assert "Another command is changing" in capsys.readouterr().err
    go_on(shop_run)


@pytest.mark.slow
def test_killed_at_random_moments_the_run_stays_whole_and_the_update_goes_on(origin: Path, tmp_path: Path) -> None:
    script, rows = Path(__file__).parents[2] / "benchmarks" / "update_kills.py", tmp_path / "rows"
    command = [sys.executable, str(script), str(origin / "run"), str(origin / "new"), "--kills", "12", "--results", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    row = json.loads(rows.read_text())
    assert done.returncode == 0 and row["figure"] == 12, done.stderr
    assert row["by_time"] and row["at_changes"] and row["updates"], row


def test_a_kill_between_the_exchange_and_the_end_loses_nothing_of_the_run(shop_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came into the old folder just before the exchange is taken over by the next update."""

    def exchange(fresh: Path, out: Path) -> None:
        (out / "events.sqlite-wal").write_text("acknowledged")
        replace_folder(fresh, out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_folder", exchange)
        with pytest.raises(KeyboardInterrupt):
            go_on(shop_run)
    assert go_on(shop_run) is None, "the new run has the events"
    assert (shop_run / "events.sqlite-wal").read_text() == "acknowledged"
    assert not list(shop_run.parent.glob(".*.update"))


def test_a_source_without_an_identity_is_never_resumed(shop_run: Path) -> None:
    source = replace(source_of_files([shop_run.parent / "new"], base_of(shop_run)), identity=())
    assert isinstance(source, NewSource)
    with pytest.raises(KeyboardInterrupt):
        update(shop_run, source, shop_run, watch=Watch(callbacks=[Stop(2)]))
    assert update(shop_run, source, shop_run).new_items == 5


@pytest.mark.parametrize("part", ["", "model", "dataset"])
def test_a_run_is_not_exchanged_below_the_current_folder(
    shop_run: Path, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, new = content(shop_run), str(shop_run.parent / "new")
    monkeypatch.chdir(shop_run / part)
    given = {"": ".", "model": ".", "dataset": ".."}[part]
    assert main(["update", given, "--data", new]) == 2
    assert "is part of" in capsys.readouterr().err
    assert content(shop_run) == before
    assert main(["update", given, "--data", new, "--out", str(shop_run.parent / "out"), "--set", "updating.max_worse_frac=1"]) == 0
    assert content(shop_run) == before and (shop_run.parent / "out" / "bundle" / "manifest.json").is_file()
