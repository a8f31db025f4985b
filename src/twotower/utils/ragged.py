"""Ragged arrays: many slices laid end to end, handled all at once."""

from __future__ import annotations

import numpy as np

from twotower.utils.types import Int, Mask


def lengths_to_offsets(sizes: Int) -> Int:
    """Sizes [n] → offsets int64 [n + 1]: slice i is offsets[i]:offsets[i + 1]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def ragged_arange(start: Int, size: Int) -> tuple[Int, Int]:
    """Slices start[i]:start[i] + size[i] laid end to end → of each place its slice and its position, both int64 [Σ size]."""
    owner = np.repeat(np.arange(len(size)), size)
    return owner, np.arange(len(owner)) + np.repeat(start - (np.cumsum(size) - size), size)


def changes(*keys: Int) -> Mask:
    """True where any key differs from the line before; the first line opens a group."""
    changed = np.ones(len(keys[0]), np.bool_)
    if len(changed):
        changed[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return changed


def lower_bound(sorted_values: Int, begin: Int, end: Int, value: Int) -> Int:
    """For each slice begin:end, the first position whose value is not below `value` (else end): bisection, all slices at once."""
    low, high = begin.copy(), end.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        below = open_ & (sorted_values[np.minimum(middle, len(sorted_values) - 1)] < value)
        low, high = np.where(below, middle + 1, low), np.where(open_ & ~below, middle, high)
    return np.asarray(low, np.int64)
