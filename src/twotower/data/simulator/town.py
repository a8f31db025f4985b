"""Define the simulated town: the true preferences of its users and the probability of every choice.

`Truth` holds all parameters; `simulate` writes them to a file. Events are drawn from exactly the probabilities of `Truth.scores`,
so its ranking is an upper bound for every model.

A user chooses an item at time t, given the items visited so far (oldest first, h_1 … h_n), in two steps:

1. With probability `user_habit` (0 without a history) the user returns to h_j; j is drawn with weight habit_decay^(n - j). If that
   item has closed, step 2 follows.
2. Otherwise the user chooses among all items open at t, with probability proportional to

       popularity × nearness × category × taste × price × novelty

   nearness   far + Σ over home and second location of anchor × exp(-km / decay_km), within the same town
   category   rhythm of the category at this hour of the week × (1 + weight of the category, if it is one of the four favourites)
   taste      exp(⟨user at t, item⟩); the user's vector and favourites drift from one end to the other over drift_s
   price      exp(-price × (price level - budget)²)
   novelty    exp(-hype × (1 - exp(-age / hype_s))) of the item, × `again` if it was visited before
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from twotower.errors import DataError, clause
from twotower.schema import DAY_S, HOURS_PER_WEEK
from twotower.utils.types import Array, Float, Float64, Int

NEVER = np.float32(-1e9)  # score of an item that is closed, not yet open, or unknown
STILL_OPEN = np.iinfo(np.int64).max
HOUR_S, WEEK_S = 3_600, 7 * DAY_S
START_S, WEEKS = 1_262_563_200, 628  # Monday 2010-01-04 to Monday 2022-01-17
END_S = START_S + WEEKS * WEEK_S


@dataclass(frozen=True, slots=True)
class Tastes:
    """Parameters that all users share; see the formula of the module."""

    decay_km: float = 1.6
    anchor: float = 0.4
    """Weight of the second location; home has 1."""
    far: float = 0.01
    price: float = 0.35
    unpriced: float = 0.3
    """Squared distance from any budget, for items without a price."""
    hype: float = 0.4
    hype_s: float = 250.0 * DAY_S
    again: float = 0.03
    habit_decay: float = 0.9
    drift_s: float = 5 * 365.0 * DAY_S


@dataclass(frozen=True, slots=True)
class Truth:
    """All parameters of the town: `N` items, `U` users, `P` neighbourhoods (`place_`), `C` categories, `D` dimensions of taste.

    Kilometres are relative to a town. Ids have 22 bytes. `[2]` of users is home and second location, or both ends of the drift.
    """

    tastes: Tastes
    item_id: Array  # S22 [N]
    item_town: Array  # int32 [N]
    item_xy: Array  # float32 [N, 2] km
    item_category: Array  # int32 [N]
    item_price: Array  # int8 [N], 1-4, 0 = none
    item_log_pop: Array  # float32 [N]
    item_quality: Array  # float32 [N], moves stars
    item_latent: Array  # float32 [N, D], unit
    item_open_s: Array  # int64 [N]
    item_close_s: Array  # int64 [N]
    place_town: Array  # int32 [P], sorted
    place_xy: Array  # float32 [P, 2] km
    rhythm: Array  # float32 [C, 168], at most 1
    user_id: Array  # S22 [U]
    user_place: Array  # int32 [U, 2]
    user_favourite: Array  # int32 [U, 4] categories, distinct
    user_favour: Array  # float32 [U, 2, 4]
    user_latent: Array  # float32 [U, 2, D], both ends of the same length
    user_budget: Array  # float32 [U]
    user_habit: Array  # float32 [U]
    user_join_s: Array  # int64 [U]

    def save(self, path: Path) -> None:
        """Write all parameters to one safetensors file (ids as bytes)."""
        tensors = {
            name: array.view(np.uint8).reshape(-1, 22) if name.endswith("_id") else array for name, array in self._arrays().items()
        }
        save_file(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()},
            path,
            {"tastes": json.dumps(asdict(self.tastes))},
        )

    @classmethod
    def load(cls, path: Path) -> Truth:
        """Return the parameters in a file of `save`.

        Raises
        ------
        DataError
            The file is missing or was not written by `simulate`.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
                tastes = Tastes(**json.loads(file.metadata()["tastes"]))
            ids = {name: np.ascontiguousarray(arrays[name]).view("S22").ravel() for name in ("item_id", "user_id")}
            return cls(tastes=tastes, **{**arrays, **ids})
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise DataError(
                f"Cannot read {path}: {clause(error)}. It must be a file written by `twotower simulate`. Simulate the town again."
            ) from None

    def scores(
        self, user_ids: Sequence[str], time_s: Int, item_ids: Sequence[str] | None = None, history: tuple[Int, Int] | None = None
    ) -> Float:
        """Return the true log-probability of every item for each (user, time).

        Parameters
        ----------
        user_ids, time_s
            [B]: users and times (seconds).
        item_ids
            [M]: columns of the result; None: all N items in the order of the town. Unknown ids are allowed.
        history
            Offsets int64 [B + 1] and positions in `item_ids` int64 [T]: all items visited before that time, oldest first.

        Returns
        -------
        float32 [B, M]
            Natural logarithms, normalised over the N items; NEVER = -1e9 for unavailable items and unknown ids.

        Raises
        ------
        DataError
            A user id is unknown.
        """
        users = _rows(self.user_id, user_ids)
        if (users < 0).any():
            unknown_id = user_ids[int(np.argmax(users < 0))]
            raise DataError(f"User {unknown_id!r} is not in the simulated town. Use the truth file of the same raw folder.")
        columns = np.arange(len(self.item_id)) if item_ids is None else _rows(self.item_id, item_ids)
        offsets, visited = history if history is not None else (np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int64))
        visited = columns[visited]
        out = np.full((len(users), len(columns)), NEVER, np.float32)
        step = max(1, 2_000_000 // max(1, len(self.item_id)))
        for a in range(0, len(users), step):
            b = min(len(users), a + step)
            logs = self._log_probability(users[a:b], time_s[a:b], offsets[a : b + 1] - offsets[a], visited[offsets[a] : offsets[b]])
            out[a:b] = np.where(columns >= 0, logs[:, columns], NEVER)
        return out

    def _log_probability(self, users: Int, time_s: Int, offsets: Int, visited: Int) -> Float:
        utility, shape = self._utility(users, time_s), (len(users), len(self.item_id))
        row = np.repeat(np.arange(len(users)), np.diff(offsets))
        lag = offsets[1:][row] - np.arange(len(visited)) - 1  # 0 = most recent
        known = visited >= 0
        habit, seen = np.zeros(shape), np.zeros(shape, bool)
        np.add.at(habit, (row[known], visited[known]), self.tastes.habit_decay ** lag[known])
        seen[row[known], visited[known]] = True
        total = np.bincount(row, self.tastes.habit_decay**lag, len(users))
        habit *= (self.user_habit[users] / np.maximum(total, 1e-12))[:, None] * np.isfinite(utility)
        utility += np.log(self.tastes.again) * seen
        fresh = np.exp(utility - np.maximum(utility.max(1, keepdims=True), -1e300))
        fresh /= np.maximum(fresh.sum(1, keepdims=True), 1e-300)
        p = habit + (1 - habit.sum(1, keepdims=True)) * fresh
        with np.errstate(divide="ignore"):
            return np.asarray(np.maximum(np.log(p), NEVER), np.float32)

    def _utility(self, users: Int, time_s: Int) -> Float64:
        """Return the logarithm of the product of step 2, without `again`: float64 [B, N], -inf for closed items."""
        t, place = self.tastes, self.user_place[users]
        near = np.full((len(users), len(self.item_id)), t.far)
        for k, weight in enumerate((1.0, t.anchor)):
            home = place[:, k]
            km = np.linalg.norm(self.place_xy[home][:, None] - self.item_xy[None], axis=2)
            near += weight * np.exp(-km / t.decay_km) * (self.place_town[home][:, None] == self.item_town)
        latent, favour = self.drifted(users, time_s)
        wanted = np.ones((len(users), len(self.rhythm)))
        np.add.at(wanted, (np.arange(len(users))[:, None], self.user_favourite[users]), favour)
        wanted *= self.rhythm[:, hour_of_week(time_s)].T
        age = time_s[:, None] - self.item_open_s
        utility = np.log(near) + np.log(wanted)[:, self.item_category] + latent @ self.item_latent.T + self.item_log_pop
        utility -= t.price * self.price_gap(self.item_price, self.user_budget[users][:, None]) + t.hype * (
            1 - np.exp(-np.maximum(age, 0) / t.hype_s)
        )
        return np.where((age >= 0) & (time_s[:, None] < self.item_close_s), utility, -np.inf)

    def drifted(self, users: Int, time_s: Int) -> tuple[Float, Float]:
        """Return taste vectors [B, D] and weights of the favourite categories [B, 4] of users at given times."""
        share = np.clip((time_s - self.user_join_s[users]) / self.tastes.drift_s, 0, 1).astype(np.float32)[:, None]
        latent, favour = self.user_latent[users], self.user_favour[users]
        return latent[:, 0] + share * (latent[:, 1] - latent[:, 0]), favour[:, 0] + share * (favour[:, 1] - favour[:, 0])

    def price_gap(self, price: Array, budget: Array) -> Array:
        """Return the squared distance between price levels and budgets, broadcast; a constant for items without a price."""
        return np.where(price > 0, (price - budget) ** 2, self.tastes.unpriced)

    def _arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tastes"}


def hour_of_week(time_s: Int) -> Int:
    """Return hours since Monday 00:00, 0 to 167.

    Examples
    --------
    >>> hour_of_week(np.array([START_S, START_S - 3600]))
    array([  0, 167])
    """
    return (time_s // HOUR_S + 72) % HOURS_PER_WEEK  # 1970 began on a Thursday


def _rows(ids: Array, wanted: Sequence[str]) -> Int:
    order = np.argsort(ids, kind="stable")
    keys = np.array([str(x).encode() for x in wanted], "S64") if len(wanted) else np.zeros(0, "S64")
    at = np.minimum(np.searchsorted(ids[order], keys), len(ids) - 1)
    return np.where(ids[order][at] == keys, order[at], -1).astype(np.int64)
