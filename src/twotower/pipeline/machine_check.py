"""Check whether this machine can train and serve, and advise on problems.

`gather` reads the machine into `MachineInfo`, and `diagnose`, a pure function, returns one finding per subject. Nothing is changed,
nothing is allocated on a GPU, and nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from twotower.errors import DataError, MissingExtraError, TrainingError
from twotower.utils import hardware
from twotower.utils.config import DataConfig, EvaluationConfig

OK, WARNING, PROBLEM = "ok", "warning", "problem"
DISTRIBUTION = "two-tower-rec"
OLDEST_PYTHON, NEWEST_PYTHON, OLDEST_TORCH = (3, 11), (3, 14), (2, 4)  # see pyproject.toml; newer versions are not tested
KAGGLE = (Path("/kaggle/input"), Path("/kaggle/input/datasets"))  # mount points of datasets: by name, or by owner and name
GB = 10**9
MIN_RAM_BYTES = 3 * GB // 2  # all stages on a town of 60,000 events peaked at 1.5 GB
EASE_RAM = MIN_RAM_BYTES + 4 * EvaluationConfig().max_ease_items ** 2  # one float32 matrix, items × items
MIN_DISK_BYTES = GB // 5  # raw files, dataset, two checkpoints and bundle of that town take less than 0.1 GB
# All of Yelp: 2,000,000 users and 150,000 items of width 64 in float32, with AdamW's two moments, in three checkpoints at a time.
YELP_DISK = 2_150_000 * 64 * 4 * 3 * 3
MIN_GPU_BYTES = GB  # PyTorch's kernels and workspaces alone take several hundred MB


@dataclass(frozen=True, slots=True)
class RawFiles:
    """Yelp's raw files in one folder: the tables found, or why they cannot be read."""

    path: Path
    tables: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineInfo:
    """Properties of a machine.

    Attributes
    ----------
    python
        Version (major, minor).
    driver
        True if NVIDIA's driver is loaded, even if PyTorch cannot use it.
    cores
        Number of CPU cores available to this process.
    folder, disk_free_bytes
        Working folder, and the free space of its disk.
    requested
        True if the caller named the folder of raw files.
    raw
        Folders with raw files; with `requested`, only the named folder, with or without files.
    extras
        Optional parts: name → missing packages.
    kaggle
        True on Kaggle.
    """

    python: tuple[int, int]
    torch: hardware.Torch
    driver: bool
    cores: int
    memory: hardware.Memory
    folder: Path
    disk_free_bytes: int
    requested: bool
    raw: tuple[RawFiles, ...]
    extras: dict[str, tuple[str, ...]]
    kaggle: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check: its level ("ok", "warning", "problem"), what was found, and what to do."""

    name: str
    level: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.name:<11} {self.found}" + (f" {self.advice}" if self.advice else "")


# Diagnosis.


def diagnose(machine: MachineInfo) -> list[Finding]:
    """Return the findings of all checks."""
    judged = [
        _python(machine),
        _torch(machine),
        *_gpus(machine),
        _precision(machine),
        _cores(machine),
        _memory(machine),
        _disk(machine),
    ]
    return [*judged, *_raw(machine), *_extras(machine)]


def refuse(findings: list[Finding]) -> None:
    """Raise an error if there is a problem.

    Raises
    ------
    TrainingError
        A finding has the level "problem"; the message lists their names.

    Examples
    --------
    >>> refuse([Finding("cores", OK, "8.")])
    """
    names = [finding.name for finding in findings if finding.level == PROBLEM]
    if names:
        raise TrainingError(f"Found problems with: {', '.join(names)}. Follow the advice on their lines above.")


def _python(machine: MachineInfo) -> Finding:
    found = f"{machine.python[0]}.{machine.python[1]}."
    if machine.python < OLDEST_PYTHON:
        return Finding("python", PROBLEM, found, f"Python {_dots(OLDEST_PYTHON)} or later is required. Install it.")
    if machine.python > NEWEST_PYTHON:
        return Finding("python", WARNING, found, f"Tested up to {_dots(NEWEST_PYTHON)}. Use that version if something fails.")
    return Finding("python", OK, found)


def _torch(machine: MachineInfo) -> Finding:
    version = tuple(int(part) for part in re.findall(r"\d+", machine.torch.version)[:2])
    found = f"{machine.torch.version}, built for {machine.torch.build}."
    if version < OLDEST_TORCH:
        return Finding("torch", PROBLEM, found, f"PyTorch {_dots(OLDEST_TORCH)} or later is required: pip install -U torch.")
    if machine.driver and machine.torch.build == "CPU":
        return Finding(
            "torch", WARNING, found, "NVIDIA's driver is loaded. Install a CUDA build to use the GPU (pytorch.org/get-started)."
        )
    return Finding("torch", OK, found)


def _gpus(machine: MachineInfo) -> list[Finding]:
    """Check the GPUs' memory and kernels: one finding per GPU and one for several together, or one if there is no GPU."""
    if not machine.torch.gpus:
        if machine.driver and machine.torch.build != "CPU":
            advice = "NVIDIA's driver is loaded. Check that nvidia-smi lists a GPU, and that the driver supports this CUDA version."
            return [Finding("gpu", WARNING, "PyTorch finds no GPU.", advice)]
        return [Finding("gpu", OK, "None: training runs on the CPU.")]
    usable = machine.torch.usable
    findings = [_gpu(number, machine, bool(usable)) for number in range(len(machine.torch.gpus))]
    if len(usable) > 1:
        together = f"To train on all of them: torchrun --nproc-per-node {len(usable)} -m twotower train …"
        findings.append(Finding("gpus", OK, f"{len(usable)} can be used.", together))
    return findings


def _gpu(number: int, machine: MachineInfo, others: bool) -> Finding:
    gpu, name = machine.torch.gpus[number], f"gpu {number}"
    found = f"{gpu.name}, capability {_dots(gpu.capability)}, {gpu.memory_bytes / GB:.0f} GB."
    if number not in machine.torch.usable:
        missing = f"This PyTorch has no kernels for it ({' '.join(machine.torch.arch_list)}): the first operation on it fails."
        advice = f"{missing} {_way_out(gpu, machine)}"
        return Finding(name, WARNING if others else PROBLEM, found, advice)
    if gpu.memory_bytes < MIN_GPU_BYTES:
        return Finding(name, WARNING, found, "Little memory for training. Set training.device: cpu if it runs out.")
    return Finding(name, OK, found)


def _way_out(gpu: hardware.Gpu, machine: MachineInfo) -> str:
    """Return advice for a GPU without kernels. PyTorch's last builds with sm_50, sm_60 and sm_70 are those for CUDA 12.6."""
    if len(machine.torch.usable):
        return f"Exclude it: CUDA_VISIBLE_DEVICES={','.join(map(str, machine.torch.usable))}."
    install = "pip install -U torch --index-url https://download.pytorch.org/whl/"
    if hardware.serves(("sm_50", "sm_60", "sm_70"), gpu.capability):
        other = 'On Kaggle choose the accelerator "GPU T4 ×2", or install' if machine.kaggle else "Install"
        return f"{other} a build for CUDA 12.6: {install}cu126. Or set training.device: cpu."
    return "Install a build that supports it (pytorch.org/get-started), or set training.device: cpu."


def _precision(machine: MachineInfo) -> Finding:
    """Report what `training.precision: auto` means on the first usable GPU, which training uses, or on the CPU."""
    first = machine.torch.gpus[machine.torch.usable[0]].capability if machine.torch.usable else None
    return Finding("precision", OK, f"auto means {hardware.auto_precision(first)} here.")


def _cores(machine: MachineInfo) -> Finding:
    return Finding("cores", OK, f"{machine.cores}.")


def _memory(machine: MachineInfo) -> Finding:
    memory = machine.memory
    limit = "" if memory.limit_bytes is None else f", of which this process may take {memory.limit_bytes / GB:.1f}"
    found = f"{memory.free_bytes / GB:.1f} GB free of {memory.total_bytes / GB:.1f}{limit}."
    if memory.free_bytes < MIN_RAM_BYTES:
        return Finding("memory", PROBLEM, found, f"The demo alone takes up to {MIN_RAM_BYTES / GB:.1f} GB. Close other programs.")
    if memory.free_bytes < EASE_RAM:
        advice = f"The baseline EASE may take {EASE_RAM / GB:.1f} GB. Lower evaluation.max_ease_items for large catalogues."
        return Finding("memory", WARNING, found, advice)
    return Finding("memory", OK, found)


def _disk(machine: MachineInfo) -> Finding:
    found = f"{machine.disk_free_bytes / GB:.1f} GB free in {machine.folder}."
    if machine.disk_free_bytes < MIN_DISK_BYTES:
        return Finding("disk", PROBLEM, found, "A checkpoint would not fit. Free disk space, or use another disk with --out.")
    if machine.disk_free_bytes < YELP_DISK:
        advice = f"The full Yelp data needs up to {YELP_DISK / GB:.1f} GB for checkpoints. Free disk space before training on it."
        return Finding("disk", WARNING, found, advice)
    return Finding("disk", OK, found)


def _raw(machine: MachineInfo) -> list[Finding]:
    if not machine.raw:
        advice = "Use --data FOLDER, or simulate data: twotower simulate --out data/raw. (Not needed for your own tables.)"
        return [Finding("raw files", WARNING, "Found no Yelp files.", advice)]
    return [_raw_files(found, machine.requested) for found in machine.raw]


def _raw_files(found: RawFiles, requested: bool) -> Finding:
    if found.fault:
        return Finding("raw files", PROBLEM if requested else WARNING, f"{found.path} cannot be used.", found.fault)
    tables = f"{', '.join(found.tables)} in {found.path}." if found.tables else f"No Yelp files in {found.path}."
    if "business" in found.tables and {"review", "tip"} & set(found.tables):
        return Finding("raw files", OK, tables)
    return Finding("raw files", PROBLEM if requested else WARNING, tables, "Required: businesses, and reviews or tips.")


def _extras(machine: MachineInfo) -> list[Finding]:
    """Report the optional parts; a missing one is not a problem."""
    return [
        Finding(
            "optional",
            OK,
            f"{name}: {'not installed' if missing else 'installed'}.",
            f"Missing: {', '.join(missing)}. Install with: pip install '{DISTRIBUTION}[{name}]'" if missing else "",
        )
        for name, missing in sorted(machine.extras.items())
    ]


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# Reading the machine.


def gather(data: Path | None = None) -> MachineInfo:
    """Return the properties of this machine.

    Parameters
    ----------
    data
        Folder of raw files; None: look in $TWOTOWER_DATA, data/raw and the mount points of Kaggle.
    """
    folder = Path.cwd()
    named = os.environ.get("TWOTOWER_DATA")
    folders = [data] if data else [*([Path(named)] if named else []), DataConfig().path, *KAGGLE]
    raw_files = [_look(path) for path in folders]
    return MachineInfo(
        python=sys.version_info[:2],
        torch=hardware.installed(),
        driver=hardware.nvidia_driver(),
        cores=hardware.cores(),
        memory=hardware.memory(),
        folder=folder,
        disk_free_bytes=shutil.disk_usage(folder).free,
        requested=data is not None,
        raw=tuple(found for found in raw_files if data or found.tables or found.fault),
        extras=_missing_extras(),
        kaggle=KAGGLE[0].exists() or "KAGGLE_KERNEL_RUN_TYPE" in os.environ,
    )


def _look(path: Path) -> RawFiles:
    try:
        from twotower.data.sources.yelp import find_files

        files = find_files(path)
    except (DataError, MissingExtraError) as error:
        return RawFiles(path, fault=str(error))
    except OSError as error:
        return RawFiles(path, fault=f"{error.strerror}.")
    folder = next(iter(files.values())).parent if files else path
    return RawFiles(folder, tuple(sorted(files)))


def _missing_extras() -> dict[str, tuple[str, ...]]:
    """Return the missing packages of each optional part, apart from those for development."""
    try:
        needs = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # not installed: run from a source folder
        return {}
    missing: dict[str, tuple[str, ...]] = {}
    for need in needs:
        read = re.match(r"([\w.-]+).*;.*\bextra == ['\"]([\w.-]+)['\"]", need)
        if read and read[2] not in ("all", "dev"):  # all extras together, and the development tools
            absent = () if _is_installed(read[1]) else (read[1],)
            missing[read[2]] = missing.get(read[2], ()) + absent
    return missing


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
