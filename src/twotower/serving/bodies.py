"""Read JSON bodies so that a hostile one costs no more than a valid one.

The size has been charged before a body arrives. A body with too many values is refused by counting its brackets, commas and
colons, without parsing it. Of a body that is not valid, the first mistake is reported.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from twotower.serving.limits import MAX_JSON_MARKS

MARKS = (b"[", b"{", b",", b":")
MAX_MISTAKES = 200  # more are not listed to find the first
Body = TypeVar("Body", bound=BaseModel)


class BodyError(Exception):
    """A body that cannot be used.

    Attributes
    ----------
    status, code
        HTTP status and code of the error.
    location
        Path to the mistake in the JSON; None: the whole.
    """

    def __init__(self, text: str, *, status: int = 422, code: str = "malformed", location: str | None = None) -> None:
        super().__init__(text)
        self.status, self.code, self.location = status, code, location


def parse(model: type[Body], body: bytes) -> Body:
    """Return a body as `model`.

    Raises
    ------
    BodyError
        It is not valid JSON, has too many values, or does not fit the model.

    Examples
    --------
    >>> class Point(BaseModel):
    ...     x: int
    >>> parse(Point, b'{"x": 3}')
    Point(x=3)
    """
    if sum(map(body.count, MARKS)) > MAX_JSON_MARKS:
        text = (
            f"The body has too many values: at most {MAX_JSON_MARKS:,} brackets, commas and colons are allowed. Send less at once."
        )
        raise BodyError(text, status=413, code="too_large")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _first(error) from None


def _first(error: ValidationError) -> BodyError:
    """Return the first mistake of many."""
    if error.error_count() > MAX_MISTAKES:
        return BodyError(f"Invalid request: it has more than {MAX_MISTAKES} mistakes, such as unknown fields. See /docs.")
    mistakes = error.errors(include_url=False)
    # A filter is text or JSON. If an object was sent, skip the error of the text branch.
    first = next((one for one in mistakes if not (one["type"] == "string_type" and isinstance(one["input"], dict))), mistakes[0])
    if first["type"] == "json_invalid":
        return BodyError(f"The body is not valid JSON: {first['ctx']['error']}.")
    branches = ("constrained-str", "function-after")  # names of the branches of the filter type, not parts of the request
    location = ".".join(str(step)[:80] for step in first["loc"] if not str(step).startswith(branches))[:300]
    return BodyError(f"Invalid request: {location or 'body'}: {first['msg']}. See /docs.", location=location or None)


def described(model: type[BaseModel], *, optional: bool = False) -> dict[str, Any]:
    """Return what OpenAPI says about a body; `schemas_of` has the definitions."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": not optional, "content": {"application/json": {"schema": schema}}}}


def schemas_of(*models: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI schemas of bodies and of all parts of them, by name."""
    _, found = models_json_schema([(model, "validation") for model in models], ref_template="#/components/schemas/{model}")
    return dict(found["$defs"])
