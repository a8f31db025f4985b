"""Several processes as one: what `torchrun` starts, on one host or many, over NCCL on GPUs and gloo on CPUs.

Everything here works in a single process too, where it does nothing: code above knows one way only. All processes must call the
same functions in the same order.

Promise: what W processes compute of a batch adds up to what one process computes of it.
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

WHOLE_BLOCK = 1 << 16  # rows of each process
LOST = timedelta(minutes=10)  # a process that says nothing for so long is taken for dead


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started; nothing happens without it.

    Raises
    ------
    TrainingError
        Another process ended, so that this one waited in vain.
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
        dist.barrier()  # who leaves first closes its connections, and gloo may abort a process that still writes to them
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not _lost(error):
            raise
        raise TrainingError(
            f"All processes of a run must live to its end. Process {me} lost another one ({str(error).splitlines()[0][:120]}). "
            "The last checkpoint stands; go on with --resume, on as many processes as there are."
        ) from None
    finally:
        dist.destroy_process_group()


def _end_on_sigterm(*_: object) -> None:
    """`torchrun` ends all processes when one has died."""
    raise TrainingError(
        f"All processes of a run must live to its end. Process {rank()} was told to end (SIGTERM), as when another one has "
        "died. The last checkpoint stands; go on with --resume, on as many processes as there are."
    )


def _lost(error: BaseException) -> bool:
    """Whether an error is that of a connection: gloo raises plain RuntimeErrors, whose text alone tells them apart."""
    return isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe")
    )


def leave(code: int) -> NoReturn:
    """End this process at once, its work being done: in the interpreter's own ending the threads of the libraries that tied several
    together may abort it, and `torchrun` would take that for a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Parts [sizes[rank], …] of all processes, one after the other [Σ sizes, …]; gradients flow back to their owners, summed."""
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
    """Replace every tensor by its sum over the processes; one message for each type."""
    if world_size() == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype is dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def broadcast(values: Sequence[float]) -> list[float]:
    """The values that process 0 has: so that all decide alike."""
    if world_size() == 1:
        return list(values)
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    told = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return [float(value) for value in told.cpu()]


def gather_rows(row: Tensor, answer_with: Tensor) -> Tensor:
    """Rows of a matrix of which process p holds rows p, p + W, p + 2W, …

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
    order, counts = _by_owner(row)
    asked, asked_counts = _exchange(row[order], counts)
    answers, _ = _exchange(answer_with[asked // world_size()], asked_counts)
    found = torch.empty_like(answers)
    found[order] = answers
    return found


def scatter_rows(row: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Send (row, value) pairs to the rows' owners; returns what this process's own rows were sent, numbered as it holds them."""
    order, counts = _by_owner(row)
    rows, _ = _exchange(row[order], counts)
    values, _ = _exchange(value[order], counts)
    return rows // world_size(), values


def local_rows(rows: int) -> int:
    """How many rows of a matrix this process holds; see `gather_rows`."""
    return -(-(rows - rank()) // world_size())


def gather_full(part: Tensor, rows: int) -> Tensor:
    """The whole matrix [rows, …] from the rows each process holds, on the CPU of process 0; others get one without rows.

    It is gathered in blocks: no device ever holds more than `WHOLE_BLOCK` rows of each process besides its own.
    """
    if world_size() == 1:
        return part
    held = [-(-(rows - p) // world_size()) for p in range(world_size())]
    result = torch.empty(rows if rank() == 0 else 0, *part.shape[1:], dtype=part.dtype)
    for start in range(0, held[0], WHOLE_BLOCK):
        sizes = [min(max(n - start, 0), WHOLE_BLOCK) for n in held]
        with torch.no_grad():
            found = gather(part[start : start + WHOLE_BLOCK], sizes).cpu()
        for p, (a, b) in enumerate(pairwise(np.cumsum([0, *sizes]))):
            if rank() == 0:
                result[start * world_size() + p :: world_size()][: b - a] = found[a:b]
    return result


def local_part(matrix: Tensor) -> Tensor:
    """The rows that this process holds of a whole matrix."""
    return matrix[rank() :: world_size()]


def _by_owner(row: Tensor) -> tuple[Tensor, list[int]]:
    owner = row % world_size()
    return owner.argsort(stable=True), torch.bincount(owner, minlength=world_size()).tolist()


def _exchange(x: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
    """Send the first counts[0] rows to process 0, the next to 1, …; returns the rows received, by sender, and how many of each."""
    sent = torch.tensor(counts, device=x.device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    sizes = received.tolist()
    out = x.new_empty(sum(sizes), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), sizes, counts)
    return out, sizes
