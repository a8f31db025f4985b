"""Describe every setting (dotted name, type, default, range, text) for the reference page and for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from twotower.utils.config import Config
from twotower.utils.registry import Names

TYPES: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Path: "path",
    date: "date",
    NoneType: "null",
    Any: "any value",
}
UNITS = {
    "s": "seconds",
    "days": "days",
    "km": "kilometres",
    "gb": "GB",
    "bytes": "bytes",
    "chars": "characters",
    "frac": "fraction",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes
    ----------
    name
        Dotted path in the YAML file; "[]" stands for an entry of a list, "NAME" for a key of a mapping.
    kind
        Type in words, or the allowed values.
    default
        Default as YAML; None if a value is required.
    bounds
        Allowed range in words; empty if there is none.
    unit
        Unit given by the suffix of the name (`_s`, `_days`, …); empty if there is none.
    text
        Description of the setting.
    """

    name: str
    kind: str
    default: str | None
    bounds: str
    unit: str
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the settings: its dotted name ("" for the top level), its description and its own settings."""

    name: str
    text: str
    settings: list[Setting]


def sections(model: type[BaseModel] = Config, name: str = "") -> list[Section]:
    """Return a section and all sections inside it, in the order of the YAML file.

    Examples
    --------
    >>> [section.name for section in sections()][:3]
    ['', 'data', 'data.interactions']
    """
    own: list[Setting] = []
    inner: list[Section] = []
    for key, field in model.model_fields.items():
        path = f"{name}.{field.alias or key}".lstrip(".")
        nested = list(_nested(field.annotation, path))
        if not nested or _kind(field.annotation) != "section":
            own.append(_setting(path, field))
        for other, inner_path in nested:
            inner += sections(other, inner_path)
    return [Section(name, _paragraph(model.__doc__), own), *inner]


def settings_yaml(config: Config) -> str:
    """Return all settings as YAML that `load_config` reads back to the same settings; a password is left out."""
    values = {**config.model_dump(mode="json"), "serving": config.serving.model_dump(mode="json")}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of a settings file. Editors complete and check YAML with it."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Settings of twotower"}


def _setting(path: str, field: FieldInfo) -> Setting:
    default = None if field.is_required() else _as_yaml(field.get_default(call_default_factory=True))
    unit = next((UNITS[word] for word in path.rpartition("_")[2:] if word in UNITS), "")
    kind = _kind(Annotated[(field.annotation, *field.metadata)]) if _names(field.metadata) else _kind(field.annotation)
    return Setting(path, kind, default, _bounds(field.metadata), unit, _paragraph(field.description))


def _nested(annotation: Any, path: str) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the sections inside a type, with their dotted names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, path
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (list, dict):
        yield from _nested(parts[-1], f"{path}[]" if origin is list else f"{path}.NAME")
    elif origin in (Union, UnionType, Annotated):
        for part in parts:
            yield from _nested(part, path)


def _kind(annotation: Any) -> str:
    """Return a type in words: "integer or null", "list of text"; allowed values as JSON."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if names := _names(parts[1:]):
            return " or ".join([*map(json.dumps, names), "a registered name"])
        bounds = _bounds(parts[1:])
        return _kind(parts[0]) + (f" ({bounds})" if bounds else "")
    if origin is Literal:
        return " or ".join(json.dumps(part) for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(_kind(part) for part in parts)
    if origin in (list, tuple):
        return f"list of {_kind(parts[0])}".replace("section", "sections")
    if origin is dict:
        return f"mapping from {_kind(parts[0])} to {_kind(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _names(metadata: Sequence[Any]) -> list[str]:
    """Return what the built-in names of a registry are written as; empty for a setting of another kind."""
    return next((mark.examples() for mark in metadata if isinstance(mark, Names)), [])


def _bounds(metadata: Sequence[Any]) -> str:
    """Return the range that pydantic constraints (bare or inside `Field`) allow, in words."""
    limits: dict[str, Any] = {}
    for one in [inner for outer in metadata for inner in getattr(outer, "metadata", [outer])]:
        limits |= {name: getattr(one, name) for name in ("ge", "gt", "le", "lt", "min_length", "max_length") if hasattr(one, name)}
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    if "ge" in limits and "le" in limits:
        return f"{limits['ge']} to {limits['le']}"
    shown = [f"{word} {limits[name]}" for name, word in words.items() if limits.get(name) is not None]
    return ", ".join(shown) or ("not empty" if limits.get("min_length") else "")


def _as_yaml(value: Any) -> str:
    """Return a default on one line, as it would stand in a YAML file."""
    plain = str(value) if isinstance(value, Path | date) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())
