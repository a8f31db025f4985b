"""Define the HTTP routes that change items."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote

from fastapi import Depends, FastAPI, HTTPException, Response
from pydantic_core import to_json

from twotower.schema import ITEM_ID
from twotower.serving.item_changes import read_changes
from twotower.serving.item_schemas import ItemsChangedOut, ItemsIn
from twotower.serving.json_routes import BEARER, Post
from twotower.serving.limits import MAX_ID_CHARS
from twotower.serving.part_error import unknown
from twotower.serving.service import Service

ITEMS_PER_TOKEN = 25  # of a request count as one more request


def add_item_changes(app: FastAPI, post: Post, service: Service, refusals: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes to an application."""

    async def stored(body: ItemsIn) -> bytes:
        items = [{ITEM_ID: one.item_id, **(one.model_extra or {})} for one in body.items]
        changes = await asyncio.to_thread(read_changes, service.current.engine, items, body.remove, body.reset)
        times = await asyncio.to_thread(service.journal.change_items, changes, body.reset)
        return to_json({"accepted": len(changes) + len(body.reset), "items_changed": times})

    @post("/v1/items", ItemsIn, ItemsChangedOut, "items")
    async def change_items(body: ItemsIn, state: dict[str, Any]) -> bytes:
        """Add, change or remove items. When this responds, it is on disk; all servers serve it from their next refresh on.

        Columns that are not sent stay as they are, and are null for a new item. A change is on top of every bundle, also of one
        that is loaded later, until the column is changed again or the item is reset.
        """
        state["asks_for"](1 + (len(body.items) + len(body.remove) + len(body.reset)) // ITEMS_PER_TOKEN)
        return await stored(body)

    extra: dict[str, Any] = {"responses": refusals, "dependencies": [Depends(BEARER)], "tags": ["items"]}

    @app.delete("/v1/items/{item_id:path}", response_model=ItemsChangedOut, **extra)
    async def remove_item(item_id: str) -> Response:
        """Stop recommending an item, from the next refresh on. It still counts in histories.

        Percent-encode the id, slashes included.
        """
        name = unquote(item_id)
        if not 1 <= len(name) <= MAX_ID_CHARS:
            raise HTTPException(404, str(unknown("item", name)))
        return Response(await stored(ItemsIn(remove=[name])), media_type="application/json")
