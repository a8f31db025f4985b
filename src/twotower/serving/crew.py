"""Start worker processes, listen to them, and end them.

Each worker has a seat: a row of shared numbers and an eventfd. There are more seats than workers that answer, because workers of
earlier versions finish their requests.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from twotower.errors import BusyError
from twotower.serving.metrics_sum import MetricsFolder
from twotower.serving.shared_counts import SharedCounts
from twotower.serving.worker import MESSAGE_BYTES, Handover, Seat
from twotower.utils.console import log
from twotower.utils.types import Json

SEATS_S = 60.0  # time for workers of earlier versions to finish, when others need their seats


@dataclass(slots=True)
class Worker:
    """A running worker, as its supervisor sees it."""

    pid: int
    seat: int
    pipe: socket.socket
    began: float
    ready: bool = False
    retired: bool = False


class Crew:
    """The worker processes of a supervisor.

    Parameters
    ----------
    work
        Runs a worker in a new process and ends it.
    seats
        Number of workers that can exist at once.
    metrics
        Keeps the counts of workers that have ended.
    ending
        Returns the signal that ends the server; 0: none.
    ended
        Called with the process id and the status of a worker that has ended.

    Attributes
    ----------
    workers
        Running workers by process id.
    asked
        What workers ask for, in order: the worker and its message.
    """

    def __init__(
        self,
        work: Callable[[Seat], NoReturn],
        seats: int,
        metrics: MetricsFolder,
        ending: Callable[[], int],
        ended: Callable[[int, int], None],
    ) -> None:
        self._work, self._metrics, self._ending, self._ended = work, metrics, ending, ended
        self._pid, self.counts, self._handover = os.getpid(), SharedCounts(seats), Handover()
        self._bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(seats)]
        self.workers: dict[int, Worker] = {}
        self.asked: deque[tuple[Worker, Json]] = deque()
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def listen(self, seconds: float) -> None:
        """Wait for messages. Note what workers say about themselves, what they ask for, and which ones have ended."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
                continue
            worker = self.workers[key.data]
            try:
                received = worker.pipe.recv(MESSAGE_BYTES)
            except OSError:  # it has ended and left messages unread
                received = b""
            if not received:
                self._selector.unregister(worker.pipe)
                continue
            message = json.loads(received)
            worker.ready |= "ready" in message
            worker.retired |= "retired" in message
            if "id" in message:
                self.asked.append((worker, message))
        self._reap()

    def tell(self, worker: Worker, message: Json) -> None:
        """Send a message to a worker; one that has ended is passed over."""
        with suppress(OSError):
            worker.pipe.send(json.dumps(message).encode())

    def wait(self, pids: list[int], seconds: float, done: Callable[[Worker], bool], *, strict: bool = True) -> bool:
        """Wait until all these workers are done; `strict`: and none has ended."""
        end = time.monotonic() + seconds
        while not all(done(self.workers[pid]) for pid in pids if pid in self.workers):
            left = end - time.monotonic()
            if left <= 0 or self._ending() or (strict and any(pid not in self.workers for pid in pids)):
                return False
            self.listen(min(left, 1.0))
        return not strict or all(pid in self.workers for pid in pids)

    def start(self, wanted: int) -> list[int]:
        """Start workers, and return their process ids; fewer than wanted if the system has no room for them.

        Raises
        ------
        BusyError
            Too many workers of earlier versions still finish requests.
        """
        end, made = time.monotonic() + SEATS_S, list[int]()
        while len(self._bells) - len(self.workers) < wanted:
            if time.monotonic() > end or self._ending():
                raise BusyError("Workers of earlier versions still finish requests. Try again later.")
            self.listen(0.1)
        try:
            for _ in range(wanted):
                made.append(self._fork())
        except OSError as error:
            log.error("a worker cannot be started: %s", error.strerror)
        return made

    def _fork(self) -> int:
        number = next(one for one in range(len(self._bells)) if all(one != worker.seat for worker in self.workers.values()))
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError:
            mine.close()
            theirs.close()
            raise
        if pid == 0:
            self._become_worker(mine, theirs, number)
        theirs.close()
        self.workers[pid] = Worker(pid, number, mine, time.monotonic())
        self._selector.register(mine, selectors.EVENT_READ, pid)
        if self._ending():  # the signal came before this worker
            kill(pid, self._ending())
        return pid

    def _become_worker(self, mine: socket.socket, theirs: socket.socket, number: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(one, signal.SIG_IGN if one == signal.SIGHUP else signal.SIG_DFL)
            for end in (mine, *(worker.pipe for worker in self.workers.values())):
                end.close()  # so that it notices when the supervisor has gone
            self._work(
                Seat(
                    number=number,
                    parent=self._pid,
                    pipe=theirs,
                    counts=self.counts,
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
            worker = self.workers.pop(pid, None)
            if worker is None:
                continue
            with suppress(KeyError):
                self._selector.unregister(worker.pipe)
            worker.pipe.close()
            self.counts.set_ready(worker.seat, ready=False)
            self._metrics.forget(pid)
            self._ended(pid, status)

    def end(self, stop_by: float) -> None:
        """Wait for the end of all workers. Those that do not end in time are killed."""
        while self.workers and time.monotonic() < stop_by:
            self._selector.select(0.05)
            with suppress(BlockingIOError):
                self._woken.recv(4096)
            self._reap()
        for pid in list(self.workers):
            log.warning("worker %d did not end in time and is killed", pid)
            kill(pid)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def how(status: int) -> str:
    """Return how a process has ended, from its status.

    Examples
    --------
    >>> how(9), how(256)
    ('killed by SIGKILL', 'exit code 1')
    """
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"
