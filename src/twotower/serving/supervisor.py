"""Run several workers that share one port and one copy of the bundle.

The supervisor opens the bundle and forks the workers, so that all of them share its memory. It answers no request. To refresh the
items or to load another bundle, it does that itself and forks new workers; when all of them answer, the old ones accept nothing
more, finish what is in progress, and pass their connections on. So a version is either served by all or by none. What workers ask
for meanwhile is done afterwards, in order; equal requests, and all users to be forgotten, together.

A worker that dies is replaced. SIGTERM and SIGINT stop all workers; SIGHUP reads the bundle again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from twotower.errors import BusyError, DataError, TwoTowerError
from twotower.serving.crew import Crew, how, kill
from twotower.serving.freshness import Version
from twotower.serving.metrics_sum import MetricsFolder
from twotower.serving.updater import Updater, freeze_garbage_collector
from twotower.serving.updates import EXPIRE_S
from twotower.serving.worker import Seat
from twotower.utils.config_serving import ServingConfig
from twotower.utils.console import log
from twotower.utils.types import Json

T = TypeVar("T")

START_S = 60.0  # time for a worker to start
RETIRE_S = 10.0  # time for a worker to stop answering when others take over
END_S = 2.0  # time for workers to end after all requests have
PAUSE_S = 1.0  # between two starts of a worker that dies at once
GENERATIONS = 8  # of workers that can exist at once: current, new, and those that still finish requests


class Supervisor:
    """Starts, replaces and stops workers.

    Parameters
    ----------
    work
        Runs a worker in a new process and ends it.
    """

    def __init__(self, config: ServingConfig, updater: Updater, metrics: MetricsFolder, work: Callable[[Seat], NoReturn]) -> None:
        self._config, self._updater, self._metrics = config, updater, metrics
        self._current: list[int] = []
        self._signals: list[int] = []
        self._stop_by = 0.0
        self._unserved: Version | None = None
        self._next_start = 0.0
        self._crew = Crew(work, GENERATIONS * config.workers, metrics, lambda: self._ending, self._on_end)
        self._due, self._expire = time.monotonic() + config.refresh_s, 0.0

    def run(self, started: Callable[[], None]) -> int:
        """Run the workers until SIGTERM or SIGINT, and return the exit code. `started` is called when all answer."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        try:
            if not self._take_over():
                return 0 if self._ending else 1
            started()
            while not self._ending:
                self._turn()
            return 0
        finally:  # whatever happens, no worker stays behind
            if not self._ending:
                self._on_signal(signal.SIGTERM, None)
            self._crew.end(self._stop_by)

    def _turn(self) -> None:
        """Do what has been asked for, and what is due."""
        self._metrics.write(os.getpid(), self._updater.meters.registry)
        if not self._crew.asked:
            self._crew.listen(self._pause_s())
        if self._crew.asked and not self._ending:
            self._obey()
        if signal.SIGHUP in self._signals:
            self._signals.remove(signal.SIGHUP)
            self._changed(lambda: self._reload(None))
        self._replace_dead()
        if time.monotonic() >= self._expire:
            self._updater.expire()
            self._expire = time.monotonic() + EXPIRE_S
        if self._config.refresh_s and time.monotonic() >= self._due and not self._ending:
            self._changed(self._refresh)
            self._due = time.monotonic() + self._config.refresh_s

    def _on_signal(self, number: int, _: Any) -> None:
        """Note a signal. One that ends the server reaches the workers at once, also while a bundle is loaded."""
        if number == signal.SIGCHLD:
            return
        if number != signal.SIGHUP and not self._ending:
            self._stop_by = time.monotonic() + self._config.drain_s + END_S
            self._crew.counts.set("stopping", 1)
            for pid in list(self._crew.workers):
                kill(pid, number)
        self._signals.append(number)

    @property
    def _ending(self) -> int:
        """Return the first signal that ends the server; 0: none."""
        return next((one for one in self._signals if one in (signal.SIGTERM, signal.SIGINT)), 0)

    def _on_end(self, pid: int, status: int) -> None:
        if pid in self._current and not self._ending:
            log.error("worker %d has ended: %s; another one starts", pid, how(status))

    def _pause_s(self) -> float:
        alive = sum(pid in self._crew.workers for pid in self._current)
        waiting = [PAUSE_S] if alive < self._config.workers else []
        return min([*waiting, max(self._due - time.monotonic(), 0.0) if self._config.refresh_s else 60.0, 60.0])

    # What workers ask for

    def _obey(self) -> None:
        """Do what workers have asked for first, and answer. If a worker has ended meanwhile, it is done all the same."""
        asked = self._crew.asked
        first = asked[0][1]
        together = [one for one in asked if _joins(first, one[1])]
        rest = [one for one in asked if not _joins(first, one[1])]
        asked.clear()
        asked.extend(rest)
        messages = [message for _, message in together]
        results, error = self._changed(lambda: self._results_of(messages))
        for (worker, message), result in zip(together, results or [{}] * len(together), strict=True):
            answer = {"result": result} if error is None else {"error": str(error), "busy": isinstance(error, BusyError)}
            self._crew.tell(worker, {"id": message["id"], **answer})

    def _changed(self, change: Callable[[], T]) -> tuple[T | None, TwoTowerError | None]:
        """Change what is served. A failure does not end the server: what was served stays."""
        try:
            return change(), None
        except TwoTowerError as error:  # logged
            return None, error
        except Exception:
            log.exception("a change of what is served has failed")
            return None, DataError("The change has failed; the log has the traceback. What was served stays.")

    def _results_of(self, messages: list[Json]) -> list[Json]:
        """Do what these messages ask for together, and return an answer for each."""
        if "forget" in messages[0]:
            users = [message["forget"] for message in messages]
            counts = [self._updater.journal.forget(user) for user in users]
            self._replace_all(self._refreshed(), self._served)  # also if nothing has changed: workers have memory
            return [{"events": count, "in_bundle": self._updater.holds(user)} for user, count in zip(users, counts, strict=True)]
        return [self._result_of(messages[0])] * len(messages)

    def _result_of(self, message: Json) -> Json:
        updater = self._updater
        if "refresh" in message:
            return self._refresh()
        if "promote" in message:
            return self._replace_all(updater.promoted(), updater.reloaded)
        if "roll_back" in message:
            before = updater.current.engine.version
            result = self._replace_all(updater.rolled_back(), updater.reloaded)
            updater.left(before)
            return result
        return self._reload(message["reload"])

    # Versions

    def _reload(self, path: str | None) -> Json:
        return self._replace_all(self._updater.opened(None if path is None else Path(path)), self._updater.reloaded)

    def _refresh(self) -> Json:
        version = self._refreshed()
        if version is self._updater.current:
            return version.as_refreshed()
        return self._replace_all(version, self._served)

    def _refreshed(self) -> Version:
        """Return the version with all accepted events: perhaps one whose workers did not start last time."""
        current, version, last = self._updater.current, self._updater.refreshed(), self._unserved
        if version is current and last is not None and last.freshness is current.freshness:
            return last
        self._unserved = version
        return version

    def _served(self, fresh: Version) -> Json:
        self._updater.serve(fresh)
        return fresh.as_refreshed()

    def _replace_all(self, version: Version, serve: Callable[[Version], Json]) -> Json:
        """Let new workers answer for a version, or leave everything as it is."""
        before, self._updater.current = self._updater.current, version
        freeze_garbage_collector()
        try:
            started = self._take_over()
        finally:
            self._updater.current = before
        if started:
            self._unserved = None
            return serve(version)
        if self._ending:
            raise BusyError("The server stops. Try again later.")
        log.error("the new version is not served: its workers did not start")
        raise DataError("The new version is not served: its workers did not start. The log has the reason.")

    # Workers

    def _take_over(self) -> bool:
        """Start workers for the current version. When all answer, retire the old ones. Return False if one does not start."""
        began, old, wanted, crew = time.monotonic(), self._current, self._config.workers, self._crew
        new = crew.start(wanted)
        if len(new) < wanted or not crew.wait(new, START_S, lambda worker: worker.ready):
            for pid in [] if self._ending else new:  # a signal that ends the server has reached them: they drain
                kill(pid)
            return False
        self._current = new
        log.info("%d workers have started in %.2f s", len(new), time.monotonic() - began)
        for pid in old:
            if pid in crew.workers:
                crew.tell(crew.workers[pid], {"retire": 1})
        crew.wait(old, RETIRE_S, lambda worker: worker.retired, strict=False)
        return True

    def _replace_dead(self) -> None:
        """Start workers in place of those that have ended."""
        alive = [pid for pid in self._current if pid in self._crew.workers]
        young = any(time.monotonic() - self._crew.workers[pid].began < PAUSE_S for pid in alive)
        missing = self._config.workers - len(alive)
        self._current = alive
        if missing and not young and not self._ending and time.monotonic() >= self._next_start:
            self._next_start = time.monotonic() + PAUSE_S  # also where a worker ends before it answers
            with suppress(BusyError):  # tried again at the next turn
                made = self._crew.start(missing)
                self._crew.wait(made, START_S, lambda worker: worker.ready)
                self._current = [*alive, *made]


def _joins(first: Json, other: Json) -> bool:
    """Return whether a request can be done together with the first one.

    Examples
    --------
    >>> _joins({"reload": "a", "id": 1}, {"reload": "a", "id": 9}), _joins({"reload": "a", "id": 1}, {"reload": "b", "id": 2})
    (True, False)
    >>> _joins({"forget": "a", "id": 1}, {"forget": "b", "id": 2}), _joins({"promote": 1, "id": 1}, {"promote": 1, "id": 2})
    (True, False)
    """
    if first is other or ("forget" in first and "forget" in other):
        return True
    same = {name: value for name, value in first.items() if name != "id"} == {k: v for k, v in other.items() if k != "id"}
    return same and ("reload" in first or "refresh" in first)
