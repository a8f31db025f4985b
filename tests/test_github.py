"""The files of `.github`: they fit the published schemas, and they name targets, Pythons and files that exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "dependabot": [GITHUB / "dependabot.yml"],
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "github-issue-forms": sorted((GITHUB / "ISSUE_TEMPLATE").glob("*_*.yml")),
    "citation-file-format": [ROOT / "CITATION.cff"],
    "compose-spec": [ROOT / "compose.yaml"],
}


def jobs(workflow: Path) -> dict[str, Any]:
    """Return the jobs of a workflow."""
    found: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_fit_their_published_schema(schema: str) -> None:
    assert SCHEMAS[schema]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, SCHEMAS[schema])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_job_runs_something_that_exists(workflow: Path) -> None:
    targets = [*re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)]
    for name, job in jobs(workflow).items():
        assert set(job.get("needs", "").split()) <= jobs(workflow).keys()
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
            continue
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), f"{workflow.name}: {name}"
            assert "@" in step.get("uses", "@"), "an action has a version"
            assert set(re.findall(r"\bmake ([a-z]+)", step.get("run", ""))) <= set(targets)


def test_the_matrix_has_every_python_that_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert jobs(GITHUB / "workflows" / "ci.yml")["check"]["strategy"]["matrix"]["python"] == declared
    assert project["requires-python"] == f">={declared[0]}"
