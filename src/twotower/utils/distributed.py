"""Communicate between the processes that `torchrun` starts, on one or several hosts (NCCL on GPUs, gloo on CPUs).

All functions also work in a single process, where they communicate nothing, so callers need no special case. All processes must
call the same functions in the same order. The results of W processes for a batch add up to the result of one process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from twotower.errors import TrainingError

WHOLE_BLOCK = 1 << 16  # rows of each process that `gather_full` gathers at once
LOST = timedelta(minutes=10)  # a process that does not answer for so long counts as dead


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of `torchrun` for the duration of the block; without `torchrun`, do nothing.

    Raises
    ------
    TrainingError
        The connection to another process was lost, or SIGTERM was received.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LOST)
    me = rank()
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    try:
        yield
        dist.barrier()  # leaving closes connections, and gloo may abort a process that still writes to them
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not _lost(error):
            raise
        raise TrainingError(
            f"Process {me} lost the connection to another process ({str(error).splitlines()[0][:120]}). Training needs all. "
            "The last checkpoint is intact; continue with --resume, on any number of processes."
        ) from None
    finally:
        dist.destroy_process_group()


def _end_on_sigterm(*_: object) -> None:
    """Raise a `TrainingError`: `torchrun` sends SIGTERM to all processes when one has died."""
    raise TrainingError(
        f"Process {rank()} received SIGTERM, probably because another process has died. Training needs all of them. "
        "The last checkpoint is intact; continue with --resume, on any number of processes."
    )


def _lost(error: BaseException) -> bool:
    """Return True for an error of the connection. gloo raises plain RuntimeErrors, which only their text identifies."""
    return isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe")
    )


def leave(code: int) -> NoReturn:
    """End this process at once with exit code `code`.

    A normal interpreter exit may abort because of threads of the communication libraries, which `torchrun` counts as a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the parts [sizes[rank], …] of all processes concatenated, [Σ sizes, …]; gradients flow back summed."""
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x, tuple(sizes))  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sizes: tuple[int, ...] = ctx.sizes
        total = grad.contiguous()
        dist.all_reduce(total)
        start = sum(sizes[: rank()])
        return total[start : start + sizes[rank()]], None


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over the processes, with one message per data type."""
    if world_size() == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype is dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def broadcast(values: Sequence[float]) -> list[float]:
    """Return the values of process 0, so that all processes decide alike."""
    if world_size() == 1:
        return list(values)
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.broadcast(tensor, 0)
    return [float(value) for value in tensor.cpu()]


def gather_rows(row: Tensor, answer_with: Tensor) -> Tensor:
    """Return rows of a matrix of which process p holds rows p, p + W, p + 2W, …

    Parameters
    ----------
    row
        int64 [n]: rows of the whole matrix.
    answer_with
        This process's rows [⌈(R − rank) / W⌉, …].

    Returns
    -------
    Tensor
        [n, …], in the order of `row`.
    """
    if world_size() == 1:
        return answer_with[row]
    order, counts, asked_counts = _by_owner(row)
    requested_rows = _exchange(row[order], counts, asked_counts)
    answers = _exchange(answer_with[requested_rows // world_size()], asked_counts, counts)
    found = torch.empty_like(answers)
    found[order] = answers
    return found


def scatter_rows(row: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Send (row, value) pairs to the owners of the rows; return those sent to this process, with its local row numbers."""
    order, counts, sizes = _by_owner(row)
    return _exchange(row[order], counts, sizes) // world_size(), _exchange(value[order], counts, sizes)


def local_rows(rows: int) -> int:
    """Return how many of the `rows` rows of a matrix this process holds; see `gather_rows`."""
    return -(-(rows - rank()) // world_size())


def gather_full(part: Tensor, rows: int) -> Tensor:
    """Return the whole matrix [rows, …] on the CPU of process 0; other processes get a matrix without rows.

    It is gathered in blocks, so that a device holds at most `WHOLE_BLOCK` rows of each process besides its own.
    """
    if world_size() == 1:
        return part
    sizes = [-(-(rows - p) // world_size()) for p in range(world_size())]
    result = torch.empty(rows if rank() == 0 else 0, *part.shape[1:], dtype=part.dtype)
    for start in range(0, sizes[0], WHOLE_BLOCK):
        sizes = [min(max(n - start, 0), WHOLE_BLOCK) for n in sizes]
        with torch.no_grad():
            found = gather(part[start : start + WHOLE_BLOCK], sizes).cpu()
        for p, (a, b) in enumerate(pairwise(np.cumsum([0, *sizes]))):
            if rank() == 0:
                result[start * world_size() + p :: world_size()][: b - a] = found[a:b]
    return result


def local_part(matrix: Tensor) -> Tensor:
    """Return the rows of a whole matrix that this process holds."""
    return matrix[rank() :: world_size()]


def _by_owner(row: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Return the order that sorts `row` by owner, how many rows go to each process, and how many each process sends to this one."""
    owner = row % world_size()
    sent = torch.bincount(owner, minlength=world_size())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    counts, sizes = torch.stack([sent, received]).tolist()
    return owner.argsort(stable=True), counts, sizes


def _exchange(x: Tensor, counts: list[int], sizes: list[int]) -> Tensor:
    """Send the first counts[0] rows to process 0, the next to 1, …; return the received rows by sender, sizes[p] from process p."""
    out = x.new_empty(sum(sizes), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), sizes, counts)
    return out
