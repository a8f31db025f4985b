"""Publish the vectors of a bundle: to Parquet files that any vector database reads, and to Milvus.

The score of a user and an item is the inner product of their published vectors, and the bonus of the item if it has one. A vector
has the numbers of the tower, and after them the columns of `models.priors`: the popularities of an item beside their weights for a
user, and the location. In published vectors these columns are balanced (`index_tuning.balance_of`), because graphs of neighbours
need items of similar norms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from twotower.bundle.bundle import Bundle
from twotower.bundle.index_tuning import balance_of, sample_queries
from twotower.errors import DataError
from twotower.models.neural_retriever import model_bonuses
from twotower.schema import FIRST_ROW, ITEM_ID, TIMES_END_S, USER_ID
from twotower.search.approximate import balanced
from twotower.search.filters.item_filter import ItemFilter
from twotower.search.filters.milvus_expression import ROW, StoredColumns, longest_text, nan_to_null
from twotower.search.milvus_index import EF, MilvusIndex
from twotower.search.milvus_store import SEARCH_S, MilvusAddress, MilvusStore
from twotower.utils.atomic_files import atomic_file
from twotower.utils.ids import id_types, native_ids
from twotower.utils.types import Float, Int

VECTOR, POPULARITY, RECENT, SEEN, ITEM = "vector", "popularity", "recent_events", "seen", "item"
BONUS_ITEMS, BONUSES = "bonus_items", "bonuses"
OWN = (ITEM_ID, VECTOR, POPULARITY, RECENT)
BATCH = 1000  # items of one upload
USERS = 1024  # users encoded at once
M, EF_CONSTRUCTION = 32, 200  # of the graph in Milvus


def publish_parquet(bundle: Bundle, out: Path) -> int:
    """Write the offered items to a Parquet file, and return their number.

    It has "item_id", "vector" (a list of float32 of fixed size), "popularity" (log popularity of all events), "recent_events" (of
    the last 90 days) and all columns of the catalogue. A column with one of these names gets "catalogue_" in front.
    """
    rows, arrays, balance = _offered(bundle), bundle.arrays, _balance(bundle)
    items = bundle.dataset.items.take(pa.array(rows - FIRST_ROW))
    columns: dict[str, Any] = {
        ITEM_ID: native_ids(items[ITEM_ID], id_types(bundle.dataset.manifest)[ITEM_ID]),
        VECTOR: _lists(balanced(arrays.vectors[rows], balance)),
        POPULARITY: _popularity(bundle)[rows],
        RECENT: arrays.recent_event_count[rows],
    }
    for name in items.column_names:
        if name != ITEM_ID:
            columns[f"catalogue_{name}" if name in OWN else name] = items[name]
    table = pa.table(columns).replace_schema_metadata({"twotower": json.dumps(_about(bundle, balance))})
    with atomic_file(out) as beside:
        pq.write_table(table, beside, compression="zstd", row_group_size=10_000)
    return len(rows)


def publish_users(bundle: Bundle, out: Path) -> int:
    """Write what all users of the bundle are queried with to a Parquet file, and return their number.

    It has "user_id", "vector" and "seen", the ids of the items that a list leaves out. "bonus_items" are the ids of the items whose
    score is the inner product and a bonus (those after and before the last items of the user), and "bonuses" are these.
    """
    dataset, balance = bundle.dataset, _balance(bundle)
    kinds = id_types(dataset.manifest)
    users, items = native_ids(dataset.users[USER_ID], kinds[USER_ID]), native_ids(dataset.items[ITEM_ID], kinds[ITEM_ID])
    kind = pa.list_(pa.float32(), bundle.arrays.vectors.shape[1])
    schema = pa.schema(
        [
            (USER_ID, users.type),
            (VECTOR, kind),
            (SEEN, pa.list_(items.type)),
            (BONUS_ITEMS, pa.list_(items.type)),
            (BONUSES, pa.list_(pa.float32())),
        ],
        {"twotower": json.dumps(_about(bundle, balance))},
    )
    with atomic_file(out) as beside, pq.ParquetWriter(beside, schema, compression="zstd") as writer:
        for start in range(0, dataset.n_users, USERS):
            rows = np.arange(start, min(start + USERS, dataset.n_users)) + FIRST_ROW
            queries = dataset.histories(rows, np.full(len(rows), bundle.moment_s))
            queries = replace(
                queries, disliked=dataset.disliked(rows, np.full(len(rows), TIMES_END_S))
            )  # as for a request without a time
            vectors = bundle.query_vectors(queries, np.zeros(len(rows), np.float32)).numpy()
            vectors = balanced(vectors, [1 / one for one in balance])
            never = np.zeros(len(rows), np.bool_)
            offsets, left_out = queries.left_out(never)
            found = model_bonuses(bundle.model, bundle.store, queries, never)
            found = found.take(bundle.arrays.offered[found.item_row])
            begins, listed = found.beside((np.zeros(len(rows) + 1, np.int64), np.zeros(0, np.int64)))
            temperature, weights = float(bundle.model.temperature().detach()), bundle.model.priors.transitions.double().numpy()
            added = pa.array((temperature * (found.transitions @ weights)).astype(np.float32))
            columns = [
                _plain(users.slice(start, len(rows))),
                _lists(vectors),
                _ragged(offsets, _plain(items.take(left_out - FIRST_ROW))).cast(schema.field(SEEN).type),
                _ragged(begins, _plain(items.take(listed - FIRST_ROW))).cast(schema.field(BONUS_ITEMS).type),
                _ragged(begins, added),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    return dataset.n_users


def _ragged(offsets: Int, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def publish_milvus(bundle: Bundle, address: MilvusAddress, *, exact: bool = False) -> int:
    """Write the offered items as a new version of a collection in Milvus, which takes the alias when it is complete.

    Return the number of items. With `exact`, Milvus scans all vectors (FLAT), else it searches in a graph (HNSW).

    Raises
    ------
    DataError
        Milvus cannot be reached, or refuses.
    MissingExtraError
        pymilvus is not installed.
    """
    rows = _offered(bundle)
    if not len(rows):
        raise DataError(f"{bundle.path} offers no items. There is nothing to publish.")
    store = MilvusStore(address)
    stored = StoredColumns(ItemFilter(bundle.dataset.items, bundle.dataset.specs))
    try:
        schema, index = _schema(bundle, stored, exact=exact)
        balance = _balance(bundle)
        about = json.dumps({**_about(bundle, balance), "exact": exact})
        properties = {"twotower.seal": bundle.manifest.seal, "twotower.about": about}
        store.publish(schema, index, properties, lambda: _uploads(bundle, stored, rows, balance), len(rows))
    finally:
        store.close()
    return len(rows)


@dataclass(frozen=True, slots=True)
class RemoteIndex:
    """An index in Milvus: its address, and how it is searched; see `MilvusIndex` and `MilvusStore`."""

    address: MilvusAddress
    ef: int = EF
    search_s: float = SEARCH_S


def publish_again(bundle: Bundle, address: MilvusAddress) -> None:
    """Write a bundle that has changed as the next version of a collection, with an index of the same kind.

    Raises
    ------
    DataError
        See `publish_milvus`; or there is no collection.
    """
    store = MilvusStore(address)
    try:
        _, properties = store.current()
    finally:
        store.close()
    if properties.get("twotower.seal") != bundle.manifest.seal:
        publish_milvus(bundle, address, exact=json.loads(properties["twotower.about"])["exact"])


def with_milvus(bundle: Bundle, remote: RemoteIndex) -> Bundle:
    """Return the bundle with the index of its vectors in Milvus.

    Raises
    ------
    DataError
        The collection has vectors of another bundle or of another revision, or Milvus cannot be reached.
    """
    address, store = remote.address, MilvusStore(remote.address, remote.search_s)
    collection, properties = store.current()
    found, wanted = properties.get("twotower.seal", ""), bundle.manifest.seal
    if found != wanted:
        raise DataError(
            f"{address.shown} has the vectors of version {found[:12]}, but {bundle.path} is version {wanted[:12]}. "
            f"Run `twotower publish {bundle.path} --to {address.shown}`."
        )
    columns = StoredColumns(ItemFilter(bundle.dataset.items, bundle.dataset.specs))
    vectors, balance = torch.from_numpy(bundle.arrays.vectors), json.loads(properties["twotower.about"])["balance"]
    return replace(bundle, built=MilvusIndex(vectors, store, collection, columns, balance=balance, ef=remote.ef))


def _offered(bundle: Bundle) -> Int:
    """Return the rows of the items that are offered."""
    return np.flatnonzero(bundle.arrays.offered[FIRST_ROW:]) + FIRST_ROW


def _popularity(bundle: Bundle) -> Float:
    """Return the log popularity of all events of each item row."""
    return bundle.arrays.vectors[:, bundle.vectors.shape[1]]


def _balance(bundle: Bundle) -> list[float]:
    return balance_of(sample_queries(bundle, 0), bundle.model.priors.width)


def _about(bundle: Bundle, balance: list[float]) -> dict[str, Any]:
    """Return what a reader of the vectors needs to know."""
    width = bundle.vectors.shape[1]
    return {
        "version": bundle.manifest.seal[:12],
        "metric": "inner product",
        "tower": width,
        "popularity": bundle.model.priors.popularities,
        "location": bundle.arrays.vectors.shape[1] - width - bundle.model.priors.popularities,
        "balance": balance,
    }


def _lists(vectors: Float) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])


def _plain(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _schema(bundle: Bundle, stored: StoredColumns, *, exact: bool) -> tuple[Any, Any]:
    """Return the fields of a collection, and its index."""
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field(ROW, DataType.INT64, is_primary=True)
    schema.add_field(ITEM_ID, DataType.VARCHAR, max_length=longest_text(bundle.dataset.items[ITEM_ID]))
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=bundle.arrays.vectors.shape[1])
    schema.add_field(POPULARITY, DataType.FLOAT, nullable=True)
    schema.add_field(RECENT, DataType.INT64)
    schema.add_field(ITEM, DataType.JSON, nullable=True)
    stored.add_fields(schema)
    index = MilvusClient.prepare_index_params()
    graph = {"index_type": "HNSW", "params": {"M": M, "efConstruction": EF_CONSTRUCTION}}
    index.add_index(VECTOR, metric_type="IP", **({"index_type": "FLAT"} if exact else graph))
    return schema, index


def _uploads(bundle: Bundle, stored: StoredColumns, rows: Int, balance: list[float]) -> Iterator[list[dict[str, Any]]]:
    """Yield the items in batches, in the fields of `_schema`."""
    popularity, recent = _popularity(bundle), bundle.arrays.recent_event_count
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        items = bundle.dataset.items.take(pa.array(part - FIRST_ROW))
        columns: dict[str, list[Any]] = {
            ROW: part.tolist(),
            ITEM_ID: items[ITEM_ID].to_pylist(),
            VECTOR: balanced(bundle.arrays.vectors[part], balance).tolist(),
            POPULARITY: nan_to_null(popularity[part]),
            RECENT: recent[part].tolist(),
            ITEM: [json.loads(json.dumps(item, default=str)) for item in items.to_pylist()],
        }
        columns |= stored.fields(part - FIRST_ROW)
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
