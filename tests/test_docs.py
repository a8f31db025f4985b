"""The pages and the configurations keep their word: links lead somewhere, recipes name real registries, every YAML loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from twotower.utils.config import Config, load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

SEED_YAML = """
model:
  user_tower:
    embedding_dim: 64
    hidden_dims: [256, 128]
    num_heads: 4
    dropout: 0.1
  item_tower:
    embedding_dim: 64
    hidden_dims: [256, 128]
    dropout: 0.1
training:
  batch_size: 512
  learning_rate: 0.001
  num_epochs: 30
"""


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def holds(values: dict[str, Any], part: dict[str, Any]) -> bool:
    """Whether every value of `part` stands in `values` at the same place."""
    return all(holds(values[key], value) if isinstance(value, dict) else values[key] == value for key, value in part.items())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        assert not fragment or fragment in anchors(target), f"{page.name} links to {link}: no such heading"


def test_every_recipe_names_a_registry_that_is_there() -> None:
    recipes = re.findall(r"^\| .+? \| .+? \| `([A-Z]+)` in `(.+?)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(recipes) >= 6
    for registry, path in recipes:
        assert re.search(rf"^{registry}\b.*=", (ROOT / path).read_text(), re.M), f"{path} holds no {registry}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_differs_from_the_defaults(path: Path) -> None:
    assert load_config(path) != Config()


def test_the_configuration_the_project_began_with_loads_unchanged(tmp_path: Path) -> None:
    (tmp_path / "seed.yaml").write_text(SEED_YAML)
    assert holds(load_config(tmp_path / "seed.yaml").model_dump(), yaml.safe_load(SEED_YAML))
    assert SEED_YAML in (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "how-to").glob("*.md")), ids=lambda page: page.stem)
def test_a_task_page_is_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_has_the_one_recipe(path: Path) -> None:
    given = load_config(path)
    computed = ("gradient_checkpointing", "precision")
    assert given.model == Config().model
    assert given.training.model_copy(update={name: getattr(Config().training, name) for name in computed}) == Config().training
