"""Test the package as a new user gets it: declared, imported and pinned packages agree, and the built wheel works alone."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BEHIND_ANOTHER = {"tensorboard", "duckdb", "onnx", "tzdata"}  # torch.utils.tensorboard, Ibis, torch.onnx and zoneinfo import them
WHEN_ASKED_FOR = {"faiss-cpu"}  # imported by name, with an error of our own
TOOLS = ("dev", "docs")  # extras that the package itself does not import
EXTRAS = {
    name
    for key, names in PROJECT["optional-dependencies"].items()
    if key not in TOOLS
    for name in names
    if not name.startswith(PROJECT["name"])
}
TRAIN_ONLY = ("duckdb", "ibis", "implicit", "tensorboard", "sklearn", "scipy", "fastapi")


def canonical(requirement: str) -> str:
    """The distribution's name in a requirement, in the spelling that compares: "PyYAML>=6" → "pyyaml"."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[\]<>=!~; ]", requirement)[0]).lower()


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    nodes = [node for path in (ROOT / "src").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    roots = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    roots |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    known, declared = packages_distributions(), {canonical(r) for r in {*PROJECT["dependencies"], *EXTRAS}}
    imported: set[str] = set()
    for root in roots - sys.stdlib_module_names - {"twotower"}:
        names = {canonical(name) for name in known.get(root, [root])}  # several share a namespace such as google
        imported |= names & declared or names
    assert imported | BEHIND_ANOTHER | WHEN_ASKED_FOR == declared


def test_every_dependency_has_one_pin() -> None:
    mine = [canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(mine) == len(set(mine))
    wanted = [*PROJECT["dependencies"], *(one for key in TOOLS for one in PROJECT["optional-dependencies"][key]), *EXTRAS]
    assert {canonical(r) for r in wanted} - {PROJECT["name"]} <= set(mine)


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    import twotower
    from twotower.cli import main

    assert twotower.__version__ == version(PROJECT["name"])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"twotower {twotower.__version__}\n"
    assert all(hasattr(twotower, name) for name in twotower.__all__)


def test_the_changelog_begins_with_the_version() -> None:
    assert re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] in ("Unreleased", PROJECT["version"])


def test_the_citation_names_the_version() -> None:
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target() -> None:
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony and [line.split()[1] for line in shown.splitlines()] == phony[1].split()


@pytest.mark.slow
def test_the_wheel_answers_alone_and_trains_with_its_extra(town_bundle: Path, tmp_path: Path) -> None:
    def run(*command: str | Path, code: int = 0) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("two_tower_rec-*-py3-none-any.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python, twotower = tmp_path / "venv/bin/python", tmp_path / "venv/bin/twotower"
    install = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")

    run(*install, wheel)
    assert "recommend" in run(twotower, "--help")
    assert wheel.name.split("-")[1] in run(twotower, "--version")
    run(python, "-c", f"import importlib.util as u; assert not any(map(u.find_spec, {TRAIN_ONLY}))")
    assert len(run(twotower, "recommend", town_bundle, "--history", "", "--json").splitlines()) == 10
    run(twotower, "recommend", town_bundle, "--all", "--out", "lists.parquet")
    run(twotower, "doctor")
    assert "movielens-1m" in run(twotower, "datasets") and "ratings.dat" in run(twotower, "datasets", "config", "movielens-1m")
    (tmp_path / "orders.csv").write_text("user,item\na,b\n")
    needed = [
        ("train", ["prepare", "--output-dir", "x"]),
        ("train", ["prepare", "--data", "orders.csv", "--output-dir", "x"]),
        ("train", ["inspect", "orders.csv"]),
        ("serve", ["serve", str(town_bundle)]),
        ("datasets", ["datasets", "get", "movielens-1m"]),
    ]
    for extra, command in needed:
        (said,) = run(twotower, *command, code=2).splitlines()
        assert said.startswith("twotower: error: Not installed: ") and said.endswith(f"pip install 'two-tower-rec[{extra}]'")
    imported = (
        "from twotower.errors import MissingExtraError\ntry: import twotower.trainers\nexcept ImportError as error: print(error)"
    )
    assert "two-tower-rec[train]" in run(python, "-c", imported)

    run(*install, f"{wheel}[train]")
    run(twotower, "simulate", "--users", "50", "--businesses", "60", "--events", "500", "--seed", "1", "--out", tmp_path / "town")
    assert {"business", "review", "user"} <= {path.name.split(".")[0].rpartition("_")[2] for path in (tmp_path / "town").iterdir()}
    assert "simulate" in run(python, "-m", "twotower", "--help")
    tiny = ["data.path=town", "training.max_steps=4", "evaluation.baselines=[popular]", "prepare.text_dim=4"]
    assert "Report:" in run(twotower, "run", "--out", "run", *(part for setting in tiny for part in ("--set", setting)))
    assert (tmp_path / "run" / "report.html").is_file()
    assert len(run(twotower, "recommend", "run/bundle", "--history", "", "--json").splitlines()) == 10


def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from twotower.cli import main
    from twotower.errors import MissingExtraError, TwoTowerError, require

    with pytest.raises(ImportError, match=r"Not installed: no_such_module\. .*pip install 'two-tower-rec\[train\]'"):
        require("train", "json", "no_such_module")
    assert issubclass(MissingExtraError, TwoTowerError)
    for name in [name for name in sys.modules if name.split(".")[:2] == ["twotower", "serving"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert main(["serve", "bundle"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "twotower: error: Not installed: uvloop. This needs the extra 'serve'. Run: pip install 'two-tower-rec[serve]'"


def test_the_address_of_the_repository_stands_in_one_place() -> None:
    """The notebook, which needs it before there is a clone, has the same one."""
    address = PROJECT["urls"]["Repository"]
    notebook = json.loads((ROOT / "notebooks" / "train_kaggle.ipynb").read_text(encoding="utf-8"))
    assert f'REPOSITORY = "{address}.git"' in "".join("".join(cell["source"]) for cell in notebook["cells"])
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "CITATION.cff", *ROOT.glob("src/**/*.py")]
    assert [page for page in pages if address in page.read_text(encoding="utf-8")] == []
