"""Define the inputs of the towers: batches of items and users, and the declaration of their fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

GAP_BUCKETS = 24  # log2 of seconds, capped
STARS_BUCKETS = 8  # 0 padding, 1 no stars, 2 … 7 for 0 to 5 stars
ALIGNED = 16  # bytes: every tensor in a block starts at a multiple of this
Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One input field of a tower, and how its tensor becomes an embedding.

    Attributes
    ----------
    kind
        "rows": int64 [n] rows of a table; "bag": int64 [n, width] rows, 0 padded, averaged; "dense": float32 [n, width];
        "geo": int64 [n, 2] cells and, under `name.point`, float32 [n, 3] km.
    sizes
        Rows of the table(s), or the width of a dense field.
    table
        Name of the embedding table; fields with the same name share it.
    """

    name: str
    kind: Literal["rows", "bag", "dense", "geo"]
    sizes: tuple[int, ...]
    table: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of a dataset that determine the model.

    Attributes
    ----------
    items, users
        Rows of the two id tables, including the two reserved rows.
    event_types
        Number of event types (codes 1 … event_types).
    item_fields, user_fields
        Input fields of each tower. The "state" of an item changes with time and is not part of the tokens of a history.
    ordered
        True if targets come after the history. With a predefined split they may come from anywhere in it.
    half_lives
        Half-lives in days of the popularities of an item; 0: all events count the same.
    """

    items: int
    users: int
    event_types: int
    item_fields: tuple[FieldSpec, ...]
    user_fields: tuple[FieldSpec, ...]
    ordered: bool
    half_lives: tuple[float, ...] = (0.0,)


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """`n` items: `row` int64 [n] (rows of the id table) and one tensor per field [n, …]."""

    row: Tensor
    fields: dict[str, Tensor]

    def to(self, device: torch.device | str) -> ItemBatch:
        """Copy to a device; see `on_device`."""
        return on_device(self, device)


@dataclass(frozen=True, slots=True)
class UserBatch:
    """`S` histories stored one after another in `T` slots, and `Q` positions at which user vectors are computed.

    Histories are grouped into a few widths and padded only to their width, so that short histories stay cheap.

    Attributes
    ----------
    items
        Distinct items of all histories; the first is PAD.
    widths
        (histories, width) of each group of equal width: the first `histories · width` slots belong to the first group, and so on.
    history
        int64 [T]: positions in `items`, oldest first, 0 after the end of each history.
    event_type, stars, gap
        int64 [T]: event type code, stars bucket, log2 bucket of the seconds since the event before.
    at, seen
        int64 [Q]: slot of the last visible event, and number of visible events (if 0, `at` has no meaning).
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
        """Copy to a device; see `on_device`."""
        return on_device(self, device)


def on_device(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with all tensors on `device`; copies from pinned memory do not wait for the device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def packed(batch: Batch, *, pin_memory: bool = False) -> tuple[Tensor, Callable[[Tensor], Batch]]:
    """Copy all tensors of a batch into one block of bytes, which can be copied to a device in one call.

    Returns
    -------
    block
        uint8 [n], each tensor at a multiple of 16 bytes.
    rebuild
        Function that returns the same batch as views of a copy of the block, on any device.
    """
    tensors: list[Tensor] = []
    map_tensors(batch, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // ALIGNED) * ALIGNED)
    block = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin_memory)

    def view(block: Tensor, number: int) -> Tensor:
        tensor, start = tensors[number], starts[number]
        return block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    for number, tensor in enumerate(tensors):
        view(block, number).copy_(tensor)

    def rebuild(block: Tensor) -> Batch:
        numbers = iter(range(len(tensors)))
        return map_tensors(batch, lambda _: view(block, next(numbers)))

    return block, rebuild


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch whose tensors are replaced by `change(tensor)`, also inside nested dataclasses, tuples and dicts.

    Examples
    --------
    >>> items = ItemBatch(torch.tensor([2, 3]), {"state": torch.zeros(2, 5)})
    >>> map_tensors(items, lambda tensor: tensor[:1]).row
    tensor([2])
    """
    found: Any = batch
    if isinstance(found, Tensor):
        found = change(found)
    elif isinstance(found, dict):
        found = {name: map_tensors(value, change) for name, value in found.items()}
    elif isinstance(found, tuple):
        found = tuple(map_tensors(value, change) for value in found)
    elif is_dataclass(found) and not isinstance(found, type):
        found = replace(found, **{part.name: map_tensors(getattr(found, part.name), change) for part in fields(found)})
    mapped: Batch = found
    return mapped
