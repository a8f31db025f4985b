"""Define the HTTP routes of the feedback loop: export of events, forgetting of users, and versions beside each other."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, FastAPI, Query, Response
from fastapi.responses import StreamingResponse
from pydantic_core import to_json

from twotower.errors import BusyError, DataError
from twotower.serving import feedback_schemas as f
from twotower.serving import operation_schemas as o
from twotower.serving.event_export import export_events, since_of
from twotower.serving.json_routes import BEARER
from twotower.serving.limits import MAX_ID_CHARS
from twotower.serving.row_faults import DamagedRowError
from twotower.serving.service import Service
from twotower.utils.console import log

PARQUET = "application/vnd.apache.parquet"
BLOCK = 1 << 18
Since = Annotated[str | None, Query(max_length=40, description="Events from this time on.", examples=["2026-11-01"])]
UserText = Annotated[str, Query(min_length=1, max_length=MAX_ID_CHARS, description="An id, of any characters.", examples=["u_17"])]


def add_feedback(app: FastAPI, service: Service, refusals: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes to an application."""
    keyed: dict[str, Any] = {"responses": refusals, "dependencies": [Depends(BEARER)]}
    _exports(app, service, keyed)
    _forgetting(app, service, keyed)
    _versions(app, service, keyed)


def _exports(app: FastAPI, service: Service, keyed: dict[str, Any]) -> None:
    file = {"content": {PARQUET: {"schema": {"type": "string", "format": "binary"}}}}
    files = keyed | {"responses": {**keyed["responses"], 200: file}}

    async def exported(since: str | None, *, answers: bool) -> Response:
        begin_s = since_of(since)
        folder = tempfile.TemporaryDirectory(prefix="twotower-")
        try:
            file = Path(folder.name) / "export.parquet"
            await asyncio.to_thread(export_events, service.store_url, file, begin_s, answers=answers)
        except BaseException as error:
            folder.cleanup()
            if not isinstance(error, DataError | BusyError):
                raise
            log.error("cannot export events or answers: %s", error.__cause__ or error)  # it may have an address or a path
            if isinstance(error, DamagedRowError):
                raise BusyError(f"The export was not made. {error}") from None
            raise BusyError("The export was not made: the event store or the disk does not respond. Try again later.") from None
        return StreamingResponse(_blocks(file, folder), media_type=PARQUET)

    @app.get("/v1/events/export", response_class=Response, tags=["events"], **files)
    async def export_events_file(since: Since = None) -> Response:
        """Return the accepted events as Parquet, in the columns that `twotower update --data` reads."""
        return await exported(since, answers=False)

    @app.get("/v1/events/export/answers", response_class=Response, tags=["events"], **files)
    async def export_answers_file(since: Since = None) -> Response:
        """Return the logged answers as Parquet, with the propensity of every shown item, for `twotower estimate`."""
        return await exported(since, answers=True)


def _blocks(file: Path, folder: tempfile.TemporaryDirectory[str]) -> Iterator[bytes]:
    with folder, file.open("rb") as opened:
        while block := opened.read(BLOCK):
            yield block


def _forgetting(app: FastAPI, service: Service, keyed: dict[str, Any]) -> None:
    async def forgotten(user: str) -> Response:
        return _json({"user": user, **await service.forget(user)})

    @app.delete("/v1/users/{user:path}", response_model=f.ForgottenOut, tags=["users"], **keyed)
    async def forget_user(user: str) -> Response:
        """Delete everything about a user: events, answers, history and user vector, in store, memory and bundle.

        Percent-encode the id, slashes included. A user who is not known is not an error.
        """
        return await forgotten(unquote(user))

    @app.delete("/v1/users", response_model=f.ForgottenOut, tags=["users"], **keyed)
    async def forget_user_by_query(user: UserText) -> Response:
        """Delete everything about a user. Unlike a path, a query can hold any id, `..` included."""
        return await forgotten(user)


def _versions(app: FastAPI, service: Service, keyed: dict[str, Any]) -> None:
    @app.get("/admin/versions", response_model=f.VersionsOut, tags=["operation"], **keyed)
    async def get_versions() -> Response:
        """Return the served versions with their shares and what came of their lists, and the versions that are kept."""
        return _json(await asyncio.to_thread(service.versions))

    @app.post("/admin/promote", response_model=o.ReloadOut, tags=["operation"], **keyed)
    async def promote_version() -> Response:
        """Serve the second version alone."""
        return _json(await service.updates.promote())

    @app.post("/admin/rollback", response_model=o.ReloadOut, tags=["operation"], **keyed)
    async def roll_back() -> Response:
        """Serve the version before; with two versions, the first one alone."""
        return _json(await service.updates.roll_back())


def _json(content: Any) -> Response:
    return Response(to_json(content, inf_nan_mode="null", fallback=str), media_type="application/json")
