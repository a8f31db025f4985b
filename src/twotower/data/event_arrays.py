"""Define the events of a dataset as arrays, by user and by item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twotower.utils.types import Float, Int, Mask


class _ByUser:
    """Rows of users laid end to end."""

    __slots__ = ()
    offsets: Int
    item_row: Int

    def __len__(self) -> int:
        return len(self.item_row)

    @property
    def user_row(self) -> Int:
        """Return the user row of each row, int64."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True, slots=True)
class Events(_ByUser):
    """Events of users with an id, by user, oldest first.

    Attributes
    ----------
    offsets
        int64 [n_user_rows + 1]: the events of user row u are offsets[u]:offsets[u + 1].
    item_row, time_s, event_type
        int64 [E]: item row; seconds (position in the user's sequence if events have no times); code (`Dataset.event_types`).
    stars, weight
        float32 [E]: stars (NaN if not given); weight in the loss.
    positive
        bool [E]: True for events that may be targets.
    split
        int8 [E]: TRAIN, VALID, TEST or WITHHELD.
    request
        int64 [E]: number of the list from which the item was chosen, 0 if unknown; None if all are unknown.
    """

    offsets: Int
    item_row: Int
    time_s: Int
    event_type: Int
    stars: Float
    weight: Float
    positive: Mask
    split: NDArray[np.int8]
    request: Int | None = None


@dataclass(frozen=True, slots=True)
class NegativeEvents(_ByUser):
    """Explicit negatives and impressions of users, by user, oldest first; no history and no popularity counts them.

    Attributes
    ----------
    offsets
        int64 [n_user_rows + 1]: the rows of user row u are offsets[u]:offsets[u + 1].
    item_row, time_s, stars, split
        [N]: as in `Events`.
    event_type
        int64 [N]: code from 0 (`DatasetManifest.negative_types`).
    weight
        float32 [N]: size of the weight of the event type; of an impression, 1 / position.
    impression
        bool [N]: True if the item was only shown.
    position, request
        int64 [N]: position in the list, and number of the list as in `Events`; 0 if unknown.
    """

    offsets: Int
    item_row: Int
    time_s: Int
    event_type: Int
    stars: Float
    weight: Float
    split: NDArray[np.int8]
    impression: Mask
    position: Int
    request: Int


@dataclass(frozen=True, slots=True)
class ItemEvents:
    """All events, including anonymous ones, by item, oldest first.

    Attributes
    ----------
    offsets
        int64 [n_item_rows + 1]: the events of item row i are offsets[i]:offsets[i + 1].
    time_s, stars, split
        [V]: as in `Events`.
    """

    offsets: Int
    time_s: Int
    stars: Float
    split: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def item_row(self) -> Int:
        """Return the item row of each event, int64 [V]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
