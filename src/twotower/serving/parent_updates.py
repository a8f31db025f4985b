"""Ask the supervisor of all workers for a change of what is served; `worker.py` lists the messages."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from pathlib import Path

from twotower.errors import DataError
from twotower.serving.freshness import RefreshError
from twotower.utils.types import Json

GONE = "The server stops, or has too many requests of this kind. Try again later."


class ParentUpdates:
    """Asks the supervisor for updates; see `updates.Updates`."""

    def __init__(self, pipe: socket.socket) -> None:
        self._pipe, self._ids = pipe, itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Json]] = {}

    async def reload(self, path: Path | None) -> Json:
        """See `Updates`."""
        return await self._ask({"reload": None if path is None else str(path)})

    async def refresh(self) -> Json:
        """See `Updates`."""
        return await self._ask({"refresh": 1})

    async def promote(self) -> Json:
        """See `Updates`."""
        return await self._ask({"promote": 1})

    async def roll_back(self) -> Json:
        """See `Updates`."""
        return await self._ask({"roll_back": 1})

    async def forget(self, user: str) -> Json:
        """See `Updates`."""
        return await self._ask({"forget": user})

    async def keep_fresh(self) -> None:
        """See `Updates`; the supervisor does it."""

    async def _ask(self, message: Json) -> Json:
        number = next(self._ids)
        try:
            self._pipe.send(json.dumps({**message, "id": number}).encode())
        except OSError:  # it has gone, or too much has been asked for
            raise RefreshError(GONE) from None
        self._waiting[number] = asyncio.get_running_loop().create_future()
        return await self._waiting[number]

    @property
    def pending(self) -> bool:
        """Return True while an update has been asked for."""
        return bool(self._waiting)

    def take(self, message: Json) -> None:
        """Take what the supervisor says."""
        waiting = self._waiting.pop(message["id"], None)
        if waiting is None or waiting.done():
            return
        if "error" in message:
            waiting.set_exception((RefreshError if message["busy"] else DataError)(message["error"]))
        else:
            waiting.set_result(message["result"])

    def gone(self) -> None:
        """Refuse what has been asked for: the supervisor has gone."""
        while self._waiting:
            _, waiting = self._waiting.popitem()
            if not waiting.done():
                waiting.set_exception(RefreshError(GONE))
