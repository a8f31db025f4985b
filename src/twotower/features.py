"""Rows and moments → tensors: the ONLY code that builds a model's input, for training, evaluation and recommendation alike.

Enters: encoded static arrays (`encoders.py`), the log of visits of the items, and histories. Leaves: `ItemBatch` and `UserBatch`.

Promise: every changing feature is a function of events strictly before the moment asked about. An item's state comes from
`ItemDynamics`, a user's from prefix sums over the history (`HistoryState`); neither knows anything later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.encoders import ELITE_BASE_YEAR, cell_rows, points_km
from twotower.retriever import Queries
from twotower.schema import DAY_S, FIRST_ROW, PAD, UNKNOWN, FeatureSpec

Int = NDArray[np.int64]
Array = NDArray[Any]

MEAN_STARS = 3.75  # a round figure near Yelp's mean; only centres the feature
RECENT_DAYS = 30
GAP_BUCKETS = 24  # log2 of seconds, capped
WIDTHS = (4, 8, 16, 32, 64, 128, 256)  # histories are padded to the next of these, or to the longest of the batch
STARS_BUCKETS = 8  # 0 padding, 1 none given, 2 … 7 for 0 to 5 stars
ITEM_STATE_WIDTH = 5
USER_STATE_WIDTH = 8
_TIME_BITS = 36  # seconds since 1970 up to the year 4147; leaves 27 bits for item rows


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One input field of a tower: how its tensor is turned into an embedding.

    Attributes
    ----------
    kind
        "rows": int64 [n] rows of a table; "bag": int64 [n, width] rows, 0 padded, averaged; "dense": float32 [n, width];
        "geo": int64 [n, 2] cells and, under `name.point`, float32 [n, 3] km.
    sizes
        Rows of the table(s), or the width of a dense field.
    table
        Fields that name the same table share it.
    """

    name: str
    kind: Literal["rows", "bag", "dense", "geo"]
    sizes: tuple[int, ...]
    table: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes that the data gives to the model.

    Attributes
    ----------
    items, users
        Rows of the two id tables, the reserved two included.
    event_types
        Kinds of events (codes 1 … event_types).
    item_fields, user_fields
        Input fields of each tower. An item's "state" changes with time, and is not part of a history's tokens.
    """

    items: int
    users: int
    event_types: int
    item_fields: tuple[FieldSpec, ...]
    user_fields: tuple[FieldSpec, ...]


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """Items `n`: `row` int64 [n] (rows of the id table) and one tensor per field [n, …]."""

    row: Tensor
    fields: dict[str, Tensor]

    def to(self, device: torch.device | str) -> ItemBatch:
        """Copy to a device."""
        return ItemBatch(self.row.to(device), {name: value.to(device) for name, value in self.fields.items()})


@dataclass(frozen=True, slots=True)
class UserBatch:
    """`S` histories laid end to end in `T` places, and `Q` moments at which a vector is wanted.

    Histories are sorted into a few widths and padded to their width only, so that short ones cost what they hold.

    Attributes
    ----------
    items
        The distinct items of all histories; the first is PAD.
    widths
        (histories, width) of each run of equal width: the first `histories · width` places are theirs, and so on.
    history
        int64 [T]: positions in `items`, oldest first, 0 after the end of each history.
    event_type, stars, gap
        int64 [T]: event type code, stars bucket, log2 bucket of the seconds since the event before.
    at, seen
        int64 [Q]: the place of the last event the moment sees, and how many it sees (0: none, `at` means nothing then).
    user_row
        int64 [Q]: rows of the user id table.
    fields
        One tensor per user field [Q, …].
    """

    items: ItemBatch
    widths: tuple[tuple[int, int], ...]
    history: Tensor
    event_type: Tensor
    stars: Tensor
    gap: Tensor
    at: Tensor
    seen: Tensor
    user_row: Tensor
    fields: dict[str, Tensor]

    def to(self, device: torch.device | str) -> UserBatch:
        """Copy to a device."""
        moved = {name: getattr(self, name).to(device) for name in self.__slots__ if name not in ("fields", "widths")}
        return replace(self, **moved, fields={name: value.to(device) for name, value in self.fields.items()})


@dataclass(frozen=True, slots=True)
class HistoryState:
    """What a history says about its user, as sums: so that any one event can be taken out again. Arrays over moments [Q].

    `place` is the sum of latitudes and longitudes [Q, 2] of the `place_n` events whose item has a place; times are seconds, 0 for none.
    """

    count: Int
    stars_sum: Array
    stars_n: Int
    place: Array
    place_n: Int
    first_s: Int
    last_s: Int


class History:
    """Ragged histories with prefix sums: the state of a user after any number of their events, in constant time.

    Parameters
    ----------
    offsets, item_row, time_s, event_type, stars
        As in `Queries`: [S + 1] and [T].
    place
        float [n_items, 2]: degrees of every item, NaN where unknown.
    """

    def __init__(self, offsets: Int, item_row: Int, time_s: Int, event_type: Int, stars: Array, place: Array) -> None:
        self.offsets, self.item_row, self.time_s, self.event_type, self.stars = offsets, item_row, time_s, event_type, stars
        self._rated = np.isfinite(stars)
        self._where = place[item_row].astype(np.float64) if len(place) else np.full((len(item_row), 2), np.nan)
        self._placed = np.isfinite(self._where).all(axis=1)
        self._stars_sum = _prefix(np.where(self._rated, stars, 0.0))
        self._stars_n = _prefix(self._rated)
        self._place = _prefix(np.where(self._placed[:, None], self._where, 0.0))
        self._place_n = _prefix(self._placed)

    def state(self, row: Int, pos: Int) -> HistoryState:
        """State after the first `pos` events of history `row`; both int64 [Q]."""
        a = self.offsets[row]
        b = a + pos
        some = pos > 0
        time_s = self.time_s if len(self.time_s) else np.zeros(1, np.int64)
        return HistoryState(
            count=pos,
            stars_sum=self._stars_sum[b] - self._stars_sum[a],
            stars_n=self._stars_n[b] - self._stars_n[a],
            place=self._place[b] - self._place[a],
            place_n=self._place_n[b] - self._place_n[a],
            first_s=np.where(some, time_s[np.minimum(a, len(time_s) - 1)], 0),
            last_s=np.where(some, time_s[b - 1], 0),
        )

    def state_without(self, row: Int, event: Int) -> HistoryState:
        """State after all events of history `row` but the one at position `event` of the flat arrays; both int64 [Q].

        `last_s` is the time of the event just before the one left out: what the user had done last when it happened.
        """
        a, b = self.offsets[row], self.offsets[row + 1]
        whole = self.state(row, b - a)
        own_stars = np.where(self._rated[event], self.stars[event], 0.0)
        own_place = np.where(self._placed[event][:, None], self._where[event], 0.0)
        second = np.where(b - a > 1, self.time_s[np.minimum(a + 1, len(self.time_s) - 1)], 0)
        return replace(
            whole,
            count=whole.count - 1,
            stars_sum=whole.stars_sum - own_stars,
            stars_n=whole.stars_n - self._rated[event],
            place=whole.place - own_place,
            place_n=whole.place_n - self._placed[event],
            first_s=np.where(event == a, second, self.time_s[a]),
            last_s=np.where(event > a, self.time_s[np.maximum(event - 1, 0)], 0),
        )


class ItemDynamics:
    """The state of any item at any moment, from the visits strictly before it.

    Parameters
    ----------
    item_row, time_s, stars
        Visits [V], sorted by (item_row, time_s); stars NaN where none were given.
    """

    def __init__(self, item_row: Int, time_s: Int, stars: Array) -> None:
        self._key = (item_row.astype(np.int64) << _TIME_BITS) + time_s
        self._time_s = time_s
        rated = np.isfinite(stars)
        self._stars_sum = _prefix(np.where(rated, stars, 0.0))
        self._stars_n = _prefix(rated)

    def state(self, row: Int, time_s: Int, *, without_stars: Array | None = None) -> NDArray[np.float32]:
        """Features float32 [n, 5] of item `row` just before `time_s` (both int64 [n]).

        Columns: log visits, mean stars (shrunk towards 3.75 by five), log visits of the last 30 days, log age in days since
        the first visit, and 1 where nothing was known. `without_stars` float [n] takes one visit with those stars out again
        (NaN: a visit without stars; infinite: takes nothing out).
        """
        base = row.astype(np.int64) << _TIME_BITS
        first = np.searchsorted(self._key, base)
        last = np.searchsorted(self._key, base + np.maximum(time_s, 0))
        recent = np.searchsorted(self._key, base + np.maximum(time_s - RECENT_DAYS * DAY_S, 0))
        count, recent_n = last - first, last - np.maximum(recent, first)
        stars_sum, stars_n = self._stars_sum[last] - self._stars_sum[first], self._stars_n[last] - self._stars_n[first]
        if without_stars is not None:
            taken, rated = ~np.isinf(without_stars), np.isfinite(without_stars)
            count, recent_n = np.maximum(count - taken, 0), np.maximum(recent_n - taken, 0)
            stars_sum, stars_n = stars_sum - np.where(rated, without_stars, 0.0), stars_n - rated
        opened = self._time_s[np.minimum(first, len(self._time_s) - 1)] if len(self._time_s) else np.zeros_like(time_s)
        age_days = np.where(count > 0, np.maximum(time_s - opened, 0) / DAY_S, 0.0)
        mean = (stars_sum - MEAN_STARS * stars_n) / (stars_n + 5.0)
        columns = [np.log1p(count) / 3, mean, np.log1p(recent_n) / 2, np.log1p(age_days) / 5, count == 0]
        return np.stack(columns, axis=1).astype(np.float32)


class FeatureStore:
    """Everything needed to turn rows and moments into batches.

    Parameters
    ----------
    item_static, user_static
        Encoded arrays over all rows (`encode_items`, `encode_users`).
    dynamics
        State of the items, or None where times mean nothing (sequences without a clock).
    n_trained_items, n_trained_users
        Entities with an id embedding: rows 2 … 2 + n - 1; every other row becomes UNKNOWN.
    cells
        Known coarse and fine cells of the items' "location", or None: then users have no home area.
    use_place
        Whether the place a request comes from is a feature of the user.
    max_history
        Most recent events read of a history.
    """

    def __init__(
        self,
        item_static: Mapping[str, Array],
        user_static: Mapping[str, Array],
        *,
        dynamics: ItemDynamics | None,
        n_trained_items: int,
        n_trained_users: int,
        cells: tuple[Array, Array] | None,
        max_history: int,
        use_place: bool = False,
    ) -> None:
        self._items = {name: _tensor(value) for name, value in item_static.items() if not name.endswith(".place")}
        self._user_static = user_static
        self._users = {name: _tensor(value) for name, value in user_static.items() if name not in ("since_s", "elite")}
        places = {name.removesuffix(".place"): value for name, value in item_static.items() if name.endswith(".place")}
        self._items |= {f"{name}.point": torch.from_numpy(points_km(value)) for name, value in places.items()}
        self.place: Array = next(iter(places.values()), np.zeros((0, 2), np.float32))
        self.dynamics, self._cells, self._use_place = dynamics, cells, use_place and cells is not None
        self._trained_items, self._trained_users = n_trained_items + FIRST_ROW, n_trained_users + FIRST_ROW
        self.max_history = max_history

    def with_dynamics(self, dynamics: ItemDynamics | None) -> FeatureStore:
        """Return the same store with another state of the items (another moment's knowledge)."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, dynamics=dynamics)
        return other

    def items(self, row: Int, time_s: Int | None = None, *, without_stars: Array | None = None) -> ItemBatch:
        """Items `row` int64 [n]; with `time_s` int64 [n] also their state just before it ("state" float32 [n, 5])."""
        at = torch.from_numpy(row)
        fields = {name: value[at] for name, value in self._items.items()}
        if time_s is not None and self.dynamics is not None:
            fields["state"] = torch.from_numpy(self.dynamics.state(row, time_s, without_stars=without_stars))
        return ItemBatch(torch.from_numpy(np.where(row < self._trained_items, row, UNKNOWN)), fields)

    def users(self, queries: Queries) -> UserBatch:
        """One moment per query, after its whole history."""
        history = History(
            queries.offsets, queries.item_row, queries.event_time_s, queries.event_type, queries.stars, self.place
        )
        row = np.arange(len(queries))
        tokens = last_tokens(queries.offsets[:-1], queries.offsets[1:], self.max_history)
        return self.user_batch(
            history,
            tokens,
            at_row=row,
            at_pos=np.minimum(queries.lengths, self.max_history),
            state=history.state(row, queries.lengths),
            time_s=queries.time_s,
            user_row=queries.user_row,
            request_place=queries.place,
        )

    def user_batch(
        self,
        history: History,
        tokens: Int,
        *,
        at_row: Int,
        at_pos: Int,
        state: HistoryState,
        time_s: Int,
        user_row: Int,
        request_place: Array | None = None,
    ) -> UserBatch:
        """Batch from events chosen by position.

        Parameters
        ----------
        tokens
            int64 [S, H]: positions in the flat arrays of `history`, oldest first, -1 after the end.
        at_row, at_pos, time_s, user_row
            int64 [Q]: each moment's row of `tokens`, the tokens it sees, its time, its user.
        state
            Each moment's state.
        request_place
            float [Q, 2]: where each request comes from, or None.
        """
        order, widths, place = _places_of(tokens)
        flat = np.concatenate([tokens[order[a:b], :width].ravel() for a, b, width in widths])
        valid = flat >= 0
        position = np.maximum(flat, 0)
        rows = np.where(valid, _take(history.item_row, position), PAD)
        distinct, inverse = np.unique(np.append(rows, PAD), return_inverse=True)
        stars = _take(history.stars, position)
        bucket = np.where(np.isfinite(stars), 2 + np.nan_to_num(stars).round().astype(np.int64), 1)
        return UserBatch(
            items=self.items(distinct),
            widths=tuple((b - a, width) for a, b, width in widths),
            history=torch.from_numpy(inverse[:-1]),
            event_type=torch.from_numpy(np.where(valid, _take(history.event_type, position), 0)),
            stars=torch.from_numpy(np.where(valid, bucket, 0)),
            gap=torch.from_numpy(self._gaps(_take(history.time_s, position), valid, place)),
            at=torch.from_numpy(place[at_row] + np.maximum(at_pos - 1, 0)),
            seen=torch.from_numpy(at_pos),
            user_row=torch.from_numpy(np.where(user_row < self._trained_users, user_row, UNKNOWN)),
            fields=self._user_fields(state, time_s, user_row, request_place),
        )

    def item_fields(self, specs: tuple[FeatureSpec, ...], vocabulary_sizes: Mapping[str, int]) -> tuple[FieldSpec, ...]:
        """Layout of `ItemBatch.fields` ("state" last): what the item tower is built from."""
        fields = _static_fields("item", specs, self._items, vocabulary_sizes)
        return (*fields, FieldSpec("state", "dense", (ITEM_STATE_WIDTH,), "item.state")) if self.dynamics is not None else fields

    def user_fields(self, specs: tuple[FeatureSpec, ...], vocabulary_sizes: Mapping[str, int]) -> tuple[FieldSpec, ...]:
        """Layout of `UserBatch.fields`: what the user tower is built from."""
        fields = list(_static_fields("user", specs, self._users, vocabulary_sizes))
        fields.append(FieldSpec("state", "dense", (USER_STATE_WIDTH,), "user.state"))
        if self._cells is not None:
            sizes = tuple(len(cells) + FIRST_ROW for cells in self._cells)
            fields.append(FieldSpec("home", "geo", sizes, "item.location"))
            fields += [FieldSpec("place", "geo", sizes, "item.location")] if self._use_place else []
        if self.dynamics is not None:
            fields += [FieldSpec(name, "rows", (n + FIRST_ROW,), name) for name, n in (("hour", 24), ("weekday", 7), ("month", 12))]
        return tuple(fields)

    def _gaps(self, time_s: Int, valid: NDArray[np.bool_], start: Int) -> Int:
        if self.dynamics is None:
            return np.zeros(len(time_s), np.int64)
        gaps = np.diff(time_s, prepend=time_s[:1])
        gaps[start] = 0
        return np.where(valid, 1 + np.minimum(np.log2(np.maximum(gaps, 1)), GAP_BUCKETS - 2).astype(np.int64), 0)

    def _user_fields(self, state: HistoryState, time_s: Int, user_row: Int, place: Array | None) -> dict[str, Tensor]:
        at = torch.from_numpy(user_row)
        fields = {name: value[at] for name, value in self._users.items()}
        since_s, elite = (self._user_static[name][user_row] if name in self._user_static else np.zeros_like(time_s) for name in ("since_s", "elite"))
        timed = self.dynamics is not None
        fields["state"] = torch.from_numpy(_user_state(state, time_s, since_s, elite, timed))
        if self._cells is not None:
            home = state.place / np.where(state.place_n > 0, state.place_n, np.nan)[:, None]
            fields |= self._geo("home", home)
            if self._use_place:
                fields |= self._geo("place", place if place is not None else np.full((len(time_s), 2), np.nan))
        if timed:
            fields["hour"] = torch.from_numpy(time_s // 3600 % 24 + FIRST_ROW)
            fields["weekday"] = torch.from_numpy((time_s // DAY_S + 3) % 7 + FIRST_ROW)  # 1970-01-01 was a Thursday; Monday is 0
            fields["month"] = torch.from_numpy(time_s.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64) % 12 + FIRST_ROW)
        return fields

    def _geo(self, name: str, place: Array) -> dict[str, Tensor]:
        assert self._cells is not None
        return {name: torch.from_numpy(cell_rows(self._cells, place)), f"{name}.point": torch.from_numpy(points_km(place))}


def last_tokens(start: Int, stop: Int, most: int) -> Int:
    """Positions int64 [S, H] of the last `most` events of each slice start:stop, left-aligned, -1 after the end."""
    start = np.maximum(start, stop - most)
    width = max(int((stop - start).max(initial=0)), 1)
    at = start[:, None] + np.arange(width)
    return np.where(at < stop[:, None], at, -1)


def _places_of(tokens: Int) -> tuple[Int, list[tuple[int, int, int]], Int]:
    """Lay histories [S, H] end to end by width class.

    Returns
    -------
    order
        int64 [S]: histories in the order they are laid.
    widths
        (from, to, width): order[from:to] take `width` places each.
    place
        int64 [S]: the first place of each history.
    """
    length, longest = (tokens >= 0).sum(axis=1), tokens.shape[1]
    classes = np.array([width for width in WIDTHS if width < longest] + [longest])
    group = np.searchsorted(classes, length)
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(len(classes) + 1))
    widths = [(int(a), int(b), int(width)) for a, b, width in zip(bounds[:-1], bounds[1:], classes, strict=True) if b > a]
    place = np.empty(len(tokens), np.int64)
    place[order] = np.concatenate([[0], np.cumsum(classes[group[order]])])[:-1]
    return order, widths, place


def _user_state(state: HistoryState, time_s: Int, since_s: Int, elite: Int, timed: bool) -> NDArray[np.float32]:
    """Features float32 [Q, 8]: log events, mean stars, and with a clock: log days since the first and the last event, log events a
    month, log days since joining, elite years so far; then 1 where there is no history."""
    count = state.count
    columns = [np.log1p(count) / 3, (state.stars_sum - MEAN_STARS * state.stars_n) / (state.stars_n + 1.0)]
    zero = np.zeros(len(count))
    if timed:
        active_days = np.where(count > 0, np.maximum(time_s - state.first_s, 0) / DAY_S, 0.0)
        idle_days = np.where((count > 0) & (state.last_s > 0), np.maximum(time_s - state.last_s, 0) / DAY_S, 0.0)
        account_days = np.where(since_s > 0, np.maximum(time_s - since_s, 0) / DAY_S, 0.0)
        per_month = count / (active_days / 30 + 1)
        columns += [np.log1p(active_days) / 5, np.log1p(idle_days) / 5, np.log1p(per_month), np.log1p(account_days) / 5]
        columns.append(np.log1p(_years_before(elite, time_s)))
    else:
        columns += [zero] * 5
    columns.append(count == 0)
    return np.stack(columns, axis=1).astype(np.float32)


def _years_before(bits: Int, time_s: Int) -> Int:
    """Number of years marked in `bits` that ended before the year of `time_s` began."""
    year = time_s.astype("datetime64[s]").astype("datetime64[Y]").astype(np.int64) + 1970
    earlier = (np.int64(1) << np.clip(year - ELITE_BASE_YEAR, 0, 62)) - 1
    past = np.ascontiguousarray(bits & earlier)
    return np.unpackbits(past.view(np.uint8).reshape(len(past), 8), axis=1).sum(axis=1).astype(np.int64)


def _static_fields(
    side: str, specs: tuple[FeatureSpec, ...], arrays: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[FieldSpec, ...]:
    fields = []
    for spec in specs:
        if spec.side != side:
            continue
        key = f"{side}.{spec.name}"
        if spec.kind in ("categorical", "multi"):
            fields.append(FieldSpec(spec.name, "rows" if spec.kind == "categorical" else "bag", (sizes[key] + FIRST_ROW,), key))
        elif spec.kind == "geo":
            fields.append(FieldSpec(spec.name, "geo", tuple(sizes[f"{key}.{scale}"] + FIRST_ROW for scale in range(2)), key))
        else:
            fields.append(FieldSpec(spec.name, "dense", (arrays[spec.name].shape[1],), key))
    return tuple(fields)


def _prefix(values: Array) -> Array:
    """Sums before each position: [T, …] → [T + 1, …]."""
    dtype = np.int64 if values.dtype == np.bool_ else values.dtype
    sums = np.zeros((len(values) + 1, *values.shape[1:]), dtype)
    np.cumsum(values, axis=0, out=sums[1:])
    return sums


def _take(values: Array, at: Int) -> Array:
    """`values[at]`, or zeros when there are no values at all."""
    return values[at] if len(values) else np.zeros(at.shape, values.dtype)


def _tensor(value: Array) -> Tensor:
    return torch.from_numpy(value.astype(np.int64) if value.dtype == np.int32 else value)
