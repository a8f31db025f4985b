"""Open bundles and refresh their items; decide what is served.

`Updater` does the work. `Updates` is what the routes call: in a single process `OwnUpdates`, in a worker `worker.ParentUpdates`,
which asks the process that all workers are copies of.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from twotower.errors import DataError, TwoTowerError
from twotower.serving.catalogue import Browser
from twotower.serving.event_journal import Journal
from twotower.serving.freshness import Freshness, RefreshError, Version
from twotower.serving.model_version import Engine
from twotower.serving.prometheus import Meters
from twotower.utils.console import log
from twotower.utils.types import Json


class Updater:
    """Holds the served version and makes new ones.

    Parameters
    ----------
    bundle
        Folder of the first bundle.
    trusted_key
        Public key that bundles must be signed for, those of reloads included; see `load_bundle`.
    refresh_s
        Interval in seconds at which the items are refreshed; 0: only on demand.

    Raises
    ------
    TwoTowerError
        The bundle cannot be opened.
    """

    def __init__(self, bundle: Path, journal: Journal, meters: Meters, trusted_key: Path | None, refresh_s: float) -> None:
        self.journal, self.meters, self._trusted_key, self.refresh_s = journal, meters, trusted_key, refresh_s
        self.current = self._version(bundle, Engine.load(bundle, trusted_key))
        self.serve(self.current)

    def serve(self, version: Version) -> None:
        """Serve a version from now on."""
        self.current = version
        self.meters.bundle(version.engine.version)
        self.meters.items(version.engine.as_of, asdict(version.freshness.counts))

    def opened(self, path: Path | None) -> Version:
        """Return the version of the bundle at `path`; None: the current folder, which is read again.

        Raises
        ------
        DataError
            The bundle cannot answer. The log says why.
        """
        before = self.current.path
        try:
            return self._opened(path or before)
        except TwoTowerError as error:
            self.meters.reload("refused")
            log.error("reload refused; %s stays in use: %s", before, error)
            raise

    def reloaded(self, version: Version) -> Json:
        """Serve an opened version. Return its name and that of the previous one."""
        before = self.current.engine.version
        self.serve(version)
        self.meters.reload("loaded")
        log.info("now serving %s, version %s", version.path, version.engine.version)
        return {"version": version.engine.version, "previous_version": before}

    def refreshed(self) -> Version:
        """Return the current version with all accepted events, or the current version itself if there are no new ones.

        Raises
        ------
        RefreshError
            It failed. The last items stay in use.
        """
        return self.current.freshness.refresh(self.current)

    def _opened(self, path: Path) -> Version:
        try:
            engine = Engine.load(path, self._trusted_key)
        except TwoTowerError:
            raise
        except Exception:  # valid hashes but invalid content
            log.exception("%s cannot be served", path)
            raise DataError(
                f"The bundle {path} fails on a test request; the log has the traceback. Write it again with `twotower export`."
            ) from None
        freeze_garbage_collector()
        return self._version(path, engine)

    def _version(self, path: Path, engine: Engine) -> Version:
        """Return the version of a loaded bundle, with the accepted events unless items are refreshed only on demand."""
        freshness = Freshness(engine, self.journal, self.meters)
        version = Version(path, engine, Browser(engine, self.journal), freshness)
        if self.refresh_s:
            with suppress(RefreshError):  # logged
                return freshness.refresh(version)
        return version


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

    async def keep_fresh(self) -> None:
        """Refresh the items at every interval, without end."""
        ...


class OwnUpdates:
    """Updates of a server that is one process; see `Updates`. Reloads and refreshes take turns."""

    def __init__(self, updater: Updater, serve: Callable[[Version], None]) -> None:
        self._updater, self._serve = updater, serve
        self._changing = asyncio.Lock()

    async def reload(self, path: Path | None) -> Json:
        """See `Updates`."""
        async with self._changing:
            version = await asyncio.to_thread(self._updater.opened, path)
            result = self._updater.reloaded(version)
            self._serve(version)
            return result

    async def refresh(self) -> Json:
        """See `Updates`."""
        async with self._changing:
            version = await asyncio.to_thread(self._updater.refreshed)
            self._updater.serve(version)
            self._serve(version)
            return version.as_refreshed()

    async def keep_fresh(self) -> None:
        """See `Updates`; with an interval of 0, there is nothing to do."""
        while self._updater.refresh_s:
            await asyncio.sleep(self._updater.refresh_s)
            with suppress(RefreshError):  # logged
                await self.refresh()


def freeze_garbage_collector() -> None:
    """Exclude all loaded objects from garbage collection, which would delay responses by tens of milliseconds."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
