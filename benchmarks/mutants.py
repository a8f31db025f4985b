"""Run mutation tests: change one statement of a module, run its tests, and count the mutants that they kill.

mutmut makes the mutants inside functions. It changes no module constants and no decorated functions, and removes no calls. So
`mutants.yaml` has such mutants, written by hand. That file also lists the tests of each module, and the equivalent mutants with the
reason.

A seeded sample of each module runs in a copy of the working tree. Changes of wording in messages are not mutants. A mutant whose
tests exceed the time limit counts as killed (`timed_out`). Prints the survivors in the format of the file and a table, and appends
a JSON line for each module to benchmarks/results/mutants.jsonl. The exit code is 1 if less than 90 % are killed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from common import RESULTS, ROOT, claim, tell
from mutmut.mutation.file_mutation import mutate_file_contents

PLAN = Path(__file__).with_suffix(".yaml")
REQUIRED = 0.9
PLANTED_TIMEOUT_S = 300
SURVIVED = {0, 33}  # exit codes of mutmut: the tests passed, or no test reaches the function
TIMED_OUT = {-24, 24, 36, 152, 255}
UNSURE = {None, 2, 34, 35}  # not run, interrupted, skipped, suspicious
MUTMUT = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = ["src/twotower/{module}"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["--import-mode=importlib", "-p", "no:cacheprovider"]
use_git_change_detection = false
track_dependencies = false
timeout_multiplier = 5.0
timeout_constant = 20.0
"""


@dataclass(frozen=True)
class Change:
    """A mutant: statements of a module before and after the change."""

    module: str
    old: str
    new: str

    def __str__(self) -> str:
        return yaml.safe_dump([{"module": self.module, "old": self.old, "new": self.new, "why": ""}], sort_keys=False, width=1000)


@dataclass
class Outcome:
    """The mutants of one module, by outcome."""

    killed: list[Change] = field(default_factory=list)
    survived: list[Change] = field(default_factory=list)
    equivalent: list[Change] = field(default_factory=list)
    possible: int = 0
    timed_out: int = 0

    @property
    def share(self) -> float:
        """Return the share of mutants that were killed or are equivalent."""
        total = len(self.killed) + len(self.survived) + len(self.equivalent)
        return 1 - len(self.survived) / max(total, 1)


def main() -> int:
    """Run the mutants of all modules, or of those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="paths below src/twotower, such as utils/losses.py; none: all")
    parser.add_argument("--sample", type=int, default=40, help="mutants of a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--children", type=int, default=1, help="tests that run at the same time")
    parser.add_argument("--results", type=Path, default=RESULTS / "mutants.jsonl")
    arguments = parser.parse_args()
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    equivalent = {Change(each["module"], each["old"], each["new"]) for each in plan["equivalent"]}
    planted = [Change(each["module"], each["old"], each["new"]) for each in plan["planted"]]
    outcomes: dict[str, Outcome] = {}
    for module in arguments.modules or plan["modules"]:
        tests = [f"tests/{name}" for name in plan["modules"][module]]
        with tempfile.TemporaryDirectory() as folder:
            outcome = outcomes[module] = Outcome()
            found = [*_generated(Path(folder), module, tests, arguments, outcome)]
            found += _by_hand(Path(folder), tests, [fault for fault in planted if fault.module == module])
        for change, survived in found:
            where = outcome.killed if not survived else outcome.equivalent if change in equivalent else outcome.survived
            where.append(change)
        for change in outcome.survived:
            print(change, end="", flush=True)
        tell(_row(module, outcome, arguments.seed), arguments.results)
    print(_table(outcomes))
    return int(any(outcome.share < REQUIRED for outcome in outcomes.values()))


def _generated(
    folder: Path, module: str, tests: list[str], arguments: argparse.Namespace, outcome: Outcome
) -> Iterator[tuple[Change, bool]]:
    """Run a sample of mutmut's mutants. Yield each with True if it survived."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8") + MUTMUT.format(module=module, tests=json.dumps(tests))
    (folder / "pyproject.toml").write_text(settings, encoding="utf-8")
    mutants = _mutants(module)
    outcome.possible = len(mutants)
    names = sorted(mutants)
    chosen = sorted(random.Random(f"{arguments.seed} {module}").sample(names, min(arguments.sample, len(names))))
    if not chosen:
        return
    dotted = f"twotower.{module.removesuffix('.py').replace('/', '.')}"
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(arguments.children)]
    command += [f"{dotted}.{name}" for name in chosen]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # mutmut puts its copy first in sys.path
    meta = folder / "mutants" / "src" / "twotower" / f"{module}.meta"
    codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"] if meta.exists() else {}
    missing = [name for name in chosen if codes.get(f"{dotted}.{name}") in UNSURE]
    if missing:
        raise SystemExit(f"{module}: mutmut did not judge {', '.join(missing)}.\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    outcome.timed_out = sum(codes[f"{dotted}.{name}"] in TIMED_OUT for name in chosen)
    for name in chosen:
        yield Change(module, *mutants[name]), codes[f"{dotted}.{name}"] in SURVIVED


def _by_hand(folder: Path, tests: list[str], planted: list[Change]) -> Iterator[tuple[Change, bool]]:
    """Apply the mutants written by hand. Yield each with True if the tests still pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "src"), os.environ.get("PYTHONPATH", "")])}
    for fault in planted:
        path = folder / "src" / "twotower" / fault.module
        source = path.read_text(encoding="utf-8")
        if source.count(fault.old) != 1:
            raise SystemExit(f"{fault.module} has {source.count(fault.old)} times {fault.old!r}, expected once. Correct {PLAN}.")
        path.write_text(source.replace(fault.old, fault.new), encoding="utf-8")
        try:
            ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False, timeout=PLANTED_TIMEOUT_S)
            survived = ran.returncode == 0
        except subprocess.TimeoutExpired:
            survived = False
        path.write_text(source, encoding="utf-8")
        yield fault, survived


def _mutants(module: str) -> dict[str, tuple[str, str]]:
    """Return the statements before and after each of mutmut's changes, by name, except changes of wording."""
    source = (ROOT / "src" / "twotower" / module).read_text(encoding="utf-8")
    generated = mutate_file_contents(module, source)
    functions = {node.name: node for node in ast.walk(ast.parse(generated.code)) if isinstance(node, ast.FunctionDef)}
    found = {}
    for name in generated.mutant_names:
        before, after = functions[f"{name.rpartition('__mutmut_')[0]}__mutmut_orig"], functions[name]
        if _without_wording(before) != _without_wording(after):
            found[name] = _difference(before, after)
    return found


class _Wording(ast.NodeTransformer):
    """Empties strings that contain a space (sentences) and parts of f-strings."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) and " " in node.value else node


def _without_wording(function: ast.FunctionDef) -> str:
    emptied = ast.unparse(_Wording().visit(ast.parse(ast.unparse(function))))
    return emptied.replace(function.name, "", 1)


def _difference(before: ast.FunctionDef, after: ast.FunctionDef) -> tuple[str, str]:
    """Return the lines that differ as the unparser writes them, one line per statement, joined."""
    one, other = (ast.unparse(function).splitlines()[1:] for function in (before, after))
    old, new = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if kind != "equal":
            old += [line.strip() for line in one[a:b]]
            new += [line.strip() for line in other[c:d]]
    if not old and not new:  # a default value
        return ast.unparse(before.args), ast.unparse(after.args)
    return "; ".join(old), "; ".join(new)


def _row(module: str, outcome: Outcome, seed: int) -> dict[str, object]:
    """Return the share of killed mutants as a claim, with counts."""
    counts = {name: len(getattr(outcome, name)) for name in ("killed", "survived", "equivalent")}
    more = {"faults": sum(counts.values()), **counts, "timed_out": outcome.timed_out, "possible": outcome.possible}
    claimed = f"faults in {module} that its tests find, or that change nothing"
    return claim(claimed, 100 * outcome.share, "%", "required", 100 * REQUIRED, seed, **more)


def _table(outcomes: dict[str, Outcome]) -> str:
    lines = ["| module | mutants | killed | survived | equivalent | found |", "|---|--:|--:|--:|--:|--:|"]
    for module, outcome in outcomes.items():
        counts = [len(outcome.killed), len(outcome.survived), len(outcome.equivalent)]
        cells = " | ".join(str(count) for count in [sum(counts), *counts])
        lines.append(f"| `{module}` | {cells} | {outcome.share:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
