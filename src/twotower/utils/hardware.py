"""What there is to compute on: PyTorch's build, the GPUs it sees and which of them its kernels run on, cores and memory.

Enters: nothing, or facts given by hand. Leaves: facts, and judgements that are pure functions of them.

Promise: a GPU that PyTorch sees but has no kernels for is told apart from one it can use, without touching it.
"""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

Capability = tuple[int, int]

BF16_FROM = 8  # major compute capability with bf16 in its matrix units; older ones have fp16 alone
_EMBEDDED = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)}  # chips with CPU and GPU in one: no other chip of their major runs their code
_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as PyTorch sees it; `capability` is (major, minor), a T4's (7, 5)."""

    name: str
    capability: Capability
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Torch:
    """The installed PyTorch.

    Attributes
    ----------
    version
        As in "2.8.0+cu128".
    build
        "CPU", "CUDA 12.8" or "ROCm 6.3".
    arch_list
        What its kernels were compiled for, as `torch.cuda.get_arch_list` says: "sm_75", "compute_90" …
    gpus
        In PyTorch's own order.
    """

    version: str
    build: str
    arch_list: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()

    @property
    def usable(self) -> tuple[int, ...]:
        """Numbers of the GPUs that the kernels run on."""
        cuda = self.build.startswith("CUDA") and self.arch_list
        return tuple(i for i, gpu in enumerate(self.gpus) if not cuda or serves(self.arch_list, gpu.capability))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the machine; of this process's control group (None: no limit); and what can still be taken under both."""

    total_bytes: int
    limit_bytes: int | None
    free_bytes: int


def serves(arch_list: tuple[str, ...], capability: Capability) -> bool:
    """Whether kernels compiled for `arch_list` run on a GPU of `capability`.

    Machine code (sm_XY) runs within its major version, on the same minor version or a later one; intermediate code (compute_XY) is
    compiled by the driver for any later capability. Code for one chip alone (sm_90a) or for one family (sm_100f) stays there, and
    embedded chips share machine code with nobody: NVIDIA's "CUDA Programming Guide" (the CUDA platform), and the table
    `DEVICE_REQUIREMENT` in torch/cuda/__init__.py.
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
    """The precision that "auto" means on a GPU of `capability` (None: on a CPU): "fp32", "bf16" or "fp16"."""
    if capability is None:
        return "fp32"
    return "bf16" if capability[0] >= BF16_FROM else "fp16"


def installed() -> Torch:
    """Look at the installed PyTorch and at the GPUs it sees."""
    build = "CPU"
    if torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of GPUs it has no kernels for; this module's callers do it better
        if not torch.cuda.is_available():
            return Torch(torch.__version__, build)
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        gpus = tuple(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory) for gpu in found)
        return Torch(torch.__version__, build, tuple(torch.cuda.get_arch_list()), gpus)


def nvidia_driver() -> bool:
    """Whether the machine has NVIDIA's driver loaded, whatever PyTorch makes of it (Linux)."""
    return Path("/proc/driver/nvidia/version").exists()


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> Memory:
    """Look at the memory (where the system does not say what is free: all of it)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.M)
    free = int(available[1]) * 1024 if available else total
    limit, used = control_group(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return Memory(total, limit, free if limit is None else min(free, max(limit - used, 0)))


def control_group(root: Path, membership: Path) -> tuple[int | None, int]:
    """The tightest memory limit over this process, and what is used under it, in bytes; (None, 0) without any.

    Parameters
    ----------
    root
        Where control groups are mounted, of version 1 or 2.
    membership
        The file that names the process's groups, as /proc/self/cgroup does.

    What the kernel can drop at once (files read long ago) does not count as used.
    """
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
        for group in [here, *here.parents]:  # inside a container the path may name a group that only the host can see
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
    """Bytes that the system says of this process: "VmRSS" in memory, "VmHWM" the most there was; 0 where it does not say."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def trim_heap(above: int = 0) -> None:
    """Let the C library return what was freed, if this process takes more than `above` bytes (glibc; elsewhere nothing happens)."""
    if status("VmRSS") > above:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
