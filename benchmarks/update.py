"""How good a model stays with updates, beside training it anew each time and beside a frozen model with refreshed items.

    python benchmarks/update.py town --periods 12
    python benchmarks/update.py ml100k --periods 4 --days 14
    python benchmarks/update.py town --users 6000 --businesses 2000 --events 120000 --periods 60 --anew-every 52 --ask-days 56

The last periods of a set are kept back. The first model is trained on all events before them. At the start of each period, three
systems are asked its questions: the first model with items refreshed every week; the model updated with the events since its last
update (`twotower update`); and one trained anew on all events so far, with the recipe fixed. Each comes with the CPU seconds of its
preparation, training, calibration and export. With `--anew-every N`, a model is trained anew, and the systems are asked, at each
N-th period only; with `--ask-days D`, the questions are those of the D days from there on. Prints a JSON line for each period and
system, then the claims with 95 % intervals of their ratio (paired bootstrap over users), which it appends to
benchmarks/results/update.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from common import QUALITY_SETS, RESULTS, ROOT, Row, claim, commit, in_words, machine, tell
from quality import raw_folder

from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.grown_dataset import grow
from twotower.data.growth import plan_growth
from twotower.data.new_rows import read_new_rows
from twotower.errors import TrainingError, TwoTowerError
from twotower.evaluation.bootstrap import resample
from twotower.evaluation.evaluator import evaluate
from twotower.pipeline.new_data import source_of_tables
from twotower.pipeline.run_folder import run_dataset, run_manifest
from twotower.pipeline.stages import prepare_stage, train_stage
from twotower.pipeline.update import update
from twotower.schema import DAY_S
from twotower.trainers.calibration import refreshed_system
from twotower.trainers.grown_checkpoint import grow_checkpoint
from twotower.utils.config import Config, load_config, parse_config
from twotower.utils.console import setup_logging
from twotower.utils.types import Array

METRIC = "NDCG@10"
REFRESH_DAYS = 7.0
RESAMPLES = 2000


@dataclass(frozen=True)
class Whole:
    """A set as tables in memory: all its events, items and users, and the settings that read them."""

    events: pa.Table
    others: dict[str, pa.Table]
    config: Config

    def between(self, start_s: float, stop_s: float) -> dict[str, pa.Table]:
        """The tables with the events of a time."""
        chosen = pc.and_(pc.greater_equal(self.events["time"], start_s), pc.less(self.events["time"], stop_s))
        return {"events": self.events.filter(chosen), **self.others}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    setup_logging(quiet=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(given, (given.folder or Path(folder)).absolute())
    except TwoTowerError as error:
        sys.stderr.write(f"update: error: {' '.join(str(error).split())}\n")
        return 2
    for row in rows:
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


def measure(given: argparse.Namespace, folder: Path) -> list[Row]:
    """The claims about a set; the row of each period and system is told when it is known."""
    for name in ("raw", "all", "updated", "anew", "asked"):
        shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier measurement
    whole = opened(given, folder)
    end = int(pc.max(whole.events["time"]).as_py()) + 1
    starts = [end - given.days * DAY_S * (given.periods - number) for number in range(given.periods + 1)]
    first = folder / "first"
    if not (first / "bundle").exists():
        trained(whole, starts[0], given.days, first)
    shutil.copytree(first, folder / "updated")
    asked = _Questions(given, whole, folder, starts)
    costs: list[float] = []
    since = 0
    for number in range(1, given.periods):
        published, spent = updated(whole, folder / "updated", starts[since], starts[number])
        costs.append(spent)
        since = number if published else since
        if number % min(given.anew_every, given.periods - 1) == 0:
            asked.ask(number, "updated", folder / "updated", float(np.mean(costs[-given.anew_every :])))
            asked.ask(number, "anew", *trained(whole, starts[number], given.days, folder / "anew"))
            asked.ask(number, "frozen", first, 0.0)
    return asked.claims()


def opened(given: argparse.Namespace, folder: Path) -> Whole:
    """Read a set once, and turn it into tables."""
    chosen, sizes = QUALITY_SETS[given.set], {name: getattr(given, name) for name in ("users", "businesses", "events")}
    raw = raw_folder(chosen, folder, given.seed, sizes)
    split = ["prepare.split.kind=time", "prepare.split.valid=0", "prepare.split.test=0"]
    settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}", f"seed={given.seed}", *split, *given.overrides]
    config = load_config(ROOT / "configs" / chosen.config, settings)
    prepare_stage(config, folder / "all")
    dataset = Dataset.open(folder / "all")
    events = dataset.events
    types = np.array(["event", *dataset.event_types], object)
    table = pa.table(
        {
            "user": pa.array(dataset.user_ids[events.user_row], pa.string()),
            "item": pa.array(dataset.item_ids[events.item_row], pa.string()),
            "time": pa.array(events.time_s),
            "stars": pa.array(events.stars.astype(np.float64), from_pandas=True),
            "type": pa.array(types[events.event_type], pa.string()),
        }
    )
    data: dict[str, Any] = {
        "source": "tables",
        "interactions": {
            **{"path": "events", "user_id": "user", "item_id": "item", "time": "time", "time_format": "%s"},
            **{"event_type": "type", "stars": "stars"},
        },
    }
    for side, key in (("item", "item_id"), ("user", "user_id")):
        specs = [spec for spec in dataset.specs if spec.side == side]
        features = [{"name": spec.name, "kind": spec.kind, "columns": list(spec.columns)} for spec in specs if spec.kind != "text"]
        data[f"{side}s"] = {"path": f"{side}s", key: key, "features": features}
    others = {"items": dataset.items, "users": dataset.users}
    values = {**config.model_dump(mode="json"), "data": data}
    values["training"] |= {"recipe": "fixed"}
    return Whole(table.sort_by("time"), others, parse_config(values))


def trained(whole: Whole, stop_s: int, days: int, out: Path) -> tuple[Path, float]:
    """Train on all events before a time, of which the last period validates; the run, and the CPU seconds."""
    shutil.rmtree(out, ignore_errors=True)
    tables, began = whole.between(0, stop_s), time.process_time()
    share = len(whole.between(stop_s - days * DAY_S, stop_s)["events"]) / len(tables["events"])
    split = {"kind": "time", "valid": share, "test": 0.0}
    config = whole.config.model_copy(
        update={"prepare": type(whole.config.prepare).model_validate({**whole.config.prepare.model_dump(), "split": split})}
    )
    prepare_stage(config, out / "dataset", tables)
    train_stage(config, out / "dataset", out / "model", bundle=out / "bundle")
    return out, time.process_time() - began


def updated(whole: Whole, run: Path, start_s: int, stop_s: int) -> tuple[bool, float]:
    """Update a run in place with the events of a time; whether it is published (a worse model is not), and CPU seconds."""
    began = time.process_time()
    base = run_dataset(run / "model")
    try:
        update(run, source_of_tables({"events": whole.between(start_s, stop_s)["events"]}, base), run)
        published = True
    except TrainingError as error:
        sys.stderr.write(f"{error}\n")
        published = False
    return published, time.process_time() - began


class _Questions:
    """Asks systems the questions of a period, and keeps what they answered."""

    def __init__(self, given: argparse.Namespace, whole: Whole, folder: Path, starts: list[int]) -> None:
        self.given, self.whole, self.folder, self.starts = given, whole, folder, starts
        self.rows: list[Row] = []
        self.values: dict[str, list[tuple[Array, Array]]] = {}  # of a system: users and values of each period

    def ask(self, number: int, system: str, run: Path, cpu_s: float) -> None:
        """Evaluate a run on the questions of a period, with all events before it and items refreshed every week."""
        manifest, work = run_manifest(run / "model"), self.folder / "asked"
        base, config = run_dataset(run / "model", manifest), manifest.config
        stop_s = self.starts[number] + (self.given.ask_days or self.given.days) * DAY_S
        new = {"events": self.whole.between(0, stop_s)["events"]}
        source = source_of_tables(new, base)
        rows = read_new_rows(source.data, base, "the period", source.tables)
        growth = plan_growth(base, rows, valid_frac=1.0)
        assert growth is not None
        grown = grow(base, rows, growth, work / "dataset")
        grow_checkpoint(run / "model" / "best.pt", base, grown, work / "start.pt", config)
        known = grown.known_to(base.n_train_items, base.n_train_users)
        model = load_trained(work / "start.pt", grown)[0]
        held_out = grown.held_out("valid").by_time()
        chosen = np.flatnonzero(held_out.queries.time_s >= self.starts[number])
        found = evaluate(
            refreshed_system(model, known, config, REFRESH_DAYS),
            held_out,
            known,
            config.evaluation,
            metrics=[METRIC],
            beyond_k=None,
        )
        values, users = found.values[chosen, 0], grown.user_ids[held_out.queries.user_row[chosen]]
        order = np.argsort(users, kind="stable")
        self.values.setdefault(system, []).append((users[order], values[order]))
        row = {
            **{"set": self.given.set, "seed": self.given.seed, "period": number, "days": self.given.days, "system": system},
            **{"ndcg_10": round(float(values.mean()), 5), "questions": len(values), "cpu_s": round(cpu_s, 2)},
            **{"events": len(base.events), "items": base.n_items, "users": base.n_users},
            **{"machine": machine(), "commit": commit()},
        }
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        self.rows.append(row)
        shutil.rmtree(work)

    def interval(self, system: str) -> list[float]:
        """95 % interval of the quality of a system, relative to training anew; paired bootstrap over users."""
        users, mine, anew = (
            np.concatenate([pair[n] for pair in self.values[name]]) for n, name in ((0, system), (1, system), (1, "anew"))
        )
        _, user = np.unique(users, return_inverse=True)
        draws = resample(np.stack([mine, anew], axis=1), user, RESAMPLES, self.given.seed)
        return [round(float(end), 4) for end in np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5])]

    def claims(self) -> list[Row]:
        """Quality and cost of the updates, relative to training anew, and quality of the frozen model."""

        def mean(system: str, name: str) -> float:
            mine = [row for row in self.rows if row["system"] == system]
            return float(np.average([row[name] for row in mine], weights=[row["questions"] for row in mine]))

        shared = {"set": self.given.set, "periods": self.given.periods - 1, "days": self.given.days}
        shared["anew_every"] = self.given.anew_every
        seed, name = self.given.seed, f"{self.given.set}, {self.given.periods - 1} periods of {self.given.days} days"
        anew, cost, last = mean("anew", "ndcg_10"), mean("anew", "cpu_s"), self.rows[-1]["period"]
        after, fresh = (next(row["ndcg_10"] for row in self.rows[-3:] if row["system"] == system) for system in ("updated", "anew"))
        kept, frozen = ({"interval": self.interval(system)} for system in ("updated", "frozen"))
        return [
            claim(f"{METRIC} after {last} updates, {name}", after, "", "trained anew", fresh, seed, **shared),
            claim(f"{METRIC} of updates, {name}", mean("updated", "ndcg_10"), "", "trained anew", anew, seed, **shared, **kept),
            claim(
                f"{METRIC} of a frozen model, {name}", mean("frozen", "ndcg_10"), "", "trained anew", anew, seed, **shared, **frozen
            ),
            claim(f"CPU seconds of an update, {name}", mean("updated", "cpu_s"), "s", "trained anew", cost, seed, **shared),
        ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["town", "ml100k"])
    parser.add_argument("--periods", type=int, default=12, help="periods that are kept back (default: 12)")
    parser.add_argument("--days", type=int, default=7, help="length of a period (default: 7)")
    parser.add_argument("--anew-every", type=int, default=1, help="train anew and ask at each N-th period (default: 1)")
    parser.add_argument("--ask-days", type=int, help="days of questions after a period's start (default: the period)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--folder", type=Path, help="where the runs stay; a first model that is there is not trained again")
    parser.add_argument("--results", type=Path, default=RESULTS / "update.jsonl", help="file the rows are appended to")
    for name, size in {"users": 30_000, "businesses": 5_000, "events": 600_000}.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"of the town (default: {size:,})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
