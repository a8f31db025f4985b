"""The pages and the configurations keep their word: links lead somewhere, recipes name real registries, every YAML loads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from pydantic import BaseModel

from twotower.cli import app
from twotower.utils.config import Config, load_config, parse_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
LIVING = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md", "results.md")]  # history, and a generated page
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
    """Return True if `values` contains every value of `part` at the same key."""
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


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


COMMANDS = sorted(
    {
        found[1]
        for page in LIVING
        for block in blocks(page, "bash")
        for line in re.sub(r"\\\n\s*", " ", block).splitlines()
        if (found := re.match(r"(?:\w+=\S+ |torchrun .*-m )*twotower (.+?)(?: +#.*| &)?$", line.strip())) and "…" not in line
    }
)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_of_a_page_is_understood(words: str) -> None:
    name, *arguments = shlex.split(words)
    with click.Context(app) as parent:
        app.commands[name].make_context(name, arguments, parent=parent)  # raises on an option that does not exist


@pytest.mark.parametrize("page", LIVING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_yaml_and_python_of_a_page_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        parse_config(yaml.safe_load(block))
    for block in blocks(page, "python"):
        if "-> " not in block or "return" in block:  # signatures alone are no program
            compile(block, str(page), "exec")


@pytest.mark.parametrize("page", LIVING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_setting_of_a_page_exists(page: Path) -> None:
    for name in re.findall(
        r"\b(?:data|prepare|model|training|evaluation|updating)\.[a-z_]+[a-z_.]*[a-z_]",
        "\n".join(re.findall(r"`[^`\n]+`", page.read_text())),
    ):
        if name.endswith((".md", ".py", ".html", ".yaml", ".sh")):
            continue
        section: Any = Config
        for part in name.split("."):
            if not (isinstance(section, type) and issubclass(section, BaseModel)):
                break
            assert part in section.model_fields, f"{page.name} names {name}, which is no setting"
            annotation = section.model_fields[part].annotation
            models = [
                a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            section = models[0] if models else None


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
    computed = ("memory_budget_gb", "precision")
    assert given.model == Config().model
    assert given.training.model_copy(update={name: getattr(Config().training, name) for name in computed}) == Config().training
