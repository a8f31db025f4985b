"""Write the generated references: settings, commands, Python API, registries and HTTP API, one Markdown page each."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import twotower
from twotower.cli import app
from twotower.serving.api_reference import Route, Value, read_api
from twotower.serving.app import api_document
from twotower.utils.config_serving import variable_of
from twotower.utils.settings_reference import Setting, sections

PYTHON = {
    "Models": ["twotower:Model", "twotower:load", "twotower:describe"],
    "Evaluation": ["twotower:Report", "twotower:compare", "twotower.api.compare:Comparison"],
    "Callbacks and loggers": [f"twotower:{name}" for name in twotower.__all__ if name.endswith(("Callback", "Training", "Logger"))],
    "Registers": [f"twotower:{name}" for name in twotower.__all__ if name.startswith("register_")],
    "Client of a server": ["twotower.client:Client"],
    "Single requests": ["twotower.retrieval.recommender:Recommender", "twotower.retrieval.request:*"],
    "Models and baselines": ["twotower.retriever:*"],
    "Settings": ["twotower.utils.config:load_config", "twotower.utils.config:parse_config"],
    "Errors": ["twotower.errors:*"],
}
"""Documented objects, as module:name; "*" stands for all public classes and functions that the module defines."""
REGISTRIES = {
    "SOURCES": "Readers of raw files (`data.source`).",
    "OBJECTIVES": "How events become training examples.",
    "LOSSES": "Losses (`training.loss`).",
    "TOWERS": "How embedded fields become a vector (`tower` of a tower).",
    "POOLINGS": "How a history becomes one vector (`model.user_tower.pooling`).",
    "INTERACTIONS": "How the features of a tower are combined.",
    "METRICS": "Metrics of an evaluation.",
    "BASELINES": "Systems that a model is compared with (`evaluation.baselines`).",
    "INDEXES": "Search indexes (`twotower tune-index --kinds`).",
}


def write_references(folder: Path) -> None:
    """Write all reference pages into a folder."""
    folder.mkdir(parents=True)
    pages = {
        "settings": settings_page(),
        "commands": commands_page(),
        "python": python_page(),
        "registries": registries_page(),
        "http": http_page(),
    }
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def settings_page() -> str:
    """Return the page of all settings."""
    parts = [
        "---\ntocdepth: 2\n---",
        "# Settings",
        "Write settings into a YAML file and pass it with `--config`. Override single settings with `--set name=value`. Settings "
        "that you leave out have the defaults below, and an unknown name is an error.",
        "- `twotower config --show` prints the effective settings, after `--config`, environment and `--set`.\n"
        "- The settings of `serving` can also come from environment variables, named there. The command line comes before the "
        "environment, the environment before the file.\n"
        "- `twotower config --schema > settings.schema.json` writes a JSON schema. Editors complete and check settings with it: "
        "put `# yaml-language-server: $schema=settings.schema.json` into the first line of the YAML file.\n"
        "- `twotower config --schema report` prints the schema of `report.json`; `dataset`, `run` and `bundle` those of manifests.",
    ]
    for section in sections():
        parts += [f"## `{section.name}`" if section.name else "## Top level", plain(section.text)]
        parts += [part for setting in section.settings for part in _setting(setting)]
    return "\n\n".join(parts)


def _setting(setting: Setting) -> Iterable[str]:
    facts = [re.sub(r'("[^"]+")', r"`\1`", setting.kind)]
    facts += [setting.unit] if setting.unit else []
    facts += [setting.bounds] if setting.bounds else []
    facts += ["required" if setting.default is None else f"default `{setting.default}`"]
    section, _, name = setting.name.partition(".")
    facts += [f"`{variable_of(name)}`"] if section == "serving" else []
    return f"### `{setting.name}`", f"[{' · '.join(facts)}]{{.meta-line}}", plain(setting.text)


def commands_page() -> str:
    """Return the page of all commands and their options."""
    parts = [
        "---\ntocdepth: 2\n---",
        "# Commands",
        "`twotower COMMAND --help` prints the same. Options of the program come before the command.",
    ]
    for context in _contexts(app, click.Context(app, info_name="twotower")):
        parts += [f"## `{context.command_path}`", *_command(context.command, context)]
    return "\n\n".join(parts)


def _contexts(command: click.Command, context: click.Context) -> Iterable[click.Context]:
    """Yield the contexts of a command and of all commands below it, in the order of the help."""
    yield context
    for name in command.list_commands(context) if isinstance(command, click.Group) else []:
        below = command.get_command(context, name)
        if below is not None and not below.hidden:
            yield from _contexts(below, click.Context(below, info_name=name, parent=context))


def _command(command: click.Command, context: click.Context) -> Iterable[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{context.command_path} {usage}\n```"
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "").replace("\f", "")):
        unwrapped = paragraph.startswith("\b")  # click's mark of lines that stay as they are: examples
        yield f"```text\n{paragraph[1:].strip()}\n```" if unwrapped else plain(" ".join(paragraph.split()))
    records = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
    yield table(("Option", "Description"), [(f"`{names}`", plain(text)) for names, text in records if text])


def python_page() -> str:
    """Return the page of the public Python API; Sphinx fills it from the docstrings."""
    parts = [
        "---\ntocdepth: 2\n---",
        "# Python API",
        "The objects below are public. Their names change only with a note in the changelog.",
    ]
    seen: set[int] = set()
    for title, names in PYTHON.items():
        parts.append(f"## {title}")
        for module, name in (entry.split(":") for entry in names):
            for found in public_names(module) if name == "*" else [name]:
                target = getattr(importlib.import_module(module), found)
                if id(target) not in seen and callable(target):
                    kind = "function" if inspect.isroutine(target) else "class"
                    parts.append(f"```{{eval-rst}}\n.. auto{kind}:: {module}.{found}\n```")
                seen.add(id(target))
    return "\n\n".join(parts)


def public_names(module: str) -> list[str]:
    """Return what a module exports: its `__all__`, or the public classes and functions that it defines."""
    loaded = importlib.import_module(module)
    own = [name for name, value in vars(loaded).items() if getattr(value, "__module__", None) == module and callable(value)]
    return list(getattr(loaded, "__all__", [name for name in own if not name.startswith("_")]))


def registries_page() -> str:
    """Return the page of all registries and their entries."""
    parts = [
        "# Registries",
        "A registry maps the names that settings use to functions and classes. "
        "[Contributing](../contributing.md) says how to add an entry.",
    ]
    for registry, text in REGISTRIES.items():
        module = module_of(registry)
        entries: Mapping[str, Any] = getattr(importlib.import_module(module), registry)
        rows = [(f"`{name}`", f"`{_name(entry)}`", plain(_first_line(entry))) for name, entry in entries.items()]
        parts += [f"## `{registry}`", f"{text} In `{module}`.", table(("Name", "Object", "What it is"), rows)]
    return "\n\n".join(parts)


def module_of(registry: str) -> str:
    """Return the module that assigns a name at its top level."""
    package = Path(str(twotower.__file__)).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            if any(isinstance(target, ast.Name) and target.id == registry for target in targets):
                return ".".join(("twotower", *path.relative_to(package).with_suffix("").parts))
    raise LookupError(f"No module of the package defines {registry}. Correct REGISTRIES in {__file__}.")


def _name(entry: Any) -> str:
    return str(getattr(entry, "__name__", type(entry).__name__))


def _first_line(entry: Any) -> str:
    return (inspect.getdoc(entry) or "").partition("\n\n")[0].replace("\n", " ")


def http_page() -> str:
    """Return the page of the HTTP API, read from the OpenAPI document of the server."""
    api = read_api(api_document())
    parts = [
        "---\ntocdepth: 3\n---",
        "# HTTP API",
        "`twotower serve` answers these routes. Requests and answers are JSON. A running server shows the same reference at "
        "`/docs` and as an OpenAPI document at `/openapi.json`; neither loads anything from the internet.",
    ]
    for tag, routes in api.by_tag.items():
        parts.append(f"## {tag.capitalize()}")
        parts += [part for route in routes for part in _route(route)]
    parts.append("## Objects")
    for name, (text, fields) in api.objects.items():
        parts += [f"(object-{name.lower()})=\n### {name}", plain(text)]
        parts += [_values(fields)] if fields else []
    return "\n\n".join(parts)


def _route(route: Route) -> Iterable[str]:
    yield f"### {route.method} `{route.path}`"
    yield plain(route.text) + (" **Needs the key**: `Authorization: Bearer KEY`." if route.needs_key else "")
    if route.parameters:
        yield _values(route.parameters, in_path=True)
    for word, name, example in (("Request", route.body, route.sent), ("Answer", route.answer, route.answered)):
        if name:
            yield f"{word}: [{name}](#object-{name.lower()})"
            yield f"```json\n{example}\n```"
    if route.failures:
        yield table(("Status", "Error"), [(f"`{status}`", plain(text)) for status, text in route.failures])


def _values(values: Sequence[Value], *, in_path: bool = False) -> str:
    rows = []
    for value in values:
        kind = " ".join(f"[{word}](#object-{word.lower()})" if word in value.objects else word for word in value.kind.split())
        notes = [value.text, f"Range: {value.bounds}." if value.bounds else "", "Required." if value.required else ""]
        notes += [
            f"In the {value.location}." if in_path else "",
            f"Default: `{value.default}`." if value.default is not None else "",
        ]
        rows.append((f"`{value.name}`", kind, plain(" ".join(note for note in notes if note))))
    return table(("Name", "Type", "Description"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)


def plain(text: str) -> str:
    """Return text in which only backticks mark something: what Markdown would read as HTML or a link is escaped."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<\[\]*])", r"\\\1", part) for part in parts)
