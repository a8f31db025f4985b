"""Run several workers that share one port and one copy of the bundle.

The supervisor opens the bundle and forks the workers, so that all of them share its memory. It answers no request. To refresh the
items or to load another bundle, it does that itself and forks new workers; when all of them answer, the old ones accept nothing
more, finish what is in progress, and pass their connections on. So a version is either served by all or by none.

A worker that dies is replaced. SIGTERM and SIGINT stop all workers; SIGHUP reads the bundle again.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from twotower.errors import BusyError, DataError, TwoTowerError
from twotower.serving.freshness import RefreshError, Version
from twotower.serving.metrics_sum import MetricsFolder
from twotower.serving.shared_counts import SharedCounts
from twotower.serving.updater import Updater, freeze_garbage_collector
from twotower.serving.updates import EXPIRE_S
from twotower.serving.worker import MESSAGE_BYTES, Handover, Seat
from twotower.utils.config_serving import ServingConfig
from twotower.utils.console import log
from twotower.utils.types import Json

START_S = 60.0  # time for a worker to start
RETIRE_S = 10.0  # time for a worker to stop answering when others take over
END_S = 2.0  # time for workers to end after all requests have
PAUSE_S = 1.0  # between two starts of a worker that dies at once


@dataclass(slots=True)
class Worker:
    """A running worker, as its supervisor sees it."""

    pid: int
    seat: int
    pipe: socket.socket
    began: float
    ready: bool = False
    retired: bool = False


class Supervisor:
    """Starts, replaces and stops workers.

    Parameters
    ----------
    work
        Runs a worker in a new process and ends it.
    """

    def __init__(self, config: ServingConfig, updater: Updater, metrics: MetricsFolder, work: Callable[[Seat], NoReturn]) -> None:
        self._config, self._updater, self._metrics, self._work = config, updater, metrics, work
        seats = 3 * config.workers  # of the old, the new, and those that still finish requests
        self._counts, self._handover = SharedCounts(seats), Handover()
        self._bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(seats)]
        self._workers: dict[int, Worker] = {}
        self._current: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._signals: list[int] = []
        self._stop_by = 0.0
        self._due, self._expire = time.monotonic() + config.refresh_s, 0.0

    def run(self, started: Callable[[], None]) -> int:
        """Run the workers until SIGTERM or SIGINT, and return the exit code. `started` is called when all answer."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        if not self._take_over():
            code = 0 if self._ending else 1
            self._end()
            return code
        started()
        while not self._ending:
            self._publish()
            for worker, message in self._messages(self._pause_s()):
                self._obey(worker, message)
            if signal.SIGHUP in self._signals:
                self._signals.remove(signal.SIGHUP)
                with suppress(TwoTowerError):  # logged
                    self._reload(None)
            self._replace_dead()
            if time.monotonic() >= self._expire:
                self._updater.expire()
                self._expire = time.monotonic() + EXPIRE_S
            if self._config.refresh_s and time.monotonic() >= self._due:
                with suppress(RefreshError):  # logged
                    self._refresh()
                self._due = time.monotonic() + self._config.refresh_s
        self._end()
        return 0

    def _on_signal(self, number: int, _: Any) -> None:
        """Note a signal. One that ends the server reaches the workers at once, also while a bundle is loaded."""
        if number == signal.SIGCHLD:
            return
        if number != signal.SIGHUP and not self._ending:
            self._stop_by = time.monotonic() + self._config.drain_s + END_S
            self._counts.set("stopping", 1)
            for pid in list(self._workers):
                self._kill(pid, number)
        self._signals.append(number)

    @property
    def _ending(self) -> int:
        """Return the first signal that ends the server; 0: none."""
        return next((one for one in self._signals if one in (signal.SIGTERM, signal.SIGINT)), 0)

    def _pause_s(self) -> float:
        waiting = [PAUSE_S] if len(self._current) < self._config.workers else []
        return min([*waiting, max(self._due - time.monotonic(), 0.0) if self._config.refresh_s else 60.0, 60.0])

    def _publish(self) -> None:
        self._metrics.write(os.getpid(), self._updater.meters.registry)

    # Messages

    def _messages(self, seconds: float, only: set[int] | None = None) -> list[tuple[Worker, Json]]:
        """Wait for messages, of all workers or only of some, and note the workers that have ended."""
        found = []
        for key, _ in [] if self._ending and only is None else self._selector.select(seconds):
            if key.data is None:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
            elif only is None or key.data in only:
                worker = self._workers[key.data]
                received = worker.pipe.recv(MESSAGE_BYTES)
                if received:
                    found.append((worker, json.loads(received)))
                else:
                    self._selector.unregister(worker.pipe)
        self._reap()
        return found

    def _obey(self, worker: Worker, message: Json) -> None:
        if "id" not in message:
            return
        try:
            told = self._told(message)
            answer = {"id": message["id"], "told": told}
        except TwoTowerError as error:
            answer = {"id": message["id"], "error": str(error), "busy": isinstance(error, BusyError)}
        self._tell(worker, answer)

    def _told(self, message: Json) -> Json:
        """Do what a worker asks for, and return what it answers."""
        updater = self._updater
        if "refresh" in message:
            return self._refresh()
        if "promote" in message:
            return self._replace_all(updater.promoted(), updater.reloaded)
        if "roll_back" in message:
            before = updater.current.engine.version
            told = self._replace_all(updater.rolled_back(), updater.reloaded)
            updater.left(before)
            return told
        if "forget" in message:
            count = updater.journal.forget(message["forget"])
            fresh = updater.refreshed()
            self._replace_all(fresh, self._served)  # also if nothing has changed: workers have memory
            return {"events": count}
        return self._reload(message["reload"])

    def _tell(self, worker: Worker, message: Json) -> None:
        with suppress(OSError):  # it has ended
            worker.pipe.send(json.dumps(message).encode())

    # Versions

    def _reload(self, path: str | None) -> Json:
        return self._replace_all(self._updater.opened(None if path is None else Path(path)), self._updater.reloaded)

    def _refresh(self) -> Json:
        before, version = self._updater.current, self._updater.refreshed()
        if version is before:
            return version.as_refreshed()

        return self._replace_all(version, self._served)

    def _served(self, fresh: Version) -> Json:
        self._updater.serve(fresh)
        return fresh.as_refreshed()

    def _replace_all(self, version: Version, serve: Callable[[Version], Json]) -> Json:
        """Let new workers answer for a version, or leave everything as it is."""
        before, self._updater.current = self._updater.current, version
        freeze_garbage_collector()
        started = self._take_over()
        self._updater.current = before
        if not started:
            raise DataError("The new version is not served: its workers did not start. The log has the reason.")
        return serve(version)

    # Workers

    def _take_over(self) -> bool:
        """Start workers for the current version. When all answer, retire the old ones. Return False if one does not start."""
        began = time.monotonic()
        old, new = self._current, [self._fork() for _ in range(self._config.workers)]
        if not self._await(new, START_S, lambda worker: worker.ready):
            for pid in [] if self._ending else new:  # a signal that ends the server has reached them: they drain
                self._kill(pid)
            return False
        self._current = new
        log.info("%d workers have started in %.2f s", len(new), time.monotonic() - began)
        for pid in old:
            if pid in self._workers:
                self._tell(self._workers[pid], {"retire": 1})
        self._await([pid for pid in old if pid in self._workers], RETIRE_S, lambda worker: worker.retired, strict=False)
        return True

    def _await(self, pids: list[int], seconds: float, done: Callable[[Worker], bool], *, strict: bool = True) -> bool:
        """Wait until all these workers are done; `strict`: and none has ended."""
        end = time.monotonic() + seconds
        while not all(done(self._workers[pid]) for pid in pids if pid in self._workers):
            left = end - time.monotonic()
            if left <= 0 or self._ending or (strict and any(pid not in self._workers for pid in pids)):
                return False
            for worker, message in self._messages(min(left, 1.0), set(pids)):
                worker.ready |= "ready" in message
                worker.retired |= "retired" in message
        return not strict or all(pid in self._workers for pid in pids)

    def _fork(self) -> int:
        number = next(one for one in range(len(self._bells)) if all(one != worker.seat for worker in self._workers.values()))
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            self._become_worker(mine, theirs, number)
        theirs.close()
        self._workers[pid] = Worker(pid, number, mine, time.monotonic())
        self._selector.register(mine, selectors.EVENT_READ, pid)
        if self._ending:  # the signal came before this worker
            self._kill(pid, self._ending)
        return pid

    def _become_worker(self, mine: socket.socket, theirs: socket.socket, number: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(one, signal.SIG_IGN if one == signal.SIGHUP else signal.SIG_DFL)
            for end in (mine, *(worker.pipe for worker in self._workers.values())):
                end.close()  # so that it notices when the supervisor has gone
            self._work(
                Seat(
                    number=number,
                    pipe=theirs,
                    counts=self._counts,
                    bells=self._bells,
                    handover=self._handover,
                    metrics=self._metrics,
                )
            )
        except BaseException:
            log.exception("a worker has not started")
        finally:
            os._exit(1)

    def _reap(self) -> None:
        """Note the workers that have ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            worker = self._workers.pop(pid, None)
            if worker is None:
                continue
            with suppress(KeyError):
                self._selector.unregister(worker.pipe)
            worker.pipe.close()
            self._counts.set_ready(worker.seat, ready=False)
            self._metrics.forget(pid)
            if pid in self._current and not self._ending:
                log.error("worker %d has ended: %s; another one starts", pid, _how(status))

    def _replace_dead(self) -> None:
        """Start workers in place of those that have ended."""
        alive = [pid for pid in self._current if pid in self._workers]
        young = any(time.monotonic() - self._workers[pid].began < PAUSE_S for pid in alive)
        missing = self._config.workers - len(alive)
        self._current = alive
        if missing and not young and not self._ending:
            made = [self._fork() for _ in range(missing)]
            self._await(made, START_S, lambda worker: worker.ready)
            self._current = [*alive, *made]

    def _kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def _end(self) -> None:
        """Wait for the end of all workers. Those that do not end in time are killed."""
        while self._workers and time.monotonic() < self._stop_by:
            self._selector.select(0.05)
            with suppress(BlockingIOError):
                self._woken.recv(4096)
            self._reap()
        for pid in list(self._workers):
            log.warning("worker %d did not end in time and is killed", pid)
            self._kill(pid)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"
