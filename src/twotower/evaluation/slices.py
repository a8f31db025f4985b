"""Split held-out queries into slices for the report.

The groups of one title do not overlap; empty groups are left out. A query with several targets is grouped by the earliest one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.features.item_columns import as_lists, category_column
from twotower.schema import FIRST_ROW
from twotower.utils.types import Int, Mask

HISTORY_LENGTHS = ((0, 0), (1, 2), (3, 5), (6, 10), (11, 20), (21, None))
CITIES = 8


def slices(held_out: HeldOut, dataset: Dataset) -> dict[str, dict[str, Mask]]:
    """Return masks over the queries, title → group → bool [B].

    The titles are the history length, known or new user, popularity of the target item, and city of the target.
    """
    target = first_target(held_out)
    lengths, users = held_out.queries.lengths, held_out.queries.user_row
    known = (users >= FIRST_ROW) & (users < dataset.n_train_user_rows)
    by_length = {_label(low, high): (lengths >= low) & (lengths <= (high or np.inf if low else 0)) for low, high in HISTORY_LENGTHS}
    kind = popularity_class(dataset)[target]
    titles: dict[str, dict[str, Mask]] = {
        "history length": by_length,
        "user": {"known": known, "new": ~known},
        f"target {dataset.noun}": {name: kind == code for code, name in enumerate(("head", "torso", "tail", "new"))},
    }
    city = _cities(dataset)
    if city is not None:
        names, count = np.unique(city[target], return_counts=True)
        largest = [str(name) for name in names[np.argsort(-count, kind="stable")] if name][:CITIES]
        titles["city of the target"] = {name: city[target] == name for name in largest}
    full = {title: {name: mask for name, mask in groups.items() if mask.any()} for title, groups in titles.items()}
    return {title: groups for title, groups in full.items() if groups}


def first_target(held_out: HeldOut) -> Int:
    """Return the item row of each query's earliest target event, int64 [B]."""
    query = np.repeat(np.arange(len(held_out.queries)), np.diff(held_out.target_offsets))
    first: Int = held_out.target_row[np.lexsort((held_out.event_index, query))][held_out.target_offsets[:-1]]
    return first


def popularity_class(dataset: Dataset) -> Int:
    """Return the popularity class of each item, int64 [n_item_rows]: 0 head, 1 torso, 2 tail, 3 new.

    Items are sorted by decreasing popularity. Head, torso and tail hold a third of the positive training events each. New items
    have no positive training event.
    """
    count = dataset.item_train_count
    order = np.argsort(-count, kind="stable")
    before = np.cumsum(count[order]) - count[order]  # events of more popular items
    kind = np.empty(len(count), np.int64)
    kind[order] = np.minimum(3 * before // max(int(count.sum()), 1), 2)
    kind[count == 0] = 3
    return kind


def categories(dataset: Dataset) -> tuple[Int, Int] | None:
    """Return the distinct categories of each item as a ragged array, or None if no item has a category.

    Returns
    -------
    offsets, codes
        int64 [n_item_rows + 1] and int64 [n]: item row i has the categories codes[offsets[i]:offsets[i + 1]].
    """
    name = category_column(dataset.items, dataset.specs, learned=True)
    if name is None:
        return None
    column = as_lists(dataset.items[name])
    item = np.asarray(pc.list_parent_indices(column), np.int64) + FIRST_ROW
    code = np.asarray(pc.fill_null(pc.dictionary_encode(pc.list_flatten(column)).indices, -1), np.int64)
    keys = np.unique(item[code >= 0] * (code.max(initial=0) + 1) + code[code >= 0])
    if not len(keys):
        return None
    counts = np.bincount(keys // (code.max() + 1), minlength=dataset.n_item_rows)
    return np.append(0, np.cumsum(counts)), keys % (code.max() + 1)


def _cities(dataset: Dataset) -> NDArray[np.str_] | None:
    if "city" not in dataset.items.column_names:
        return None
    column = pc.fill_null(pc.utf8_trim_whitespace(dataset.items["city"].cast(pa.string())), "")
    return np.array([""] * FIRST_ROW + column.to_pylist())


def _label(low: int, high: int | None) -> str:
    return str(low) if low == high else f"{low}+" if high is None else f"{low}–{high}"
