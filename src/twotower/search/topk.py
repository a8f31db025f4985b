"""Scores in, the exact `k` best items of every row out, in bounded memory.

Enters: a matrix of scores, one row a query, one column an item row. Leaves: `Recommendations`. Promised: the order is that of a
full sort by (score descending, item row ascending), whatever the ties; PAD, UNKNOWN and masked items never appear; extra memory
grows with sqrt(N k) a query.

How: the columns are cut into blocks, and only the `k` blocks with the best maxima are looked into. An item outside of them has
`k` block maxima before it, each with a better score or the same score and a lower row, so it is not among the `k` best. Where equal
scores leave open which is taken, score and row are packed into one int64 key. A few rows go one by one: whatever reaches the
k-th best maximum is sorted, stably.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from twotower.retriever import Recommendations
from twotower.schema import FIRST_ROW
from twotower.utils.types import Float, Int, Mask

Ragged = tuple[Int, Int]
"""(offsets int64 [B + 1], rows int64 [T]): the rows of query b are rows[offsets[b]:offsets[b + 1]]."""

_CANDIDATES = 2**22  # keys held at once: 32 MB
_NUMPY_MAX_ROWS = 32  # rows that are done one by one, on a CPU: NumPy then, which does not wait for the threads of its product
_LANES = 32  # floats in the registers that one step of a reduction fills
_NOTHING = float("-inf")
_BROKEN = "Scores must be numbers. Got NaN: the model that made them is broken."


def top_k(scores: Float | Tensor, k: int, *, exclude: Ragged | None = None, allow: Mask | None = None) -> Recommendations:
    """Return the `k` best items of every row of `scores`.

    Parameters
    ----------
    scores
        float32 [B, N], array or tensor (of any device). Used as scratch space when writable: masked entries become -inf.
    k
        Length of the lists, at least 1.
    exclude
        Ragged item rows left out of each query's list, repeats allowed; usually its history.
    allow
        bool [N] or [B, N]; False leaves the item out.

    Returns
    -------
    Recommendations
        items int64 [B, k], scores float32 [B, k]; -1 / -inf where fewer than `k` items have a score above -inf.

    Raises
    ------
    ValueError
        A score is NaN, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1. Got {k}.")
    matrix = _tensor(scores)
    _mask(matrix, exclude, allow)
    return _top(matrix, k)


def top_k_among(scores: Float, rows: Int, k: int) -> Recommendations:
    """The `k` best of one query's candidates: item `rows` int64 [C], ascending, with their scores float32 [C]; as in `top_k`."""
    found = _top(torch.from_numpy(scores[None]), k)
    found.items[found.items >= 0] = rows[found.items[found.items >= 0]]
    return found


def _top(matrix: Tensor, k: int) -> Recommendations:
    size, width = matrix.shape
    items = np.full((size, k), -1, np.int64)
    values = np.full((size, k), _NOTHING, np.float32)
    if size <= _NUMPY_MAX_ROWS and matrix.device.type == "cpu":
        for b, row in enumerate(matrix.numpy()):
            at = _best_of_one(row, k)
            items[b, : len(at)], values[b, : len(at)] = at, row[at]
        return Recommendations(items, values)
    step = max(1, _CANDIDATES // (4 * isqrt(width * min(k, width)) + 1))
    for start in range(0, size, step):
        best, rows, broken = _best(matrix[start : start + step], min(k, width))
        if broken:
            raise ValueError(_BROKEN)
        items[start : start + step, : rows.shape[1]] = rows.cpu().numpy()
        values[start : start + step, : rows.shape[1]] = best.cpu().numpy()
    items[values == _NOTHING] = -1
    return Recommendations(items, values)


def _best_of_one(scores: Float, k: int) -> Int:
    """Columns of the k best scores, fewer where fewer are above -inf."""
    if not len(scores):
        return np.zeros(0, np.int64)
    k = min(k, len(scores))
    wide = isqrt(len(scores) * k)  # at least k
    whole = len(scores) // wide * wide
    maxima = scores[:whole].reshape(-1, wide).max(axis=0)  # of every wide-th score: whole registers at a time
    if np.isnan(maxima).any() or np.isnan(scores[whole:]).any():
        raise ValueError(_BROKEN)
    floor = np.partition(maxima, -k)[-k]  # k scores reach it, so every one of the k best does
    at = np.flatnonzero((scores >= floor) & (scores > _NOTHING))
    return np.asarray(at[np.argsort(-scores[at], kind="stable")[:k]], np.int64)


def _tensor(scores: Float | Tensor) -> Tensor:
    if isinstance(scores, Tensor):
        return scores.detach().float()
    return _writable(np.ascontiguousarray(scores, np.float32))


def _writable(array: Float | Int | Mask) -> Tensor:
    """The same numbers as a tensor, which PyTorch wants writable."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _mask(matrix: Tensor, exclude: Ragged | None, allow: Mask | None) -> None:
    matrix[:, :FIRST_ROW] = _NOTHING
    if exclude is not None:
        offsets, rows = exclude
        query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        matrix[_writable(query).to(matrix.device), _writable(rows).to(matrix.device)] = _NOTHING
    if allow is not None:
        banned = torch.from_numpy(~np.asarray(allow, bool))  # an array of its own: filters give read-only ones
        matrix.masked_fill_(banned.to(matrix.device), _NOTHING)


def _best(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and rows of the k best columns, k <= N, and whether a score is NaN: all on the device of `matrix`."""
    size, width = matrix.shape
    block = _block(width, k)
    blocks = width // block
    whole, tail = matrix[:, : blocks * block].view(size, blocks, block), matrix[:, blocks * block :]
    maxima = whole.amax(-1)
    broken = maxima.isnan().any() | tail.isnan().any()
    # In ascending order, so that among the candidates, too, a lower position is a lower row.
    chosen = _first(maxima, min(k, blocks), ordered=False).sort(dim=1).values
    scores = torch.cat([whole.gather(1, chosen[:, :, None].expand(-1, -1, block)).flatten(1), tail], 1)
    at = _first(scores, k, ordered=True)
    inside = chosen.shape[1] * block
    rows = chosen.gather(1, (at // block).clamp(max=chosen.shape[1] - 1)) * block + at % block
    return scores.gather(1, at), torch.where(at < inside, rows, at - inside + blocks * block), broken


def _first(scores: Tensor, k: int, *, ordered: bool) -> Tensor:
    """Columns int64 [B, k] of the k best scores, a lower one first where scores are equal; in this order only if `ordered`.

    A top-k of floats leaves open which of equal ones it takes. On a CPU queries where that matters, few with most scores, are done
    again. A GPU would have to be waited for to know them: there integer keys, which have no ties, order all queries at once.
    """
    if scores.device.type != "cpu":
        return torch.topk(_keys(scores), k, dim=1).indices
    best = torch.topk(scores, min(k + 1, scores.shape[1]), dim=1)
    equal = (best.values[:, 1:] == best.values[:, :-1]) & (best.values[:, 1:] > _NOTHING)
    again = (equal if ordered else equal[:, k - 1 :]).any(1).nonzero()[:, 0]
    columns = best.indices[:, :k]
    if len(again):
        columns[again] = torch.topk(_keys(scores[again]), k, dim=1).indices
    return columns


def _block(width: int, k: int) -> int:
    """Columns of a block: about sqrt(N / k), where looking for blocks and looking into them take the same; whole vector registers,
    which are reduced several times faster, unless the blocks are tiny."""
    block = max(1, isqrt(width // k))
    return -(-block // _LANES) * _LANES if block > _LANES // 2 else block


def _keys(scores: Tensor) -> Tensor:
    """int64 keys, one for each column: a higher score first, then a lower column."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: minus zero becomes zero, which it equals
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # the integers in the order of the floats
    return ordered * 2**32 - torch.arange(scores.shape[1], device=scores.device)
