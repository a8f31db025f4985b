"""What is looked up beside the answers: a few threads, and a bound on what waits for them."""

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
    """Functions run in threads, at most `most` under way or waiting; one that nobody waits for any more counts until it ends."""

    def __init__(self, most: int) -> None:
        self.most, self._room = most, threading.BoundedSemaphore(most)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lookups")

    async def __call__(self, look: Callable[Given, Found], *given: Given.args, **named: Given.kwargs) -> Found:
        """What `look` returns.

        Raises
        ------
        BusyError
            So many are under way already.
        """
        if not self._room.acquire(blocking=False):
            raise BusyError(f"No more than {self.most} lookups may wait at once. Try again a little later.")
        under_way = self._threads.submit(look, *given, **named)
        under_way.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(under_way)
