"""Define the held-out queries of a dataset and their targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twotower.retriever import Queries
from twotower.utils.ragged import lengths_to_offsets, ragged_arange
from twotower.utils.types import Int


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Queries of a split and their targets.

    Attributes
    ----------
    queries
        `B` queries, by user, then time.
    target_offsets, target_row
        int64 [B + 1], [T]: distinct items (rows ascending) of the positive events of each query.
    event_index
        int64 [T]: first event of each target, as a position in `Dataset.events`.
    """

    queries: Queries
    target_offsets: Int
    target_row: Int
    event_index: Int

    @property
    def seen_targets(self) -> int:
        """Number of targets that are in the history of their query."""
        parts = (self.queries.offsets, self.queries.item_row), (self.target_offsets, self.target_row)
        seen, wanted = ((np.repeat(np.arange(len(at) - 1), np.diff(at)) << 32) + rows for at, rows in parts)
        return int(np.isin(wanted, seen).sum())

    def targets(self, rows: Int) -> tuple[Int, Int]:
        """Return the position in `rows` and the item row of every target of these queries, int64 [T]."""
        query, at = ragged_arange(self.target_offsets[rows], np.diff(self.target_offsets)[rows])
        return query, self.target_row[at]

    def by_time(self) -> HeldOut:
        """Return the same queries in the order of their times."""
        order = np.argsort(self.queries.time_s, kind="stable")
        size = np.diff(self.target_offsets)[order]
        _, at = ragged_arange(self.target_offsets[order], size)
        return HeldOut(self.queries.take(order), lengths_to_offsets(size), self.target_row[at], self.event_index[at])
