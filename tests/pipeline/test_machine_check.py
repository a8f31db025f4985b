"""Test the machine check with given facts: GPUs with and without kernels, little memory, a full disk, no data."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twotower.cli import main
from twotower.pipeline import machine_check
from twotower.pipeline.machine_check import OK, PROBLEM, WARNING, Finding, MachineInfo, RawFiles, diagnose
from twotower.utils import hardware
from twotower.utils.hardware import Gpu, Memory, Torch, auto_precision, control_group, serves

from ..conftest import Town

GB = 10**9
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
P100, T4 = Gpu("Tesla P100-PCIE-16GB", (6, 0), 17 * GB), Gpu("Tesla T4", (7, 5), 16 * GB)
A100, H100 = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 42 * GB), Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85 * GB)
CPU = Torch("2.8.0+cpu", "CPU")
MACHINE = MachineInfo(
    python=(3, 12),
    torch=CPU,
    driver=False,
    cores=4,
    memory=Memory(32 * GB, None, 24 * GB),
    folder=Path("/work"),
    disk_free_bytes=100 * GB,
    requested=False,
    raw=(RawFiles(Path("data/raw"), ("business", "checkin", "review")),),
    extras={},
    kaggle=False,
)


def cuda(arch_list: tuple[str, ...], *gpus: Gpu) -> Torch:
    return Torch("2.8.0+cu1xx", "CUDA 12.x", arch_list, gpus)


def judged(**machine: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(replace(MACHINE, **machine))}


def levels(**machine: object) -> dict[str, str]:
    return {name: finding.level for name, finding in judged(**machine).items() if finding.level != OK}


def test_a_machine_without_a_gpu_is_fine() -> None:
    findings = judged()
    assert {finding.level for finding in findings.values()} == {OK}
    assert "CPU" in findings["gpu"].found and "fp32" in findings["precision"].found and "business" in findings["raw files"].found


@pytest.mark.parametrize(("gpu", "precision"), [(T4, "fp16"), (A100, "bf16"), (H100, "bf16")], ids=lambda value: str(value)[:8])
def test_gpus_that_are_served(gpu: Gpu, precision: str) -> None:
    findings = judged(torch=cuda(CU128, gpu), driver=True)
    assert {finding.level for finding in findings.values()} == {OK}
    assert gpu.name in findings["gpu 0"].found and precision in findings["precision"].found


def test_two_of_them_can_train_together() -> None:
    findings = judged(torch=cuda(CU128, T4, T4), driver=True, kaggle=True)
    assert {finding.level for finding in findings.values()} == {OK}
    assert {"gpu 0", "gpu 1"} < findings.keys() and "--nproc-per-node 2" in findings["gpus"].advice


def test_the_trap_of_a_p100_without_kernels() -> None:
    """PyTorch reports that CUDA is available, but the first operation fails."""
    findings = judged(torch=cuda(CU128, P100), driver=True, kaggle=True)
    assert {name for name, finding in findings.items() if finding.level != OK} == {"gpu 0"}
    told = str(findings["gpu 0"])
    assert findings["gpu 0"].level == PROBLEM
    for said in (
        "P100",
        "6.0",
        "no kernels",
        "sm_70",
        "the first operation on it fails",
        '"GPU T4 ×2"',
        "whl/cu126",
        "device: cpu",
    ):
        assert said in told
    assert "fp32" in findings["precision"].found  # what is left is the CPU
    elsewhere = judged(torch=cuda(CU128, P100), driver=True)["gpu 0"].advice
    assert "Kaggle" not in elsewhere and "cu126" in elsewhere


def test_a_p100_with_kernels_is_fine() -> None:
    findings = judged(torch=cuda(CU126, P100), driver=True, kaggle=True)
    assert {finding.level for finding in findings.values()} == {OK} and "fp16" in findings["precision"].found


def test_a_gpu_newer_than_the_kernels_needs_a_newer_build() -> None:
    advice = judged(torch=cuda(CU126, Gpu("RTX 5090", (12, 0), 32 * GB)), driver=True)["gpu 0"].advice
    assert "cu126" not in advice and "build that supports it" in advice


def test_one_of_two_without_kernels_is_left_out() -> None:
    findings = judged(torch=cuda(CU128, P100, A100), driver=True)
    assert findings["gpu 0"].level == WARNING and "CUDA_VISIBLE_DEVICES=1." in findings["gpu 0"].advice
    assert findings["gpu 1"].level == OK and "bf16" in findings["precision"].found


def test_other_makers_kernels_are_not_judged() -> None:
    amd = Torch("2.8.0+rocm6.3", "ROCm 6.3", ("gfx90a", "gfx942"), (Gpu("MI210", (9, 0), 68 * GB),))
    assert amd.usable == (0,)


def test_a_driver_that_pytorch_makes_nothing_of() -> None:
    assert levels(driver=True) == {"torch": WARNING}
    assert levels(driver=True, torch=cuda(CU128)) == {"gpu": WARNING}


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"python": (3, 9)}, {"python": PROBLEM}),
        ({"python": (3, 15)}, {"python": WARNING}),
        ({"torch": Torch("2.3.1", "CPU")}, {"torch": PROBLEM}),
        ({"torch": Torch("2.10.0a0+git", "CPU")}, {}),
        ({"torch": cuda(CU128, Gpu("GTX 745", (7, 5), GB // 2))}, {"gpu 0": WARNING}),
        ({"memory": Memory(32 * GB, GB, GB // 2)}, {"memory": PROBLEM}),
        ({"memory": Memory(4 * GB, None, 2 * GB)}, {"memory": WARNING}),
        ({"disk_free_bytes": 10**6}, {"disk": PROBLEM}),
        ({"disk_free_bytes": 2 * GB}, {"disk": WARNING}),
        ({"raw": ()}, {"raw files": WARNING}),
        ({"raw": (RawFiles(Path("x")),), "requested": True}, {"raw files": PROBLEM}),
        ({"raw": (RawFiles(Path("x"), ("business", "user")),), "requested": True}, {"raw files": PROBLEM}),
        ({"raw": (RawFiles(Path("x"), ("business", "user")),)}, {"raw files": WARNING}),
        ({"raw": (RawFiles(Path("x"), fault="Two releases."),)}, {"raw files": WARNING}),
        ({"raw": (RawFiles(Path("x"), fault="Two releases."),), "requested": True}, {"raw files": PROBLEM}),
        ({"extras": {"spark": ("pyspark",), "faiss": ()}}, {}),
    ],
    ids=str,
)
def test_problems_of_the_machine_are_found(machine: dict[str, object], expected: dict[str, str]) -> None:
    findings = judged(**machine)
    assert {name: finding.level for name, finding in findings.items() if finding.level != OK} == expected
    assert all(findings[name].advice for name in expected)


def test_optional_parts_name_their_installation() -> None:
    told = [str(finding) for finding in diagnose(replace(MACHINE, extras={"spark": ("pyspark",), "faiss": ()}))]
    assert any("pip install 'two-tower-rec[spark]'" in line and "pyspark" in line for line in told)
    assert any("faiss: installed." in line for line in told)


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),  # a later minor version
        (("sm_86",), (8, 0), False),  # ... an earlier one
        (("sm_80",), (9, 0), False),  # another major version
        (("compute_70",), (9, 0), True),  # the driver compiles
        (("compute_90",), (7, 5), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),  # for one chip
        (("compute_90a",), (12, 0), False),
        (("sm_100f",), (10, 3), True),  # for a family
        (("sm_100f",), (12, 0), False),
        (("gfx90a",), (9, 0), False),
        ((), (8, 0), False),
    ],
)
def test_which_kernels_run_where(arch_list: tuple[str, ...], capability: tuple[int, int], expected: bool) -> None:
    assert serves(arch_list, capability) is expected


@pytest.mark.skipif(not hasattr(torch.cuda, "DEVICE_REQUIREMENT"), reason="this PyTorch has no table of its own")
def test_which_kernels_run_where_agrees_with_pytorch() -> None:
    table = torch.cuda.DEVICE_REQUIREMENT
    wrong = [
        (code, device)
        for code in table
        for device in table
        if serves((f"sm_{code}",), divmod(device, 10)) != (device in table[code])
        and {code, device} != {101, 110}  # one chip renamed
    ]
    assert len(table) > 10 and wrong == []


def test_auto_precision() -> None:
    assert [auto_precision(c) for c in (None, (6, 0), (7, 5), (8, 0), (9, 0))] == ["fp32", "fp16", "fp16", "bf16", "bf16"]


def test_memory_limits_of_both_kinds_of_control_groups(tmp_path: Path) -> None:
    def group(path: str, **files: object) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("__", ".")).write_text(f"{text}\n")

    def limit(text: str) -> tuple[int | None, int]:
        (tmp_path / "cgroup").write_text(text)
        return control_group(tmp_path / "fs", tmp_path / "cgroup")

    assert limit("0::/pod/box\n") == (None, 0)
    group("fs/pod/box", memory__max="max", memory__current=700)
    group("fs/pod", memory__max=1000, memory__current=900, memory__stat="anon 500\ninactive_file 300")
    assert limit("0::/pod/box\n") == (1000, 600)  # the tighter one is the parent's; what was read long ago can be dropped
    group("fs", memory__max=800, memory__current=100)
    assert limit("0::/../elsewhere\n") == (800, 100)  # seen from inside a container
    group("fs/memory/job", memory__limit_in_bytes=500, memory__usage_in_bytes=50, memory__stat="total_inactive_file 20")
    group("fs/memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=10**9)
    assert limit("5:cpu:/job\n4:memory:/job\n") == (500, 30)
    assert limit("4:memory:/\n") == (None, 0)


def test_this_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)
    machine = machine_check.gather()
    assert machine.torch.version == torch.__version__ and (machine.torch.build == "CPU") == (
        torch.version.cuda is torch.version.hip
    )
    assert len(machine.torch.gpus) == torch.cuda.device_count()
    assert 0 < machine.memory.free_bytes <= machine.memory.total_bytes and machine.cores >= 1 and machine.disk_free_bytes > 0
    assert machine.folder == tmp_path and not machine.requested and "dev" not in machine.extras


def test_raw_files_are_found_where_they_are(town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine_check, "KAGGLE", (tmp_path / "none",))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/raw").symlink_to(town.raw)
    monkeypatch.setenv("TWOTOWER_DATA", str(tmp_path / "empty"))
    found = machine_check.gather().raw
    assert [(place.path, place.fault) for place in found] == [(Path("data/raw"), "")] and {"business", "review"} <= set(
        found[0].tables
    )
    monkeypatch.setenv("TWOTOWER_DATA", str(town.raw))
    assert [place.path for place in machine_check.gather().raw] == [town.raw, Path("data/raw")]
    for copy in ("a", "b"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / copy).symlink_to(town.raw)
    assert "several" in machine_check.gather(tmp_path / "two").raw[0].fault


def test_the_command_prints_a_line_each_and_exits_with_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_check, "gather", lambda data: replace(MACHINE, requested=data is not None))
    assert main(["doctor", "--data", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(diagnose(MACHINE)) and all(line.startswith("ok") for line in lines)
    monkeypatch.setattr(machine_check, "gather", lambda _: replace(MACHINE, torch=cuda(CU128, P100), disk_free_bytes=0))
    assert main(["doctor"]) == 2
    told = capsys.readouterr()
    assert sum(line.startswith("problem") for line in told.out.splitlines()) == 2
    assert "gpu 0, disk" in told.err and len(told.err.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not pin processes to cores")
def test_only_the_cores_this_process_may_use_count() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert hardware.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
