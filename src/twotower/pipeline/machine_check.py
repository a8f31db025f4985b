"""Whether this machine can do the work: what is here, and what to do about what is not.

Enters: the machine, read once into `Facts`. Leaves: a finding for every thing that matters, each a line.

Promise: `diagnose` is a pure function of the facts. Nothing is changed, nothing is allocated on a GPU, nothing is fetched.
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
OLDEST_PYTHON, NEWEST_PYTHON, OLDEST_TORCH = (3, 11), (3, 14), (2, 4)  # pyproject.toml; newer ones than these were not tried
KAGGLE = (Path("/kaggle/input"), Path("/kaggle/input/datasets"))  # where it mounts data sets: by name, or by owner and name
GB = 10**9
LEAST_RAM = 3 * GB // 2  # the whole way over a town of 60,000 events peaked at 1.5 GB
EASE_RAM = LEAST_RAM + 4 * EvaluationConfig().max_ease_items ** 2  # one float32 matrix, items × items
LEAST_DISK = GB // 5  # that town's raw files, dataset, two checkpoints and bundle are below 0.1 GB
# All of Yelp: 2,000,000 users and 150,000 items of width 64 in float32, with AdamW's two moments, in three checkpoints at a time.
YELP_DISK = 2_150_000 * 64 * 4 * 3 * 3
LEAST_GPU = GB  # PyTorch's own kernels and workspaces take some hundred MB before the first table


@dataclass(frozen=True, slots=True)
class RawFiles:
    """Yelp's raw files in one place: the tables that are there, or why they cannot be read."""

    path: Path
    tables: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a machine is.

    Attributes
    ----------
    python
        (major, minor).
    driver
        NVIDIA's driver is loaded, whatever PyTorch makes of it.
    cores
        That this process may run on.
    folder, disk_free_bytes
        The working folder, and the room on its disk.
    asked
        The folder of raw files was named by the caller, and not looked for.
    raw
        Places that hold raw files; with `asked`, that folder whatever it holds.
    extras
        Optional parts: name → packages that are missing.
    kaggle
        The machine is one of Kaggle's.
    """

    python: tuple[int, int]
    torch: hardware.Torch
    driver: bool
    cores: int
    memory: hardware.Memory
    folder: Path
    disk_free_bytes: int
    asked: bool
    raw: tuple[RawFiles, ...]
    extras: dict[str, tuple[str, ...]]
    kaggle: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: its level ("ok", "warning", "problem"), what was found, and what to do."""

    name: str
    level: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.name:<11} {self.found}" + (f" {self.advice}" if self.advice else "")


# Judging.


def diagnose(facts: Facts) -> list[Finding]:
    """Judge everything."""
    judged = [_python(facts), _torch(facts), *_gpus(facts), _precision(facts), _cores(facts), _memory(facts), _disk(facts)]
    return [*judged, *_raw(facts), *_extras(facts)]


def refuse(findings: list[Finding]) -> None:
    """Raise when anything is a problem.

    Raises
    ------
    TrainingError
        With the problems' names.
    """
    names = [finding.name for finding in findings if finding.level == PROBLEM]
    if names:
        raise TrainingError(f"The machine must be free of problems. Found some with {', '.join(names)}. Do what their lines say.")


def _python(facts: Facts) -> Finding:
    found = f"{facts.python[0]}.{facts.python[1]}."
    if facts.python < OLDEST_PYTHON:
        return Finding("python", PROBLEM, found, f"Python {_dots(OLDEST_PYTHON)} or later is needed: install it.")
    if facts.python > NEWEST_PYTHON:
        return Finding("python", WARNING, found, f"Tried up to {_dots(NEWEST_PYTHON)}: take that one if something fails.")
    return Finding("python", OK, found)


def _torch(facts: Facts) -> Finding:
    version = tuple(int(part) for part in re.findall(r"\d+", facts.torch.version)[:2])
    found = f"{facts.torch.version}, built for {facts.torch.build}."
    if version < OLDEST_TORCH:
        return Finding("torch", PROBLEM, found, f"PyTorch {_dots(OLDEST_TORCH)} or later is needed: pip install -U torch.")
    if facts.driver and facts.torch.build == "CPU":
        return Finding(
            "torch", WARNING, found, "NVIDIA's driver is here: a CUDA build (pytorch.org/get-started) would use the GPU."
        )
    return Finding("torch", OK, found)


def _gpus(facts: Facts) -> list[Finding]:
    """The GPUs' memory and kernels: a line each, and one for all; one line when there are none."""
    if not facts.torch.gpus:
        if facts.driver and facts.torch.build != "CPU":
            advice = "NVIDIA's driver is here: see whether nvidia-smi lists a GPU, and whether the driver is new enough for CUDA."
            return [Finding("gpu", WARNING, "PyTorch finds none.", advice)]
        return [Finding("gpu", OK, "None: training runs on the CPU.")]
    usable = facts.torch.usable
    findings = [_gpu(number, facts, bool(usable)) for number in range(len(facts.torch.gpus))]
    if len(usable) > 1:
        together = f"torchrun --nproc-per-node {len(usable)} -m twotower train … trains on them together."
        findings.append(Finding("gpus", OK, f"{len(usable)} can be used.", together))
    return findings


def _gpu(number: int, facts: Facts, others: bool) -> Finding:
    gpu, name = facts.torch.gpus[number], f"gpu {number}"
    found = f"{gpu.name}, capability {_dots(gpu.capability)}, {gpu.memory_bytes / GB:.0f} GB."
    if number not in facts.torch.usable:
        missing = f"This PyTorch has no kernels for it ({' '.join(facts.torch.arch_list)}): the first operation on it fails."
        advice = f"{missing} {_way_out(gpu, facts)}"
        return Finding(name, WARNING if others else PROBLEM, found, advice)
    if gpu.memory_bytes < LEAST_GPU:
        return Finding(name, WARNING, found, "Little for training: set training.device: cpu if it runs out of memory.")
    return Finding(name, OK, found)


def _way_out(gpu: hardware.Gpu, facts: Facts) -> str:
    """What to do about a GPU without kernels. Builds for CUDA 12.6 are PyTorch's last with sm_50, sm_60 and sm_70."""
    if len(facts.torch.usable):
        return f"Leave it out: CUDA_VISIBLE_DEVICES={','.join(map(str, facts.torch.usable))}."
    install = "pip install -U torch --index-url https://download.pytorch.org/whl/"
    if hardware.serves(("sm_50", "sm_60", "sm_70"), gpu.capability):
        other = 'On Kaggle choose the accelerator "GPU T4 ×2", or install' if facts.kaggle else "Install"
        return f"{other} a build for CUDA 12.6: {install}cu126. Or set training.device: cpu."
    return "Install a build whose list holds it (pytorch.org/get-started), or set training.device: cpu."


def _precision(facts: Facts) -> Finding:
    """What training.precision: auto comes to, on the GPU that training takes: the first usable one."""
    first = facts.torch.gpus[facts.torch.usable[0]].capability if facts.torch.usable else None
    return Finding("precision", OK, f"auto means {hardware.auto_precision(first)} here.")


def _cores(facts: Facts) -> Finding:
    return Finding("cores", OK, f"{facts.cores}.")


def _memory(facts: Facts) -> Finding:
    memory = facts.memory
    limit = "" if memory.limit_bytes is None else f", of which this process may take {memory.limit_bytes / GB:.1f}"
    found = f"{memory.free_bytes / GB:.1f} GB free of {memory.total_bytes / GB:.1f}{limit}."
    if memory.free_bytes < LEAST_RAM:
        return Finding("memory", PROBLEM, found, f"The demo alone takes up to {LEAST_RAM / GB:.1f} GB: end other programs.")
    if memory.free_bytes < EASE_RAM:
        advice = f"The baseline EASE may take {EASE_RAM / GB:.1f} GB: lower evaluation.max_ease_items for large catalogues."
        return Finding("memory", WARNING, found, advice)
    return Finding("memory", OK, found)


def _disk(facts: Facts) -> Finding:
    found = f"{facts.disk_free_bytes / GB:.1f} GB free in {facts.folder}."
    if facts.disk_free_bytes < LEAST_DISK:
        return Finding("disk", PROBLEM, found, "A checkpoint would not fit: make room, or write elsewhere with --out.")
    if facts.disk_free_bytes < YELP_DISK:
        advice = f"All of Yelp needs up to {YELP_DISK / GB:.1f} GB for checkpoints: make room before training on it."
        return Finding("disk", WARNING, found, advice)
    return Finding("disk", OK, found)


def _raw(facts: Facts) -> list[Finding]:
    if not facts.raw:
        advice = "Name their folder with --data, or make a town: twotower simulate --out data/raw. (Tables of your own need none.)"
        return [Finding("raw files", WARNING, "Found none of Yelp's.", advice)]
    return [_raw_files(found, facts.asked) for found in facts.raw]


def _raw_files(found: RawFiles, asked: bool) -> Finding:
    if found.fault:
        return Finding("raw files", PROBLEM if asked else WARNING, f"{found.path} cannot be used.", found.fault)
    tables = f"{', '.join(found.tables)} in {found.path}." if found.tables else f"None of Yelp's in {found.path}."
    if "business" in found.tables and {"review", "tip"} & set(found.tables):
        return Finding("raw files", OK, tables)
    return Finding("raw files", PROBLEM if asked else WARNING, tables, "The businesses, and the reviews or tips, are needed.")


def _extras(facts: Facts) -> list[Finding]:
    """Optional parts: being without one is no fault."""
    return [
        Finding(
            "optional",
            OK,
            f"{name}: {'not installed' if missing else 'installed'}.",
            f"Lacks {', '.join(missing)}: pip install '{DISTRIBUTION}[{name}]' brings it." if missing else "",
        )
        for name, missing in sorted(facts.extras.items())
    ]


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# Gathering.


def gather(data: Path | None = None) -> Facts:
    """Read the machine.

    Parameters
    ----------
    data
        Folder of raw files; None looks in $TWOTOWER_DATA, data/raw and where Kaggle mounts them.
    """
    folder = Path.cwd()
    named = os.environ.get("TWOTOWER_DATA")
    places = [data] if data else [*([Path(named)] if named else []), DataConfig().path, *KAGGLE]
    looked = [_look(place) for place in places]
    return Facts(
        python=sys.version_info[:2],
        torch=hardware.installed(),
        driver=hardware.nvidia_driver(),
        cores=hardware.cores(),
        memory=hardware.memory(),
        folder=folder,
        disk_free_bytes=shutil.disk_usage(folder).free,
        asked=data is not None,
        raw=tuple(found for found in looked if data or found.tables or found.fault),
        extras=_missing_extras(),
        kaggle=KAGGLE[0].exists() or "KAGGLE_KERNEL_RUN_TYPE" in os.environ,
    )


def _look(place: Path) -> RawFiles:
    try:
        from twotower.data.sources.yelp import find_files

        files = find_files(place)
    except (DataError, MissingExtraError) as error:
        return RawFiles(place, fault=str(error))
    except OSError as error:
        return RawFiles(place, fault=f"{error.strerror}.")
    folder = next(iter(files.values())).parent if files else place
    return RawFiles(folder, tuple(sorted(files)))


def _missing_extras() -> dict[str, tuple[str, ...]]:
    """Of each optional part that users may want: the packages it would add that are not installed."""
    try:
        needs = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a source folder
        return {}
    missing: dict[str, tuple[str, ...]] = {}
    for need in needs:
        read = re.match(r"([\w.-]+).*;.*\bextra == ['\"]([\w.-]+)['\"]", need)
        if read and read[2] not in ("all", "dev"):  # the others together, and the developers' own
            absent = () if _is_installed(read[1]) else (read[1],)
            missing[read[2]] = missing.get(read[2], ()) + absent
    return missing


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
