"""Show the lists of a few users of the test part beside their histories."""

from __future__ import annotations

import numpy as np

from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.retriever import Retriever
from twotower.schema import FIRST_ROW, ITEM_ID, UNKNOWN
from twotower.utils.documents import Example, ExampleItem
from twotower.utils.ids import id_types, native_id
from twotower.utils.types import Int

USERS, LIST_LENGTH, HISTORY = 5, 5, 5


def examples(system: Retriever, held_out: HeldOut, dataset: Dataset, *, exclude_seen: bool, seed: int) -> list[Example]:
    """Return the lists of a few users, drawn with `seed` among those with a history.

    "came_next" are the items that came next.
    """
    queries = held_out.queries
    chosen = np.flatnonzero((np.diff(queries.offsets) > 0) & (queries.user_row != UNKNOWN))
    chosen = np.sort(np.random.default_rng(seed).choice(chosen, min(USERS, len(chosen)), replace=False))
    lists = system.retrieve(queries.take(chosen), LIST_LENGTH, exclude_seen=exclude_seen).items
    found = []
    for query, rows in zip(chosen.tolist(), lists, strict=True):
        targets = held_out.target_row[held_out.target_offsets[query] : held_out.target_offsets[query + 1]]
        history = queries.item_row[queries.offsets[query] : queries.offsets[query + 1]][::-1]
        user = str(dataset.user_ids[queries.user_row[query]])
        found.append(
            Example(
                user=native_id(user, id_types(dataset.manifest)["user_id"]),
                history=_items(dataset, history[:HISTORY], ()),
                recommended=_items(dataset, rows[rows >= FIRST_ROW], targets),
                came_next=_items(dataset, targets[:HISTORY], ()),
            )
        )
    return found


def _items(dataset: Dataset, rows: Int, targets: Int | tuple[()]) -> list[ExampleItem]:
    names = dataset.items["name"] if "name" in dataset.items.column_names else dataset.items[ITEM_ID]
    kind, known = id_types(dataset.manifest)[ITEM_ID], {int(row) for row in targets}
    ids = [str(dataset.item_ids[row]) for row in rows]
    item_names = [names[int(row) - FIRST_ROW].as_py() or one for row, one in zip(rows, ids, strict=True)]
    return [
        ExampleItem(item=native_id(one, kind), name=name, hit=int(row) in known)
        for one, name, row in zip(ids, item_names, rows, strict=True)
    ]
