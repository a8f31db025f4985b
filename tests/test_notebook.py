"""Test the notebook for Kaggle: its stored form, its stop at an error, and complete runs in a real kernel.

The runs are subprocesses, because warnings of the kernel must not fail the tests.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from twotower.pipeline import machine_check
from twotower.utils import hardware

from .kernel import run_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "train_kaggle.ipynb"
FEW = "training.num_epochs=3 training.log_every=2 evaluation.bootstrap_resamples=100 evaluation.tune_baselines=false"
TOWN = '{"users": 300, "businesses": 200, "events": 6000}'


class Ran(NamedTuple):
    """An executed notebook: whether it reached its end, what each cell printed or showed, its figures as PNG, and its error."""

    whole: bool
    printed: dict[str, str]
    figures: list[str]
    error: str


def stored() -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return notebook


def code() -> dict[str, str]:
    """Source of every code cell, by id."""
    return {cell["id"]: "".join(cell["source"]) for cell in stored()["cells"] if cell["cell_type"] == "code"}


def execute(tmp_path: Path, folder: Path, python: Path = Path(sys.executable), **settings: str) -> Ran:
    """Run all cells in `folder` with `python`; `settings` are the notebook's own."""
    cells, stderr = run_notebook(
        NOTEBOOK, tmp_path, folder, python=python, **{f"TWOTOWER_NOTEBOOK_{name}": value for name, value in settings.items()}
    )
    outputs = [(cell["id"], output) for cell in cells for output in cell["outputs"]]
    failed = [(name, output["ename"], output["evalue"]) for name, output in outputs if output["output_type"] == "error"]
    assert bool(failed) == bool(stderr), stderr
    printed = {cell["id"]: "" for cell in cells}
    for name, output in outputs:
        printed[name] += "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
    figures = [output["data"]["image/png"] for _, output in outputs if "image/png" in output.get("data", {})]
    return Ran(not stderr, printed, figures, " ".join(value for _, _, value in failed))


def ranks(table: str) -> list[int]:
    """The column of ranks in a frame that a notebook shows, which begins with index, and for users the user."""
    header, *rows = table.partition("\n\n")[0].splitlines()  # a wide frame goes on below an empty line
    place = header.split().index("rank") + 1
    return [int(row.split()[place]) for row in rows if re.match(r"\d+ ", row)]


def test_it_is_stored_as_kaggle_opens_it_and_without_outputs() -> None:
    notebook = stored()
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kaggle"]["accelerator"] == "nvidiaTeslaT4"
    assert notebook["metadata"]["kaggle"]["isGpuEnabled"] and notebook["metadata"]["kaggle"]["isInternetEnabled"]
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    for cell in notebook["cells"]:
        assert cell["cell_type"] != "code" or (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]


def test_its_cells_are_python_alone() -> None:
    """A `!command` would go on after a failure, and is no Python."""
    for name, source in code().items():
        ast.parse(source, name)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(NOTEBOOK.parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_its_cells_use_what_exists(path: Path, tmp_path: Path) -> None:
    """Also the lines that only a machine with a GPU, or a download, reaches."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    options = ["--config-file=", "--check-untyped-defs", "--ignore-missing-imports", "--follow-imports=silent"]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(ROOT / ".mypy_cache" / "notebooks"), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT / "src")})
    assert done.stdout, done.stderr
    assert not [line for line in done.stdout.splitlines() if line.endswith(("[attr-defined]", "[name-defined]", "[call-arg]"))]


@pytest.mark.parametrize(
    ("names", "card"), [(("Tesla T4", "Tesla T4"), "T4"), (("NVIDIA L4",), "L4"), ((), "T4"), (("P100",), "T4")]
)
def test_the_plan_is_for_the_gpus_at_hand(names: tuple[str, ...], card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"P100": (6, 0)}
    gpus = tuple(hardware.Gpu(name, capability.get(name, (8, 9) if "L4" in name else (7, 5)), 15 * 10**9) for name in names)
    there = hardware.Torch("2.8.0+cu128", "CUDA 12.8", ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90"), gpus)
    monkeypatch.setattr(hardware, "installed", lambda: there)
    asked: dict[str, Any] = {}
    names_there: dict[str, Any] = {
        "PROCESSES": 0,
        "config": None,
        "dataset": None,
        "plan_stage": lambda *_, **given: asked.update(given),
    }
    exec(code()["plan"], names_there)
    assert (asked["device"], asked["processes"]) == (card, max(len(there.usable), 1))


def test_a_failing_program_stops_the_notebook(capfd: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(code()["settings"] + "\n" + code()["run"], names)
    names["sh"](sys.executable, "-c", "print('well')")
    with pytest.raises(subprocess.CalledProcessError):
        names["sh"](sys.executable, "-c", "import sys; sys.exit('ill')")
    said = capfd.readouterr().out.splitlines()
    assert "well" in said and "ill" in said


@pytest.mark.parametrize(
    "file",
    [
        "yelp-dataset/yelp_academic_dataset_business.json",
        "yelp-dataset/yelp_academic_dataset_business.json/yelp_academic_dataset_business.json",
        "yelp-dataset/Yelp JSON/yelp_academic_dataset_business.json",
        "datasets/yelp-dataset/yelp-dataset/yelp_academic_dataset_business.json",
    ],
)
def test_mounted_files_are_found(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "input" / file).parent.mkdir(parents=True)
    (tmp_path / "input" / file).write_text("{}")
    monkeypatch.setattr(machine_check, "KAGGLE", (tmp_path / "input", tmp_path / "input" / "datasets"))
    names: dict[str, Any] = {"Path": Path, "DATA": "", "DATASET": "", "source": ROOT}
    names |= {"OUT": tmp_path / "out", "WORK": tmp_path / "work"}
    exec(code()["data"], names)
    assert names["raw"] in machine_check.KAGGLE
    assert names["file"] == ROOT / "configs" / "kaggle.yaml" and not names["simulated"]


@pytest.mark.slow
def test_the_town_from_installing_to_recommending(tmp_path: Path) -> None:
    """In an environment that has everything but the package, PyTorch included, which pip leaves alone; two processes train."""
    venv.create(tmp_path / "venv", with_pip=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (own / "what_is_there.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ran = execute(
        tmp_path,
        NOTEBOOK.parent,
        tmp_path / "venv" / "bin" / "python",
        OUT=str(tmp_path / "out"),
        WORK=str(tmp_path / "work"),
        TOWN=TOWN,
        SETTINGS=FEW,
        PROCESSES="2",
    )
    assert ran.whole, ran.printed
    assert "pip install" in ran.printed["install"]
    added = {path.name.split("-")[0] for path in own.glob("*.dist-info")} - {"pip", "setuptools"}
    assert added == {"two_tower_rec"}
    assert "2 processes" in ran.printed["train"]
    assert ranks(ran.printed["recommend"]) == list(range(1, 11))
    assert len(ran.figures) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] in ran.printed["evaluate"] and "oracle" in report["systems"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bundle", "report.html", "report.json"}


@pytest.mark.slow
def test_a_session_without_time_is_continued_by_the_next(tmp_path: Path) -> None:
    """The first stops at once, with a model. Its output is mounted read-only beside the wheels, and the second goes on from it."""
    few = f"training.recipe=fixed {FEW}"
    given = {"SOURCE": str(ROOT), "TOWN": TOWN, "SETTINGS": few, "INPUT": str(tmp_path / "input")}
    first = execute(tmp_path, tmp_path, OUT=str(tmp_path / "one"), WORK=str(tmp_path / "work"), MAX_HOURS="1e-9", **given)
    assert first.whole, first.printed
    assert "stopped before its end" in first.printed["train"] and ranks(first.printed["recommend"]) == list(range(1, 11))
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"bundle", "checkpoint", "report.html", "report.json"}
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "one").rename(tmp_path / "input")
    for path in (tmp_path / "input").rglob("*"):
        path.chmod(0o555)
    second = execute(tmp_path, tmp_path, OUT=str(tmp_path / "two"), WORK=str(tmp_path / "work"), **given)
    assert second.whole, second.printed
    rows = [json.loads(line) for line in (tmp_path / "work" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[-1]["step"] > 1, "the steps of the first session are those of the second"
    assert not (tmp_path / "two" / "checkpoint").exists()


@pytest.mark.slow
def test_the_heads_of_the_2022_release(real_data: Path, tmp_path: Path) -> None:
    ran = execute(
        tmp_path,
        tmp_path,
        SOURCE=str(ROOT),
        DATA=str(real_data / "yelp-raw" / "2022"),
        OUT=str(tmp_path / "out"),
        WORK=str(tmp_path / "work"),
        SETTINGS=f"prepare.min_user_events=1 prepare.min_item_events=1 {FEW}",
    )
    assert ran.whole, ran.printed
    assert "kaggle.yaml" in ran.printed["data"]
    assert "1,794" in ran.printed["prepare"] and "processes" not in ran.printed["train"]
    assert ranks(ran.printed["recommend"]) == list(range(1, 11))
    assert len(ran.figures) == 1
    assert (tmp_path / "out" / "bundle" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_mistake_in_the_settings_stops_it(tmp_path: Path) -> None:
    ran = execute(
        tmp_path,
        NOTEBOOK.parent,
        OUT=str(tmp_path / "out"),
        WORK=str(tmp_path / "work"),
        TOWN=TOWN,
        SETTINGS="training.num_epoch=3",
    )
    assert not ran.whole
    assert "Did you mean 'num_epochs'" in ran.error
    assert not ran.printed["train"]
