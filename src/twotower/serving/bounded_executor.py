"""Run lookups (searches for items and users, histories) in a few threads, with a bound on the number that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from twotower.errors import BusyError

THREADS = 4
Given = ParamSpec("Given")
Found = TypeVar("Found")


class Lookups:
    """Runs functions in threads, at most `most` running or waiting. A cancelled one counts until it ends."""

    def __init__(self, most: int) -> None:
        self.most, self._slots = most, threading.BoundedSemaphore(most)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lookups")

    async def __call__(self, look: Callable[Given, Found], *given: Given.args, **named: Given.kwargs) -> Found:
        """Run `look` in a thread and return its result.

        Raises
        ------
        BusyError
            `most` functions are running or waiting already.
        """
        if not self._slots.acquire(blocking=False):
            raise BusyError(f"Too many lookups are waiting: at most {self.most} are allowed. Try again later.")
        under_way = self._threads.submit(look, *given, **named)
        under_way.add_done_callback(lambda _: self._slots.release())
        return await asyncio.wrap_future(under_way)
