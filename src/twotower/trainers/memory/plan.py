"""Choose settings that keep training within a memory budget, and suggest settings when memory runs out.

The batch size and the number of candidates never change. Changes are tried in the order of their cost in time:
gradient_checkpointing (attention is computed twice), micro_batch_size (both towers are computed twice; the largest that fits),
both, and last the storage of the large tables, which changes how they learn: updated by rows, then also in fp16.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.trainers.memory.estimate import MemoryBreakdown, predict, storages
from twotower.trainers.memory.sizes import WorkloadSizes, dataset_sizes, scaled, yelp_sizes
from twotower.utils.config import ResolvedConfig, parse_config

GB = 10**9
DEVICES = {"T4": 15 * GB, "P100": 16 * GB, "L4": 22 * GB, "H100": 80 * GB, "H200": 141 * GB}
WITH_BF16 = ("L4", "H100", "H200")  # precision "auto" means bf16 there, and fp16 on the others
LARGE = 10_000  # minimum number of rows of a large table
MIN_MICRO_BATCH = 32
# The last one is oneDNN's message for a failed allocation.
_SIGNS = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "could not create a primitive")


@dataclass(frozen=True, slots=True)
class Machine:
    """Machine of a plan: kind ("cpu" or "cuda"), memory in bytes, precision, and number of such processes that train together."""

    kind: str
    budget: int
    precision: str = "fp32"
    processes: int = 1

    def parts(self, workload: WorkloadSizes, config: ResolvedConfig) -> MemoryBreakdown:
        """Return the memory of one process, part by part."""
        return predict(workload, config, kind=self.kind, precision=self.precision, processes=self.processes)


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings that fit, their memory, and their difference from the given settings, as `--set` arguments."""

    config: ResolvedConfig
    parts: MemoryBreakdown
    machine: Machine
    settings: tuple[str, ...]

    @property
    def trim_above_bytes(self) -> int:
        """Process size in bytes that leaves room for the work of one step."""
        return self.parts.fixed + self.machine.budget - self.parts.peak

    def __str__(self) -> str:
        chosen = ", ".join(self.settings) or "nothing changed"
        return f"{human(self.parts.peak)} of {human(self.machine.budget)}: {chosen}"


def make_plan(workload: WorkloadSizes, config: ResolvedConfig, machine: Machine) -> Plan:
    """Return the first settings that fit.

    Raises
    ------
    TrainingError
        No settings fit; the message names a change that would.
    """
    least: tuple[MemoryBreakdown, ResolvedConfig] | None = None
    for tried in candidate_configs(workload, config):
        parts = machine.parts(workload, tried)
        if parts.peak <= machine.budget:
            return Plan(tried, parts, machine, settings(config, tried))
        if least is None or parts.peak < least[0].peak:
            least = parts, tried
    assert least is not None  # the given settings are tried first
    raise TrainingError(
        f"Training does not fit into {human(machine.budget)}. It takes {human(least[0].peak)} even with "
        f"{', '.join(settings(config, least[1])) or 'the given settings'}. {_way_out(workload, config, least[1], machine)}"
    )


def candidate_configs(workload: WorkloadSizes, config: ResolvedConfig) -> Iterator[ResolvedConfig]:
    """Yield settings to try, the cheapest in time first."""
    large = [table.name for table in storages(workload, config) if table.rows >= LARGE and table.name not in config.model.tables]
    levels: list[dict[str, Any]] = [{}, {"update": "sparse"}, {"update": "sparse", "dtype": "fp16"}]
    given = config.training.gradient_checkpointing
    blocks = config.model.user_tower.num_blocks
    checkpointing = [given] if given or not blocks else [False, True]
    first = config.training.micro_batch_size or config.training.batch_size
    smaller = [first >> n for n in range(1, 32) if first >> n >= MIN_MICRO_BATCH]
    # Recompute attention; recompute both towers, in the largest micro-batches that fit; recompute both.
    passes = [(config.training.micro_batch_size, save) for save in checkpointing]
    passes += [(micro, save) for save in checkpointing for micro in smaller]
    for level in levels:
        tables = {name: level for name in large} if level else {}
        for micro, save in passes:
            yield changed(config, tables, micro_batch_size=micro, gradient_checkpointing=save)


def changed(config: ResolvedConfig, tables: dict[str, Any], **training: Any) -> ResolvedConfig:
    """Return the settings with another storage of some tables and other training settings."""
    values = config.model_dump(mode="json")
    values["training"] |= training
    values["model"]["tables"] |= tables
    return parse_config(values, ResolvedConfig)


def settings(old: ResolvedConfig, new: ResolvedConfig) -> tuple[str, ...]:
    """Return the difference of two settings as `--set` arguments."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json", exclude_unset=False)
    found = [
        f"--set training.{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in after["training"].items()
        if value != before["training"][name]
    ]
    if old.model.tables != new.model.tables:
        given = {name: table.model_dump(mode="json", exclude_defaults=True) for name, table in new.model.tables.items()}
        inside = ", ".join(f"{name}: {{{', '.join(f'{key}: {value}' for key, value in of.items())}}}" for name, of in given.items())
        found.append(f"--set 'model.tables={{{inside}}}'")
    return tuple(found)


def _way_out(workload: WorkloadSizes, config: ResolvedConfig, least: ResolvedConfig, machine: Machine) -> str:
    """Return advice: the first change that makes the smallest plan fit, in the order of its effect on the model."""
    largest = max(storages(workload, least), key=lambda table: table.rows)
    for shift in range(1, 7):
        rows = largest.rows >> shift
        stored = least.model.tables.get(largest.name)
        if rows < LARGE:
            break
        smaller = {**(stored.model_dump(mode="json") if stored else {"update": "sparse"}), "max_rows": rows}
        if machine.parts(workload, changed(least, {largest.name: smaller})).peak <= machine.budget:
            return f"Set max_rows: {rows} for {largest.name} in model.tables, so that ids share rows."
    for shift in range(1, 10):
        size = config.training.batch_size >> shift
        micro = min(least.training.micro_batch_size or size, size)
        fewer = replace(workload, load=scaled(workload.load, size / config.training.batch_size))
        if size >= MIN_MICRO_BATCH and machine.parts(fewer, changed(least, {}, micro_batch_size=micro)).peak <= machine.budget:
            return f"Use a smaller batch: --set training.batch_size={size}."
    for processes in (machine.processes << n for n in range(1, 8)):
        if replace(machine, processes=processes).parts(workload, least).peak <= machine.budget:
            return f"Train with {processes} processes, which share the tables."
    return f"Use a budget of at least {human(machine.parts(workload, least).peak)}."


def as_table(plan: Plan) -> str:
    """Return the plan as text."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    parts = plan.parts
    where = "peak of a training step" + (f", in each of {plan.machine.processes} processes" if plan.machine.processes > 1 else "")
    table.add_row(where, human(parts.step))
    for name in ("base", "data", "weights", "optimiser", "gradients", "activations", "loss", "batches"):
        table.add_row(f"  {NAMES.get(name, name)}", human(getattr(parts, name)))
    table.add_row("validation", human(parts.validating))
    table.add_row("calibration", human(parts.calibrating))
    if plan.machine.kind == "cpu":
        table.add_row("loading the data", human(parts.base + parts.data + parts.weights + parts.opening))
        table.add_row("export", human(parts.base + parts.export))
    table.add_row("peak", human(parts.peak))
    table.add_row("budget", human(plan.machine.budget))
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    kept = "With training.memory_budget_gb, freed memory is returned to the system. Without it, a process may use more than this."
    return "\n".join([*lines, *([kept] if plan.machine.kind == "cpu" else []), *(plan.settings or ("The given settings fit.",))])


NAMES = {"base": "base process", "batches": "prefetched batches"}


def human(size: float) -> str:
    """Return a size in bytes as text, in powers of ten.

    Examples
    --------
    >>> human(1_500_000_000), human(20_000_000), human(3_000)
    ('1.50 GB', '20 MB', '3 kB')
    """
    for unit, factor in (("GB", GB), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}" if unit == "GB" else f"{size / factor:.0f} {unit}"
    return f"{size / 1000:.0f} kB"


# Out of memory in spite of a plan.


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on a GPU or a CPU.

    Examples
    --------
    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError())
    (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in _SIGNS)


def explain(dataset: Dataset, config: ResolvedConfig, machine: Machine, out: Path) -> TrainingError:
    """Return the error of a run that ran out of memory when it used `machine.budget` bytes."""
    try:
        workload = dataset_sizes(dataset, config)
    except (MemoryError, RuntimeError):  # not even enough memory for this
        workload = yelp_sizes(dataset.n_train_users, dataset.n_train_items, len(dataset.events), config)
    smaller = replace(machine, budget=min(machine.budget, machine.parts(workload, config).peak - 1))
    try:
        plan = make_plan(workload, config, smaller)
        budget = math.ceil(plan.parts.peak / GB * 1000) / 1000
        chosen = " ".join((f"--set training.memory_budget_gb={budget}", *plan.settings))
        resumed = "in another --out" if any("model.tables" in setting for setting in plan.settings) else "with --resume"
        advice = f"These settings fit; use them {resumed}: {chosen}."
    except TrainingError as refusal:
        advice = str(refusal)
    last = out / "last.pt"
    stands = f"The last checkpoint, {last}, is intact." if last.is_file() else "There is no checkpoint yet."
    return TrainingError(f"Training ran out of memory when it used {human(machine.budget)}. {advice} {stands}")
