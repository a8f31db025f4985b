"""Test what a run says whose dataset was moved away, and that its advice works."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.cli import main
from twotower.data.dataset import Dataset
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event

from .conftest import content

USER = "C0007"


@pytest.fixture
def moved(shop_run: Path) -> tuple[Path, Path, Path]:
    """Return a run, the path of its dataset as `twotower train --data` notes it, and the path to which the dataset was moved."""
    before, after = shop_run.parent / "D", shop_run.parent / "E"
    (shop_run / "dataset").rename(after)
    file = shop_run / "model" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dataset": str(before)}))
    return shop_run, before, after


def users_of(folder: Path) -> list[str]:
    return [str(user) for user in Dataset.open(folder).users["user_id"].to_pylist()]


@pytest.mark.parametrize("command", ["evaluate", "update", "export", "forget"])
def test_a_dataset_that_is_not_there_any_more_is_one_sentence(
    moved: tuple[Path, Path, Path], tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before, _ = moved
    options = {
        "evaluate": [],
        "update": ["--data", str(tmp_path / "new")],
        "export": ["--out", str(tmp_path / "again")],
        "forget": ["--user", USER],
    }
    assert main([command, str(run), *options[command]]) == 2
    said = capsys.readouterr().err.strip()
    assert said == (
        f"twotower: error: The run {run} was trained on the dataset {before}, which is not there any more. Move it back, or link "
        f"its old path to its new one: `ln -s /NEW/PATH {before}`. To forget users in its bundle meanwhile, run "
        f"`twotower forget {run}/bundle --user ID`."
    )


def test_the_bundle_forgets_alone_and_a_link_brings_the_dataset_back(moved: tuple[Path, Path, Path]) -> None:
    run, before, after = moved
    assert main(["forget", str(run / "bundle"), "--user", USER]) == 0
    assert USER not in users_of(run / "bundle" / "dataset") and USER in users_of(after)
    before.symlink_to(after)
    assert main(["forget", str(run), "--user", USER]) == 0
    assert USER not in users_of(after)
    assert main(["evaluate", str(run)]) == 0


def test_a_run_without_a_bundle_and_a_lost_dataset_of_its_own(
    moved: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, *_ = moved
    (run / "bundle").rename(run / "kept")
    (run / "model" / "manifest.json").write_text((run / "model" / "manifest.json").read_text().replace(str(moved[1]), "../dataset"))
    (run / "dataset").mkdir()
    assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"was trained on the dataset {run / 'dataset'}, which is not there any more" in said and "twotower forget" not in said


def lose_the_dataset(run: Path) -> None:
    (run / "dataset").rename(run / "moved")


def damage(name: str) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        (run / name).write_bytes(b"damaged")

    return write


def damage_a_kept_version(run: Path) -> None:
    name = "158cb78f084a"
    shutil.copytree(run / "bundle", run / "bundle.versions" / name)
    (run / "bundle.versions" / "history.json").write_text(json.dumps([name]))
    damage(f"bundle.versions/{name}/model.safetensors")(run)


def forbid(run: Path) -> None:
    run.chmod(0o777)
    (run / "model").chmod(0o555)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lose_the_dataset, "which is not there any more"),
        (damage("dataset/manifest.json"), "is not there any more|manifest.json"),
        (damage("model/best.pt"), "best.pt is damaged"),
        (damage("report.json"), "report.json is not a readable report. Delete it, or write it again"),
        (damage("bundle/model.safetensors"), "model.safetensors"),
        (damage_a_kept_version, "model.safetensors"),
        (forbid, "model cannot be written, so nothing was changed"),
    ],
    ids=["no dataset", "dataset", "checkpoint", "report", "bundle", "kept version", "not writable"],
)
def test_what_is_wrong_is_found_before_anything_is_forgotten(
    shop_run: Path,
    harm: Callable[[Path], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"sqlite:{shop_run.parent / 'events.sqlite'}"
    store = open_store(url)
    store.append([Event("1", USER, "b", 100)])
    store.close()
    harm(shop_run)
    if harm is forbid:  # this test may run as root, who may write everywhere
        monkeypatch.setattr("os.access", lambda path, _: bool(os.stat(path).st_mode & 0o200))
    before = content(shop_run)
    assert main(["forget", str(shop_run), "--user", USER, "--events", url]) == 2
    found = capsys.readouterr().err
    assert re.search(said, found) and found.count("\n") == 1
    assert content(shop_run) == before
    store = open_store(url)
    assert store.forget(USER) == 1, "nothing was forgotten"
    store.close()
