"""Check for `gpu.py` that training is correct: the same on a GPU as on the CPU."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from gpu_bench import CPU, Bench, Found
from torch import Tensor

from twotower.bundle.bundle import load_trained
from twotower.data.dataset_features import open_store, split_moment
from twotower.evaluation.evaluator import judge
from twotower.models.layers import attention, dropout
from twotower.models.neural_retriever import NeuralRetriever
from twotower.retriever import Recommendations
from twotower.trainers.optimizer import choose_precision
from twotower.trainers.two_tower_trainer import TwoTowerTrainer

CLASSIC = (  # the classic two-tower architecture: attention, a cross network and an MLP
    "model.user_tower.hidden_dims=[256,128]",
    "model.item_tower.hidden_dims=[256,128]",
    "model.user_tower.num_blocks=1",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "gradient checkpointing": ("training.gradient_checkpointing=true", "model.user_tower.num_blocks=2"),
    "micro-batches": ("training.micro_batch_size=128",),
    "tables by rows": ("model.sparse_update_from_rows=100",),
    "next event": ("training.objective=next_event", "model.user_tower.num_blocks=2", "model.user_tower.pooling=last"),
    "classic towers": CLASSIC,
    "full softmax": ("training.loss=full_softmax",),
}


def machine(bench: Bench) -> Found:
    """Report the hardware, and the precision that `auto` selects."""
    figures: dict[str, Any] = {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    precision = choose_precision("auto", bench.device)
    if bench.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(bench.device)
        figures |= {"capability": f"{gpu.major}.{gpu.minor}", "gib": round(gpu.total_memory / 2**30, 1)}
        expected = torch.bfloat16 if gpu.major >= 8 else torch.float16
        return Found(precision is expected, figures | {"precision": str(precision)})
    return Found(precision is torch.float32, figures | {"precision": str(precision)})


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Draw the random numbers of a step on the CPU, so that dropout is the same on all devices."""
    rand, plain = torch.rand, dropout.dropout

    def drawn(*size: Any, device: Any = None, **more: Any) -> Tensor:
        return rand(*size, **more).to(device or CPU)

    def dropped(x: Tensor, p: float, training: bool) -> Tensor:
        if x.device.type == "cpu":
            return plain(x, p, training)
        level = min(round(256 * p), 255)
        if not training or level == 0:
            return x
        words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape).to(x.device) >= level
        return x * kept * (256 / (256 - level))

    torch.rand, dropout.dropout, attention.dropout = drawn, dropped, dropped  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.rand, dropout.dropout, attention.dropout = rand, plain, plain


def losses_of(trainer: TwoTowerTrainer, steps: int) -> list[float]:
    """Train the same batches on every device, and return the loss of each step."""
    found, before = [], 0.0
    plan = trainer.loader.plan(0)
    for step in range(steps):
        trainer._step(trainer.loader.batch(plan[step % len(plan)], step // len(plan), step % len(plan)))
        trainer.check()
        total = float(trainer.losses.total)
        found.append(total - before)
        before = total
    return found


def both(bench: Bench, steps: int, *settings: str) -> tuple[TwoTowerTrainer, TwoTowerTrainer, float]:
    """Train the same model on the CPU and on the device, in fp32. Return both trainers and the largest difference of losses."""
    there = bench.trainer("town", "training.precision=fp32", *settings)
    here = bench.trainer("town", "training.precision=fp32", *settings, device=CPU)
    here.begin()
    there.model.load_state_dict(here.model.state_dict())
    with same_draws():
        pairs = zip(losses_of(here, steps), losses_of(there, steps), strict=True)
        return here, there, max(abs(a - b) / abs(a) for a, b in pairs)


def same_losses(bench: Bench) -> Found:
    """Check that 50 steps from the same seed give the losses of the CPU, and the same lists for 1,000 users."""
    here, there, apart = both(bench, 8 if bench.small else 50)
    lists = [answers(trainer, 1000) for trainer in (here, there)]
    shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(*(one.items for one in lists), strict=True)]
    agree = float(np.mean(shared))
    return Found(apart < 1e-3 and agree >= 0.99, {"losses_apart": apart, "top10_shared": agree, "wanted": "1e-3, 0.99"})


def answers(trainer: TwoTowerTrainer, users: int) -> Recommendations:
    """Return the ten best items for the first validation queries."""
    dataset, model = trainer.dataset, trainer.model.eval()
    retriever = NeuralRetriever(model, trainer.store, n_item_rows=dataset.n_item_rows, time_s=split_moment(dataset, "valid"))
    return retriever.retrieve(trainer.held_out.queries.slice(0, users), 10)


def variant(bench: Bench, name: str) -> Found:
    """Check a variant of training: the same losses as on the CPU."""
    _, _, apart = both(bench, 3 if bench.small else 20, *VARIANTS[name])
    return Found(apart < 1e-3, {"losses_apart": apart, "wanted": "1e-3"})


def precisions(bench: Bench) -> Found:
    """Check that bf16 and fp16 are within the noise of fp32: paired intervals on the town's test part, and two seeds of fp32."""
    few = ("training.max_steps=6", "training.eval_queries=200") if bench.small else ("training.max_steps=300",)
    dataset, systems, seconds = bench.dataset(), [], {}
    store = open_store(dataset, "test", bench.config().model)
    for name, settings in {
        "fp32": ("training.precision=fp32",),
        "another seed": ("training.precision=fp32", "seed=1"),
        "bf16": ("training.precision=bf16",),
        "fp16": ("training.precision=fp16",),
    }.items():
        folder = bench.out / f"precision-{name}"
        trainer = TwoTowerTrainer(dataset, bench.config("town", *few, *settings), folder)
        seconds[name] = round(bench.seconds(trainer.fit), 1)
        model, _, _ = load_trained(folder / "best.pt", dataset)
        moment = split_moment(dataset, "test")
        systems.append(NeuralRetriever(model.to(bench.device), store, n_item_rows=dataset.n_item_rows, time_s=moment, name=name))
    settings = bench.config().evaluation.model_copy(update={"baselines": [], "max_queries": 300 if bench.small else None})
    report = judge(systems, dataset, settings, main="fp32", metric="NDCG@10", seed=0)
    gaps = {name: report.differences[name]["NDCG@10"] for name in ("another seed", "bf16", "fp16")}
    noise = 2 * abs(gaps["another seed"].value)
    fine = all(gap.low <= 0 <= gap.high or abs(gap.value) <= noise for gap in gaps.values())
    figures = {name: round(report.systems[name]["NDCG@10"].value, 4) for name in ("fp32", *gaps)}
    intervals = {f"fp32 - {name}": [round(getattr(gap, key), 4) for key in ("value", "low", "high")] for name, gap in gaps.items()}
    return Found(fine, {"NDCG@10": figures, **intervals, "fit_s": seconds})


def overflow(bench: Bench) -> Found:
    """Check that fp16 with a loss scale far too large skips the step, halves the scale, and then trains."""
    trainer = bench.trainer("town", "training.precision=fp16", "model.sparse_update_from_rows=100")
    trainer.begin()
    trainer.scaler.scale.fill_(2.0**140)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    losses_of(trainer, 1)
    kept = all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    halved = float(trainer.scaler.scale) == 2.0**139
    trainer.scaler.scale.fill_(65536.0)
    losses = losses_of(trainer, 3 if bench.small else 20)
    moved = not torch.equal(trainer.model.user_tower.stars, before["user_tower.stars"])
    learned = all(map(math.isfinite, losses))
    return Found(
        kept and halved and moved and learned, {"weights_kept": kept, "scale_halved": halved, "trains_on": moved and learned}
    )


def resumed(bench: Bench) -> Found:
    """Check that an interrupted and resumed run ends like an uninterrupted one."""
    steps = 6 if bench.small else 40
    config = bench.config("town", f"training.max_steps={steps}", "training.log_every=1", "training.eval_queries=200")
    whole = TwoTowerTrainer(bench.dataset(), config, bench.out / "whole")
    whole.fit()
    folder = bench.out / "cut"
    cut = TwoTowerTrainer(bench.dataset(), config, folder)
    step = cut._step

    def until(batch: Any) -> None:
        step(batch)
        if cut.state.step == steps // 2:
            cut._save("last.pt")
            raise KeyboardInterrupt

    cut._step = until  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        cut.fit()
    again = TwoTowerTrainer(bench.dataset(), config, folder)
    again.fit(resume=True)
    logged = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (bench.out / "whole", folder)
    ]
    first, second = ([row["loss"] for row in rows if "loss" in row] for rows in logged)
    apart = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    return Found(apart < 1e-3, {"losses_apart": apart, "steps": steps, "wanted": "1e-3"})


def compiled(bench: Bench) -> Found:
    """Check `torch.compile` of heads and attention blocks: the same losses without dropout; measure a step."""
    plain = ("model.item_tower.id_dropout=0", "model.user_tower.id_dropout=0", "model.user_tower.dropout=0")
    found: dict[str, Any] = {}
    for name in ("eager", "compiled"):
        trainer = bench.trainer("town", "training.precision=fp32", *CLASSIC, *plain, "model.item_tower.neighbour_dropout=0")
        trainer.begin()
        for part in trainer.model.modules():
            if isinstance(part, dropout.Dropout):
                part.p = 0.0
        model, began = trainer.model, time.perf_counter()
        if name == "compiled":
            encoder = model.user_tower.encoder
            assert encoder is not None
            for part in (model.user_tower.head, model.item_tower.head, *encoder.blocks):
                part.compile(dynamic=True)
        losses = losses_of(trainer, 2 if bench.small else 8)
        batches = list(islice(trainer.batches(0, 0), 2 if bench.small else 8))
        found[name] = {
            "losses": losses,
            "first_s": round(time.perf_counter() - began, 2),
            "step_ms": round(1000 * bench.seconds(lambda: [trainer._step(b) for b in batches]) / len(batches), 2),  # noqa: B023
        }
    apart = max(abs(a - b) / abs(a) for a, b in zip(found["eager"].pop("losses"), found["compiled"].pop("losses"), strict=True))
    return Found(apart < 1e-3, {"losses_apart": apart, **found})
