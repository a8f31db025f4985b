"""Describe the hardware: PyTorch's build, the GPUs and whether its kernels run on them, CPU cores and memory.

A GPU that PyTorch sees but has no kernels for is recognised without using it. Decisions are pure functions of the facts, so tests
can pass facts of other machines.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

Capability = tuple[int, int]

BACKGROUND_NICE = 4  # of a thread that should not slow others down
BF16_FROM = 8  # major compute capability with bf16 in the matrix units; older ones have only fp16
_EMBEDDED = {
    (5, 3),
    (6, 2),
    (7, 2),
    (8, 7),
    (10, 1),
}  # chips with CPU and GPU in one: no other chip of the same major version runs their code
_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as PyTorch reports it; `capability` is (major, minor), for example (7, 5) for a T4."""

    name: str
    capability: Capability
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Torch:
    """The installed PyTorch.

    Attributes
    ----------
    version
        For example "2.8.0+cu128".
    build
        "CPU", "CUDA 12.8" or "ROCm 6.3".
    arch_list
        Architectures of its kernels, from `torch.cuda.get_arch_list`: "sm_75", "compute_90", …
    gpus
        The GPUs in PyTorch's order.
    """

    version: str
    build: str
    arch_list: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()

    @property
    def usable(self) -> tuple[int, ...]:
        """Return the numbers of the GPUs that the kernels run on."""
        cuda = self.build.startswith("CUDA") and self.arch_list
        return tuple(i for i, gpu in enumerate(self.gpus) if not cuda or serves(self.arch_list, gpu.capability))


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes: of the machine, the limit of the control group (None: no limit), and what is free under both."""

    total_bytes: int
    limit_bytes: int | None
    free_bytes: int


def serves(arch_list: tuple[str, ...], capability: Capability) -> bool:
    """Return True if kernels compiled for `arch_list` run on a GPU of `capability`.

    Machine code (sm_XY) runs on the same major version with an equal or later minor version. Intermediate code (compute_XY) is
    compiled by the driver for any later capability. Code for one chip (sm_90a) or one family (sm_100f) runs only there, and
    embedded chips share machine code with no other chip. See NVIDIA's "CUDA Programming Guide" (the CUDA platform), and the table
    `DEVICE_REQUIREMENT` in torch/cuda/__init__.py.

    Examples
    --------
    >>> serves(("sm_80",), (8, 6)), serves(("sm_80",), (9, 0)), serves(("compute_80",), (9, 0))
    (True, False, True)
    """
    return any(_runs(arch, capability) for arch in arch_list)


def _runs(arch: str, capability: Capability) -> bool:
    read = _ARCH.fullmatch(arch)
    if read is None:
        return False
    kind, major, minor, special = read.groups()
    code = (int(major), int(minor))
    if code == capability:
        return True
    if kind == "compute" and not special:
        return code < capability
    return special != "a" and code[0] == capability[0] and code < capability and not {code, capability} & _EMBEDDED


def auto_precision(capability: Capability | None) -> str:
    """Return the precision that "auto" stands for on a GPU of `capability`, or on a CPU (None): "fp32", "bf16" or "fp16".

    Examples
    --------
    >>> auto_precision(None), auto_precision((7, 5)), auto_precision((8, 0))
    ('fp32', 'fp16', 'bf16')
    """
    if capability is None:
        return "fp32"
    return "bf16" if capability[0] >= BF16_FROM else "fp16"


def installed() -> Torch:
    """Return facts about the installed PyTorch and the GPUs it sees."""
    build = "CPU"
    if torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about GPUs without kernels; the callers of this module give better advice
        if not torch.cuda.is_available():
            return Torch(torch.__version__, build)
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        gpus = tuple(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory) for gpu in found)
        return Torch(torch.__version__, build, tuple(torch.cuda.get_arch_list()), gpus)


def nvidia_driver() -> bool:
    """Return True if NVIDIA's driver is loaded (Linux), whether or not PyTorch can use it."""
    return Path("/proc/driver/nvidia/version").exists()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> Memory:
    """Return the memory of the machine. If the system does not report free memory, all of it counts as free."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.M)
    free = int(available[1]) * 1024 if available else total
    limit, used = control_group(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return Memory(total, limit, free if limit is None else min(free, max(limit - used, 0)))


def control_group(root: Path, membership: Path) -> tuple[int | None, int]:
    """Return the tightest memory limit of this process and the memory used under it, in bytes; (None, 0) without a limit.

    Parameters
    ----------
    root
        Mount point of the control groups, version 1 or 2.
    membership
        File that names the groups of the process, such as /proc/self/cgroup.

    Notes
    -----
    Inactive file cache, which the kernel can drop at once, does not count as used.
    """
    # psutil reads no memory limit of a control group, and joblib only the CPU quota of the outermost one.
    lines = [line.split(":", 2) for line in _text(membership).splitlines() if line.count(":") >= 2]
    tightest: tuple[int | None, int] = (None, 0)
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        base, limit_file, use_file, idle = (
            (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else (root, "memory.max", "memory.current", "inactive_file")
        )
        here = base / path.strip("/")
        for group in [here, *here.parents]:  # inside a container the path may name a group that is visible only on the host
            limit = _text(group / limit_file).strip()
            if limit.isdigit() and int(limit) < (tightest[0] or 1 << 60):  # version 1 writes "no limit" as nearly 2^63
                dropped = re.search(rf"^{idle} (\d+)", _text(group / "memory.stat"), re.M)
                tightest = int(limit), int(_text(group / use_file) or 0) - (int(dropped[1]) if dropped else 0)
            if group == base:
                break
    return tightest


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def status(name: str) -> int:
    """Return a memory figure of this process in bytes, "VmRSS" (current) or "VmHWM" (peak); 0 if the system does not report it."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def trim_heap(above: int = 0) -> None:
    """Return freed memory to the system if this process uses more than `above` bytes. Works with glibc only."""
    if status("VmRSS") > above:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


async def keep_trimmed(every_s: float = 5.0) -> None:
    """Return freed memory to the system from time to time, until cancelled.

    Large requests leave their memory in pieces, which the allocator keeps. A return takes up to 4 ms.
    """
    while True:
        await asyncio.sleep(every_s)
        await asyncio.to_thread(trim_heap)


def compute_on_one_core() -> None:
    """Let the calling thread compute on one core, which leaves other threads their speed.

    OpenMP keeps a team of threads for each thread that computes. While all teams together have more threads than there are cores,
    GNU's OpenMP lets their threads sleep between two operations, and each operation waits until they wake up. A training with a
    second team, of the thread that builds its batches, took 1.7 times as long on two cores.
    """
    torch.get_num_threads()  # sets the number of this thread, once
    threadpool_limits(1, user_api="openmp")


def yield_to_others() -> None:
    """Let the calling thread compute on one core, at a lower priority than other threads."""
    torch.set_num_threads(1)  # OpenMP and MKL have a number for each thread
    if sys.platform == "linux":  # elsewhere, a priority is that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)
