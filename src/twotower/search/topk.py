"""Select the exact top-k items of every row of a score matrix, in bounded memory.

The matrix has one row per query and one column per item row. The result equals a full sort by (score descending, item row
ascending), including ties. PAD, UNKNOWN and masked items are never returned. Extra memory grows with sqrt(N k) per query.

Method: the columns are split into blocks, and only the `k` blocks with the largest maxima are searched. An item outside of them has
`k` block maxima before it, each with a better score or with the same score and a lower row, so it is not in the top k. If ties
leave the choice open, score and row are packed into one int64 key. A few queries on a CPU are processed one by one: the scores
that reach the k-th best maximum are sorted stably.
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

_CANDIDATES = 2**22  # keys in memory at a time: 32 MB
_NUMPY_MAX_ROWS = 32  # on a CPU, up to this many rows are processed one by one with NumPy, which does not wait for threads
_LANES = 32  # floats processed by one step of a vectorised reduction
_NOTHING = float("-inf")
_BROKEN = "A score is NaN. Scores must be numbers. Check the weights of the model that computed them."


def top_k(scores: Float | Tensor, k: int, *, exclude: Ragged | None = None, allow: Mask | None = None) -> Recommendations:
    """Return the `k` best items of every row of `scores`.

    Parameters
    ----------
    scores
        float32 [B, N], array or tensor (of any device). Used as scratch space when writable: masked entries become -inf.
    k
        Length of the lists, at least 1.
    exclude
        Ragged item rows to exclude for each query, repeats allowed; usually its history.
    allow
        bool [N] or [B, N]; False excludes the item.

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
        raise ValueError(f"k is {k}. It must be at least 1.")
    matrix = _tensor(scores)
    _mask(matrix, exclude, allow)
    return _top(matrix, k)


def top_k_among(scores: Float, rows: Int, k: int) -> Recommendations:
    """Return the `k` best of one query's candidates: item `rows` int64 [C], ascending, with scores float32 [C]. See `top_k`."""
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
    """Return the columns of the k best scores; fewer if fewer scores are above -inf."""
    if not len(scores):
        return np.zeros(0, np.int64)
    k = min(k, len(scores))
    wide = isqrt(len(scores) * k)  # at least k
    whole = len(scores) // wide * wide
    maxima = scores[:whole].reshape(-1, wide).max(axis=0)  # strided blocks: whole SIMD registers at a time
    if np.isnan(maxima).any() or np.isnan(scores[whole:]).any():
        raise ValueError(_BROKEN)
    floor = np.partition(maxima, -k)[-k]  # k scores reach it, so all of the k best do
    at = np.flatnonzero((scores >= floor) & (scores > _NOTHING))
    return np.asarray(at[np.argsort(-scores[at], kind="stable")[:k]], np.int64)


def _tensor(scores: Float | Tensor) -> Tensor:
    if isinstance(scores, Tensor):
        return scores.detach().float()
    return _writable(np.ascontiguousarray(scores, np.float32))


def _writable(array: Float | Int | Mask) -> Tensor:
    """Return the array as a tensor, copied if it is read-only."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _mask(matrix: Tensor, exclude: Ragged | None, allow: Mask | None) -> None:
    matrix[:, :FIRST_ROW] = _NOTHING
    if exclude is not None:
        offsets, rows = exclude
        query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        matrix[_writable(query).to(matrix.device), _writable(rows).to(matrix.device)] = _NOTHING
    if allow is not None:
        banned = torch.from_numpy(~np.asarray(allow, bool))  # a new array: filters return read-only ones
        matrix.masked_fill_(banned.to(matrix.device), _NOTHING)


def _best(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores and rows of the k best columns (k <= N) and whether a score is NaN, on the device of `matrix`."""
    size, width = matrix.shape
    block = _block(width, k)
    blocks = width // block
    whole, tail = matrix[:, : blocks * block].view(size, blocks, block), matrix[:, blocks * block :]
    maxima = whole.amax(-1)
    broken = maxima.isnan().any() | tail.isnan().any()
    # Ascending, so that a lower position among the candidates is a lower row.
    chosen = _first(maxima, min(k, blocks), ordered=False).sort(dim=1).values
    scores = torch.cat([whole.gather(1, chosen[:, :, None].expand(-1, -1, block)).flatten(1), tail], 1)
    at = _first(scores, k, ordered=True)
    inside = chosen.shape[1] * block
    rows = chosen.gather(1, (at // block).clamp(max=chosen.shape[1] - 1)) * block + at % block
    return scores.gather(1, at), torch.where(at < inside, rows, at - inside + blocks * block), broken


def _first(scores: Tensor, k: int, *, ordered: bool) -> Tensor:
    """Return the columns int64 [B, k] of the k best scores, the lower column first for ties; sorted only if `ordered`.

    `torch.topk` does not define the order of ties. On a CPU, the few queries with relevant ties are processed again. On a GPU,
    finding them would need a synchronisation, so all queries use integer keys, which have no ties.
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
    """Return the columns of a block: about sqrt(N / k), where finding blocks and searching them cost the same.

    Unless blocks are tiny, the size is rounded up to whole SIMD registers, which are reduced several times faster.
    """
    block = max(1, isqrt(width // k))
    return -(-block // _LANES) * _LANES if block > _LANES // 2 else block


def _keys(scores: Tensor) -> Tensor:
    """Return int64 keys, one for each column, that order by score and then by lower column."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns minus zero into zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers that sort like the floats
    return ordered * 2**32 - torch.arange(scores.shape[1], device=scores.device)
