"""Define the interface of everything that recommends: models, baselines, the oracle and served bundles.

`Retriever.retrieve` turns `Queries` (a history, a time and optionally a known user row each; columnar and ragged) into
`Recommendations` (item rows and scores, best first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from twotower.schema import UNKNOWN
from twotower.utils.ragged import concatenated, lengths_to_offsets, ragged_arange, taken
from twotower.utils.types import Float, Int, Mask


@dataclass(frozen=True, slots=True)
class Queries:
    """`B` queries: users and times to rank items for, each with the history before its time.

    Attributes
    ----------
    offsets
        int64 [B + 1]; the history of query b is the slice offsets[b]:offsets[b + 1] of the next four, oldest event first.
    item_row, event_time_s, event_type, stars
        [T]: item row, seconds, event type code (from 1; 0 is padding), stars (NaN if not given).
    time_s
        int64 [B]: time of the query in seconds; every event of the history is strictly earlier.
    user_row
        int64 [B]: row of the user (profile and id embedding), UNKNOWN = 1 for a new user.
    location
        float32 [B, 2]: latitude and longitude of the request in degrees, NaN if unknown.
    disliked
        Offsets int64 [B + 1] and item rows of the explicit negatives of each user before the time; None: no user has any.
    """

    offsets: Int
    item_row: Int
    event_time_s: Int
    event_type: Int
    stars: Float
    time_s: Int
    user_row: Int
    location: Float
    disliked: tuple[Int, Int] | None = None

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def lengths(self) -> Int:
        """Return the number of events of each history, int64 [B]."""
        return np.diff(self.offsets)

    @property
    def seen(self) -> tuple[Int, Int]:
        """Return offsets int64 [B + 1] and rows of the items that `exclude_seen` leaves out: the history and what is disliked."""
        return self.left_out(np.zeros(len(self), np.bool_))

    def left_out(self, again: Mask) -> tuple[Int, Int]:
        """Return offsets and rows of the history and, of the queries that are not in the mask `again` [B], of what is disliked."""
        history = self.offsets, self.item_row
        if self.disliked is None:
            return history
        offsets, rows = self.disliked
        kept = ~np.repeat(again, np.diff(offsets))
        return concatenated(history, (lengths_to_offsets(np.where(again, 0, np.diff(offsets))), rows[kept]))

    def slice(self, start: int, stop: int) -> Queries:
        """Return queries start to stop (exclusive), as views."""
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
            disliked=self.disliked and taken(self.disliked, np.arange(start, min(stop, len(self)))),
        )

    def take(self, rows: Int) -> Queries:
        """Return the queries `rows` int64 [n], in that order."""
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
            disliked=self.disliked and taken(self.disliked, rows),
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
        """Return queries from plain lists of item rows, oldest first, all at time `time_s` (seconds).

        Without `event_times_s`, events are one week apart and the last is one week before `time_s`. Without `user_rows`, all users
        are new.

        Examples
        --------
        >>> queries = Queries.of([[2, 3], []], time_s=1_700_000_000)
        >>> len(queries), queries.lengths.tolist()
        (2, [2, 0])
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
    """Item rows int64 [B, K] and scores float32 [B, K], best first; padded with -1 and -inf if fewer than K items are allowed."""

    items: Int
    scores: Float


class Retriever(Protocol):
    """Interface of a recommender; models, baselines and bundles implement it."""

    @property
    def name(self) -> str:
        """Its name in a report."""
        ...

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        """Return the `k` best items of each query.

        Rows PAD and UNKNOWN are never returned. Ties go to the lower row.

        Parameters
        ----------
        queries
            `B` queries.
        k
            Number of items per query. If fewer remain, the rest is -1 with score -inf.
        exclude_seen
            Leave out the items of the query's own history and those that the user dislikes.
        allow
            bool [n_item_rows] or [B, n_item_rows], over all rows: False leaves the item out.
        """
        ...
