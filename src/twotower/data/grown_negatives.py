"""Write the negatives of an extended dataset, and number the lists from which items were chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.dataset import NEGATIVES_FILE, Dataset
from twotower.data.event_arrays import NegativeEvents
from twotower.data.event_tables import codes_of
from twotower.data.growth import Growth, rows_of
from twotower.data.sources.raw_tables import POSITION, REQUEST
from twotower.schema import EVENT_TYPE, FIRST_ROW, STARS, TIME, TRAIN, VALID, WEIGHT, WITHHELD
from twotower.utils.array_files import arrays_of, write_arrays
from twotower.utils.ragged import lengths_to_offsets
from twotower.utils.types import Array, Int


def new_requests(base: Dataset, growth: Growth) -> tuple[Int, Int]:
    """Return the list numbers of the new events and of the new negatives, which follow those of the dataset; 0: unknown.

    A dataset keeps no names of its lists, so a list that goes on in the new data is a new one.
    """
    tables = [growth.events, *([] if growth.negatives is None else [growth.negatives.rows])]
    named = [table[REQUEST] if REQUEST in table.column_names else pa.chunked_array([pa.nulls(len(table))]) for table in tables]
    texts = pa.chunked_array([chunk for column in named for chunk in column.cast(pa.string()).chunks], pa.string())
    known = [rows.request.max(initial=0) for rows in (base.events, base.negatives) if rows is not None and rows.request is not None]
    code = codes_of(texts)
    code = np.where(code > 0, code + max(map(int, known), default=0), 0)
    return code[: len(growth.events)], code[len(growth.events) :]


def write_negatives(
    base: Dataset, growth: Growth, request: Int, user_new_row: Int, item_new_row: Int, folder: Path
) -> tuple[dict[str, int], list[str]]:
    """Write the old and the new negatives. Return their numbers by event type, and these types: known ones keep their codes.

    Parameters
    ----------
    request
        List numbers of the new negatives.
    user_new_row, item_new_row
        New row of every old row, followed by those of the new users and items.
    """
    types, parts = list(base.manifest.negative_types), list[dict[str, Array]]()
    if base.negatives is not None:
        old = arrays_of(base.negatives) | {"user_row": user_new_row[base.negatives.user_row]}
        split = np.where(base.negatives.split == WITHHELD, WITHHELD, TRAIN)
        parts.append(old | {"item_row": item_new_row[old["item_row"]], "split": split.astype(np.int8)})
    if growth.negatives is not None:
        rows = growth.negatives.rows
        types += sorted({*rows[EVENT_TYPE].to_pylist()} - {*types})
        impression_types = pa.array(base.manifest.config.prepare.impression_types, pa.string())
        time_s = np.asarray(rows[TIME].to_numpy(), np.int64)
        position = pc.fill_null(rows[POSITION], 0).to_numpy() if POSITION in rows.column_names else np.zeros(len(rows))
        parts.append(
            {
                "user_row": user_new_row[growth.negatives.user_row],
                "item_row": item_new_row[growth.negatives.item_row],
                "time_s": time_s,
                "event_type": rows_of(types, rows[EVENT_TYPE]) - FIRST_ROW,
                "stars": rows[STARS].to_numpy().astype(np.float32),
                "weight": rows[WEIGHT].to_numpy().astype(np.float32),
                "split": np.where(time_s < growth.cut_s, TRAIN, VALID).astype(np.int8),
                "impression": pc.is_in(rows[EVENT_TYPE], impression_types).to_numpy(),
                "position": position.astype(np.int64),
                "request": request,
            }
        )
    if not parts:
        return {}, types
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[-1] if name != "offsets"}
    owner = joined.pop("user_row")
    order = np.lexsort((joined["time_s"], owner))
    offsets = lengths_to_offsets(np.bincount(owner, minlength=len(user_new_row)))
    negatives = NegativeEvents(offsets=offsets, **{name: value[order] for name, value in joined.items()})
    write_arrays(folder / NEGATIVES_FILE, arrays_of(negatives))
    return dict(zip(types, np.bincount(joined["event_type"], minlength=len(types)).tolist(), strict=True)), types
