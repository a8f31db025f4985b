"""What the towers read: batches of items and of users, and the declaration of their fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from twotower.utils.config import ModelConfig

GAP_BUCKETS = 24  # log2 of seconds, capped
STARS_BUCKETS = 8  # 0 padding, 1 none given, 2 … 7 for 0 to 5 stars
ALIGNED = 16  # bytes: the start of every tensor in a block
Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One input field of a tower: how its tensor is turned into an embedding.

    Attributes
    ----------
    kind
        "rows": int64 [n] rows of a table; "bag": int64 [n, width] rows, 0 padded, averaged; "dense": float32 [n, width];
        "geo": int64 [n, 2] cells and, under `name.point`, float32 [n, 3] km.
    sizes
        Rows of the table(s), or the width of a dense field.
    table
        Fields that name the same table share it.
    """

    name: str
    kind: Literal["rows", "bag", "dense", "geo"]
    sizes: tuple[int, ...]
    table: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes that the data gives to the model.

    Attributes
    ----------
    items, users
        Rows of the two id tables, the reserved two included.
    event_types
        Kinds of events (codes 1 … event_types).
    item_fields, user_fields
        Input fields of each tower. An item's "state" changes with time, and is not part of a history's tokens.
    ordered
        Whether what is asked for comes after the history. Under a given split it comes from anywhere in it.
    timed
        Whether events have times; else they have positions only.
    events
        Positive ones of the training part.
    """

    items: int
    users: int
    event_types: int
    item_fields: tuple[FieldSpec, ...]
    user_fields: tuple[FieldSpec, ...]
    ordered: bool = True
    timed: bool = True
    events: int = 0

    def resolve(self, config: ModelConfig) -> ModelConfig:
        """The settings with what they leave to the data."""
        return config.resolved(ordered=self.ordered, timed=self.timed, events=self.events)


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """Items `n`: `row` int64 [n] (rows of the id table) and one tensor per field [n, …]."""

    row: Tensor
    fields: dict[str, Tensor]

    def to(self, device: torch.device | str) -> ItemBatch:
        """Copy to a device; see `on_device`."""
        return on_device(self, device)


@dataclass(frozen=True, slots=True)
class UserBatch:
    """`S` histories laid end to end in `T` places, and `Q` moments at which a vector is wanted.

    Histories are sorted into a few widths and padded to their width only, so that short ones cost what they hold.

    Attributes
    ----------
    items
        The distinct items of all histories; the first is PAD.
    widths
        (histories, width) of each run of equal width: the first `histories · width` places are theirs, and so on.
    history
        int64 [T]: positions in `items`, oldest first, 0 after the end of each history.
    event_type, stars, gap
        int64 [T]: event type code, stars bucket, log2 bucket of the seconds since the event before.
    at, seen
        int64 [Q]: the place of the last event the moment sees, and how many it sees (0: none, `at` means nothing then).
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
    """Copy all tensors of a batch into one block of bytes, to be copied on at once.

    Returns
    -------
    block
        uint8 [n], each tensor at a multiple of 16 bytes.
    rebuild
        Makes the same batch from a copy of the block, on any device, as views of it.
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
    """Return a batch whose tensors are replaced by `change(tensor)`, however deep they lie in dataclasses, tuples and dicts.

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
