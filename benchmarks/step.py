"""Compare a training step with its matrix products and attention kernels alone.

    python benchmarks/step.py [--set a.b=value] [--table]

Uses the S3-Rec Yelp split, with the model and the batches of `training_speed.py`, built beforehand. Every matrix product and
attention kernel of a step is recorded with its operands, forward and backward. Then steps and their products alone run in turn. The
figure is the ratio of the two sums over the batches, where the time of a batch is the minimum over the repeats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, claim, in_words, tell
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from training_speed import open_trainer

from twotower.errors import TwoTowerError
from twotower.utils.console import setup_logging

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._scaled_dot_product")


class Products(TorchDispatchMode):
    """Records every matrix product and attention kernel, with its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record it if it is a product."""
        if str(func).startswith(PRODUCTS):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    setup_logging(quiet=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = open_trainer(Path(folder), given.seed, given.overrides)
            batches = [trainer.loader.batch(members, 0, i) for i, members in enumerate(trainer.loader.plan(0)[: given.steps])]
            step_s, products_s = measure(lambda batch: trainer._step(batch), batches, given.repeats)
            if given.table:
                sys.stderr.write(operations(lambda batch: trainer._step(batch), batches))
    except TwoTowerError as error:
        sys.stderr.write(f"step: error: {' '.join(str(error).split())}\n")
        return 2
    examples = sum(len(batch.target) for batch in batches) / len(batches)
    items = sum(len(batch.log_weight) for batch in batches) / len(batches)
    what = f"a training step of {examples:.0f} examples against {items:.0f} candidates on average"
    step_ms, products_ms = 1000 * step_s / len(batches), 1000 * products_s / len(batches)
    against, threads = "its matrix products and attention kernels alone", torch.get_num_threads()
    row = claim(what, step_ms, "ms", against, products_ms, given.seed, threads=threads)
    tell(row, given.results)
    sys.stderr.write(in_words(row))
    return 0


def measure(step: Callable[[Any], None], batches: Sequence[Any], repeats: int) -> tuple[float, float]:
    """Return the seconds of all steps and of their products alone, in turn; the minimum of `repeats` for each batch."""
    for batch in batches[:3]:
        step(batch)
    best: list[tuple[float, float]] = []
    for batch in batches:
        with Products() as products:
            step(batch)
        pairs = [(_seconds(step, batch), _seconds(replay, products.calls)) for _ in range(repeats)]
        best.append((min(one for one, _ in pairs), min(other for _, other in pairs)))
    return sum(one for one, _ in best), sum(other for _, other in best)


@torch.no_grad()
def replay(calls: Sequence[Call]) -> None:
    """Run the products again, on the same operands."""
    for func, args, kwargs in calls:
        func(*args, **kwargs)


def operations(step: Callable[[Any], None], batches: Sequence[Any], most: int = 25) -> str:
    """Return the operations of a step with the largest own time."""
    with profile() as seen:
        for batch in batches:
            step(batch)
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in seen.events() or []:
        total[event.name] += event.self_cpu_time_total
        calls[event.name] += 1
    whole = sum(total.values())
    lines = ["", "| operation | ms a step | share | calls a step |", "|---|--:|--:|--:|"]
    for name, spent in total.most_common(most):
        each = len(batches)
        lines.append(f"| {name} | {spent / 1000 / each:.2f} | {spent / whole:.1%} | {calls[name] / each:.1f} |")
    return "\n".join(lines) + "\n"


def _seconds(run: Callable[[Any], None], argument: Any) -> float:
    began = time.perf_counter()
    run(argument)
    return time.perf_counter() - began


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="batches measured (default: 24)")
    parser.add_argument("--repeats", type=int, default=7, help="times each is run (default: 7)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--table", action="store_true", help="show what the time of a step goes into")
    parser.add_argument("--results", type=Path, default=RESULTS / "step.jsonl", help="file the row is appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
