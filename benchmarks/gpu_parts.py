"""The parts of `gpu.py`: each a function of a `Bench` that returns what it measured and whether a promise holds.

A part computes on `bench.device`, "cuda" or, for a rehearsal, "cpu". It may raise whatever it likes: the runner records it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from common import QUALITY_SETS, ROOT
from step import Products, replay
from torch import Tensor

from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, resolve, split_moment
from twotower.evaluation.evaluator import evaluate, judge
from twotower.features.batches import Layout
from twotower.models.layers import attention, dropout
from twotower.models.neural_retriever import NeuralRetriever
from twotower.models.two_tower import TwoTower
from twotower.pipeline.stages import TOWN, prepare_stage, simulate_stage
from twotower.retriever import Recommendations
from twotower.trainers import two_tower_trainer
from twotower.trainers.memory.plan import DEVICES, Machine, make_plan
from twotower.trainers.memory.sizes import dataset_sizes
from twotower.trainers.optimizer import choose_precision
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils import distributed
from twotower.utils.config import Config, load_config

CPU = torch.device("cpu")
CLASSIC = (  # the shape of the classic two-tower: an MLP over a cross network, attention in front
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
YELP_USERS, YELP_ITEMS = 1_987_897, 150_346  # of the full dump
QUIET = ("training.log_every=1000000", "training.eval_every_epochs=1000000")


class Found(NamedTuple):
    """What a part found: whether its promise holds (None: there is none, it only measures), and figures by name."""

    ok: bool | None
    figures: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where a part runs.

    Attributes
    ----------
    data
        Folder of prepared datasets, by name; the town is made where it is missing.
    small
        A rehearsal: as few steps as show that the code runs.
    """

    device: torch.device
    data: Path
    out: Path
    small: bool

    def dataset(self, name: str = "town") -> Dataset:
        """Open a dataset."""
        folder = self.data / name
        if name == "town" and not (folder / "manifest.json").is_file():
            prepare_set(name, self.data)
        return Dataset.open(folder)

    def config(self, name: str = "town", *settings: str, device: torch.device | None = None) -> Config:
        """The default recipe for a set, with some settings changed."""
        chosen = f"training.device={(device or self.device).type}"
        return load_config(ROOT / "configs" / QUALITY_SETS[name].config, [chosen, *settings])

    def trainer(self, name: str = "town", *settings: str, device: torch.device | None = None) -> TwoTowerTrainer:
        """A trainer that is ready for its first step, and neither logs nor validates by itself."""
        self.out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.out))
        chosen = self.config(name, "training.max_steps=600", *QUIET, *settings, device=device)
        return TwoTowerTrainer(self.dataset(name), chosen, folder)

    @cached_property
    def name(self) -> str:
        """The card's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long it takes, on the device too."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began


def prepare_set(name: str, folder: Path) -> None:
    """Make the prepared dataset of one of `QUALITY_SETS` in `folder`/name; real data lie below TWOTOWER_DATA."""
    chosen = QUALITY_SETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.raw is None:
            raw = Path(scratch) / "raw"
            simulate_stage(raw, **TOWN, seed=0)
        else:
            raw = Path(os.environ["TWOTOWER_DATA"]) / chosen.raw
        settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}"]
        prepare_stage(load_config(ROOT / "configs" / chosen.config, settings), folder / name)


# Right.


def machine(bench: Bench) -> Found:
    """What there is, and the precision it gets."""
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
    """Let a step draw its random numbers on the CPU, whatever it computes on, so that all devices drop the same."""
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
    """Train so many steps on the same batches on every device; the loss of each."""
    found, before = [], 0.0
    plan = trainer.loader.plan(0)
    for step in range(steps):
        trainer._step(trainer.loader.batch(plan[step % len(plan)], step // len(plan), step % len(plan)), None)
        trainer.check()
        total = float(trainer.losses.total)
        found.append(total - before)
        before = total
    return found


def both(bench: Bench, steps: int, *settings: str) -> tuple[TwoTowerTrainer, TwoTowerTrainer, float]:
    """Train the same model on the CPU and on the device, in fp32; both trainers, and how far their losses lie apart at most."""
    there = bench.trainer("town", "training.precision=fp32", *settings)
    here = bench.trainer("town", "training.precision=fp32", *settings, device=CPU)
    here.begin()
    there.model.load_state_dict(here.model.state_dict())
    with same_draws():
        pairs = zip(losses_of(here, steps), losses_of(there, steps), strict=True)
        return here, there, max(abs(a - b) / abs(a) for a, b in pairs)


def same_losses(bench: Bench) -> Found:
    """50 steps from the same seed: the same losses as on the CPU, and afterwards the same lists for 1,000 users."""
    here, there, apart = both(bench, 8 if bench.small else 50)
    lists = [answers(trainer, 1000) for trainer in (here, there)]
    shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(*(one.items for one in lists), strict=True)]
    agree = float(np.mean(shared))
    return Found(apart < 1e-3 and agree >= 0.99, {"losses_apart": apart, "top10_shared": agree, "wanted": "1e-3, 0.99"})


def answers(trainer: TwoTowerTrainer, users: int) -> Recommendations:
    """The ten best for the first so many validation questions."""
    dataset, model = trainer.dataset, trainer.model.eval()
    retriever = NeuralRetriever(model, trainer.store, n_item_rows=dataset.n_item_rows, time_s=split_moment(dataset, "valid"))
    return retriever.retrieve(trainer.held_out.queries.slice(0, users), 10)


def variant(bench: Bench, name: str) -> Found:
    """Another way to train: the same losses as on the CPU."""
    _, _, apart = both(bench, 3 if bench.small else 20, *VARIANTS[name])
    return Found(apart < 1e-3, {"losses_apart": apart, "wanted": "1e-3"})


def precisions(bench: Bench) -> Found:
    """bf16 and fp16 train within the noise of fp32: paired intervals on the town's test part, and two seeds of fp32."""
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
    """fp16 with a loss scale far too large: the step is left out, the scale halved, and the next ones train."""
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
    """A run that is cut and resumed ends as the uninterrupted one."""
    steps = 6 if bench.small else 40
    config = bench.config("town", f"training.max_steps={steps}", "training.log_every=1", "training.eval_queries=200")
    whole = TwoTowerTrainer(bench.dataset(), config, bench.out / "whole")
    whole.fit()
    folder = bench.out / "cut"
    cut = TwoTowerTrainer(bench.dataset(), config, folder)
    step = cut._step

    def until(batch: Any, board: Any) -> None:
        step(batch, board)
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
    """`torch.compile` of heads and attention blocks: the same losses without dropout, and what a step takes."""
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
            "step_ms": round(1000 * bench.seconds(lambda: [trainer._step(b, None) for b in batches]) / len(batches), 2),  # noqa: B023
        }
    apart = max(abs(a - b) / abs(a) for a, b in zip(found["eager"].pop("losses"), found["compiled"].pop("losses"), strict=True))
    return Found(apart < 1e-3, {"losses_apart": apart, **found})


# Fast.


def speed(bench: Bench, name: str) -> Found:
    """Examples per second of the default recipe; what waits for batches, what waits for the device, and the bare kernels."""
    trainer = bench.trainer(name)
    trainer.begin()
    drained = list(islice(trainer.batches(0, 0), 4 if bench.small else 24))
    for batch in drained:
        trainer._step(batch, None)
    figures = throughput(bench, trainer, 2 if bench.small else 6)
    plan = trainer.loader.plan(0)
    making = bench.seconds(lambda: [trainer.loader.batch(plan[i], 0, i) for i in range(len(drained))]) / len(drained)
    stepping = min(bench.seconds(lambda: [trainer._step(batch, None) for batch in drained]) for _ in range(3)) / len(drained)
    calls = []
    for batch in drained[:6]:
        with Products() as products:
            trainer._step(batch, None)
        calls.append(products.calls)
    some = min(bench.seconds(lambda: [trainer._step(batch, None) for batch in drained[:6]]) for _ in range(3))
    kernels = min(bench.seconds(lambda: [replay(one) for one in calls]) for _ in range(3))
    stalls = read_backs(trainer, drained) if bench.device.type == "cuda" else None
    figures |= busy(trainer, drained[:6]) if bench.device.type == "cuda" else {}
    here = bench.trainer(name, device=CPU)
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


def busy(trainer: TwoTowerTrainer, batches: Sequence[Any]) -> dict[str, Any]:
    """How long the GPU works in a step, on what most, and how often it is asked to."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        for batch in batches:
            trainer._step(batch, None)
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
    """Train for so long, batches made on the way."""
    examples, waited, steps, epoch = 0, 0.0, 0, 1
    bench.wait()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        batches, asked = iter(trainer.batches(epoch, 0)), time.perf_counter()
        for batch in batches:
            waited += time.perf_counter() - asked
            trainer._step(batch, None)
            examples, steps = examples + batch.examples, steps + 1
            if steps % 16 == 0:
                bench.wait()  # the time is looked at when the work is done, not when it is asked for
                if time.perf_counter() - began >= seconds:
                    break
            asked = time.perf_counter()
        batches.close()  # type: ignore[attr-defined]
        epoch += 1
    bench.wait()
    spent = time.perf_counter() - began
    return {"examples_per_s": round(examples / spent), "waited_share": round(waited / spent, 3), "steps": steps}


def read_backs(trainer: TwoTowerTrainer, batches: Sequence[Any]) -> float:
    """How often a step makes the CPU wait for the GPU, as PyTorch counts it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for batch in batches:
                trainer._step(batch, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in seen if "synchroniz" in str(warning.message)]
    for place in sorted({f"{warning.filename}:{warning.lineno}" for warning in found}):
        sys.stderr.write(f"waits for the GPU: {place}\n")
    return len(found) / len(batches)


# Fits.


def fits(bench: Bench, *settings: str, precision: str = "auto", full: bool = False, limit: float = DEVICES["T4"]) -> Found:
    """Peak memory of training and of a validation, against the plan; `full`: with tables of the full Yelp dump's sizes."""
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
    """Train as a run does, batches copied ahead; the mean loss."""
    for batch in islice(trainer.batches(0, 0), steps):
        trainer._step(batch, None)
    trainer.check()
    return [trainer.losses.mean()]


def enlarged(layout: Layout, users: int, items: int) -> Layout:
    """The same fields over id tables of other sizes."""
    fields = (replace(spec, sizes=(items,)) if spec.table == "item.id" else spec for spec in layout.item_fields)
    return replace(layout, users=users, items=items, item_fields=tuple(fields))


# Whole.


def evaluated(bench: Bench, name: str) -> Found:
    """The whole catalogue ranked on the device: the same figures as on the CPU, and how much faster."""
    dataset, config = bench.dataset(name), bench.config(name)
    found = {}
    here = bench.trainer(name, device=CPU)
    here.begin()
    here.model.eval()
    held_out = dataset.held_out("test", max_queries=500 if bench.small else 20_000, seed=0)
    store, moment = open_store(dataset, "test", here.config.model), split_moment(dataset, "test")
    for where, device in (("cpu", CPU), ("device", bench.device)):
        model = here.model.to(device)

        def work(model: TwoTower = model, where: str = where) -> None:
            system = NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=moment)
            judged = evaluate(system, held_out, dataset, config.evaluation, metrics=["NDCG@10", "Recall@20"], beyond_k=None)
            found[where] = [judged.mean("NDCG@10"), judged.mean("Recall@20")]

        found[f"{where}_s"] = round(bench.seconds(work), 2)
    apart = max(abs(a - b) for a, b in zip(found["cpu"], found["device"], strict=True))
    times = round(found["cpu_s"] / found["device_s"], 2)
    return Found(apart < 1e-3, {"questions": len(held_out.queries), "metrics_apart": apart, **found, "times_cpu": times})


def processes(bench: Bench) -> Found:
    """`torchrun` with one process trains and exports; the collectives that several would use run over NCCL (gloo on a CPU)."""
    settings = ("training.max_steps=20", "training.eval_queries=200", f"training.device={bench.device.type}")
    chosen = [word for setting in settings for word in ("--set", setting)]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "twotower", "train"]
    bench.dataset()
    done = run(*command, "--data", bench.data / "town", "--out", bench.out / "torchrun", "--overwrite", *chosen)
    best = json.loads((bench.out / "torchrun" / "manifest.json").read_text())["best"]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513", "RANK": "0", "WORLD_SIZE": "1"}
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        x = torch.arange(6.0, device=bench.device).view(3, 2).requires_grad_()
        gathered = distributed._Gather.apply(x, (3,))  # type: ignore[no-untyped-call]
        gathered.sum().backward()
        sent, counts = distributed._exchange(x.detach(), [3])
        total = torch.ones(2, dtype=torch.float64, device=bench.device)
        dist.all_reduce(total)
        dist.broadcast(total, 0)
        dist.barrier()
        assert x.grad is not None
        right = torch.equal(gathered, x) and torch.equal(sent, x) and counts == [3] and bool((x.grad == 1).all())
    finally:
        dist.destroy_process_group()
    return Found(right and best["step"] > 0 and "error" not in done, {"backend": backend, "step": best["step"]})


def notebook(bench: Bench) -> Found:
    """The cells of notebooks/train_kaggle.ipynb, one after the other, as the notebook runs them."""
    cells = json.loads((ROOT / "notebooks" / "train_kaggle.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = bench.out / "notebook.py"
    script.write_text(source, encoding="utf-8")
    sizes = (300, 200, 6000) if bench.small else (600, 400, 12_000)
    few = "training.max_steps=20 training.log_every=2 evaluation.bootstrap_resamples=100 evaluation.tune_baselines=false"
    named = {
        "SOURCE": str(ROOT),
        "OUT": str(bench.out / "notebook"),
        "TOWN": "--users {} --businesses {} --events {}".format(*sizes),
        "SETTINGS": few if bench.small else "training.max_steps=200 evaluation.tune_baselines=false",
        "PROCESSES": "1",
    }
    said = run(script, **{f"TWOTOWER_NOTEBOOK_{name}": value for name, value in named.items()}, MPLBACKEND="Agg")
    trained = f"training on {bench.device.type}" in said
    report = json.loads((bench.out / "notebook" / "report.json").read_text(encoding="utf-8"))
    whole = (bench.out / "notebook" / "bundle" / "manifest.json").is_file()
    return Found(trained and whole, {"verdict": report["verdict"], "trained_on_device": trained, "bundle": whole})


def run(first: str | Path, *arguments: str | Path, **environment: str) -> str:
    """Run a module or a script with this Python; what it said, or an error with the end of it."""
    start = ["-m", first] if isinstance(first, str) else [first]
    paths = os.pathsep.join([str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    around = {**os.environ, **environment, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *map(str, start), *map(str, arguments)],
        env=around,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{first} ended with {done.returncode}: {done.stdout[-3000:]}")
    return done.stdout
