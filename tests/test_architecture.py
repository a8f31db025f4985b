"""The house has floors: a module imports lower floors, or siblings on its own, wherever in the file the import stands."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
FLOORS = [
    "errors schema",
    "config config_data config_model arrays console hardware parallel retriever ragged "
    "metrics intervals encoders catalogue batches state features",
    "losses models.layers.* retrieval.topk retrieval.filters retrieval.filter_language retrieval.filter_tree retrieval.columns "
    "retrieval.recent retrieval.request retrieval.sealed verdict "
    "data.engine data.engine_spark data.raw data.yelp data.yelp_business data.tables data.table_files data.sequences "
    "data.neighbours data.simulate data.town data.town_builder data.town_life data.town_listing data.town_words",
    "environment data.selection data.prepare data.dataset models.towers.* retrieval.index "
    "retrieval.approximate retrieval.index_faiss retrieval.indexes",
    "data.views data.data_loader models.two_tower content factors baselines slices",
    "evaluation checkpoint report models.build retrieval.neural retrieval.towers_onnx retrieval.asked retrieval.dials "
    "retrieval.item_arrays",
    "trainers.* retrieval.shown retrieval.fitting retrieval.new_items retrieval.bundle retrieval.revision retrieval.everyone "
    "retrieval.hub retrieval.dial_curve retrieval.explain retrieval.recommender retrieval.tuning retrieval.tuning_plot",
    "pipeline serving.*",
    "demo refit",
    "cli __main__",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
FILES = [path for path in (SRC / "twotower").rglob("*.py") if path.stem != "__init__"]
MODULES = {".".join(path.relative_to(SRC / "twotower").with_suffix("").parts): path for path in FILES}


def floor(module: str) -> int | None:
    """The floor of a module, by its own name or by its folder's."""
    return FLOOR.get(module, FLOOR.get(module.rpartition(".")[0] + ".*"))


def imports(source: str) -> set[str]:
    """Modules of the package that a file imports: at the top, inside functions, and under TYPE_CHECKING alike."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute in this package"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name.removeprefix("twotower.") for name in found if name.startswith("twotower.")} & MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_lower_floors_and_siblings_only(module: str) -> None:
    here = floor(module)
    assert here is not None, f"{module} has no floor: add it to FLOORS"
    for other in imports(MODULES[module].read_text()):
        below = floor(other)
        sibling = module.rpartition(".")[0] == other.rpartition(".")[0]
        assert below is not None and (below < here or (below == here and sibling)), f"{module} ({here}) imports {other} ({below})"


def test_no_module_imports_itself_by_a_detour() -> None:
    TopologicalSorter({name: imports(path.read_text()) for name, path in MODULES.items()}).prepare()  # raises on a cycle


def test_an_import_is_found_wherever_it_stands() -> None:
    assert imports("def f():\n    from twotower import config") == {"config"}
    assert imports("if TYPE_CHECKING:\n    from twotower.errors import DataError\nimport twotower.schema") == {"errors", "schema"}
