"""Define the HTTP routes. Each route parses the request, calls the service and writes JSON; `/docs` and `/openapi.json` list them.

Read endpoints (recommendations, items, users, health, metrics, the page) need no authentication. Write endpoints (`/v1/events`,
`/admin/reload`) need the API key. Without a configured key, write endpoints are disabled.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic_core import to_json
from starlette.exceptions import HTTPException as StarletteHTTPException

from twotower.errors import BusyError, TwoTowerError
from twotower.schema import UNKNOWN
from twotower.serving import schemas as s
from twotower.serving.api_reference import api_page
from twotower.serving.bounded_executor import Lookups
from twotower.serving.limits import MAX_FILTER_CHARS, MAX_K, is_key
from twotower.serving.middleware import RequestMiddleware, error_body
from twotower.serving.service import Service, unknown
from twotower.utils.console import log

PAGE = Path(__file__).with_name("page")
CODES = {400: "malformed", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": s.ErrorOut, "description": "The request cannot be read."},
    408: {"model": s.ErrorOut, "description": "The request took too long."},
    413: {"model": s.ErrorOut, "description": "The body is too large."},
    422: {"model": s.ErrorOut, "description": "A value is invalid, or an id is unknown."},
    429: {"model": s.ErrorOut, "description": "Too many requests from this client; see Retry-After."},
    503: {"model": s.ErrorOut, "description": "The server is overloaded or not ready; see Retry-After."},
}
CLOSED: dict[int | str, dict[str, Any]] = {
    401: {"model": s.ErrorOut, "description": "The API key is missing or wrong."},
    403: {"model": s.ErrorOut, "description": "The server has no API key: write endpoints are disabled."},
}
MISSING: dict[int | str, dict[str, Any]] = {404: {"model": s.ErrorOut, "description": "The id is unknown."}}
BEARER = HTTPBearer(auto_error=False, description="The API key that the server was started with.")
Limit = Annotated[int, Query(ge=1, le=100, description="Maximum number of results.", examples=[20])]
Searched = Annotated[str, Query(max_length=100, description="Part of the item name or of the user id.", examples=["taco"])]


def create_app(service: Service, key: str | None) -> FastAPI:
    """Return the HTTP application of a service.

    Parameters
    ----------
    key
        API key of the write endpoints. None: they are disabled.
    """
    app = FastAPI(
        title="twotower", summary="Recommendations from one bundle.", docs_url=None, redoc_url=None, lifespan=_life(service)
    )
    app.state.service, app.state.key = service, key
    app.add_middleware(RequestMiddleware, limits=service.limits, meters=service.meters, overloaded=lambda: service.overloaded)
    for kind, handler in ((RequestValidationError, _malformed), (StarletteHTTPException, _refused), (TwoTowerError, _mistaken)):
        app.add_exception_handler(kind, handler)
    _answers(app, service)
    _browsing(app, service)
    _writing(app, service)
    _watching(app, service)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def _answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/recommend", response_model=s.AnswerOut, responses=REFUSALS, tags=["recommend"])
    async def recommend(body: s.RecommendIn, request: Request) -> Response:
        """Return the best items for a user or a history. If neither is known, return the most popular recent items."""
        version, (answer,) = await service.recommend([body])
        return _json({**_heading(request, version), **answer})

    @app.post("/v1/recommend:batch", response_model=s.BatchOut, responses=REFUSALS, tags=["recommend"])
    async def recommend_batch(body: s.BatchIn, request: Request) -> Response:
        """Answer several requests at once, with the same bundle version. One invalid request rejects the whole batch.

        Each request of the batch counts towards the rate limit of the client.
        """
        request.state.asks_for(len(body.requests))
        version, answers = await service.recommend(body.requests, "requests")
        return _json({**_heading(request, version), "answers": answers})

    @app.get("/v1/items/{item_id:path}/similar", response_model=s.SimilarOut, responses=REFUSALS | MISSING, tags=["recommend"])
    async def similar(
        item_id: str,
        k: Annotated[int, Query(ge=1, le=MAX_K, description="Number of items to return.", examples=[10])] = 10,
        filter: Annotated[str | None, Query(max_length=MAX_FILTER_CHARS, examples=["within(5)"])] = None,
    ) -> Response:
        """Return the items most similar to an item."""
        _known(service.current.engine.row(item_id) != UNKNOWN, "item", item_id)
        version, items = await service.similar(item_id, k, filter)
        return _json({"version": version, "items": items})


def _browsing(app: FastAPI, service: Service) -> None:
    look_up = Lookups(service.limits.lookups)

    @app.get("/v1/items", response_model=s.ItemsOut, responses=REFUSALS, tags=["items"])
    async def items(q: Searched = "", limit: Limit = 20) -> Response:
        """Search items by part of their name, ignoring case and accents. Without `q`, return the most popular items."""
        return _json({"items": await look_up(service.current.browser.items, q, limit)})

    @app.get("/v1/items/{item_id:path}", response_model=s.ItemDetailOut, responses=REFUSALS | MISSING, tags=["items"])
    async def item(item_id: str) -> Response:
        """Return one item with all its catalogue columns."""
        current = service.current
        _known(current.engine.row(item_id) != UNKNOWN, "item", item_id)
        return _json(current.browser.item(item_id))

    @app.get("/v1/users", response_model=s.UsersOut, responses=REFUSALS, tags=["users"])
    async def users(q: Searched = "", limit: Limit = 20) -> Response:
        """Search users by part of their id, ordered by number of events."""
        return _json({"users": await look_up(service.current.browser.users, q, limit)})

    @app.get("/v1/users/random", response_model=s.UsersOut, responses=REFUSALS, tags=["users"])
    async def random_user() -> Response:
        """Return a random user with a history."""
        return _json({"users": await look_up(service.current.browser.random_user)})

    @app.get("/v1/users/{user:path}/history", response_model=s.HistoryOut, responses=REFUSALS | MISSING, tags=["users"])
    async def history(user: str) -> Response:
        """Return the history of a user: the events of the bundle and the accepted events."""
        current = service.current
        _known(current.engine.user_row(user) != UNKNOWN or service.journal.of(user), "user", user)
        return _json(await look_up(current.browser.history, user))

    @app.get("/v1/about", response_model=s.AboutOut, responses=REFUSALS, tags=["items"])
    async def about() -> Response:
        """Describe the served bundle and the filters that it supports."""
        return _json(await look_up(service.current.browser.about))


def _writing(app: FastAPI, service: Service) -> None:
    async def holds_key(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        key: str | None = request.app.state.key
        if key is None:
            text = "Write endpoints are disabled: the server has no API key. Set TWOTOWER_API_KEY or use --api-key-file."
            raise HTTPException(403, text)
        if given is None or not is_key(given.credentials, key):
            text = f"The API key is {'missing' if given is None else 'wrong'}. Send the header Authorization: Bearer KEY."
            raise HTTPException(401, text, {"WWW-Authenticate": "Bearer"})

    keyed = [Depends(holds_key)]

    @app.post("/v1/events", response_model=s.EventsOut, responses=REFUSALS | CLOSED, dependencies=keyed, tags=["events"])
    async def events(body: s.EventsIn) -> Response:
        """Store events. When this responds, they are on disk and affect all later responses."""
        accepted, repeated = await service.accept(body.events)
        return _json({"accepted": accepted, "repeated": repeated})

    @app.post("/admin/reload", response_model=s.ReloadOut, responses=REFUSALS | CLOSED, dependencies=keyed, tags=["operation"])
    async def reload(body: s.ReloadIn | None = None) -> Response:
        """Serve another bundle, or read the current folder again. If the bundle is invalid, the current one stays in use."""
        version, before = await service.reload(Path(body.bundle) if body and body.bundle else None)
        return _json({"version": version, "before": before})


def _watching(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", response_model=s.StateOut, tags=["operation"])
    async def live() -> Response:
        """Return 200 while the process responds."""
        return _json({"status": "live"})

    @app.get("/health/ready", response_model=s.StateOut, responses={503: REFUSALS[503]}, tags=["operation"])
    async def ready() -> Response:
        """Return 200 if the server can answer recommendation requests."""
        if not service.ready:
            raise BusyError("Not ready: a worker thread has stopped. Restart the server.")
        return _json({"status": "ready", "version": service.current.engine.version})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["operation"])
    async def metrics() -> Response:
        """Return metrics in the Prometheus text format."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4")

    described = cache(lambda: api_page(app.openapi()))  # FastAPI's own page would load scripts from another host

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(described(), headers={"cache-control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})


def _json(content: Any) -> Response:
    return Response(to_json(content, inf_nan_mode="null", fallback=str), media_type="application/json")


def _heading(request: Request, version: str) -> dict[str, Any]:
    took_ms = round(1000 * (time.perf_counter() - request.state.began), 3)
    return {"request_id": request.state.request_id, "version": version, "took_ms": took_ms}


def _known(found: Any, kind: str, name: str) -> None:
    if not found:
        raise HTTPException(404, str(unknown(kind, name)))


def _error(request: Request, status: int, code: str, message: str, location: Any = None, headers: Any = None) -> Response:
    request.state.code = code
    body = error_body(code, message, request.state.request_id, location)
    return Response(body, status, headers, media_type="application/json")


async def _malformed(request: Request, error: Any) -> Response:
    errors = error.errors()
    # A filter is text or JSON. If an object was sent, skip the error of the text branch.
    first = next((one for one in errors if not (one["type"] == "string_type" and isinstance(one["input"], dict))), errors[0])
    if first["type"] == "json_invalid":
        text, location = f"The body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1] + 1}.", None
    else:
        branches = ("constrained-str", "function-after")  # names of the branches of the filter type, not parts of the request
        location = ".".join(str(step) for step in first["loc"][1:] if not str(step).startswith(branches)) or None
        text = f"Invalid request: {location or first['loc'][0]}: {first['msg']}. See /docs."
    return _error(request, 422, "malformed", text, location)


async def _refused(request: Request, error: Any) -> Response:
    return _error(request, error.status_code, CODES.get(error.status_code, "refused"), str(error.detail), headers=error.headers)


async def _mistaken(request: Request, error: Exception) -> Response:
    if isinstance(error, BusyError):
        return _error(request, 503, "busy", str(error), headers={"Retry-After": "1"})
    return _error(request, 422, "impossible", str(error), getattr(error, "location", None) or None)


def _life(service: Service) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        loop, tasks = asyncio.get_running_loop(), set()

        async def again() -> None:
            try:
                await service.reload()
            except TwoTowerError as error:
                log.error("reload failed; the current bundle stays in use: %s", error)

        def hang_up() -> None:
            task = loop.create_task(again())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, hang_up)
        yield
        await asyncio.to_thread(service.close)

    return life
