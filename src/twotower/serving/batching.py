"""One thread that computes, and the queue before it: what waits together is done together.

Enters: functions over lists, with one argument each. Leaves: their results, or a `BusyError` at once when too much waits already,
and when the deadline has passed before the work began.

Promises: arguments that wait for the same function are handed to it in one list, in the order they came; the mistake of one is
told to that one alone; nothing waits without a bound.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.errors import BusyError
from twotower.utils.console import log

PACE = 0.2  # weight of the latest batch in what is thought of the pace
Work = Callable[[Sequence[Any]], Sequence[Any]]
"""A function of a list: for each argument a result, or the exception that tells of its mistake, in their order."""


@dataclass(slots=True)
class Unit:
    """One argument on its way through the queue; times are seconds of `time.perf_counter`."""

    work: Work
    argument: Any
    deadline: float
    since: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    outcome: Any = None


class Batcher:
    """A worker thread behind a bounded queue.

    Parameters
    ----------
    name
        Of the thread, and of what is done in errors: "answers", "events".
    max_waiting
        Arguments that may wait; one more is refused.
    max_batch
        Arguments handed over at once.
    on_batch
        Told of each: how many arguments, and the seconds the first had waited.
    """

    def __init__(
        self, name: str, *, max_waiting: int, max_batch: int, on_batch: Callable[[int, float], None] | None = None
    ) -> None:
        self.name, self.max_waiting, self.max_batch = name, max_waiting, max_batch
        self._queue: deque[Unit] = deque()
        self._changed = threading.Condition()
        self._closed, self._unit_s = False, 0.0  # seconds each argument took of late
        self._on_batch = on_batch
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Arguments in the queue."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether the worker works."""
        return self._thread.is_alive()

    def submit(self, work: Work, arguments: Sequence[Any], deadline: float) -> list[asyncio.Future[Any]]:
        """Queue every argument, or none; each gets a future of the running loop.

        Raises
        ------
        BusyError
            See `admit`.
        """
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        units = [Unit(work, argument, deadline, now, loop, loop.create_future()) for argument in arguments]
        with self._changed:
            self.admit(len(units), deadline)
            self._queue.extend(units)
            self._changed.notify()
        return [unit.future for unit in units]

    def admit(self, count: int, deadline: float) -> None:
        """Refuse what could not be queued, or not be done in time by the pace of late.

        Raises
        ------
        BusyError
            So many more arguments are too many now.
        """
        after = len(self._queue) + count
        if self._closed or after > self.max_waiting:
            raise BusyError(f"No more than {self.max_waiting} {self.name} may wait at once. Try again a little later.")
        if after > count and time.perf_counter() + after * self._unit_s > deadline:
            raise BusyError(f"As many {self.name} wait as can be done in time. Try again a little later.")

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while units := self._next():
            now = time.perf_counter()
            timely = [unit for unit in units if unit.deadline > now]
            late = [unit for unit in units if unit.deadline <= now]
            for unit in late:
                unit.outcome = BusyError(f"The time for an answer ran out while {len(units)} {self.name} waited. Try again later.")
            if timely and self._on_batch is not None:
                self._on_batch(len(timely), now - timely[0].since)
            if timely:
                _do(timely)
                pace = (time.perf_counter() - now) / len(timely)
                self._unit_s += PACE * (pace - self._unit_s) if self._unit_s else pace
            _deliver(units)

    def _next(self) -> list[Unit]:
        """What is done next, all of one function; empty when there will be nothing more."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            units: list[Unit] = []
            while self._queue and len(units) < self.max_batch and (not units or self._queue[0].work == units[0].work):
                units.append(self._queue.popleft())
            return units


def _do(units: Sequence[Unit]) -> None:
    """Put an outcome into every unit: a result, or the exception."""
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
    except RuntimeError:  # the loop has ended: nobody waits any more
        log.warning("%d results came after the server had stopped", len(units))


def _resolve_futures(units: Sequence[Unit]) -> None:
    for unit in units:
        if unit.future.done():  # whoever asked has gone
            continue
        if isinstance(unit.outcome, BaseException):
            unit.future.set_exception(unit.outcome)
        else:
            unit.future.set_result(unit.outcome)
