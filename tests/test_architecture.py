"""The layout of the package: the order of its folders, its size, and the page that describes it."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "twotower"
PAGE = ROOT / "docs" / "architecture.md"

# From bottom to top. A folder imports only what stands before it: in an earlier row, or further left in its own row.
# A name with ".py" is a module at the root of the package.
ORDER = [
    "errors.py schema.py",
    "utils",
    "retriever.py",
    "features",
    "search/filters search",
    "data/simulator data/sources data",
    "models/layers models/towers models",
    "baselines",
    "evaluation",
    "bundle",
    "retrieval",
    "trainers/health trainers trainers/memory",
    "serving",
    "pipeline",
    "api",
    "commands",
    "cli.py __main__.py __init__.py",
]
PLACES = [place for row in ORDER for place in row.split()]
MAX_LOOSE, MAX_FOLDERS = 8, 21
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 50

FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.read_text().strip()]  # an empty `__init__.py` has no imports
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in FILES}


def place_of(module: str) -> str:
    """Return the folder of a module, or the module itself where it stands at the root of the package."""
    return module.rpartition("/")[0] or module


def imports(source: str) -> set[str]:
    """Return the modules of the package that a file imports: at the top, inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute in this package"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    names = {name.removeprefix("twotower.").replace(".", "/") + ".py" for name in found if name.startswith("twotower.")}
    return names & MODULES.keys()


def section(number: int) -> str:
    """Return the text of a numbered section of the page."""
    return re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[number].partition("\n")[2]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_folder_imports_only_folders_below_it(module: str) -> None:
    here = place_of(module)
    assert here in PLACES, f"{here} is not in ORDER: add it there and to docs/architecture.md"
    for other in imports(MODULES[module].read_text()):
        below = place_of(other)
        assert below == here or PLACES.index(below) < PLACES.index(here), f"{module} imports {other}, which is above it"


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter({name: imports(path.read_text()) for name, path in MODULES.items()}).prepare()  # raises on a cycle


def test_the_package_has_few_rooms() -> None:
    folders = {place_of(module) for module in MODULES if "/" in module}
    loose = {module for module in MODULES if "/" not in module}
    assert len(folders) <= MAX_FOLDERS and len(loose) <= MAX_LOOSE
    assert set(PLACES) == folders | loose, "ORDER names what does not exist"


def long_functions(source: str) -> list[str]:
    """Return the functions of a file that have too many lines, docstrings aside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = int(node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= int(node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{node.name}: {lines}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_are_short(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert not long_functions(source)


def test_a_long_function_is_found() -> None:
    def function(lines: int) -> str:
        return 'def f():\n    """Return.\n\n    More.\n    """\n' + "    x = 1\n" * (lines - 1)

    assert long_functions(function(50)) == [] and long_functions(function(51)) == ["f: 51"]


def test_an_import_is_found_wherever_it_stands() -> None:
    assert imports("def f():\n    from twotower.utils import config") == {"utils/config.py"}
    assert imports("if TYPE_CHECKING:\n    from twotower.errors import DataError\nimport twotower.schema") == {
        "errors.py",
        "schema.py",
    }
    assert imports("from twotower.models.towers.head import TowerHead") == {"models/towers/head.py"}


def test_the_page_shows_the_order_of_the_folders() -> None:
    table = section(2).split("\n### ")[0]
    shown = [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    assert [name.rstrip("/") for names in shown for name in names] == PLACES


def test_the_page_names_every_module_once() -> None:
    table = section(2).split("\n### ")[1]
    shown = re.findall(r"^\| `([^`]+)` \| .+ \|$", table, re.M)
    assert sorted(shown) == sorted(MODULES)
    order = [PLACES.index(place_of(module)) for module in shown]
    assert order == sorted(order), "modules stand in the order of the folders"
