"""Define the HTTP routes. Each route parses the request, calls the service and writes JSON; `/docs` and `/openapi.json` list them.

What each route needs is in `access`: reading, writing and operating have roles of their own. Health checks, metrics and the
files of the page are open.
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
from types import SimpleNamespace
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic_core import to_json

from twotower.errors import BusyError, TwoTowerError
from twotower.schema import UNKNOWN
from twotower.serving import event_schemas as e
from twotower.serving import operation_schemas as o
from twotower.serving import schemas as s
from twotower.serving.access import Access
from twotower.serving.api_reference import api_page
from twotower.serving.bounded_executor import Lookups
from twotower.serving.clients import Clients
from twotower.serving.column_schemas import ColumnsOut, ValuesOut
from twotower.serving.cursors import MAX_CURSOR_CHARS, depth
from twotower.serving.error_handlers import handle_errors
from twotower.serving.feedback_routes import add_feedback
from twotower.serving.item_routes import add_item_changes
from twotower.serving.json_routes import BEARER, Handler, JsonRoutes, Post, Route, documented
from twotower.serving.limits import MAX_FILTER_CHARS, MAX_ID_CHARS, MAX_K
from twotower.serving.middleware import Gate, RequestMiddleware
from twotower.serving.openapi import ABOUT, BUSY, MISSING, REFUSALS, completed, operation_id
from twotower.serving.page_files import MapTiles
from twotower.serving.page_index import add_page, first_lists
from twotower.serving.part_error import unknown
from twotower.serving.service import Service, joined
from twotower.utils.config_serving import Limits, ServingConfig
from twotower.utils.types import Json

ITEMS_PER_TOKEN = 25  # of a search count as one more request
Length = Annotated[int, Query(ge=1, le=MAX_K, description="Number of items to return.", examples=[10])]
FilterText = Annotated[str | None, Query(max_length=MAX_FILTER_CHARS, examples=["within(5)"])]
ColumnName = Annotated[str, Query(max_length=MAX_ID_CHARS, description="Name of the column.", examples=["category"])]
IdText = Annotated[str, Query(min_length=1, max_length=MAX_ID_CHARS, description="An id, of any characters.", examples=["b_230"])]
Further = Annotated[str | None, Query(max_length=MAX_CURSOR_CHARS, description="`next` of the last response.")]
Ids = Query(max_length=100, description="Ids of items to return.")
Limit = Annotated[int, Query(ge=1, le=100, description="Maximum number of results.", examples=[20])]
Searched = Annotated[str, Query(max_length=100, description="Part of the item name or of the user id.", examples=["taco"])]


def create_app(service: Service, access: Access, clients: Clients | None = None, config: ServingConfig | None = None) -> FastAPI:
    """Return the HTTP application of a service.

    Parameters
    ----------
    access
        Keys with their roles, allowed hosts and origins.
    clients
        Usage of each client, shared with the server that accepts connections.
    config
        What the log says of requests, and where the map of the page gets its ground.
    """
    settings = config or ServingConfig()
    app = FastAPI(
        **ABOUT,
        generate_unique_id_function=operation_id,
        docs_url=None,
        redoc_url=None,
        lifespan=_life(service),
        redirect_slashes=False,  # a redirect would follow a forged Host
    )
    app.state.service = service
    tiles = MapTiles(settings.map_tiles, settings.map_attribution) if settings.map_tiles else None
    gate = Gate(
        service.limits,
        service.meters,
        access,
        clients or Clients(service.limits),
        lambda client: service.overloaded(client),
        settings.log_clients,
        settings.log_probes,
        service.telemetry,
        tiles.origin if tiles is not None else "",
    )
    routes: dict[str, Route] = {}
    app.add_middleware(JsonRoutes, routes=routes)
    app.add_middleware(RequestMiddleware, gate=gate)
    post = documented(app, routes, REFUSALS)
    handle_errors(app)
    app.openapi = completed(app, app.openapi)  # type: ignore[method-assign]
    recommend = _answers(post, service)
    _similarity(app, service)
    look_up = Lookups(service.limits.lookups)
    _items(app, service, look_up)
    _users(app, service, look_up)
    _writing(app, post, service)
    add_item_changes(app, post, service, REFUSALS)
    add_feedback(app, service, REFUSALS)
    _watching(app, service)

    def open_to(client: str) -> bool:
        return access.public and not service.overloaded(client)

    add_page(app, tiles, first_lists(recommend, lambda: look_up(service.current.browser.about), open_to))
    return app


def api_document() -> Json:
    """Return the OpenAPI document, which needs no bundle."""
    parts = {"limits": Limits(), "meters": None, "overloaded": None, "telemetry": None}
    service: Any = SimpleNamespace(**parts)  # routes are declared, none is called
    return create_app(service, Access()).openapi()


def _answers(post: Post, service: Service) -> Handler:
    @post("/v1/recommend", s.RecommendIn, s.AnswerOut, "recommend")
    async def recommend(body: s.RecommendIn, state: dict[str, Any]) -> bytes:
        """Return the best items for a user or a history. If neither is known, return the most popular recent items."""
        state["asks_for"](body.weight)
        origin, answer = await service.recommend(body, state["client"], state["request_id"])
        return to_json(_heading(state, origin))[:-1] + b"," + answer[1:]

    @post("/v1/recommend:batch", s.BatchIn, s.BatchOut, "recommend")
    async def recommend_batch(body: s.BatchIn, state: dict[str, Any]) -> bytes:
        """Answer several requests at once, with the same bundle version. A request that cannot be answered has its own error.

        Each request of the batch counts towards the rate limit of the client, heavy ones more.
        """
        state["asks_for"](sum(one.weight for one in body.requests))
        origin, answers = await service.recommend_many(body.requests, state["client"], state["request_id"])
        return joined(_heading(state, origin), "answers", b"[%b]" % b",".join(answers))

    return recommend


def _similarity(app: FastAPI, service: Service) -> None:
    keyed = [Depends(BEARER)]

    async def likeness(request: Request, item_id: str, k: int, filter: str | None, cursor: str | None) -> Response:
        _known(service.current.engine.row(item_id) != UNKNOWN, "item", item_id)
        request.state.asks_for(1 + (depth(cursor) + k) // ITEMS_PER_TOKEN)
        return _json(await service.similar(item_id, k, filter, cursor, request.state.client))

    similar: dict[str, Any] = {
        "response_model": s.SimilarOut,
        "responses": REFUSALS | MISSING,
        "dependencies": keyed,
        "tags": ["recommend"],
    }

    @app.get("/v1/items/{item_id:path}/similar", **similar)
    async def similar_items(
        request: Request, item_id: str, k: Length = 10, filter: FilterText = None, cursor: Further = None
    ) -> Response:
        """Return the items most similar to an item. Percent-encode the id, slashes included."""
        return await likeness(request, unquote(item_id), k, filter, cursor)

    @app.get("/v1/similar", **similar)
    async def similar_items_by_query(
        request: Request, id: IdText, k: Length = 10, filter: FilterText = None, cursor: Further = None
    ) -> Response:
        """Return the items most similar to an item. Unlike a path, a query can hold any id, `..` included."""
        return await likeness(request, id, k, filter, cursor)


def _items(app: FastAPI, service: Service, look_up: Lookups) -> None:
    reading: dict[str, Any] = {"responses": REFUSALS, "dependencies": [Depends(BEARER)]}
    finding = reading | {"responses": REFUSALS | MISSING}

    @app.get("/v1/items", response_model=s.ItemsOut, tags=["items"], **reading)
    async def search_items(
        request: Request,
        q: Searched = "",
        limit: Limit = 20,
        cursor: Further = None,
        id: Annotated[list[str], Ids] = [],  # noqa: B006
        columns: Annotated[bool, Query(description="With `id`: return all catalogue columns of the items.")] = False,
    ) -> Response:
        """Search items by part of their name, ignoring case and accents. Without `q`, return the most popular items.

        With `id`, which can be repeated, return the items with these ids. Unknown ids are left out.
        """
        request.state.asks_for(1 + max(limit, len(id)) // ITEMS_PER_TOKEN)
        if id:
            return _json({"next": None, "items": await look_up(service.current.browser.items_of, id, columns)})
        return _json(await look_up(service.items, q, limit, cursor))

    @app.get("/v1/items/{item_id:path}", response_model=s.ItemDetailOut, tags=["items"], **finding)
    async def get_item(item_id: str) -> Response:
        """Return one item with all its catalogue columns. Percent-encode the id, slashes included."""
        current, name = service.current, unquote(item_id)
        _known(current.engine.row(name) != UNKNOWN, "item", name)
        return _json(current.browser.item(name))

    @app.get("/v1/columns", response_model=ColumnsOut, tags=["items"], **reading)
    async def get_columns() -> Response:
        """Describe the columns that filters can compare, with frequent values and examples of filters."""
        return _json(await look_up(lambda browser: browser.columns.about(), service.current.browser))

    @app.get("/v1/values", response_model=ValuesOut, tags=["items"], **reading)
    async def search_values(column: ColumnName, q: Searched = "", limit: Limit = 20) -> Response:
        """Search the values of a column of texts or lists by part of them, ignoring case and accents."""
        return _json({"values": await look_up(lambda browser: browser.columns.values(column, q, limit), service.current.browser)})


def _users(app: FastAPI, service: Service, look_up: Lookups) -> None:
    reading: dict[str, Any] = {"responses": REFUSALS, "dependencies": [Depends(BEARER)]}
    finding = reading | {"responses": REFUSALS | MISSING}

    @app.get("/v1/users", response_model=s.UsersOut, tags=["users"], **reading)
    async def search_users(q: Searched = "", limit: Limit = 20) -> Response:
        """Search users by part of their id, ordered by number of events."""
        return _json({"users": await look_up(service.current.browser.users, q, limit)})

    @app.get("/v1/users/random", response_model=s.UsersOut, tags=["users"], **reading)
    async def get_random_user() -> Response:
        """Return a random user with a history."""
        return _json({"users": await look_up(service.current.browser.random_user)})

    async def events_of(user: str) -> Response:
        current = service.current
        in_bundle = current.engine.user_row(user) != UNKNOWN and not service.journal.is_forgotten(user)
        _known(in_bundle or service.journal.of(user), "user", user)
        return _json(await look_up(current.browser.history, user))

    @app.get("/v1/users/{user:path}/history", response_model=s.HistoryOut, tags=["users"], **finding)
    async def get_history(user: str) -> Response:
        """Return the history of a user: the events of the bundle and the accepted ones. Percent-encode the id, slashes included."""
        return await events_of(unquote(user))

    @app.get("/v1/history", response_model=s.HistoryOut, tags=["users"], **finding)
    async def get_history_by_query(user: IdText) -> Response:
        """Return the history of a user. Unlike a path, a query can hold any id, `..` included."""
        return await events_of(user)

    @app.get("/v1/about", response_model=o.AboutOut, tags=["items"], **reading)
    async def get_about() -> Response:
        """Describe the served bundle and the filters that it supports."""
        return _json(await look_up(service.current.browser.about))


def _writing(app: FastAPI, post: Post, service: Service) -> None:
    @post("/v1/events", e.EventsIn, e.EventsOut, "events")
    async def add_events(body: e.EventsIn, state: dict[str, Any]) -> bytes:  # noqa: ARG001
        """Store events, impressions and outcomes. When this responds, they are on disk and affect all later responses.

        An impression or an outcome names its list by the `request_id` of the answer.
        """
        accepted = await service.accept(body.events)
        return to_json({"accepted": accepted.new, "repeated": accepted.repeated})

    @post("/admin/reload", s.ReloadIn, o.ReloadOut, "operation", optional=True)
    async def reload_bundle(body: s.ReloadIn | None, state: dict[str, Any]) -> bytes:  # noqa: ARG001
        """Serve another bundle, or read the current folder again. If the bundle is invalid, the current one stays in use."""
        return to_json(await service.updates.reload(Path(body.bundle) if body and body.bundle else None))

    @app.post("/admin/refresh", response_model=o.RefreshOut, responses=REFUSALS, dependencies=[Depends(BEARER)], tags=["operation"])
    async def refresh_items() -> Response:
        """Bring the state, the popularity and the fallback lists of the items up to date with the accepted events, now."""
        return _json(await service.updates.refresh())


def _watching(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", response_model=o.StateOut, tags=["operation"])
    async def check_live() -> Response:
        """Return 200 while the process responds."""
        return _json({"status": "live"})

    @app.get("/health/ready", response_model=o.StateOut, responses=BUSY, tags=["operation"])
    async def check_ready() -> Response:
        """Return 200 if the server can answer recommendation requests, and the state of the event store."""
        problem = service.problem
        if problem is not None:
            raise BusyError(problem)
        return _json(service.state())

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["operation"],
    )
    async def get_metrics() -> Response:
        """Return metrics in the Prometheus text format."""
        return Response(await service.metrics(), media_type="text/plain; version=0.0.4")

    described = cache(lambda: api_page(app.openapi()))  # FastAPI's own page would load scripts from another host

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(described(), headers={"cache-control": "no-cache"})


def _json(content: Any) -> Response:
    return Response(to_json(content, inf_nan_mode="null", fallback=str), media_type="application/json")


def _heading(state: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    took_ms = round(1000 * (time.perf_counter() - state["began"]), 3)
    return {"request_id": state["request_id"], **origin, "took_ms": took_ms}


def _known(found: Any, kind: str, name: str) -> None:
    if not found:
        raise HTTPException(404, str(unknown(kind, name)))


def _life(service: Service) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        loop, tasks = asyncio.get_running_loop(), set()

        async def again() -> None:
            try:
                await service.updates.reload(None)
            except TwoTowerError:
                return  # logged

        def hang_up() -> None:
            task = loop.create_task(again())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, hang_up)
        fresh = loop.create_task(service.updates.keep_fresh())
        yield
        fresh.cancel()
        await asyncio.to_thread(service.close)

    return life
