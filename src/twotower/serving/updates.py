"""Change what is served, from the routes of a server.

`Updater` does the work. `Updates` is what the routes call: in a single process `OwnUpdates`, in a worker `worker.ParentUpdates`,
which asks the process that all workers are copies of.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from twotower.serving.freshness import RefreshError, Version
from twotower.serving.updater import Updater
from twotower.utils.hardware import yield_to_others
from twotower.utils.types import Json

EXPIRE_S = 3600.0  # how often old events and answers are deleted


class Updates(Protocol):
    """Changes of what is served."""

    async def reload(self, path: Path | None) -> Json:
        """Serve the bundle at `path`, or read the current folder again. Return "version" and "previous_version".

        Raises
        ------
        DataError
            The bundle cannot answer. The current one stays in use.
        """
        ...

    async def refresh(self) -> Json:
        """Refresh the items with all accepted events. Return what is served now, and what became of the events.

        Raises
        ------
        RefreshError
            It failed. The last items stay in use.
        """
        ...

    async def promote(self) -> Json:
        """Serve the second version alone. Return "version" and "before"."""
        ...

    async def roll_back(self) -> Json:
        """Serve the version before, or with two versions the first one alone. Return "version" and "before"."""
        ...

    async def forget(self, user: str) -> Json:
        """Delete everything about a user from store, memory and bundles.

        Return the number of deleted "events", and whether a signed bundle still has the user: "in_bundle".

        Raises
        ------
        BusyError
            The store does not respond.
        """
        ...

    async def keep_fresh(self) -> None:
        """Refresh the items at every interval, and delete what is too old, without end."""
        ...


class OwnUpdates:
    """Updates of a server that is one process; see `Updates`. Reloads and refreshes take turns; answers come before refreshes."""

    def __init__(self, updater: Updater, serve: Callable[[Version], None]) -> None:
        self._updater, self._serve = updater, serve
        self._changing = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "refresh", initializer=yield_to_others)

    async def reload(self, path: Path | None) -> Json:
        """See `Updates`."""
        return await self._exchanged(lambda: self._updater.opened(path))

    async def promote(self) -> Json:
        """See `Updates`."""
        return await self._exchanged(self._updater.promoted)

    async def roll_back(self) -> Json:
        """See `Updates`."""
        before = self._updater.current.engine.version
        result = await self._exchanged(self._updater.rolled_back)
        self._updater.left(before)
        return result

    async def _exchanged(self, opened: Callable[[], Version]) -> Json:
        async with self._changing:
            version = await asyncio.to_thread(opened)
            result = self._updater.reloaded(version)
            self._serve(version)
            return result

    async def refresh(self) -> Json:
        """See `Updates`."""
        async with self._changing:
            version = await asyncio.get_running_loop().run_in_executor(self._thread, self._updater.refreshed)
            self._updater.serve(version)
            self._serve(version)
            return version.as_refreshed()

    async def forget(self, user: str) -> Json:
        """See `Updates`."""
        count = await asyncio.to_thread(self._updater.journal.forget, user)
        await self.refresh()
        return {"events": count, "in_bundle": self._updater.holds(user)}

    async def keep_fresh(self) -> None:
        """See `Updates`; with an interval of 0, items are refreshed on demand only."""
        due = 0.0
        while True:
            if time.monotonic() >= due:
                await asyncio.to_thread(self._updater.expire)
                due = time.monotonic() + EXPIRE_S
            await asyncio.sleep(self._updater.refresh_s or EXPIRE_S)
            if self._updater.refresh_s:
                with suppress(RefreshError):  # logged
                    await self.refresh()
