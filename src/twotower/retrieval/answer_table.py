"""Answer many requests as one Arrow table, with a row for each recommended item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.features.geo import distances_km
from twotower.retrieval.ranked_rows import RankedRows
from twotower.retrieval.recommender import FilterSpec, Recommender
from twotower.retrieval.request import Request
from twotower.schema import FIRST_ROW, ITEM_ID
from twotower.utils.console import Report, silent
from twotower.utils.ids import frame_ids, id_types
from twotower.utils.ragged import ragged_arange
from twotower.utils.types import Int

BLOCK = 512  # requests answered at once


def answer_table(
    recommender: Recommender, requests: Sequence[Request], label: tuple[str, pa.Array] | None = None, *, report: Report = silent
) -> pa.Table:
    """Answer requests, in their order, best items first.

    Parameters
    ----------
    label
        Name and values of a first column, one value per request, which tells the lists apart.
    report
        Called with the progress.

    Returns
    -------
    pa.Table
        The label; "rank" int32 from 1; "item", ids in the type of the raw data; "name", if the items have names; "score" float32;
        "distance_km" float32, if the items have locations; "source", see `Answer`; and "reasons", a list of texts, if a request
        explains.

    Raises
    ------
    RequestError
        A request is invalid.
    """
    parts = []
    for start in range(0, len(requests), BLOCK):
        block = requests[start : start + BLOCK]
        found = recommender.ranked(block)
        parts.append(_rows(recommender, found, start, explained=any(one.explain for one in requests)))
        report("recommend", min(start + BLOCK, len(requests)), len(requests))
    if not parts:
        parts.append(_rows(recommender, [], 0, explained=False))
    table = pa.concat_tables(parts).unify_dictionaries()
    request = table["request"].combine_chunks()
    table = table.drop_columns(["request"])
    return table if label is None else table.add_column(0, label[0], label[1].take(request))


def similar_table(recommender: Recommender, item: str, k: int, filter: FilterSpec) -> pa.Table:
    """Return the items most similar to an item, in the columns of `answer_table` besides the label and the source."""
    found = recommender.similar(item, k=k, filter=filter)
    rows = np.array([recommender.reader.item(one.item_id) for one in found], np.int64)
    scores = np.array([one.score for one in found], np.float32)
    km = np.array([np.nan if one.distance_km is None else one.distance_km for one in found], np.float32)
    return pa.table(_columns(recommender, rows, np.arange(1, len(rows) + 1), scores, km))


def _rows(recommender: Recommender, found: Sequence[RankedRows], start: int, *, explained: bool) -> pa.Table:
    lengths = np.array([len(one.rows) for one in found], np.int64)
    which, rank = ragged_arange(np.ones_like(lengths), lengths)
    rows, scores = _joined([one.rows for one in found], np.int64), _joined([one.scores for one in found], np.float32)
    at = recommender.details.degrees
    km = _joined([distances_km(at[one.rows], one.home or (np.nan, np.nan)) for one in found], np.float32)
    columns = {"request": pa.array(which + start), **_columns(recommender, rows, rank, scores, km)}
    columns["source"] = pa.array([one.source for one in found], pa.string()).take(pa.array(which))
    if explained:
        why = [[reason.label for reason in reasons] for one in found for reasons in (one.reasons or [()] * len(one.rows))]
        columns["reasons"] = pa.array(why, pa.list_(pa.string()))
    return pa.table(columns)


def _columns(recommender: Recommender, rows: Int, rank: Int, scores: np.ndarray, km: np.ndarray) -> dict[str, pa.Array]:
    items, at = recommender.dataset.items, pa.array(rows - FIRST_ROW)
    ids = frame_ids(items[ITEM_ID].take(at), id_types(recommender.dataset.manifest)[ITEM_ID])
    columns = {"rank": pa.array(rank, pa.int32()), "item": _one(ids)}
    if "name" in items.column_names and items["name"].null_count < len(items):
        columns["name"] = _one(pc.coalesce(items["name"].take(at), items[ITEM_ID].take(at)))
    columns["score"] = pa.array(scores, pa.float32())
    if np.isfinite(recommender.details.degrees).any():
        columns["distance_km"] = pa.array(km, pa.float32(), from_pandas=True)
    return columns


def _one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _joined(parts: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate(parts).astype(kind) if parts else np.zeros(0, kind)
