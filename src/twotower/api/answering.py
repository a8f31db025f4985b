"""Answer with frames: requests from ids, histories and frames, and vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.api.fitted import Fitted
from twotower.errors import RequestError
from twotower.retrieval.answer_table import answer_table, similar_table
from twotower.retrieval.recommender import FilterSpec, Recommender
from twotower.retrieval.request import HistoryEvent, Request
from twotower.retrieval.request_reader import check_flag, to_queries
from twotower.schema import FIRST_ROW, ITEM_ID, UNKNOWN, USER_ID
from twotower.utils.columns import plain
from twotower.utils.console import log
from twotower.utils.frames import Kind, as_kind, as_table, check_column, column_names, id_list, is_frame, kind_of, library, listed
from twotower.utils.ids import Id, frame_ids, id_text, id_types
from twotower.utils.types import Float

HISTORY, USER = "history", "user"
VECTORS_AT_ONCE = 4096
NO_TIMES = "The times of the histories are not all times. Expected dates, timestamps or seconds since 1970."
MS_FROM = 1e11  # numbers from here on are milliseconds: as seconds they would be after the year 5000


@dataclass(frozen=True)
class LabelledRequests:
    """Parsed input of a call: a request per list, and the labels of the lists.

    Attributes
    ----------
    requests
        Users and histories; the other fields are the defaults.
    label
        Name and values of the column that tells the lists apart; None for a single history.
    kind
        Library of the answer; None: that of the model.
    """

    requests: list[Request]
    label: tuple[str, pa.Array] | None
    kind: Kind | None = None


def recommend(made: Fitted, users: Any, history: Any, *, strict: bool, **same: Any) -> Any:
    """Return lists as a frame; see `Model.recommend`."""
    parsed = read(made.recommender, users, history, strict=strict)
    requests = [Request(user=one.user, history=one.history, **same) for one in parsed.requests]
    return as_kind(answer_table(made.recommender, requests, parsed.label), parsed.kind or made.kind)


def similar(made: Fitted, item: Id, k: int, filter: FilterSpec) -> Any:
    """Return similar items as a frame; see `Model.similar`."""
    return as_kind(similar_table(made.recommender, id_text(item, "item"), k, filter), made.kind)


def item_vectors(made: Fitted) -> tuple[np.ndarray, Float]:
    """Return ids and vectors of all items; see `Model.item_vectors`."""
    recommender = made.recommender
    ids = frame_ids(recommender.dataset.items[ITEM_ID], id_types(recommender.dataset.manifest)[ITEM_ID])
    return _as_numpy(ids), recommender.bundle.arrays.vectors[FIRST_ROW:].copy()


def user_vectors(made: Fitted, users: Any, history: Any) -> tuple[np.ndarray, Float]:
    """Return labels and vectors of users or histories; see `Model.user_vectors`."""
    recommender = made.recommender
    bundle = recommender.bundle
    if users is None and history is None:
        users = recommender.dataset.users[USER_ID]
    parsed = read(recommender, users, history, strict=False)
    parts = []
    for start in range(0, len(parsed.requests), VECTORS_AT_ONCE):
        queries = to_queries([recommender.reader.read(one) for one in parsed.requests[start : start + VECTORS_AT_ONCE]])
        parts.append(bundle.query_vectors(queries, np.zeros(len(queries), np.float32)).numpy())
    width = bundle.arrays.vectors.shape[1]
    label = np.arange(len(parsed.requests)) if parsed.label is None else _as_numpy(parsed.label[1])
    return label, np.concatenate(parts) if parts else np.zeros((0, width), np.float32)


def read(recommender: Recommender, users: Any, history: Any, *, strict: bool) -> LabelledRequests:
    """Turn what a caller passes as users and history into requests.

    Raises
    ------
    RequestError
        Neither is given, both are lists, an id is missing, or with `strict` a user or item is unknown.
    """
    if users is None and history is None:
        raise RequestError("Neither users nor a history is given. Pass user ids, a history of item ids, or a frame of histories.")
    check_flag("strict", strict)
    if history is not None and is_frame(history):
        users, history = (history, None) if users is None else (users, history)
    if history is not None and (is_frame(users) or is_frame(history)):
        raise RequestError("A frame of histories and other users or histories are given. Pass one of them.")
    if is_frame(users):
        return _frame(recommender, users, strict=strict)
    if history is not None:
        return _histories(recommender, users, history, strict=strict)
    kind = kind_of(users) if library(users) in ("pandas", "polars") or isinstance(users, pa.Array | pa.ChunkedArray) else None
    ids = id_list(users, "users")
    if strict:
        _check_known(recommender, ids)
    return LabelledRequests([Request(user=one) for one in ids], (USER, _labels(recommender, ids)), kind)


def _histories(recommender: Recommender, users: Any, history: Any, *, strict: bool) -> LabelledRequests:
    parts = listed(history, HISTORY)
    several = bool(parts) and not any(isinstance(one, str | bytes | HistoryEvent) or not isinstance(one, Iterable) for one in parts)
    if several and users is not None:
        raise RequestError("users and a list of histories are given. Pass one user with one history, or a frame of histories.")
    if several:
        requests = [Request(history=_events(one, f"history[{number}]")) for number, one in enumerate(parts)]
        return LabelledRequests(requests, (HISTORY, pa.array(range(len(requests)), pa.int64())))
    events = _events(parts, HISTORY)
    if users is None:
        return LabelledRequests([Request(history=events)], None)
    ids = id_list(users, "users")
    if len(ids) != 1:
        raise RequestError(f"{len(ids)} users are given with one history. Pass one user, or a frame of histories.")
    if strict:
        _check_known(recommender, ids)
    return LabelledRequests([Request(user=ids[0], history=events)], (USER, _labels(recommender, ids)))


def _events(history: Any, what: str) -> tuple[HistoryEvent, ...]:
    items = listed(history, what)
    return tuple(
        one if isinstance(one, HistoryEvent) else HistoryEvent(id_text(one, f"{what}[{number}]"))
        for number, one in enumerate(items)
    )


def _frame(recommender: Recommender, frame: Any, *, strict: bool) -> LabelledRequests:
    """Return a request per user of a frame: of histories, or of users alone if it has no column of items."""
    table = recommender.dataset.manifest.config.data.interactions
    user, item, time = (table.user_id, table.item_id, table.time) if table else (USER_ID, ITEM_ID, None)
    names = column_names(frame, "users")
    check_column(user, names, "users")
    if item not in names:
        ids = _texts(plain(as_table(frame, "users", [user]))[user], user)
        return replace(read(recommender, ids, None, strict=strict), kind=kind_of(frame))
    table = plain(as_table(frame, "users", [name for name in (user, item, time) if name in names], required=[user, item]))
    ids, items = (_texts(table[name], name) for name in (user, item))
    if time in names and time not in table.column_names:
        raise RequestError(NO_TIMES)
    times = _seconds(table[time]) if time in names else None
    groups: dict[str, list[tuple[int, int]]] = {}
    for number, one in enumerate(ids):
        groups.setdefault(one, []).append((0 if times is None else int(times[number]), number))
    rows = recommender.reader.items
    unknown = [name for name in dict.fromkeys(items) if rows.row(name) == UNKNOWN]
    if unknown:
        examples = ", ".join(repr(name) for name in unknown[:3])
        if strict:
            raise RequestError(
                f"The frame has {len(unknown)} unknown items: {examples}. Use ids of the catalogue, or strict=False."
            )
        log.warning("%d unknown items of the histories are left out: %s", len(unknown), examples)
    left_out = set(unknown)
    requests = []
    for events in groups.values():
        order = sorted(events) if times is not None else events
        kept = [(second, items[number]) for second, number in order if items[number] not in left_out]
        requests.append(Request(history=tuple(HistoryEvent(one, None if times is None else second) for second, one in kept)))
    return LabelledRequests(requests, (USER, _labels(recommender, list(groups))), kind_of(frame))


def _labels(recommender: Recommender, ids: list[str]) -> pa.Array:
    """Return users in the type of the raw data; texts, if one of them is none of that type."""
    found = frame_ids(pa.array(ids, pa.string()), id_types(recommender.dataset.manifest)[USER_ID])
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _check_known(recommender: Recommender, ids: list[str]) -> None:
    unknown = [one for one in ids if recommender.reader.users.row(one) == UNKNOWN]
    if unknown:
        examples = ", ".join(repr(one) for one in unknown[:3])
        few = recommender.dataset.users[USER_ID].slice(0, 3).to_pylist()
        raise RequestError(
            f"{len(unknown)} of {len(ids)} users are unknown: {examples}. Known are ids such as {', '.join(map(repr, few))}. "
            "Pass known users, a history, or strict=False."
        )


def _texts(column: pa.ChunkedArray, name: str) -> list[str]:
    """Return a column of ids as texts; missing ones are an error."""
    values = column.to_pylist()
    missing = sum(value is None or value != value for value in values)
    if missing:
        raise RequestError(f"The column {name!r} has {missing} missing ids of {len(values)}. Leave those rows out.")
    return [id_text(value, name) for value in values]


def _seconds(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of times, dates or seconds as seconds since 1970."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        numbers = np.asarray(column.cast(pa.float64(), safe=False).to_numpy())
        found = np.where(np.abs(numbers) >= MS_FROM, numbers / 1000, numbers)
    else:
        try:
            found = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64()).to_numpy().astype(np.float64)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            found = np.full(len(column), np.nan)
    if not np.isfinite(found).all():
        raise RequestError(NO_TIMES)
    return found.astype(np.int64)


def _as_numpy(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    values = ids.to_pylist()
    return np.array(values, dtype=np.int64 if values and all(isinstance(one, int) for one in values) else object)
