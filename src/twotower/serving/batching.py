"""Run functions in one worker thread with a bounded queue, and batch the arguments that wait for the same function.

The queue is fair: clients take turns, so one that sends much delays itself. A client may fill half of the queue.

Arguments for the same function are passed to it as one list, in arrival order. An error of one argument affects only that
argument. A `BusyError` is raised at once when the queue is full, or when the deadline has passed before the work began.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twotower.errors import BusyError
from twotower.utils.console import log
from twotower.utils.hardware import trim_heap

TRIM_S = 0.5  # seconds between returns of memory to the system
PACE = 0.2  # weight of the latest batch in the moving average of the time per argument
Work = Callable[[Sequence[Any]], Sequence[Any]]
"""A function of a list of arguments. It returns a result or an exception for each argument, in order."""


@dataclass(slots=True)
class Unit:
    """One argument in the queue. Times are seconds of `time.perf_counter`."""

    work: Work
    argument: Any
    deadline: float
    since: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    weight: int = 1
    outcome: Any = None


class Batcher:
    """A worker thread with a bounded queue.

    Parameters
    ----------
    name
        Name of the thread and, in error messages, of the work: "answers" or "events".
    max_waiting
        Maximum number of arguments in the queue.
    max_batch
        Maximum total weight of the arguments per call; a single one may weigh more.
    on_batch
        Called for each batch with its size and the seconds that its first argument waited.
    heavy
        The thread computes on one core, so that others go on, and returns the memory of large results to the system.
    """

    def __init__(
        self,
        name: str,
        *,
        max_waiting: int,
        max_batch: int,
        on_batch: Callable[[int, float], None] | None = None,
        heavy: bool = False,
    ) -> None:
        self.name, self.max_waiting, self.max_batch = name, max_waiting, max_batch
        self._heavy, self._cores, self._trimmed_s = heavy, 1 if heavy else torch.get_num_threads(), 0.0
        self._queues: OrderedDict[str, deque[Unit]] = OrderedDict()  # by client; the first one is next
        self._waiting = 0
        self._changed = threading.Condition()
        self._closed, self._unit_s = False, 0.0  # moving average of seconds per argument
        self._on_batch = on_batch
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of arguments in the queue."""
        return self._waiting

    def waiting_of(self, client: str) -> int:
        """Return the number of arguments of one client in the queue."""
        return len(self._queues.get(client, ()))

    @property
    def alive(self) -> bool:
        """Return True if the worker thread is alive."""
        return self._thread.is_alive()

    def submit(
        self, work: Work, arguments: Sequence[Any], deadline: float, client: str = "", weights: Sequence[int] = ()
    ) -> list[asyncio.Future[Any]]:
        """Queue all arguments or none. Return a future of the running loop for each. Without weights, each argument weighs 1.

        Raises
        ------
        BusyError
            See `admit`.
        """
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        units = [
            Unit(work, argument, deadline, now, loop, loop.create_future(), weight)
            for argument, weight in zip(arguments, weights or [1] * len(arguments), strict=True)
        ]
        with self._changed:
            self.admit(len(units), deadline, client)
            if units:  # no client is in the queue without an argument
                self._queues.setdefault(client, deque()).extend(units)
            self._waiting += len(units)
            self._changed.notify()
        return [unit.future for unit in units]

    def admit(self, count: int, deadline: float, client: str = "") -> None:
        """Check that `count` more arguments fit into the queue and can be done before the deadline at the current pace.

        Raises
        ------
        BusyError
            They do not fit, or cannot be done in time.
        """
        own = self.waiting_of(client) + count
        if self._closed or self._waiting + count > self.max_waiting:
            raise BusyError(f"Too many {self.name} are waiting: at most {self.max_waiting} can wait. Try again later.")
        before = min(self._waiting + count, own * (len(self._queues) + 1))  # clients take turns
        if before > count and time.perf_counter() + before * self._unit_s > deadline:
            raise BusyError(f"Too many {self.name} are waiting to be done before the deadline. Try again later.")

    def close(self) -> None:
        """Finish the queued work, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._cores)  # OpenMP and MKL have a number for each thread
        while units := self._next():
            now = time.perf_counter()
            timely = [unit for unit in units if unit.deadline > now]
            late = [unit for unit in units if unit.deadline <= now]
            for unit in late:
                unit.outcome = BusyError(f"The deadline passed while {len(units)} {self.name} were waiting. Try again later.")
            if timely and self._on_batch is not None:
                self._on_batch(len(timely), now - timely[0].since)
            if timely:
                _do(timely)
                pace = (time.perf_counter() - now) / len(timely)
                self._unit_s += PACE * (pace - self._unit_s) if self._unit_s else pace
            _deliver(units)
            if self._heavy and now > self._trimmed_s + TRIM_S:
                self._trimmed_s = now
                trim_heap()

    def _next(self) -> list[Unit]:
        """Return the next batch, all for one function; empty after `close` when the queue is empty."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            units: list[Unit] = []
            skipped, left = 0, self.max_batch
            while self._queues and skipped < len(self._queues):
                client, queue = next(iter(self._queues.items()))
                if units and (queue[0].work != units[0].work or queue[0].weight > left):
                    skipped += 1
                else:
                    skipped = 0
                    units.append(queue.popleft())
                    left -= units[-1].weight
                if queue:
                    self._queues.move_to_end(client)
                else:
                    del self._queues[client]
            self._waiting -= len(units)
            return units


def _do(units: Sequence[Unit]) -> None:
    """Set the outcome of every unit: its result or the exception."""
    try:
        for unit, result in zip(units, units[0].work([unit.argument for unit in units]), strict=True):
            unit.outcome = result
    except Exception as error:
        for unit in units:
            unit.outcome = error


def _deliver(units: Sequence[Unit]) -> None:
    try:
        for loop in {unit.loop for unit in units}:
            loop.call_soon_threadsafe(_resolve_futures, [unit for unit in units if unit.loop is loop])
    except RuntimeError:  # the loop has ended
        log.warning("dropped %d results: the server has stopped", len(units))


def _resolve_futures(units: Sequence[Unit]) -> None:
    for unit in units:
        if unit.future.done():  # the client has disconnected
            continue
        if isinstance(unit.outcome, BaseException):
            unit.future.set_exception(unit.outcome)
        else:
            unit.future.set_result(unit.outcome)
