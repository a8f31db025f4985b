"""Build the model's input from rows and times, with the same code for training, evaluation and serving.

Encoded static arrays (`encoders.py`), item states (`point_in_time.py`) and histories become `ItemBatch` and `UserBatch`. Features
that change over time use only events strictly before the time of the query.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import numpy as np
import torch
from torch import Tensor

from twotower.features.batches import GAP_BUCKETS, FieldSpec, ItemBatch, UserBatch
from twotower.features.encoders import cell_rows
from twotower.features.geo import points_km
from twotower.features.point_in_time import ITEM_STATE_WIDTH, USER_STATE_WIDTH, History, HistoryState, ItemDynamics, user_state
from twotower.features.transitions import Transitions
from twotower.retriever import Queries
from twotower.schema import DAY_S, FIRST_ROW, NEIGHBOURS, PAD, UNKNOWN, FeatureSpec
from twotower.utils.types import Array, Float, Int, Mask

WIDTHS = (4, 8, 16, 32, 64, 128, 256)  # histories are padded to the next of these, or to the longest of the batch
CLOCK = {"hour": 24, "weekday": 7, "month": 12}


class FeatureStore:
    """Turns rows and times into batches.

    Parameters
    ----------
    item_static, user_static
        Encoded arrays over all rows (`encode_items`, `encode_users`).
    dynamics
        Item states, or None if events have no times (sequences).
    n_train_item_rows, n_train_user_rows
        Number of rows of items and users with an id embedding; every later row becomes UNKNOWN.
    cells
        Known coarse and fine cells of the item locations. None: users have no home area.
    geo
        Name of the item feature with the location; locations of users share its tables.
    use_location
        Use the location of the request as a user feature.
    max_history
        Number of most recent events read of a history.
    log_popularity
        float32 [n_item_rows, H']: popularity columns; see `data.dataset_features.log_popularity`.
    transitions
        The items after and before each item; None if they are unknown.
    """

    def __init__(
        self,
        item_static: Mapping[str, Array],
        user_static: Mapping[str, Array],
        *,
        dynamics: ItemDynamics | None,
        n_train_item_rows: int,
        n_train_user_rows: int,
        cells: tuple[Array, Array] | None,
        geo: str = "location",
        max_history: int,
        log_popularity: Float,
        use_location: bool = False,
        transitions: Transitions | None = None,
    ) -> None:
        self._items = _fields(item_static)
        self._user_static = user_static
        self._users = _fields({name: value for name, value in user_static.items() if name not in ("since_s", "elite")})
        self.location: Array = item_static.get(f"{geo}.degrees", np.zeros((0, 2), np.float32))
        self._geo_table = f"item.{geo}"
        self.dynamics, self._cells, self.use_location = dynamics, cells, use_location and cells is not None
        self._trained_items, self._trained_users = n_train_item_rows, n_train_user_rows
        self.max_history = max_history
        self.log_popularity, self.transitions = log_popularity, transitions
        self.is_new = np.arange(len(log_popularity)) >= self._trained_items
        """bool [n_item_rows]: True for items that training has not seen."""

    def with_popularity(self, log_popularity: Float, dynamics: ItemDynamics | None = None) -> FeatureStore:
        """Return the same store with another popularity, such as that of a later time, and with other item states if given."""
        other = copy(self)
        other.log_popularity = log_popularity
        other.dynamics = self.dynamics if dynamics is None else dynamics
        return other

    def items(self, row: Int, time_s: Int | None = None) -> ItemBatch:
        """Return items `row` int64 [n]; with `time_s` int64 [n] also their state just before it ("state" float32 [n, 5])."""
        at = torch.from_numpy(row)
        fields = {name: value[at] for name, value in self._items.items()}
        if time_s is not None and self.dynamics is not None:
            fields["state"] = torch.from_numpy(self.dynamics.state(row, time_s))
        return ItemBatch(torch.from_numpy(np.where(row < self._trained_items, row, UNKNOWN)), fields)

    def users(self, queries: Queries) -> UserBatch:
        """Return a batch with one user vector per query, after its whole history."""
        history = History(queries.offsets, queries.item_row, queries.event_time_s, queries.event_type, queries.stars, self.location)
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
            request_location=queries.location,
        )

    def padded(self, queries: Queries) -> dict[str, Array]:
        """Return the content of `users` as padded arrays, for a user tower that looks up a vector of each item.

        Returns
        -------
        dict
            int64 [B, W] "history" (item rows, oldest first, PAD after the end), "event_type", "stars" and "gap"; int64 [B] "seen"
            and "user"; "field.NAME" [B, …].
        """
        history = History(queries.offsets, queries.item_row, queries.event_time_s, queries.event_type, queries.stars, self.location)
        tokens = last_tokens(queries.offsets[:-1], queries.offsets[1:], self.max_history)
        row, valid, position = np.arange(len(queries)), (tokens >= 0).ravel(), np.maximum(tokens, 0).ravel()
        flat = {
            "history": np.where(valid, _take(history.item_row, position), PAD),
            "event_type": np.where(valid, _take(history.event_type, position), 0),
            "stars": np.where(valid, _stars_bucket(_take(history.stars, position)), 0),
            "gap": self._gaps(_take(history.time_s, position), valid, row * tokens.shape[1]),
        }
        fields = self._user_fields(history.state(row, queries.lengths), queries.time_s, queries.user_row, queries.location)
        return {
            **{name: np.ascontiguousarray(value.reshape(tokens.shape), np.int64) for name, value in flat.items()},
            "seen": np.minimum(queries.lengths, self.max_history),
            "user": np.where(queries.user_row < self._trained_users, queries.user_row, UNKNOWN),
            **{f"field.{name}": value.numpy() for name, value in fields.items()},
        }

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
        request_location: Array | None = None,
    ) -> UserBatch:
        """Return a batch of events that are chosen by position.

        Parameters
        ----------
        tokens
            int64 [S, H]: positions in the flat arrays of `history`, oldest first, -1 after the end.
        at_row, at_pos, time_s, user_row
            int64 [Q]: row of `tokens`, number of visible tokens, time and user of each user vector.
        state
            State of each user at that time.
        request_location
            float [Q, 2]: location of each request in degrees, or None.
        """
        order, widths, slot = _slots_of(tokens)
        flat = np.concatenate([tokens[order[a:b], :width].ravel() for a, b, width in widths])
        valid = flat >= 0
        position = np.maximum(flat, 0)
        rows = np.where(valid, _take(history.item_row, position), PAD)
        distinct, inverse = np.unique(np.append(rows, PAD), return_inverse=True)
        bucket = _stars_bucket(_take(history.stars, position))
        return UserBatch(
            items=self.items(distinct),
            widths=tuple((b - a, width) for a, b, width in widths),
            history=torch.from_numpy(inverse[:-1]),
            event_type=torch.from_numpy(np.where(valid, _take(history.event_type, position), 0)),
            stars=torch.from_numpy(np.where(valid, bucket, 0)),
            gap=torch.from_numpy(self._gaps(_take(history.time_s, position), valid, slot)),
            at=torch.from_numpy(slot[at_row] + np.maximum(at_pos - 1, 0)),
            seen=torch.from_numpy(at_pos),
            user_row=torch.from_numpy(np.where(user_row < self._trained_users, user_row, UNKNOWN)),
            fields=self._user_fields(state, time_s, user_row, request_location),
        )

    def item_fields(self, specs: tuple[FeatureSpec, ...], vocabulary_sizes: Mapping[str, int]) -> tuple[FieldSpec, ...]:
        """Return the fields of `ItemBatch` ("state" last), from which the item tower is built."""
        fields = _static_fields("item", specs, self._items, vocabulary_sizes)
        if NEIGHBOURS in self._items:
            fields = (*fields, FieldSpec(NEIGHBOURS, "bag", (self._trained_items,), "item.id"))
        return (*fields, FieldSpec("state", "dense", (ITEM_STATE_WIDTH,), "item.state")) if self.dynamics is not None else fields

    def user_fields(self, specs: tuple[FeatureSpec, ...], vocabulary_sizes: Mapping[str, int]) -> tuple[FieldSpec, ...]:
        """Return the fields of `UserBatch`, from which the user tower is built."""
        fields = list(_static_fields("user", specs, self._users, vocabulary_sizes))
        fields.append(FieldSpec("state", "dense", (USER_STATE_WIDTH,), "user.state"))
        if self._cells is not None:
            sizes = tuple(len(cells) + FIRST_ROW for cells in self._cells)
            fields.append(FieldSpec("home", "geo", sizes, self._geo_table))
            fields += [FieldSpec("request_location", "geo", sizes, self._geo_table)] if self.use_location else []
        if self.dynamics is not None:
            fields += [FieldSpec(name, "rows", (n + FIRST_ROW,), name) for name, n in CLOCK.items()]
        return tuple(fields)

    def _gaps(self, time_s: Int, valid: Mask, start: Int) -> Int:
        if self.dynamics is None:
            return np.zeros(len(time_s), np.int64)
        gaps = np.diff(time_s, prepend=time_s[:1])
        gaps[start] = 0
        return np.where(valid, 1 + np.minimum(np.log2(np.maximum(gaps, 1)), GAP_BUCKETS - 2).astype(np.int64), 0)

    def _user_fields(self, state: HistoryState, time_s: Int, user_row: Int, location: Array | None) -> dict[str, Tensor]:
        at = torch.from_numpy(user_row)
        fields = {name: value[at] for name, value in self._users.items()}
        since_s, elite = self._profile("since_s", user_row), self._profile("elite", user_row)
        timed = self.dynamics is not None
        fields["state"] = torch.from_numpy(user_state(state, time_s, since_s, elite, timed))
        if self._cells is not None:
            home = state.location / np.where(state.location_n > 0, state.location_n, np.nan)[:, None]
            fields |= self._geo("home", home)
            if self.use_location:
                fields |= self._geo("request_location", location if location is not None else np.full((len(time_s), 2), np.nan))
        if timed:
            fields["hour"] = torch.from_numpy(time_s // 3600 % 24 + FIRST_ROW)
            fields["weekday"] = torch.from_numpy((time_s // DAY_S + 3) % 7 + FIRST_ROW)  # 1970-01-01 was a Thursday; Monday is 0
            months = time_s.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
            fields["month"] = torch.from_numpy(months % 12 + FIRST_ROW)
        return fields

    def _profile(self, name: str, user_row: Int) -> Int:
        values = self._user_static.get(name)
        return np.zeros_like(user_row) if values is None else values[user_row]

    def _geo(self, name: str, location: Array) -> dict[str, Tensor]:
        assert self._cells is not None
        return {name: torch.from_numpy(cell_rows(self._cells, location)), f"{name}.point": torch.from_numpy(points_km(location))}


def last_tokens(start: Int, stop: Int, most: int) -> Int:
    """Return positions int64 [S, H] of the last `most` events of each slice start:stop, left-aligned, -1 after the end.

    Examples
    --------
    >>> last_tokens(np.array([0, 3]), np.array([3, 4]), 2)
    array([[ 1,  2],
           [ 3, -1]])
    """
    start = np.maximum(start, stop - most)
    width = max(int((stop - start).max(initial=0)), 1)
    at = start[:, None] + np.arange(width)
    return np.where(at < stop[:, None], at, -1)


def _slots_of(tokens: Int) -> tuple[Int, list[tuple[int, int, int]], Int]:
    """Assign slots to histories [S, H], grouped by width and stored one after another.

    Returns
    -------
    order
        int64 [S]: histories in the order of their slots.
    widths
        (from, to, width): order[from:to] take `width` slots each.
    slot
        int64 [S]: the first slot of each history.
    """
    length, longest = (tokens >= 0).sum(axis=1), tokens.shape[1]
    classes = np.array([width for width in WIDTHS if width < longest] + [longest])
    group = np.searchsorted(classes, length)
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(len(classes) + 1))
    widths = [(int(a), int(b), int(width)) for a, b, width in zip(bounds[:-1], bounds[1:], classes, strict=True) if b > a]
    slot = np.empty(len(tokens), np.int64)
    slot[order] = np.concatenate([[0], np.cumsum(classes[group[order]])])[:-1]
    return order, widths, slot


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


def _stars_bucket(stars: Array) -> Int:
    return np.where(np.isfinite(stars), 2 + np.nan_to_num(stars).round().clip(0, 5).astype(np.int64), 1)


def _take(values: Array, at: Int) -> Array:
    """Return `values[at]`, or zeros if there are no values at all."""
    return values[at] if len(values) else np.zeros(at.shape, values.dtype)


def _fields(static: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Return encoded static features as tensors; locations become points on the globe in km."""
    kept = {name: _tensor(value) for name, value in static.items() if not name.endswith(".degrees")}
    locations = {name.removesuffix(".degrees"): value for name, value in static.items() if name.endswith(".degrees")}
    return kept | {f"{name}.point": torch.from_numpy(points_km(value)) for name, value in locations.items()}


def _tensor(value: Array) -> Tensor:
    return torch.from_numpy(value.astype(np.int64 if value.dtype == np.int32 else value.dtype))
