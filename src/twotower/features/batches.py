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


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor of a batch lies in a block of bytes; see `packed`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def view(self, block: Tensor) -> Tensor:
        """Return the tensor as a view of a block, uint8 [n]."""
        return block[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


def packed(batch: Batch, *, pin_memory: bool = False) -> tuple[Tensor, Batch]:
    """Copy all tensors of a batch into one block of bytes, which can be copied to a device, or sent to a process, in one call.

    Returns
    -------
    block
        uint8 [n], each tensor at a multiple of 16 bytes.
    slots
        The batch with a `Slot` in place of each tensor; `unpacked` gives the batch back.
    """
    tensors: list[tuple[Slot, Tensor]] = []
    size = 0

    def reserve(tensor: Tensor) -> Slot:
        nonlocal size
        slot = Slot(tensor.dtype, tuple(tensor.shape), size, tensor.nbytes)
        tensors.append((slot, tensor))
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return slot

    slots: Batch = _map(batch, Tensor, reserve)
    block = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    for slot, tensor in tensors:
        slot.view(block).copy_(tensor)
    return block, slots


def unpacked(block: Tensor, slots: Batch) -> Batch:
    """Return the batch of `packed` as views of a copy of its block, on any device."""
    batch: Batch = _map(slots, Slot, lambda slot: slot.view(block))
    return batch


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch whose tensors are replaced by `change(tensor)`, also inside nested dataclasses, tuples and dicts.

    Examples
    --------
    >>> items = ItemBatch(torch.tensor([2, 3]), {"state": torch.zeros(2, 5)})
    >>> map_tensors(items, lambda tensor: tensor[:1]).row
    tensor([2])
    """
    mapped: Batch = _map(batch, Tensor, change)
    return mapped


def _map(found: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return a structure whose objects of a class are replaced by `change(object)`."""
    if isinstance(found, kind):
        return change(found)
    if isinstance(found, dict):
        return {name: _map(value, kind, change) for name, value in found.items()}
    if isinstance(found, tuple):
        return tuple(_map(value, kind, change) for value in found)
    if is_dataclass(found) and not isinstance(found, type):
        return replace(found, **{part.name: _map(getattr(found, part.name), kind, change) for part in fields(found)})
    return found
