"""Route requests with a JSON body straight to their functions.

FastAPI documents these routes, and does not run them: finding the route, its dependencies and the error handlers costs it as much
time as a small answer. All other routes are FastAPI's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from twotower.errors import TwoTowerError
from twotower.serving.bodies import BodyError, described, parse
from twotower.serving.error_handlers import error_response

BEARER = HTTPBearer(auto_error=False, description="An API key. Reading needs none if the server was started with --public.")
Handler = Callable[..., Awaitable[bytes]]
Post = Callable[..., Callable[[Handler], Handler]]
"""Makes the decorator of a route."""


@dataclass(frozen=True, slots=True)
class Route:
    """A route with a JSON body. `path` is what log lines and metrics say."""

    path: str
    model: type[BaseModel]
    optional: bool
    answer: Callable[..., Awaitable[bytes]]


class JsonRoutes:
    """ASGI middleware that answers `POST` requests for its routes, and passes all others on."""

    def __init__(self, app: ASGIApp, routes: dict[str, Route]) -> None:
        self.app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        route = self._routes.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        try:
            body = await _body(scope, receive)
            parsed = None if route.optional and not body.strip() else parse(route.model, body)
            answer = await route.answer(parsed, scope["state"])
        except (BodyError, TwoTowerError) as error:
            await error_response(Request(scope), error)(scope, receive, send)
            return
        headers = [(b"content-length", b"%d" % len(answer)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


async def _body(scope: Scope, receive: Receive) -> bytes:
    """Return the body of a request."""
    encoding = next((value for name, value in scope["headers"] if name == b"content-encoding"), b"identity").lower()
    if encoding != b"identity":
        text = f"The encoding {encoding.decode('latin-1')[:40]!r} of the body is not supported. Send it without compression."
        raise BodyError(text, status=415, code="encoding")
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BodyError("The connection was closed before the end of the body. Send the request again.", status=400)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def documented(app: FastAPI, routes: dict[str, Route], refusals: dict[int | str, dict[str, Any]]) -> Post:
    """Return a function that makes decorators of routes: they add a function to `routes`, and its description to the application.

    A function takes the body (None if it is optional and missing) and the state of the request, and returns JSON.
    """

    def post(
        path: str, taken: type[BaseModel], given: type[BaseModel], tag: str, *, optional: bool = False
    ) -> Callable[[Handler], Handler]:
        def add(answer: Handler) -> Handler:
            routes[path] = Route(path, taken, optional, answer)

            async def stands_for() -> None:
                raise AssertionError("JsonRoutes answers this")

            stands_for.__name__, stands_for.__doc__ = answer.__name__, answer.__doc__
            extra = described(taken, optional=optional)
            app.post(
                path, response_model=given, responses=refusals, dependencies=[Depends(BEARER)], tags=[tag], openapi_extra=extra
            )(stands_for)
            return answer

        return add

    return post
