"""Provide a thread-safe least-recently-used (LRU) cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """Cache of at most `most` values; the least recently used one is removed first.

    Examples
    --------
    >>> cache = LRUCache(1)
    >>> cache.put("a", 1), cache.put("b", 2)
    (1, 2)
    >>> cache.get("a"), cache.get("b")
    (None, 2)
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """Return the value of `key` and mark it as used, or None if it is not cached."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: Value) -> Value:
        """Store `value` under `key` and return it."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return value
