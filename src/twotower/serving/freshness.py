"""Refresh the items of a served bundle with the accepted events.

Each loaded bundle has a `bundle.refresh.Refresher`, which reads the events accepted since its last refresh.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from twotower.bundle.refresh import RefreshCounts, Refresher
from twotower.errors import BusyError
from twotower.serving.catalogue import Browser
from twotower.serving.event_journal import Journal
from twotower.serving.model_version import Engine
from twotower.serving.prometheus import Meters
from twotower.utils.console import log
from twotower.utils.types import Json

PART = 10_000  # events added at a time: between two parts, requests can be answered


class RefreshError(BusyError):
    """A refresh of the items failed; the previous item vectors stay in use."""


class Freshness:
    """Refreshes the items of one loaded bundle. Can be used from several threads: calls run one at a time.

    Parameters
    ----------
    engine
        The bundle as loaded.
    """

    def __init__(self, engine: Engine, journal: Journal, meters: Meters) -> None:
        self._journal, self._meters = journal, meters
        self._lock = threading.Lock()
        self._refresher = Refresher(engine.recommender.bundle)
        self._log, self._taken = journal.log(), 0

    @property
    def counts(self) -> RefreshCounts:
        """Return the counts of the accepted events at the last refresh."""
        return self._refresher.counts

    def refresh(self, version: Version) -> Version:
        """Return the version with all accepted events, or `version` itself if there are no new ones.

        Raises
        ------
        RefreshError
            The event store does not respond, or the computation fails. The log has the reason.
        """
        began = time.perf_counter()
        try:
            with self._lock:
                fresh = self._refreshed(version)
        except Exception as error:  # after any error, the previous items stay in use, and the next refresh tries again
            if self._journal.closing:
                return version
            raise failed(version, error, self._meters, time.perf_counter() - began) from None
        outcome = "unchanged" if fresh is version else "refreshed"
        self._meters.refresh(outcome, time.perf_counter() - began)
        return fresh

    def _refreshed(self, version: Version) -> Version:
        self._journal.catch_up()
        accepted = self._journal.log()
        if accepted is not self._log:  # the store has lost entries, so all were read again
            if self._taken:
                self._refresher = self._refresher.emptied()
            self._log, self._taken = accepted, 0
        while part := accepted[self._taken : self._taken + PART]:
            events = [event for _, event in part]
            self._refresher.add(
                [user for user, _ in part],
                [str(event.item_id) for event in events],
                [event.time_s or 0 for event in events],
                [event.event_type for event in events],
                [event.stars for event in events],
            )
            self._taken += len(part)
        bundle = self._refresher.bundle_at(int(time.time()))
        if bundle is None:
            return version
        engine = version.engine.with_bundle(bundle)
        return replace(version, engine=engine, browser=version.browser.with_engine(engine))


def failed(version: Version, error: Exception, meters: Meters, seconds: float) -> RefreshError:
    """Log and count a failed refresh, and return what to raise."""
    why = " ".join(f"{type(error).__name__}: {error}".split())
    log.error("refresh failed; the items as of %s stay in use: %s", version.engine.as_of, why)
    meters.refresh("failed", seconds)
    return RefreshError("The items were not refreshed; the last ones stay in use. The log says why. Try again later.")


@dataclass(frozen=True, slots=True)
class Version:
    """The served version of a bundle, with its items as of a time.

    Attributes
    ----------
    rival, rival_share
        Another version, and the share of the users whose lists it makes.
    shadow
        Another version that computes the same lists, which users do not see.
    loaded
        The bundle as it was opened, without changes of items.
    items_changed
        How often items had been changed when `engine` was made.
    """

    path: Path
    engine: Engine
    browser: Browser
    freshness: Freshness
    rival: Version | None = None
    rival_share: float = 0.0
    shadow: Version | None = None
    loaded: Engine | None = None
    items_changed: int = 0

    def of(self, user: str | None) -> Version:
        """Return the version that makes the lists of a user; requests without a user get the first one."""
        if self.rival is None or user is None:
            return self
        return self.rival if place_of(user) >= 1 - self.rival_share else self

    def about(self) -> Json:
        """Return the fields that identify the version in every response."""
        return {"version": self.engine.version, "as_of": self.engine.as_of}

    def state(self) -> Json:
        """Return the same for a health check, with that of an index in another process."""
        return {
            **self.about(),
            "items_changed": self.items_changed,
            **({"index": "ok"} if self.engine.recommender.index.reads_filters else {}),
        }

    def as_refreshed(self) -> Json:
        """Return the version, and what became of the accepted events at the last refresh."""
        return {**self.about(), "items_changed": self.items_changed, "events": asdict(self.freshness.counts)}


def place_of(user: str) -> float:
    """Return a number from 0 to 1 that depends on the user alone, evenly spread over users.

    Examples
    --------
    >>> round(place_of("u_17"), 3)
    0.0
    """
    return int.from_bytes(hashlib.sha256(f"split:{user}".encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2.0**64
