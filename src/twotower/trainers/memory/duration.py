"""Predict the time of a training step from its operations and bytes, on GPUs and on the CPU at hand.

A step on a GPU takes the longer of two times: that of the host, which launches some hundred small kernels one by one, and that of
the GPU, which computes them. The host is slower for batches of a few hundred examples, so all GPUs take about the same time there.
A step on a CPU takes the time of its matrix products, of the bytes that it moves, and of its small operations. A short probe
measures a product, and the bytes of a layer norm: like most operations of a step, it is slower than the memory.

The coefficients are calibrated on the rows of `benchmarks/results/gpu.jsonl` and on steps of five datasets on a CPU; docs/method.md
compares them.
"""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from twotower.features.batches import FieldSpec
from twotower.trainers.memory.activations import encoded, parts
from twotower.trainers.memory.estimate import WIDTH, dense_numbers, head_numbers, predict, storages
from twotower.trainers.memory.plan import DEVICES, GB, WITH_BF16
from twotower.trainers.memory.sizes import F32, WorkloadSizes
from twotower.trainers.schedule import Schedule
from twotower.utils.config import ResolvedConfig

TRAINING = 3  # times the operations of a forward pass: the backward pass computes two products for each one
ADAMW_BYTES = 36  # of each dense number: gradient set to zero and added to; weight and two moments read and written
ACTIVATION_PASSES = 3  # times that a kept activation is written or read
LAUNCH_S = 25e-6  # for the host to launch a kernel (measured: 24.5 to 25.8 µs on the host of an H100)
KERNEL_S = 4e-6  # of the GPU for the smallest kernel
BASE_LAUNCHES, FIELD_LAUNCHES, TABLE_LAUNCHES, BLOCK_LAUNCHES = 262, 18, 12, 60
LOADING = 0.7  # share of the time that makes a batch, which the step loses to it: both need Python's lock
LOADED_S = 0.15e-6  # to make a batch, for each history position and each event of its users
REACHED, BANDWIDTH_REACHED, SCATTER_REACHED = 0.35, 0.7, 0.02  # of the peaks: products, streams, gradients of rows
CPU_OVERHEAD, CPU_BYTES, CPU_SCATTER = 1.1, 1.13, 0.49  # of products, moved bytes and rows of tables, at the speeds of the probe
CPU_LAUNCH_S = 4.4e-6  # of a small operation on a CPU
LINK_BYTES_S = 8e9  # between two GPUs without NVLink
PROBE, PROBE_NUMBERS, PROBE_ROW = 384, 2**20, 128  # sizes of the product and of the layer norm that measure the CPU


@dataclass(frozen=True, slots=True)
class Processor:
    """A kind of processor: peak operations per second of products in the precision of training, and bytes per second.

    Those of a CPU are the speeds that the probe reaches.
    """

    name: str
    flops_s: float
    bytes_s: float
    measured: bool = False


KAGGLE_HOURS, KAGGLE_BYTES = 12, 30 * GB
GPUS = (
    Processor("P100", 18.7e12, 0.73e12),
    Processor("T4", 65e12, 0.32e12),
    Processor("L4", 121e12, 0.30e12),
    Processor("H100", 989e12, 3.35e12, measured=True),
    Processor("H200", 989e12, 4.8e12, measured=True),
)
"""Data sheets: fp16 on P100 and T4, bf16 on the others."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one process does in a step.

    Attributes
    ----------
    flops
        Operations of matrix products, forward and backward.
    bytes
        Bytes that a GPU reads and writes beside the products.
    launches
        Kernels that the host launches.
    scattered
        Bytes of the rows of tables that are read, and whose gradients are added up.
    loaded
        History positions and events that the batch is made from.
    reduced
        Bytes that the processes exchange.
    """

    flops: float
    bytes: float
    scattered: float
    launches: int
    loaded: float
    reduced: int


def step_work(workload: WorkloadSizes, config: ResolvedConfig, *, precision: str = "fp32", processes: int = 1) -> StepWork:
    """Return the work of one of `processes` equal processes in a step."""
    load, layout, model = workload.load, workload.layout, config.model
    user, item, d = model.user_tower, model.item_tower, model.user_tower.embedding_dim
    examples, slots, candidates = load.examples / processes, load.slots / processes, load.candidates / processes
    members = max(load.members / processes, 1)
    length = slots / members
    dense = {side: sum(spec.sizes[0] for spec in specs if spec.kind == "dense") * d for side, specs in _fields(workload).items()}
    again = 1 + (config.training.gradient_checkpointing and user.num_blocks > 0) / TRAINING
    history = slots * user.num_blocks * (24 * d * d + 4 * length * d) * again
    heads = examples * (head_numbers(2 + len(layout.user_fields), user) + dense["user"])
    heads += candidates * head_numbers(1 + len(layout.item_fields), item)
    heads += (candidates + load.history_items) * dense["item"]
    loss = examples * load.candidates * user.hidden_dims[-1]
    flops = TRAINING * (history + 2 * heads + 2 * loss)
    micro = max(parts(workload, config, processes))
    flops *= (TRAINING + 1) / TRAINING if micro > 1 else 1  # the gradient cache encodes twice
    (kept_users, _), (kept_items, _) = encoded(workload, config, WIDTH[precision], processes)
    tables = storages(workload, config, processes)
    numbers = dense_numbers(workload, config) + sum(t.rows * d for t in tables if t.config.update == "dense")
    moved: float = ADAMW_BYTES * numbers + ACTIVATION_PASSES * micro * (kept_users + kept_items)
    moved += TRAINING * F32 * examples * load.candidates
    fields = len(layout.item_fields) * 2 + len(layout.user_fields)
    launches = BASE_LAUNCHES + FIELD_LAUNCHES * fields + TABLE_LAUNCHES * len(tables) + BLOCK_LAUNCHES * user.num_blocks
    reduced = math.ceil(2 * F32 * numbers * (processes - 1) / processes)
    listed = candidates + load.history_items
    bags = sum(workload.bags.get(spec.name, 1) for spec in layout.item_fields if spec.kind in ("bag", "rows"))
    scattered = F32 * d * (listed * (1 + bags) + examples * len(layout.user_fields))
    return StepWork(flops, moved, scattered, launches * micro, (load.slots + load.events) / processes, reduced)


def step_seconds(work: StepWork, processor: Processor) -> float:
    """Return the seconds of a step in training, with what it loses to the thread that makes batches."""
    if processor.name == "cpu":
        computing = CPU_OVERHEAD * work.flops / processor.flops_s
        moving = (CPU_BYTES * work.bytes + CPU_SCATTER * work.scattered) / processor.bytes_s
        return computing + moving + work.launches * CPU_LAUNCH_S + work.reduced / LINK_BYTES_S
    device = work.flops / (REACHED * processor.flops_s) + work.bytes / (BANDWIDTH_REACHED * processor.bytes_s)
    device += work.scattered / (SCATTER_REACHED * processor.bytes_s) + work.launches * KERNEL_S
    loading = LOADING * LOADED_S * work.loaded
    return max(work.launches * LAUNCH_S + loading, device) + work.reduced / LINK_BYTES_S


def cpu_at_hand() -> Processor:
    """Return this CPU, with the speeds of a product and of a layer norm on the threads that PyTorch uses."""
    one, other = torch.randn(PROBE * 4, PROBE), torch.randn(PROBE, PROBE)
    best = math.inf
    for _ in range(12):
        began = time.perf_counter()
        torch.mm(one, other)
        best = min(best, time.perf_counter() - began)
    rows, stream = torch.randn(PROBE_NUMBERS // PROBE_ROW, PROBE_ROW), math.inf
    for _ in range(12):
        began = time.perf_counter()
        torch.layer_norm(rows, (PROBE_ROW,))
        stream = min(stream, time.perf_counter() - began)
    return Processor("cpu", 2 * one.numel() * PROBE / best, 2 * F32 * PROBE_NUMBERS / stream, measured=True)


def steps_of(workload: WorkloadSizes, config: ResolvedConfig) -> Schedule:
    """Return the schedule of a training, with batches of the size of the largest ones."""
    return Schedule.of(config.training, max(math.ceil(workload.trained / max(workload.load.examples, 1)), 1))


def _fields(workload: WorkloadSizes) -> dict[str, tuple[FieldSpec, ...]]:
    return {"user": workload.layout.user_fields, "item": workload.layout.item_fields}


def host_bytes(workload: WorkloadSizes, config: ResolvedConfig, processes: int) -> int:
    """Return the main memory of all processes of a host whose GPUs train."""
    one = predict(workload, config, kind="cpu", processes=processes)
    return processes * (one.base + one.data + one.batches) + one.opening


def as_lines(workload: WorkloadSizes, config: ResolvedConfig, processes: int) -> list[str]:
    """Return the predicted time of a training as lines of text: on this CPU, on GPUs, and in a session of Kaggle."""
    schedule = steps_of(workload, config)
    steps = schedule.total_steps
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    here, count = cpu_at_hand(), torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    for one in (here, *GPUS):
        cpu = one.name == "cpu"
        precision = "fp32" if cpu else "bf16" if one.name in WITH_BF16 else "fp16"
        step = step_seconds(step_work(workload, config, precision=precision, processes=processes), one)
        name = f"this CPU, {threads}, {here.flops_s / 1e9:.0f} GFLOP/s" if cpu else one.name
        table.add_row(f"  {name}", f"{1000 * step:.0f} ms", hours(steps * step), "" if one.measured else "not measured")
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(table)
    each = f", in each of {processes} processes" if processes > 1 else ""
    return [
        f"time of a step and of {steps:,} steps{each}, predicted, without validations and export",
        *(line.rstrip() for line in text.getvalue().splitlines()),
        kaggle_line(workload, config, steps),
    ]


def kaggle_line(workload: WorkloadSizes, config: ResolvedConfig, steps: int) -> str:
    """Return what a training takes of a session of Kaggle with two T4."""
    two = next(one for one in GPUS if one.name == "T4")
    step = step_seconds(step_work(workload, config, precision="fp16", processes=2), two)
    host, device = host_bytes(workload, config, 2), predict(workload, config, kind="cuda", precision="fp16", processes=2).peak
    spent = steps * step / 3600
    fits = spent <= KAGGLE_HOURS and host <= KAGGLE_BYTES and device <= DEVICES["T4"]
    return (
        f"A session of Kaggle (T4 ×2, {KAGGLE_HOURS} h, {KAGGLE_BYTES / GB:.0f} GB): {hours(steps * step)}, "
        f"{host / GB:.1f} GB of main memory, {device / GB:.1f} GB of each T4; {'fits' if fits else 'does not fit'}."
    )


def hours(seconds: float) -> str:
    """Return a time as text.

    Examples
    --------
    >>> hours(90), hours(5400), hours(400_000)
    ('1.5 min', '1.5 h', '111 h')
    """
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"
