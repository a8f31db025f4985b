"""Measure the speed of training for `gpu.py`, and where the time goes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import torch
from common import ROOT
from gpu_bench import CPU, Bench, Found
from peers import say, write_events
from step import Products, replay
from training_speed import SASREC_SIZE

from twotower.trainers.two_tower_trainer import TwoTowerTrainer

EQUAL_SIZE = [setting for setting in SASREC_SIZE if not setting.startswith("prepare.")]


def speed(bench: Bench, *settings: str, name: str) -> Found:
    """Measure examples per second of the default recipe, the waits for batches and for the device, and the kernels alone."""
    trainer = bench.trainer(name, *settings)
    trainer.begin()
    drained = list(islice(trainer.batches(0, 0), 4 if bench.small else 24))
    for batch in drained:
        trainer._step(batch)
    figures = throughput(bench, trainer, 2 if bench.small else 6)
    plan = trainer.loader.plan(0)
    making = bench.seconds(lambda: [trainer.loader.batch(plan[i], 0, i) for i in range(len(drained))]) / len(drained)
    stepping = min(bench.seconds(lambda: [trainer._step(batch) for batch in drained]) for _ in range(3)) / len(drained)
    calls = []
    for batch in drained[:6]:
        with Products() as products:
            trainer._step(batch)
        calls.append(products.calls)
    some = min(bench.seconds(lambda: [trainer._step(batch) for batch in drained[:6]]) for _ in range(3))
    kernels = min(bench.seconds(lambda: [replay(one) for one in calls]) for _ in range(3))
    stalls = read_backs(trainer, drained) if bench.device.type == "cuda" else None
    figures |= busy(trainer, drained[:6]) if bench.device.type == "cuda" else {}
    here = bench.trainer(name, *settings, device=CPU)
    here.begin()
    on_cpu = throughput(replace(bench, device=CPU), here, 1 if bench.small else 3)["examples_per_s"]
    figures |= {
        "times_cpu": round(figures["examples_per_s"] / on_cpu, 2),
        "cpu_examples_per_s": on_cpu,
        "step_ms": round(1000 * stepping, 3),
        "loader_ms": round(1000 * making, 3),
        "times_kernels": round(some / kernels, 2),
        "read_backs_a_step": stalls,
        "precision": str(trainer.precision).removeprefix("torch."),
    }
    return Found(None if stalls is None else stalls == 0, figures)


def peer(bench: Bench) -> Found:
    """Measure next-event training beside RecTools' SASRec of equal size on the same device: predicted positions per second.

    Both train two attention blocks of width 64 over histories of 50. The peer trains in fp32. Its first epoch is not counted.
    """
    if find_spec("rectools") is None:
        return Found(None, {"rectools": "not installed"})
    name, epochs = ("town", 2) if bench.small else ("s3rec", 4)
    dataset = bench.dataset(name)
    write_events(dataset, bench.out)
    command = [sys.executable, str(ROOT / "benchmarks" / "rectools_peer.py"), bench.out, "sasrec", "--factors", "64"]
    told = []
    with subprocess.Popen(
        [*command, "--device", bench.device.type], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(json.loads(line))
            say(process, "go" if len(told) < epochs else "stop")
    if process.returncode:
        raise RuntimeError(f"rectools_peer.py ended with {process.returncode}")
    events = dataset.events
    lengths = np.bincount(events.user_row[events.positive & (events.split == 0)])
    positions = int(np.minimum(np.maximum(lengths - 1, 0), 50).sum())
    theirs = positions * (epochs - 1) / (told[-1]["seconds"] - told[0]["seconds"])
    ours = {}
    for precision in ("fp32", "auto"):
        trainer = bench.trainer(name, *EQUAL_SIZE, f"training.precision={precision}")
        trainer.begin()
        throughput(bench, trainer, 2)
        ours[precision] = throughput(bench, trainer, 2 if bench.small else 6)["examples_per_s"]
    times = {f"times_peer_{name}": round(rate / theirs, 2) for name, rate in ours.items()}
    return Found(
        None, {"peer": "RecTools SASRec, sampled softmax, 256 negatives", "peer_examples_per_s": round(theirs), **times, **ours}
    )


def busy(trainer: TwoTowerTrainer, batches: Sequence[Any]) -> dict[str, Any]:
    """Return the busy time of the GPU in a step, its most expensive kernels, and the number of kernel launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        for batch in batches:
            trainer._step(batch)
        torch.cuda.synchronize()
    events = seen.key_averages()
    kernels = sorted(
        (event for event in events if event.device_type.name == "CUDA"), key=lambda event: -event.self_device_time_total
    )
    each = 1000 * len(batches)
    return {
        "device_ms": round(sum(event.self_device_time_total for event in kernels) / each, 2),
        "launches": round(sum(event.count for event in events if "LaunchKernel" in event.key) / len(batches)),
        "longest_ms": {event.key[:60]: round(event.self_device_time_total / each, 2) for event in kernels[:6]},
    }


def throughput(bench: Bench, trainer: TwoTowerTrainer, seconds: float) -> dict[str, Any]:
    """Train for some seconds, with batches from the loader."""
    examples, waited, steps, epoch = 0, 0.0, 0, 1
    bench.wait()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        batches, asked = iter(trainer.batches(epoch, 0)), time.perf_counter()
        for batch in batches:
            waited += time.perf_counter() - asked
            trainer._step(batch)
            examples, steps = examples + batch.examples, steps + 1
            if steps % 16 == 0:
                bench.wait()  # measure when the work is done, not when it is launched
                if time.perf_counter() - began >= seconds:
                    break
            asked = time.perf_counter()
        batches.close()  # type: ignore[attr-defined]
        epoch += 1
    bench.wait()
    spent = time.perf_counter() - began
    return {"examples_per_s": round(examples / spent), "waited_share": round(waited / spent, 3), "steps": steps}


def read_backs(trainer: TwoTowerTrainer, batches: Sequence[Any]) -> float:
    """Return how often a step makes the CPU wait for the GPU, as counted by PyTorch."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for batch in batches:
                trainer._step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in seen if "synchroniz" in str(warning.message)]
    for place in sorted({f"{warning.filename}:{warning.lineno}" for warning in found}):
        sys.stderr.write(f"waits for the GPU: {place}\n")
    return len(found) / len(batches)
