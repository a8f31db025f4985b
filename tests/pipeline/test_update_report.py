"""Test that an update keeps the report of the model before, and says where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from twotower.cli import main
from twotower.evaluation.report import read_report

from .conftest import go_on

BEFORE = "report_before_update"


def test_the_report_of_the_model_before_is_kept_and_named(shop_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = read_report(shop_run / "report.json")
    assert old.examples
    assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new")]) == 0
    said = capsys.readouterr().out
    assert (
        f"Report: {shop_run / BEFORE / 'report.html'}, of the model before it was updated. An updated run has no test part" in said
    )
    assert not (shop_run / "report.json").exists() and not (shop_run / "report.html").exists(), "it is not that of the new model"
    assert read_report(shop_run / BEFORE / "report.json") == old.model_copy(update={"examples": []}), "no user is left in it"
    page = (shop_run / BEFORE / "report.html").read_text()
    assert old.verdict.split()[0] in page and not any(f">{one.user}<" in page for one in old.examples)

    assert main(["evaluate", str(shop_run)]) == 2
    refused = capsys.readouterr().err
    assert f"{shop_run / 'model'} was updated" in refused and f"`update` in {shop_run / 'model' / 'manifest.json'}" in refused
    assert json.loads((shop_run / "model" / "manifest.json").read_text())["update"]["number"] == 1


def test_a_report_beside_the_checkpoints_is_kept_also_by_later_updates(shop_run: Path) -> None:
    for name in ("report.json", "report.html"):
        (shop_run / name).rename(shop_run / "model" / name)  # as `twotower evaluate RUN/model` writes it
    go_on(shop_run)
    kept = (shop_run / BEFORE / "report.html").read_bytes()
    orders = shop_run.parent / "new" / "orders.csv"
    orders.write_text("".join(line.replace("2024", "2025") for line in orders.read_text().splitlines(keepends=True)))
    assert go_on(shop_run).number == 2
    assert (shop_run / BEFORE / "report.html").read_bytes() == kept


def test_a_report_that_cannot_be_read_does_not_stop_an_update(shop_run: Path) -> None:
    (shop_run / "report.json").write_text("{")
    assert go_on(shop_run).number == 1
    assert not (shop_run / BEFORE).exists()


def test_another_folder_gets_no_report_of_another_model(shop_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new"), "--out", str(tmp_path / "next")]) == 0
    assert "Report:" not in capsys.readouterr().out and not (tmp_path / "next" / BEFORE).exists()
    assert (shop_run / "report.json").is_file()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["run", "train"])
def test_nothing_of_an_updated_run_is_left_beside_a_new_one(shop_run: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = written_settings(shop_run)
    fresh = shop_run.parent / "fresh"
    (shop_run.parent / "D").mkdir()
    shutil.copytree(shop_run / "dataset", shop_run.parent / "D", dirs_exist_ok=True)
    of_kind = {"run": [], "train": ["--data", str(shop_run.parent / "D")]}[kind]
    command = [kind, *of_kind, "--config", str(settings), "--out"]
    assert main([*command, str(fresh)]) == 0
    go_on(shop_run)
    if kind == "run":  # also what `twotower train` left here
        for name in ("manifest.json", "best.pt", "metrics.jsonl", "recipe.json"):
            (shop_run / name).write_text("{}")
        (shop_run / "tensorboard").mkdir()
    (shop_run / "model" / "report.json").write_text("{}")
    (shop_run / "mine.txt").write_text("kept")
    before = names_in(shop_run)
    assert main([*command, str(shop_run)]) == 2
    assert "already contains" in capsys.readouterr().err and names_in(shop_run) == before
    assert main([*command, str(shop_run), "--overwrite"]) == 0
    dataset = {"dataset"} if kind == "train" else set()  # --data may be there
    assert names_in(shop_run) == names_in(fresh) | {"mine.txt"} | dataset
    if kind == "run":
        assert names_in(shop_run / "model") == names_in(fresh / "model")
    assert main(["update", str(shop_run), "--data", str(shop_run.parent / "new"), "--set", "updating.max_worse_frac=1"]) == 0


def written_settings(run: Path) -> Path:
    """Write the settings of a run as a file, with its raw data beside it."""
    manifest = json.loads((run / "model" / "manifest.json").read_text())["config"]
    chosen = {name: {**manifest[name]} for name in ("data", "prepare", "model")}
    chosen |= {"training": {"max_steps": 2, "recipe": "fixed"}, "evaluation": {"baselines": [], "bootstrap_resamples": 10}}
    chosen["data"]["path"] = str(run.parent)
    (run.parent / "settings.yaml").write_text(json.dumps(chosen))
    return run.parent / "settings.yaml"
