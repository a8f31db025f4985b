"""Hold the training events of a dataset by user, shared by the processes of a training, and choose those of an update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.features.point_in_time import History
from twotower.schema import TRAIN
from twotower.utils.ragged import lengths_to_offsets
from twotower.utils.types import Float, Int, Mask


@dataclass(frozen=True, slots=True)
class Replay:
    """The training events that an update trains on: all new ones, and a sample of the old ones.

    Attributes
    ----------
    fresh_from_s
        Events from this second on are new; the model has been trained on the earlier ones.
    old_frac
        Share of the old members that an epoch has; see `Objective`.
    """

    fresh_from_s: int
    old_frac: float

    def chosen(self, members: Int, fresh: Mask, rng: np.random.Generator) -> Int:
        """Return the fresh members and a random sample of the others.

        Examples
        --------
        >>> Replay(0, 0.5).chosen(np.arange(4), np.array([False, False, True, True]), np.random.default_rng(0)).tolist()
        [2, 3, 1]
        """
        old = members[~fresh]
        return np.concatenate([members[fresh], rng.choice(old, round(self.old_frac * len(old)), replace=False)])


class TrainEvents:
    """Training events by user; the only events that an objective may read.

    Every process knows all targets but reads only the histories of its own range of users, which is one slice of the files.

    Parameters
    ----------
    rank, world_size
        Number of this process, and number of processes.
    replay
        Of an update: the events to train on; None: all.

    Attributes
    ----------
    offsets, positive, fresh
        int64 [n_user_rows + 1], bool [E], [E]: start of each user's events among all training events, which may be targets, and
        which are new to the model.
    shares
        int64 [world + 1]: the events of process r are shares[r]:shares[r + 1], balanced as far as whole users allow.
    first_user, first
        First user of this process, and the first of its events.
    history
        Ragged events of the users of this process, with prefix sums.
    user_row, weight
        User row and weight of each of these events.
    positive_offsets, positive_items
        Distinct positive items of each user of this process, ragged.

    Raises
    ------
    TrainingError
        There are more processes than users with training events.
    """

    def __init__(
        self, dataset: Dataset, location: Float, *, rank: int = 0, world_size: int = 1, replay: Replay | None = None
    ) -> None:
        self._all = events = dataset.events
        self._kept, self.replay = np.flatnonzero(events.split == TRAIN), replay
        self.fresh = events.time_s[self._kept] >= replay.fresh_from_s if replay else np.ones(len(self._kept), np.bool_)
        self.positive = events.positive[self._kept] & (events.weight[self._kept] > 0)
        self.offsets = np.searchsorted(self._kept, events.offsets)
        users = user_shares(self.offsets, world_size)
        self.shares = self.offsets[users]
        self.first_user, self.first = users[rank], self.shares[rank]
        offsets = self.offsets[users[rank] : users[rank + 1] + 1] - self.first
        own = self._kept[self.first : self.shares[rank + 1]]
        self.history = History(
            offsets, events.item_row[own], events.time_s[own], events.event_type[own], events.stars[own], location
        )
        self.weight = events.weight[own]
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        self.user_row = row + self.first_user
        positive = self.positive[self.first : self.shares[rank + 1]]
        pairs = np.unique(row[positive] * dataset.n_item_rows + self.history.item_row[positive])
        self.positive_offsets = lengths_to_offsets(np.bincount(pairs // dataset.n_item_rows, minlength=len(offsets) - 1))
        self.positive_items = pairs % dataset.n_item_rows

    def targets(self, event: Int) -> tuple[Int, Int, Float]:
        """Return item rows, times and weights of training events, given their positions among those of all users."""
        at = self._kept[event]
        return self._all.item_row[at], self._all.time_s[at], self._all.weight[at]

    def lists(self, event: Int) -> Int:
        """Return the number of the list from which the item of each training event was chosen, 0 if unknown."""
        return np.zeros_like(event) if self._all.request is None else self._all.request[self._kept[event]]

    def owner(self, event: Int) -> Int:
        """Return the process that holds each training event, given positions among those of all users."""
        return np.asarray(np.searchsorted(self.shares, event, side="right") - 1)


def user_shares(offsets: Int, world_size: int) -> Int:
    """Return int64 [world + 1]: first user of each process, so that the processes have about equally many events.

    `offsets` are those of the users' events. Every process gets at least one user with events.

    Examples
    --------
    >>> user_shares(np.array([0, 2, 4, 8]), 2)
    array([0, 2, 3])
    """
    active = np.flatnonzero(np.diff(offsets))
    if world_size > max(len(active), 1):
        raise TrainingError(
            f"{world_size:,} processes are more than the {len(active):,} users with training events. Every process needs at least "
            "one of these users. Start fewer processes."
        )
    each = np.arange(world_size)
    cut = np.searchsorted(offsets[active], offsets[-1] * each / world_size)
    cut = np.minimum(np.maximum.accumulate(cut - each) + each, len(active) - world_size + each)  # every process has users
    return np.array([0, *active[cut[1:]], len(offsets) - 1])
