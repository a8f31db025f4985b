"""Describe the HTTP routes from the OpenAPI document: as plain values and as an HTML page without scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from twotower.utils.types import Json

METHODS = ("get", "post", "put", "patch", "delete")
FAILURES_FROM = 400
BOUNDS = {
    "minimum": "at least {:,}",
    "exclusiveMinimum": "above {:,}",
    "maximum": "at most {:,}",
    "exclusiveMaximum": "below {:,}",
    "minLength": "at least {:,} characters",
    "maxLength": "at most {:,} characters",
    "minItems": "at least {:,} entries",
    "maxItems": "at most {:,} entries",
}
PLACEHOLDERS: Json = {"string": "text", "integer": 1, "number": 0.5, "boolean": True, "object": {}, "null": None}


@dataclass(frozen=True, slots=True)
class Value:
    """A parameter of a route or a field of an object.

    Attributes
    ----------
    kind
        Type in words; objects have their names in `Api.objects`.
    objects
        Names of the objects in the type.
    location
        "path", "query" or "body".
    """

    name: str
    kind: str
    objects: tuple[str, ...]
    location: str
    required: bool
    default: str | None
    bounds: str
    text: str


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    Attributes
    ----------
    body, answer
        Names of the objects of request and response; None without one.
    sent, answered
        Examples of them as indented JSON; empty without one.
    failures
        Status and description of each error.
    """

    method: str
    path: str
    tag: str
    text: str
    needs_key: bool
    parameters: list[Value]
    body: str | None
    sent: str
    answer: str | None
    answered: str
    failures: list[tuple[str, str]]

    @property
    def anchor(self) -> str:
        """Return the name of the route in links."""
        words = "".join(c if c.isalnum() else " " for c in f"{self.method} {self.path}").split()
        return "-".join(words).lower()


@dataclass(frozen=True, slots=True)
class Api:
    """All routes in document order, and the description and fields of every object that they use."""

    title: str
    summary: str
    routes: list[Route]
    objects: dict[str, tuple[str, list[Value]]]

    @property
    def by_tag(self) -> dict[str, list[Route]]:
        """Return the routes by tag."""
        tags = dict.fromkeys(route.tag for route in self.routes)
        return {tag: [route for route in self.routes if route.tag == tag] for tag in tags}


def read_api(document: Json) -> Api:
    """Read an OpenAPI document.

    Parameters
    ----------
    document
        OpenAPI document of the server, as returned by `/openapi.json`.
    """
    components = document.get("components", {})
    schemas, shared = components.get("schemas", {}), components.get("responses", {})
    routes = [
        _route(method, path, methods[method], schemas, shared)
        for path, methods in document["paths"].items()
        for method in METHODS
        if method in methods
    ]
    unread = [name for route in routes for name in (route.body, route.answer) if name]
    unread += [name for route in routes for value in route.parameters for name in value.objects]
    objects: dict[str, tuple[str, list[Value]]] = {}
    while unread:
        name = unread.pop(0)
        if name not in objects:
            schema = schemas[name]
            objects[name] = (_paragraph(schema.get("description")), list(_fields(schema)))
            unread += [other for value in objects[name][1] for other in value.objects]
    info = document["info"]
    return Api(info["title"], info.get("summary", ""), routes, dict(sorted(objects.items())))


def api_page(document: Json) -> str:
    """Return the routes of an OpenAPI document as an HTML page. It loads one style sheet, `page/api.css`, and no script."""
    template = files("twotower.serving").joinpath("api.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(api=read_api(document))


def _route(method: str, path: str, operation: Json, schemas: Json, shared: Json) -> Route:
    body = _content(operation.get("requestBody", {}))
    answers = {
        status: shared[one["$ref"].rpartition("/")[2]] if "$ref" in one else one for status, one in operation["responses"].items()
    }
    good: Json = next((answer for status, answer in answers.items() if int(status) < FAILURES_FROM), {})
    answer = _content(good)
    names = [next(iter(_objects(schema)), None) for schema in (body, answer)]
    parameters = [
        _value(one["name"], one["schema"] | {"description": one.get("description", "")}, one["in"], one.get("required", False))
        for one in operation.get("parameters", [])
    ]
    return Route(
        method=method.upper(),
        path=path,
        tag=next(iter(operation.get("tags", [])), "other"),
        text=_paragraph(operation.get("description") or operation.get("summary")),
        needs_key=bool(operation.get("security")),
        parameters=parameters,
        body=names[0],
        sent=_as_json(body, schemas),
        answer=names[1],
        answered=_as_json(answer, schemas),
        failures=[(status, one.get("description", "")) for status, one in answers.items() if int(status) >= FAILURES_FROM],
    )


def _content(part: Json) -> Json:
    """Return the JSON schema of a request or response body; empty without one."""
    schema: Json = part.get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _fields(schema: Json) -> Iterator[Value]:
    for name, one in schema.get("properties", {}).items():
        yield _value(name, one, "body", name in schema.get("required", []))


def _value(name: str, schema: Json, location: str, required: bool) -> Value:
    default = json.dumps(schema["default"], ensure_ascii=False) if schema.get("default") is not None else None
    variants = [schema, *schema.get("anyOf", [])]
    limits = {key: one[key] for one in variants for key in BOUNDS if key in one and "prefixItems" not in one}
    bounds = [_bound(key, limit) for key, limit in limits.items()]
    text = next((one["description"] for one in variants if one.get("description")), "")
    objects = tuple(dict.fromkeys(_objects(schema)))
    return Value(name, _kind(schema), objects, location, required, default, ", ".join(bounds), _paragraph(text))


def _bound(key: str, limit: float) -> str:
    if limit == 1 and key in ("minLength", "minItems"):
        return "not empty"
    return BOUNDS[key].format(int(limit) if float(limit).is_integer() else limit)


def _objects(schema: Json) -> Iterator[str]:
    """Yield the names of the objects inside a schema."""
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    items = schema.get("items")
    inner = [*schema.get("anyOf", []), *schema.get("prefixItems", []), *([items] if isinstance(items, dict) else [])]
    extra = schema.get("additionalProperties")
    for one in [*inner, *([extra] if isinstance(extra, dict) else [])]:
        yield from _objects(one)


def _kind(schema: Json) -> str:
    """Return a type in words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(one) for one in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        parts = schema.get("prefixItems") or [schema.get("items") or {}]
        return "list of " + (_kind(parts[0]) if len(parts) == 1 else f"{len(parts)}: " + ", ".join(map(_kind, parts)))
    return str(schema.get("type", "any value"))


def _as_json(schema: Json, schemas: Json) -> str:
    text = json.dumps(_example(schema, schemas), indent=2, ensure_ascii=False) if schema else ""
    return re.sub(
        r"\[\s+([^\[\]{}]*?)\s+\]", lambda short: f"[{' '.join(short[1].split())}]", text
    )  # lists of plain values on one line


def _example(schema: Json, schemas: Json) -> Any:
    """Return the first example of a schema. Missing required fields are filled with examples of their own schemas."""
    if "$ref" in schema:
        return _example(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    found = next(iter(schema.get("examples", [])), schema.get("const", next(iter(schema.get("enum", [])), None)))
    fields = schema.get("properties", {})
    if fields:
        given, needed = found or {}, fields if not set(schema.get("required", [])) <= set(found or {}) else {}
        return {name: given.get(name, _example(one, schemas)) for name, one in fields.items() if name in needed or name in given}
    if found is not None:
        return found
    if "anyOf" in schema:
        return _example(schema["anyOf"][0], schemas)
    if schema.get("type") == "array":
        parts = schema.get("prefixItems") or [schema.get("items") or {}]
        return [_example(one, schemas) for one in parts]
    return PLACEHOLDERS.get(str(schema.get("type")), "text")


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())
