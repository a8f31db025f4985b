"""Compare for `gpu.py` the memory of training with the memory plan."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gpu_bench import QUIET, Bench, Found

from twotower.data.dataset_features import resolve
from twotower.features.batches import Layout
from twotower.models.two_tower import TwoTower
from twotower.trainers import two_tower_trainer
from twotower.trainers.memory.plan import DEVICES, Machine, make_plan
from twotower.trainers.memory.sizes import dataset_sizes
from twotower.trainers.optimizer import choose_precision
from twotower.trainers.two_tower_trainer import TwoTowerTrainer

YELP_USERS, YELP_ITEMS = 1_987_897, 150_346  # of the full dump


def fits(bench: Bench, *settings: str, precision: str = "auto", full: bool = False, limit: float = DEVICES["T4"]) -> Found:
    """Compare the peak memory of training and of a validation with the plan; `full`: with tables of the full Yelp release."""
    fewer = ("training.batch_size=512",) if bench.small else ()
    dataset = bench.dataset()
    config = bench.config("town", *QUIET, f"training.precision={precision}", *settings, *fewer)
    facts, resolved = dataset_sizes(dataset, config), resolve(config, dataset)
    if full:
        users, items = (YELP_USERS // 100, YELP_ITEMS // 100) if bench.small else (YELP_USERS, YELP_ITEMS)
        facts = replace(facts, layout=enlarged(facts.layout, users + 2, items + 2))
    named = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[choose_precision(precision, bench.device)]
    budget = int(limit)
    plan = make_plan(facts, resolved, Machine("cuda", budget, named))
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(min(budget / torch.cuda.get_device_properties(bench.device).total_memory, 1.0))
    plain = two_tower_trainer.build_model
    if full:
        two_tower_trainer.build_model = lambda *_: TwoTower(  # type: ignore[assignment]
            facts.layout, plan.config.model, causal=False, save_memory=plan.config.training.gradient_checkpointing
        )
    try:
        trainer = TwoTowerTrainer(dataset, plan.config, Path(tempfile.mkdtemp(dir=bench.out)))
    finally:
        two_tower_trainer.build_model = plain
    if not full:
        trainer.begin()
    losses = taught(trainer, 3 if bench.small else 30)
    step = torch.cuda.max_memory_allocated() if on_gpu else 0
    validation = None
    if not full:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.validate()
        validation = torch.cuda.max_memory_allocated() if on_gpu else 0
    planned = plan.parts.step if validation is None else max(plan.parts.step, plan.parts.validating)
    figures: dict[str, Any] = {"planned_mb": round(planned / 1e6), "settings": list(plan.settings), "precision": named}
    if not on_gpu:
        return Found(None, figures)
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(1.0)
    share = (context + max(step, validation or 0)) / planned
    inside = max(step, validation or 0) / (planned - plan.parts.base)
    figures |= {"of_plan": round(share, 3), "of_plan_without_context": round(inside, 3), "context_mb": round(context / 1e6)}
    figures |= {"step_mb": round(step / 1e6), "validation_mb": round((validation or 0) / 1e6)}
    return Found(0.85 <= share <= 1.15 and all(map(math.isfinite, losses)), figures)


def taught(trainer: TwoTowerTrainer, steps: int) -> list[float]:
    """Train like a run, with prefetched batches, and return the mean loss."""
    for batch in islice(trainer.batches(0, 0), steps):
        trainer._step(batch)
    trainer.check()
    return [trainer.losses.mean()]


def enlarged(layout: Layout, users: int, items: int) -> Layout:
    """Return the same fields with id tables of other sizes."""
    fields = (replace(spec, sizes=(items,)) if spec.table == "item.id" else spec for spec in layout.item_fields)
    return replace(layout, users=users, items=items, item_fields=tuple(fields))
