"""The package as a stranger gets it: what is declared is what is imported and pinned, and the built wheel works on its own."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BEHIND_ANOTHER = {"tensorboard", "duckdb", "onnx"}  # torch.utils.tensorboard, Ibis and torch.onnx import them
WHEN_ASKED_FOR = {"faiss-cpu"}  # imported by name, with an error of our own
TOOLS = ("dev", "docs")  # extras that the package itself does not import
EXTRAS = {name for key, names in PROJECT["optional-dependencies"].items() if key not in TOOLS for name in names}


def canonical(requirement: str) -> str:
    """The distribution's name in a requirement, in the spelling that compares: "PyYAML>=6" → "pyyaml"."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[\]<>=!~; ]", requirement)[0]).lower()


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    nodes = [node for path in (ROOT / "src").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    roots = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    roots |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    known = packages_distributions()
    imported = {canonical(d) for root in roots - sys.stdlib_module_names - {"twotower"} for d in known.get(root, [root])[:1]}
    assert imported | BEHIND_ANOTHER | WHEN_ASKED_FOR == {canonical(r) for r in {*PROJECT["dependencies"], *EXTRAS}}


def test_every_dependency_has_one_pin_for_this_python() -> None:
    lines = [line.partition(";") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    old = sys.version_info < (3, 11)
    mine = [canonical(name) for name, _, marker in lines if not marker or (marker.strip() == 'python_version < "3.11"') == old]
    assert len(mine) == len(set(mine))
    wanted = [*PROJECT["dependencies"], *(one for key in TOOLS for one in PROJECT["optional-dependencies"][key]), *EXTRAS]
    assert {canonical(r) for r in wanted} <= set(mine)


def test_the_citation_names_the_version() -> None:
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target() -> None:
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony and [line.split()[1] for line in shown.splitlines()] == phony[1].split()


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("two_tower_rec-*-py3-none-any.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    run(tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)

    twotower = tmp_path / "venv/bin/twotower"
    assert "simulate" in run(twotower, "--help")
    assert wheel.name.split("-")[1] in run(twotower, "--version")
    run(twotower, "simulate", "--users", "50", "--businesses", "60", "--events", "500", "--seed", "1", "--out", tmp_path / "town")
    assert {"business", "review", "user"} <= {path.name.split(".")[0].rpartition("_")[2] for path in (tmp_path / "town").iterdir()}
    assert "simulate" in run(tmp_path / "venv/bin/python", "-m", "twotower", "--help")
    tiny = ["data.path=town", "training.max_steps=4", "evaluation.baselines=[popular]", "prepare.text_dim=4"]
    assert "Report:" in run(twotower, "run", "--out", "run", *(part for setting in tiny for part in ("--set", setting)))
    assert (tmp_path / "run" / "report.html").is_file()
    assert len(run(twotower, "recommend", "--bundle", "run/bundle", "--history", "", "--json").splitlines()) == 10
