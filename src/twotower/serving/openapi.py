"""Complete the OpenAPI document of the application, from which references and clients are made.

The document depends only on the code and on the pinned versions of its libraries. `docs/openapi.json` is a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from twotower import __version__
from twotower.serving import schemas as s
from twotower.serving.bodies import schemas_of
from twotower.serving.event_schemas import EventsIn
from twotower.serving.item_schemas import ItemsIn
from twotower.utils.types import Json

BODIES = (s.RecommendIn, s.BatchIn, EventsIn, ItemsIn, s.ReloadIn)
RETRY_AFTER: Json = {"Retry-After": {"description": "Seconds to wait before the next attempt.", "schema": {"type": "integer"}}}
REQUEST_ID: Json = {
    "X-Request-ID": {"description": "Id of the request, also in the server's log.", "schema": {"type": "string"}},
}
ABOUT: Json = {
    "title": "Two-Tower Rec",
    "summary": "Recommendations from one bundle.",
    "description": (
        "Send JSON. An error has the status 4xx or 5xx and the body `ErrorOut`. After 429 and 503 wait for the seconds of "
        "`Retry-After`, then send the same request again. Events with an `event_id` can be sent again without being counted twice."
    ),
    "version": __version__,
    "license_info": {"name": "MIT", "identifier": "MIT"},
    "openapi_tags": [
        {"name": "recommend", "description": "Lists for users, histories and items."},
        {"name": "items", "description": "The catalogue."},
        {"name": "users", "description": "Users and their histories."},
        {"name": "events", "description": "New events, what came of lists, and exports."},
        {"name": "operation", "description": "Health, metrics, and changes of what is served."},
    ],
}
"""Arguments of `FastAPI` that describe the application."""


def _error(text: str, *, wait: bool = False) -> dict[str, Any]:
    return {"model": s.ErrorOut, "description": text, "headers": REQUEST_ID | (RETRY_AFTER if wait else {})}


FIRST_ERROR = 400  # statuses from here on
Errors = dict[int | str, dict[str, Any]]
BUSY: Errors = {503: _error("The server is overloaded or not ready.", wait=True)}
MISSING: Errors = {404: _error("The id is unknown.")}
REFUSALS: Errors = {
    400: _error("The request cannot be read."),
    401: _error("The API key is missing or wrong."),
    403: _error("The key lacks the role, or the server has no key with it."),
    408: _error("The request took too long."),
    413: _error("The body is too large, or has too many values."),
    415: _error("The body is compressed."),
    422: _error("A value is invalid, or an id is unknown."),
    429: _error("Too many requests from this client.", wait=True),
    500: _error("A bug of the server; its log has the details under the request id."),
    **BUSY,
}


def operation_id(route: APIRoute) -> str:
    """Return the name of a route in generated clients: that of its function."""
    return route.name


def completed(app: FastAPI, made: Callable[[], Json]) -> Callable[[], Json]:
    """Return a function that makes the OpenAPI document of an application.

    It adds the schemas of bodies, which FastAPI does not read itself, and gives each error response once.
    """

    def openapi() -> Json:
        if app.openapi_schema is None:
            document = made()
            components = document["components"]
            components["schemas"] = dict(sorted((components["schemas"] | schemas_of(*BODIES)).items()))
            components["responses"] = dict(sorted(_shared_errors(document).items()))
        assert app.openapi_schema is not None
        return app.openapi_schema

    return openapi


def _shared_errors(document: Json) -> Json:
    """Return the error responses of all routes by name, and put a reference to them into the routes."""
    shared: Json = {}
    for methods in document["paths"].values():
        for operation in methods.values():
            answers = operation["responses"]
            for status in filter(lambda status: int(status) >= FIRST_ERROR, answers):
                name = f"Error{status}"
                assert shared.setdefault(name, answers[status]) == answers[status], f"two texts for {status}"
                answers[status] = {"$ref": f"#/components/responses/{name}"}
    return shared
