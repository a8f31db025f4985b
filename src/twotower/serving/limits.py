"""Define the bounds of requests that are part of the API. Those that an operator may change are in `utils.config_serving`."""

from __future__ import annotations

MAX_HISTORY_EVENTS = 1000  # history events in a request
MAX_K = 500
MAX_EXPLAINED_ITEMS = 100  # items in a request
MAX_BATCH_REQUESTS = 256  # requests in a batch
MAX_BATCH_ITEMS = 25_600  # items in all lists of a batch: 6 MB
MAX_BATCH_HISTORY_EVENTS = 10_000  # events in all histories of a batch
HEAVY_WEIGHT = 8  # requests from this weight on are computed on a thread of their own, so that light ones do not wait for them
MAX_JSON_MARKS = 100_000  # brackets, commas and colons of a body: its values cost time and memory, not its bytes
MAX_EVENTS_PER_REQUEST = 1000  # events in a request
MAX_ITEMS_PER_REQUEST = 1000  # items that a request changes
MAX_ID_CHARS = 256  # characters
MAX_FILTER_CHARS = 4000  # characters
MAX_FILTER_JSON_BYTES = 1 << 16  # bytes
LAST_S = 4_102_444_800  # the year 2100: later times are probably milliseconds
