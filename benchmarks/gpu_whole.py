"""Run complete stages for `gpu.py`: evaluation, several processes, the notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from common import ROOT
from gpu_bench import CPU, Bench, Found

from twotower.data.dataset_features import open_store, split_moment
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.models.two_tower import TwoTower
from twotower.utils import distributed


def evaluated(bench: Bench, name: str) -> Found:
    """Check the full-catalogue evaluation on the device: the figures of the CPU, and the speedup."""
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
    """Check that `torchrun` with one process trains and exports, and that the collectives run over NCCL (gloo on a CPU)."""
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
        sent = distributed._exchange(x.detach(), [3], [3])
        total = torch.ones(2, dtype=torch.float64, device=bench.device)
        dist.all_reduce(total)
        dist.broadcast(total, 0)
        dist.barrier()
        assert x.grad is not None
        right = torch.equal(gathered, x) and torch.equal(sent, x) and bool((x.grad == 1).all())
    finally:
        dist.destroy_process_group()
    return Found(right and best["step"] > 0 and "error" not in done, {"backend": backend, "step": best["step"]})


def notebook(bench: Bench) -> Found:
    """Run the cells of notebooks/train_kaggle.ipynb in order."""
    cells = json.loads((ROOT / "notebooks" / "train_kaggle.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = bench.out / "notebook.py"
    script.write_text(source, encoding="utf-8")
    users, businesses, events = (300, 200, 6000) if bench.small else (600, 400, 12_000)
    few = "training.max_steps=20 training.log_every=2 evaluation.bootstrap_resamples=100 evaluation.tune_baselines=false"
    named = {
        "SOURCE": str(ROOT),
        "OUT": str(bench.out / "notebook"),
        "TOWN": json.dumps({"users": users, "businesses": businesses, "events": events}),
        "SETTINGS": few if bench.small else "training.max_steps=200 evaluation.tune_baselines=false",
        "PROCESSES": "1",
    }
    said = run(script, **{f"TWOTOWER_NOTEBOOK_{name}": value for name, value in named.items()}, MPLBACKEND="Agg")
    trained = f"training on {bench.device.type}" in said
    report = json.loads((bench.out / "notebook" / "report.json").read_text(encoding="utf-8"))
    whole = (bench.out / "notebook" / "bundle" / "manifest.json").is_file()
    return Found(trained and whole, {"verdict": report["verdict"], "trained_on_device": trained, "bundle": whole})


def run(first: str | Path, *arguments: str | Path, **environment: str) -> str:
    """Run a module or a script with this Python; return its output, or raise an error with the end of the output."""
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
