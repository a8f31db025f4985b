"""Compare masks of random filters with the meaning of each filter in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from twotower.features.geo import distances_km
from twotower.search.filters.item_filter import ItemFilter

VALUES = st.sampled_from([0, 1, 2, 2.5, 3])
TAGS = ["tea", "Bar", "pub"]
leaves = st.one_of(
    st.tuples(st.just("price"), st.sampled_from(["min", "max", "above", "below"]), VALUES),
    st.tuples(st.just("price"), st.sampled_from(["any", "none"]), st.lists(VALUES, max_size=3)),
    st.tuples(st.just("tags"), st.sampled_from(["any", "none", "all"]), st.lists(st.sampled_from(["TEA", "bar", "x"]), max_size=2)),
    st.tuples(st.just("city"), st.sampled_from(["any", "none"]), st.lists(st.sampled_from(["a", "B", "1"]), max_size=2)),
    st.tuples(st.just("within"), st.just("km"), st.sampled_from([0, 1, 3, 400, 30_000])),
)
trees = st.recursive(
    leaves.map(lambda leaf: {leaf[0]: {leaf[1]: leaf[2]}}),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: {"and": parts})
        | st.lists(inner, max_size=3).map(lambda parts: {"or": parts})
        | inner.map(lambda part: {"not": part})
    ),
    max_leaves=6,
)
_RNG = np.random.default_rng(0)
ROWS: list[dict[str, Any]] = [
    {
        "price": _RNG.choice([None, 0.0, 1.0, 2.0, 2.5, 3.0]),
        "tags": None if _RNG.random() < 0.2 else [str(tag) for tag in _RNG.choice(TAGS, _RNG.integers(0, 3))],
        "city": _RNG.choice([None, "A", "b", "1"]),
        "latitude": None if _RNG.random() < 0.2 else float(_RNG.choice([27.95, 27.96, 28.95, -27.95])),
        "longitude": float(_RNG.choice([-82.46, -82.45, 97.54])),
    }
    for _ in range(60)
]


def truth(row: dict[str, Any], node: dict[str, Any]) -> bool | None:
    """Evaluate a filter with three-valued logic in plain Python."""
    ((word, value),) = node.items()
    if word in ("and", "or"):
        parts = [truth(row, part) for part in value]
        stops = word == "or"
        return stops if stops in parts else None if None in parts else not stops
    if word == "not":
        inner = truth(row, value)
        return None if inner is None else not inner
    ((condition, wanted),) = value.items()
    if word == "within":
        if row["latitude"] is None:
            return None
        return bool(distances_km(np.array([[row["latitude"], row["longitude"]]]), (27.95, -82.46))[0] <= wanted)
    if condition == "all" and not wanted:
        return True
    if row[word] is None:
        return None
    if condition in ("min", "max", "above", "below"):
        return {"min": row[word] >= wanted, "max": row[word] <= wanted, "above": row[word] > wanted, "below": row[word] < wanted}[
            condition
        ]
    held = [text.lower() for text in row["tags"]] if word == "tags" else [row["city"].lower()] if word == "city" else [row["price"]]
    found = [(each.lower() if isinstance(each, str) else each) in held for each in wanted]
    return all(found) if condition == "all" else any(found) == (condition == "any")


@given(trees)
def test_masks_are_what_python_says(tree: dict[str, Any]) -> None:
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    made = ItemFilter(pa.table({"item_id": [str(i) for i in range(len(ROWS))], **columns}))
    mask = made.compile(tree, home=(27.95, -82.46))
    assert mask.tolist()[2:] == [truth(row, tree) is True for row in ROWS]
