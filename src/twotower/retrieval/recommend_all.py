"""Write recommendations for all users of a bundle to one Parquet file, in bounded memory, resumable and atomic.

The same request is answered for every user. The file has the columns `user_id`, `rank`, `item_id` and `score`, with users in the
order of the bundle and ids in the type of the raw data. A run that was interrupted and started again gives the same rows as an
uninterrupted one. Parts of another bundle or another request are never reused.

Blocks of users are written one by one to a temporary folder and concatenated at the end.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from time import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.dataset import Dataset
from twotower.errors import DataError
from twotower.retrieval.ranked_rows import RankedRows
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Request
from twotower.schema import FIRST_ROW, ITEM_ID, USER_ID
from twotower.utils.atomic_files import atomic_file
from twotower.utils.console import Report, silent
from twotower.utils.ids import id_types, native_ids
from twotower.utils.ragged import ragged_arange

Ids = tuple[pa.ChunkedArray, pa.ChunkedArray]
"""The ids of all users and of all items."""
BLOCK = 512  # users at a time: 512 masks of 150,000 items take 77 MB
NAMES = (USER_ID, "rank", ITEM_ID, "score")


def recommend_all(recommender: Recommender, out: Path, request: Request, *, report: Report = silent) -> int:
    """Answer `request` for every user and write the lists to `out`. Return the number of users.

    With a filter `within(km)` and no location in the request, a user without a known location in its history gets no rows.

    Parameters
    ----------
    request
        The request; its user is filled in. `explain` has no effect.
    report
        Called with the progress.

    Raises
    ------
    DataError
        `out` is a folder.
    RequestError
        The request is invalid, for instance because of a malformed filter.
    """
    if out.is_dir():
        raise DataError(f"Cannot write recommendations to {out}: it is a folder. Give the path of a file, e.g. in this folder.")
    check_request(recommender, request)
    users = recommender.dataset.n_users
    parts, now = _parts_for(out, {"bundle": recommender.bundle.manifest.seal, "block": BLOCK, "request": asdict(request)})
    native = native_ids_of(recommender.dataset)
    blocks = [(start, parts / f"{start:012d}.parquet") for start in range(0, users, BLOCK)]
    for start, part in blocks:
        if not part.is_file():
            _write(lists_of(recommender, request, now, start, min(start + BLOCK, users), native), part)
        report("recommend", min(start + BLOCK, users), users)
    with atomic_file(out) as beside, pq.ParquetWriter(beside, pq.read_schema(blocks[0][1]), compression="zstd") as writer:
        for _, part in blocks:
            writer.write_table(pq.read_table(part))
    shutil.rmtree(parts)
    return users


def check_request(recommender: Recommender, request: Request) -> None:
    """Raise the error of a request that is invalid for every user."""
    for one in recommender.find([replace(request, near=request.near or (0.0, 0.0), k=1)]):
        if not isinstance(one, RankedRows):
            raise one


def native_ids_of(dataset: Dataset) -> Ids:
    """Return the ids of all users and of all items, in the types of the raw data."""
    kinds = id_types(dataset.manifest)
    return native_ids(dataset.users[USER_ID], kinds[USER_ID]), native_ids(dataset.items[ITEM_ID], kinds[ITEM_ID])


def _parts_for(out: Path, settings: dict[str, object]) -> tuple[Path, int]:
    """Return the folder of finished blocks and the start time of the run. Blocks of another run are deleted."""
    folder = out.with_name(f".{out.name}.parts")
    text, file = json.dumps(settings, sort_keys=True), folder / "settings.json"
    before = file.read_text().splitlines() if file.is_file() else []
    if len(before) == 2 and before[0] == text and before[1].isdigit():
        return folder, int(before[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    now = int(time())  # `open_now` means the same time for all users
    file.write_text(f"{text}\n{now}\n")
    return folder, now


def lists_of(recommender: Recommender, request: Request, now: int, start: int, stop: int, native: Ids) -> pa.Table:
    """Return the lists of the users from `start` to `stop`, at the time `now` in seconds; `native` are the ids to write."""
    user_ids, item_ids = native
    ids = recommender.dataset.users[USER_ID].slice(start, stop - start)
    # The request itself is valid, so an error means `within(km)` for a user without a known location: no rows.
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    found = recommender.find([replace(request, user=user) for user in ids.to_pylist()], now=now, with_homes=False)
    lists = [(one.rows, one.scores) if isinstance(one, RankedRows) else nothing for one in found]
    lengths = np.array([len(rows) for rows, _ in lists], np.int64)
    rows = np.concatenate([nothing[0], *(rows for rows, _ in lists)])
    _, rank = ragged_arange(np.ones_like(lengths), lengths)
    items, users = item_ids.take(rows - FIRST_ROW), user_ids.take(np.repeat(np.arange(start, stop), lengths))
    columns = [
        users,
        rank.astype(np.int32),
        items,
        np.concatenate([nothing[1], *(scores for _, scores in lists)]).astype(np.float32),
    ]
    return pa.table(dict(zip(NAMES, columns, strict=True)))


def _write(table: pa.Table, file: Path) -> None:
    with atomic_file(file) as beside:
        pq.write_table(table, beside, compression="zstd")
