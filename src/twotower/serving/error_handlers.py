"""Turn the errors of routes into responses with the standard error body."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from twotower.errors import BusyError, TwoTowerError
from twotower.serving.bodies import BodyError
from twotower.serving.refusals import error_body

CODES = {400: "malformed", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}

PLAIN = {  # for the words of the framework
    "Not Found": "There is no such route. See /docs for all routes.",
    "Method Not Allowed": "This route does not take this method. The header Allow names those that it takes.",
}


def handle_errors(app: FastAPI) -> None:
    """Make an application answer errors as JSON."""
    app.add_exception_handler(RequestValidationError, _bad_parameter)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(BodyError, _invalid)
    app.add_exception_handler(TwoTowerError, _invalid)


def _error(request: Request, status: int, code: str, message: str, location: Any = None, headers: Any = None) -> Response:
    request.state.code = code
    body = error_body(code, message, request.state.request_id, location)
    return Response(body, status, headers, media_type="application/json")


async def _bad_parameter(request: Request, error: Any) -> Response:
    """Answer a wrong parameter of the query or of the path."""
    first = error.errors()[0]
    location = ".".join(map(str, first["loc"][1:])) or None
    return _error(
        request, 422, "malformed", f"Invalid request: {location or first['loc'][0]}: {first['msg']}. See /docs.", location
    )


async def _refused(request: Request, error: Any) -> Response:
    code, text = CODES.get(error.status_code, "refused"), PLAIN.get(str(error.detail), str(error.detail))
    return _error(request, error.status_code, code, text, headers=error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    return error_response(request, error)


def error_response(request: Request, error: Exception) -> Response:
    """Return the response to a request that cannot be answered."""
    if isinstance(error, BodyError):
        return _error(request, error.status, error.code, str(error), error.location)
    if isinstance(error, BusyError):
        return _error(request, 503, "busy", str(error), headers={"Retry-After": "1"})
    return _error(request, 422, "invalid", str(error), getattr(error, "location", None) or None)
