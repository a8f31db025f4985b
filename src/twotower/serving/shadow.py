"""Let a second version compute the lists that another one has answered, without an effect on these answers.

It has a thread and a short queue of its own. What does not fit is dropped. After each list the thread rests for as long as the list
took, so that it uses at most half of a core.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from twotower.errors import RequestError
from twotower.serving.model_version import Engine, Listed, Question
from twotower.serving.prometheus import Meters
from twotower.utils.console import log

MAX_WAITING = 64  # lists
MAX_REST_S = 1.0
CLOSE_S = 1.0  # time for the list in progress when the server ends


class Shadow:
    """Computes lists in the background and compares them."""

    def __init__(self, meters: Meters) -> None:
        self._meters, self._queue = meters, deque[tuple[Engine, Question, set[str]]]()
        self._changed, self._closed = threading.Condition(), False
        self._thread: threading.Thread | None = None
        self._failed = False

    def offer(self, engine: Engine, question: Question, listed: Listed) -> None:
        """Compute a list with `engine`, too, if there is time. Never waits and never fails."""
        with self._changed:
            if len(self._queue) >= MAX_WAITING or self._closed:
                self._meters.shadow("dropped")
                return
            self._queue.append((engine, question, {str(item.item_id) for item in listed.answer.items}))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Leave out what waits, and end."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                engine, question, shown = self._queue.popleft()
            began = time.perf_counter()
            self._compare(engine, question, shown, began)
            time.sleep(min(time.perf_counter() - began, MAX_REST_S))

    def _compare(self, engine: Engine, question: Question, shown: set[str], began: float) -> None:
        try:
            (listed,) = engine.answer([question])
            if isinstance(listed, RequestError):
                raise listed
        except Exception as error:  # of any kind: it must not reach the answers of the other version
            self._meters.shadow("failed")
            if not self._failed:
                log.warning("the shadow version fails: %s: %s", type(error).__name__, " ".join(str(error).split())[:200])
            self._failed = True
            return
        self._failed = False
        same = sum(str(item.item_id) in shown for item in listed.answer.items)
        self._meters.shadow("answered", time.perf_counter() - began, same / len(shown) if shown else 1.0)
