"""The one interface of everything that recommends: a model, a baseline, an oracle, a served bundle. No exceptions.

`Queries` go in (columnar and ragged: who asks is described by a history, a moment and optionally a known user row), and
`Recommendations` come out (rows and scores, best first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from twotower.schema import UNKNOWN
from twotower.utils.ragged import lengths_to_offsets, ragged_arange
from twotower.utils.types import Float, Int, Mask


@dataclass(frozen=True, slots=True)
class Queries:
    """`B` questions "what next?", each with the history known at its moment.

    Attributes
    ----------
    offsets
        int64 [B + 1]; the history of query b is the slice offsets[b]:offsets[b + 1] of the next four, oldest event first.
    item_row, event_time_s, event_type, stars
        [T]: item row, seconds, event type code (from 1; 0 is padding), stars (NaN where none were given).
    time_s
        int64 [B]: the moment of the question; every event of the history is strictly earlier.
    user_row
        int64 [B]: the user's row (profile and id embedding), UNKNOWN = 1 when there is none. Never required.
    location
        float32 [B, 2]: latitude and longitude the request comes from, NaN when unknown.
    """

    offsets: Int
    item_row: Int
    event_time_s: Int
    event_type: Int
    stars: Float
    time_s: Int
    user_row: Int
    location: Float

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def lengths(self) -> Int:
        """int64 [B]: events per history."""
        return np.diff(self.offsets)

    def slice(self, start: int, stop: int) -> Queries:
        """Queries start..stop (exclusive), as views."""
        a, b = int(self.offsets[start]), int(self.offsets[min(stop, len(self))])
        return Queries(
            offsets=self.offsets[start : stop + 1] - a,
            item_row=self.item_row[a:b],
            event_time_s=self.event_time_s[a:b],
            event_type=self.event_type[a:b],
            stars=self.stars[a:b],
            time_s=self.time_s[start:stop],
            user_row=self.user_row[start:stop],
            location=self.location[start:stop],
        )

    def take(self, rows: Int) -> Queries:
        """Queries `rows` int64 [n], in that order."""
        start, length = self.offsets[rows], self.lengths[rows]
        _, at = ragged_arange(start, length)
        return Queries(
            offsets=lengths_to_offsets(length),
            item_row=self.item_row[at],
            event_time_s=self.event_time_s[at],
            event_type=self.event_type[at],
            stars=self.stars[at],
            time_s=self.time_s[rows],
            user_row=self.user_row[rows],
            location=self.location[rows],
        )

    @classmethod
    def of(
        cls,
        histories: list[list[int]],
        *,
        time_s: int,
        event_times_s: list[list[int]] | None = None,
        user_rows: list[int] | None = None,
        location: tuple[float, float] | None = None,
        event_type: int = 1,
    ) -> Queries:
        """Queries from plain lists of item rows, oldest first; all asked at `time_s`.

        Without `event_times_s` the visits count as one a week, the last a week ago; without `user_rows` nobody is known.
        """
        lengths = [len(history) for history in histories]
        week = 7 * 86_400
        times = event_times_s or [[time_s - week * (n - j) for j in range(n)] for n in lengths]
        flat = np.array([row for history in histories for row in history], np.int64)
        size = len(histories)
        return cls(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            item_row=flat,
            event_time_s=np.array([t for row in times for t in row], np.int64),
            event_type=np.full(len(flat), event_type, np.int64),
            stars=np.full(len(flat), np.nan, np.float32),
            time_s=np.full(size, time_s, np.int64),
            user_row=np.array(user_rows or [UNKNOWN] * size, np.int64),
            location=np.full((size, 2), location or (np.nan, np.nan), np.float32),
        )


@dataclass(frozen=True, slots=True)
class Recommendations:
    """Item rows int64 [B, K] and scores float32 [B, K], best first; -1 and -inf where fewer than K items were allowed."""

    items: Int
    scores: Float


class Retriever(Protocol):
    """Whatever recommends."""

    @property
    def name(self) -> str:
        """Its name in a report."""
        ...

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """Return the `k` best items of each query.

        Rows PAD and UNKNOWN are never returned; ties go to the lower row. `exclude_seen` leaves out the items of the query's
        own history. `allow` is bool [n_items] or [B, n_items], over all rows: False leaves the item out. Where fewer than `k`
        items remain the rest is -1 / -inf.
        """
        ...
