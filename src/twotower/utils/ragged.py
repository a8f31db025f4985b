"""Compute on ragged arrays: many slices of different lengths, stored one after another."""

from __future__ import annotations

import numpy as np

from twotower.utils.types import Int, Mask


def lengths_to_offsets(sizes: Int) -> Int:
    """Return offsets int64 [n + 1] for sizes [n]: slice i is offsets[i]:offsets[i + 1].

    Examples
    --------
    >>> lengths_to_offsets(np.array([2, 0, 3]))
    array([0, 2, 2, 5])
    """
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def ragged_arange(start: Int, size: Int) -> tuple[Int, Int]:
    """Return slice numbers and positions, both int64 [Σ size], of the slices start[i]:start[i] + size[i], one after another.

    Examples
    --------
    >>> ragged_arange(np.array([0, 5]), np.array([2, 1]))
    (array([0, 0, 1]), array([0, 1, 5]))
    """
    owner = np.repeat(np.arange(len(size)), size)
    return owner, np.arange(len(owner)) + np.repeat(start - (np.cumsum(size) - size), size)


def changes(*keys: Int) -> Mask:
    """Return a mask, True where any key differs from the element before; True for the first element."""
    changed = np.ones(len(keys[0]), np.bool_)
    if len(changed):
        changed[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return changed


def lower_bound(sorted_values: Int, begin: Int, end: Int, value: Int) -> Int:
    """Return, for each slice begin:end, the first position whose value is at least `value`, else end (bisection of all slices)."""
    low, high = begin.copy(), end.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        below = open_ & (sorted_values[np.minimum(middle, len(sorted_values) - 1)] < value)
        low, high = np.where(below, middle + 1, low), np.where(open_ & ~below, middle, high)
    return np.asarray(low, np.int64)


def taken(ragged: tuple[Int, Int], slices: Int) -> tuple[Int, Int]:
    """Return the chosen slices of (offsets, values), in their order.

    Examples
    --------
    >>> taken((np.array([0, 2, 3]), np.array([7, 8, 9])), np.array([1]))
    (array([0, 1]), array([9]))
    """
    offsets, values = ragged
    size = np.diff(offsets)[slices]
    return lengths_to_offsets(size), values[ragged_arange(offsets[slices], size)[1]]


def concatenated(first: tuple[Int, Int], second: tuple[Int, Int]) -> tuple[Int, Int]:
    """Return (offsets, values) whose slices are those of `first`, each followed by that of `second`.

    Examples
    --------
    >>> concatenated((np.array([0, 1, 2]), np.array([7, 8])), (np.array([0, 0, 1]), np.array([9])))
    (array([0, 1, 3]), array([7, 8, 9]))
    """
    owner = np.concatenate([np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) for offsets, _ in (first, second)])
    order = np.argsort(owner, kind="stable")
    return first[0] + second[0], np.concatenate([first[1], second[1]])[order]
